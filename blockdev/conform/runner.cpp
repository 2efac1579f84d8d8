#include "blockdev/conform/runner.h"

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#include <fmt/core.h>

#include "blockdev/conform/channel.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::conform {

namespace {

using vhost_user::UniqueFd;
using Clock = std::chrono::steady_clock;

// A Unix socket's path has room for 107 bytes, so the folder is not below $TMPDIR if that is long.
constexpr std::size_t kFolderBytesMax = 80;
constexpr std::chrono::milliseconds kEndPatience{5000};
constexpr std::size_t kTextBytesMax = 4000;  // of a verdict: less than a pipe holds

// What begins each verdict on the pipe.
constexpr char kLetters[] = {'P', 'F', 'S'};

std::set<pid_t> children() {
  std::ifstream file(fmt::format("/proc/self/task/{}/children", ::getpid()));
  std::set<pid_t> found;
  for (pid_t pid = 0; file >> pid;) found.insert(pid);
  return found;
}

std::string make_folder() {
  const char* const base = std::getenv("TMPDIR");
  std::string pattern = std::string(base != nullptr ? base : "/var/tmp") + "/vblk-conform-XXXXXX";
  if (pattern.size() > kFolderBytesMax) pattern = "/var/tmp/vblk-conform-XXXXXX";
  return ::mkdtemp(pattern.data()) != nullptr ? pattern : "";
}

// A process that dies takes a moment to be dead, to write its core for example.
std::string death_of(Probe& probe) {
  std::string dead = probe.death();
  for (int i = 0; i < 20 && dead.empty() && probe.has_own_backend(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    dead = probe.death();
  }
  return dead;
}

Verdict verdict_of(const Test& test, const ProbeOptions& options, const std::string& folder) {
  // Ends before this function does, and its backend with it.
  Probe probe(options, folder);
  try {
    test.run(probe);
    probe.check_aftermath();
    return {Outcome::kPassed, ""};
  } catch (Verdict& verdict) {
    if (verdict.outcome == Outcome::kFailed) {
      const std::string dead = death_of(probe);
      if (!dead.empty() && verdict.text.find(dead) == std::string::npos)
        verdict.text += "; " + dead;
    }
    return verdict;
  } catch (const std::exception& exception) {
    return {Outcome::kFailed, fmt::format("the suite itself: {}", exception.what())};
  }
}

[[noreturn]] void be_test(const Test& test, const ProbeOptions& options, const std::string& folder,
                          int pipe, pid_t runner) {
  ::setpgid(0, 0);
  // A soak may be meant for a week: it ends with who asked for it, however that ends.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != runner) ::_exit(0);
  ::signal(SIGINT, SIG_IGN);
  const Verdict verdict = verdict_of(test, options, folder);
  std::string text = kLetters[static_cast<std::size_t>(verdict.outcome)] + verdict.text;
  text.resize(std::min(text.size(), kTextBytesMax));
  [[maybe_unused]] const auto written = ::write(pipe, text.data(), text.size());
  ::_exit(0);
}

}  // namespace

Runner::Runner(const ProbeOptions& options) : options_(options), children_before_(children()) {
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
}

// Kills until nobody is left: what is killed hands its children on to us.
void Runner::end_leftovers() const {
  const auto deadline = Clock::now() + kEndPatience;
  for (;;) {
    bool any = false;
    for (const pid_t pid : children()) {
      if (children_before_.contains(pid)) continue;
      any = true;
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, WNOHANG);
    }
    if (!any || Clock::now() > deadline) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

Result Runner::run(const Test& test, const std::atomic<bool>& interrupted,
                   std::chrono::milliseconds limit) {
  const auto begin = Clock::now();
  const auto result = [&](Outcome outcome, std::string text) {
    return Result{.test = &test,
                  .outcome = outcome,
                  .text = std::move(text),
                  .seconds = std::chrono::duration<double>(Clock::now() - begin).count()};
  };
  const std::string folder = make_folder();
  std::array<int, 2> ends{};
  if (folder.empty() || ::pipe2(ends.data(), O_CLOEXEC) != 0)
    return result(Outcome::kFailed, "the suite itself: " + describe_errno(errno));
  const UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  const pid_t runner = ::getpid();
  const pid_t child = ::fork();
  if (child == 0) be_test(test, options_, folder, write_end.get(), runner);
  write_end.reset();
  ::setpgid(child, child);

  std::string text;
  // A soak takes as long as it was told to.
  const auto patience = test.deadline + (is_soak(test) ? options_.soak : std::chrono::seconds(0));
  const bool is_limited = limit < patience;
  const auto deadline = begin + (is_limited ? limit : patience);
  bool timed_out = false;
  for (bool open = child > 0; open;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd descriptor{.fd = read_end.get(), .events = POLLIN, .revents = 0};
    timed_out = left <= 0;
    if (timed_out || interrupted) break;
    if (::poll(&descriptor, 1, static_cast<int>(left)) <= 0) continue;
    std::array<char, 1024> bytes{};
    const ssize_t length = ::read(read_end.get(), bytes.data(), bytes.size());
    if (length > 0) text.append(bytes.data(), static_cast<std::size_t>(length));
    open = length > 0 || (length < 0 && errno == EINTR);
  }
  int status = 0;
  const bool ended = child > 0 && ::waitpid(child, &status, WNOHANG) == child;
  if (child > 0) {
    ::kill(-child, SIGKILL);
    ::kill(child, SIGKILL);
    if (!ended) ::waitpid(child, &status, 0);
  }
  end_leftovers();
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);

  if (!text.empty()) {
    const Outcome outcome = text[0] == kLetters[0]   ? Outcome::kPassed
                            : text[0] == kLetters[1] ? Outcome::kFailed
                                                     : Outcome::kSkipped;
    return result(outcome, text.substr(1));
  }
  if (interrupted) return result(Outcome::kSkipped, "interrupted");
  if (timed_out && is_limited) {
    Result unfinished = result(Outcome::kSkipped, "the time of the run has ended");
    unfinished.cut_short = true;
    return unfinished;
  }
  if (timed_out) {
    return result(
        Outcome::kFailed,
        fmt::format("the test does not come to an end within {} s: the backend stalls, or "
                    "answers for ever",
                    patience.count()));
  }
  return result(Outcome::kFailed,
                WIFSIGNALED(status)
                    ? fmt::format("the test was killed by signal {} ({}): the backend may have "
                                  "taken away memory that it shares",
                                  WTERMSIG(status), ::strsignal(WTERMSIG(status)))
                    : "the test ended without a verdict");
}

Expected<void> Runner::check_backend(const std::atomic<bool>& interrupted) {
  // Not a test: it has no statement. Whether the backend is any good is for the tests to say.
  static const Test kFirst{
      .name = "start", .statement = {"", "", Force::kRobust, ""}, .run = [](Probe& probe) {
        const Channel channel(probe);
        probe.expect_end();
      }};
  const Result result = run(kFirst, interrupted, kFirst.deadline);
  if (result.outcome == Outcome::kPassed) return {};
  return make_error(ErrorKind::kIo, result.text);
}

}  // namespace vblk::conform
