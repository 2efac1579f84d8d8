#include "blockdev/conform/conform.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <span>
#include <string>
#include <utility>
#include <variant>

#include <fmt/core.h>

#include "blockdev/conform/options.h"
#include "blockdev/conform/report.h"
#include "blockdev/conform/runner.h"

namespace vblk::conform {

namespace {

constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;
constexpr int kExitNoBackend = 3;
constexpr int kExitIncomplete = 4;

// Without the soak. A backend that stalls in every test ends the run, not the user's patience: with
// the soak of 4 s that each integrity test has by itself, it ends within 2 minutes.
constexpr std::chrono::seconds kRunLimit{105};

Interruption& interruption() {
  static Interruption by_signal;
  return by_signal;
}

void watch_for_interrupts() {
  interruption();  // made before a handler needs it
  struct sigaction action{};
  action.sa_handler = [](int) { interruption().ask(); };
  ::sigemptyset(&action.sa_mask);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(number, &action, nullptr);
  // Who reads the report has gone: what is under way is ended all the same.
  ::signal(SIGPIPE, SIG_IGN);
}

int run_tests(const ConformOptions& options) {
  watch_for_interrupts();
  Runner runner(options.probe, interruption());
  Report report(options.format, options.repeat, options.tests);
  if (auto checked = runner.check_backend(); !checked) {
    const bool interrupted = interruption().is_asked();
    const std::string why = interrupted ? "interrupted" : checked.error().message;
    if (!interrupted) fmt::print(stderr, "vblk: conform: {}\n", why);
    // Who reads the terminal has been told.
    if (interrupted || options.format != ReportFormat::kHuman) report.finish(why);
    return interrupted ? 128 + SIGINT : kExitNoBackend;
  }
  std::string why_incomplete;
  const auto begin = std::chrono::steady_clock::now();
  std::chrono::steady_clock::duration soaked{0};
  for (const Test* test : options.tests) {
    if (test->destructive && !options.probe.target.may_write) {
      report.add({.test = test,
                  .outcome = Outcome::kSkipped,
                  .text = "writes to the disk: takes --destructive",
                  .seconds = 0});
      continue;
    }
    const auto test_begin = std::chrono::steady_clock::now();
    const std::chrono::seconds soak = is_soak(*test) ? options.probe.soak : std::chrono::seconds(0);
    const auto left = kRunLimit - (test_begin - begin - soaked);
    Result result =
        runner.run(*test, std::chrono::duration_cast<std::chrono::milliseconds>(left + soak));
    if (result.cut_short) {
      why_incomplete = interruption().is_asked()
                           ? "interrupted"
                           : fmt::format("the run has taken {} s", kRunLimit.count());
      break;
    }
    soaked += std::min<std::chrono::steady_clock::duration>(
        std::chrono::steady_clock::now() - test_begin, soak);
    report.add(std::move(result));
  }
  report.finish(why_incomplete);
  if (interruption().is_asked()) return 128 + SIGINT;
  if (report.totals().failed > 0) return kExitFailed;
  return why_incomplete.empty() ? 0 : kExitIncomplete;
}

}  // namespace

int run(int argc, char** argv) {
  auto parsed = parse_options({argv, static_cast<std::size_t>(argc)});
  if (!parsed) {
    fmt::print(stderr, "vblk: conform: {}\n", parsed.error().message);
    return kExitUsage;
  }
  if (const auto* text = std::get_if<Text>(&*parsed)) {
    fmt::print("{}", text->text);
    return 0;
  }
  return run_tests(std::get<ConformOptions>(*parsed));
}

}  // namespace vblk::conform
