#include "blockdev/bench/bench.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/bench/flush_command.h"
#include "blockdev/bench/hdr_log.h"
#include "blockdev/bench/machine_usage.h"
#include "blockdev/bench/measure.h"
#include "blockdev/bench/options.h"
#include "blockdev/bench/output.h"
#include "blockdev/bench/progress.h"
#include "blockdev/bench/report.h"
#include "blockdev/bench/tracepoint_counter.h"

namespace vblk::bench {

namespace {

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;

int fail(const Error& error, int status) {
  fmt::print(stderr, "vblk: bench: {}\n", error.message);
  return status;
}

std::string title_of(const JobGroup& group) {
  std::string title;
  for (const Workload& job : group) {
    title += fmt::format("{}{} {} depth {}", title.empty() ? "" : " + ", job.name, job.block_bytes,
                         job.depth);
  }
  return title;
}

// Runs all groups, up to the first that does not go through.
Expected<std::vector<NamedRun>> run_groups(const BenchOptions& options,
                                           const std::atomic<bool>& interrupted) {
  std::vector<NamedRun> runs;
  for (const JobGroup& group : options.groups) {
    ProgressLine line(options.show_progress);
    auto run = measure(options.target, group,
                       {.count_system_calls = options.count_system_calls,
                        .flush_device = options.flush_device,
                        .interrupted = &interrupted,
                        .show = [&line, title = title_of(group)](const Progress& progress) {
                          line.show(title, progress);
                        }});
    if (!run) {
      if (runs.empty()) return std::unexpected(std::move(run.error()));
      runs.back().result.error = std::move(run.error());
      return runs;
    }
    runs.push_back(std::move(*run));
    if (runs.back().result.error || runs.back().result.interrupted) break;
  }
  return runs;
}

std::string text_of(std::span<const NamedRun> runs, bool as_json) {
  if (as_json) return json_report(runs);
  std::string text;
  for (const NamedRun& run : runs) text += text_report(run) + (runs.size() > 1 ? "\n" : "");
  if (runs.size() > 1) text += text_summary(runs);
  return text;
}

// All that can be known to go wrong before minutes are spent on measuring.
Expected<void> check_before(const BenchOptions& options) {
  const bool changes_disk = std::ranges::any_of(options.groups, [](const JobGroup& group) {
    return std::ranges::any_of(group, &Workload::changes_disk);
  });
  if (auto checked = check_target(options.target, changes_disk); !checked) return checked;
  for (const std::string& path : {options.output_path, options.hdr_log_path}) {
    if (auto checked = check_can_write(path); !checked) return checked;
  }
  if (options.count_system_calls && !TracepointCounter(::getpid(), kSystemCalls).count()) {
    fmt::print(stderr,
               "vblk: bench: note: system calls cannot be counted here; that takes root, and "
               "tracefs on /sys/kernel/tracing\n");
  }
  return {};
}

}  // namespace

int run(int argc, char** argv) {
  const std::span<char*> arguments(argv, static_cast<std::size_t>(argc));
  if (argc > 1 && std::string_view(argv[1]) == "flush") return run_flush(arguments.subspan(1));
  const auto parsed = parse_options(arguments);
  if (!parsed) return fail(parsed.error(), kExitUsage);
  if (const auto* help = std::get_if<HelpText>(&*parsed)) {
    fmt::print("{}", help->text);
    return 0;
  }
  const auto& options = std::get<BenchOptions>(*parsed);
  if (options.flush_device_is_named) {
    if (const auto counter = FlushCounter::open(options.flush_device); !counter)
      return fail(counter.error(), kExitUsage);
  }
  if (const auto checked = check_before(options); !checked)
    return fail(checked.error(), kExitFailure);
  const auto& interrupted = interrupt_flag();
  const auto runs = run_groups(options, interrupted);
  if (!runs) return fail(runs.error(), kExitFailure);
  // What there is is told in any case.
  int status = 0;
  if (const auto written = write_output(options.output_path, text_of(*runs, options.json));
      !written)
    status = fail(written.error(), kExitFailure);
  if (!options.hdr_log_path.empty()) {
    if (const auto written = write_file(options.hdr_log_path, hdr_log(*runs)); !written)
      status = fail(written.error(), kExitFailure);
  }
  const RunResult& last = runs->back().result;
  if (last.error) return fail(*last.error, kExitFailure);
  if (last.interrupted) {
    fmt::print(stderr, "vblk: bench: interrupted; this is what was measured up to then\n");
    return 128 + SIGINT;
  }
  return status;
}

}  // namespace vblk::bench
