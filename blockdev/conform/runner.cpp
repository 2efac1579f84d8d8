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
#include <sys/eventfd.h>
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
  // The user's wishes are the runner's to hear.
  for (const int number : {SIGINT, SIGHUP}) ::signal(number, SIG_IGN);
  ::signal(SIGTERM, SIG_DFL);
  const Verdict verdict = verdict_of(test, options, folder);
  std::string text = kLetters[static_cast<std::size_t>(verdict.outcome)] + verdict.text;
  text.resize(std::min(text.size(), kTextBytesMax));
  [[maybe_unused]] const auto written = ::write(pipe, text.data(), text.size());
  ::_exit(0);
}

}  // namespace

Interruption::Interruption() : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

void Interruption::ask() {
  const int error = errno;
  is_asked_ = true;
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(event_.get(), &one, sizeof one);
  errno = error;
}

Runner::Runner(const ProbeOptions& options, const Interruption& interruption)
    : options_(options), interruption_(interruption), children_before_(children()) {
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

Result Runner::run(const Test& test, std::chrono::milliseconds limit) {
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
  // A soak takes as long as it was told to, and a backend that is started again for each connection
  // takes longer for many of them.
  constexpr int kTimesWithRestarts = 3;
  const auto patience =
      test.deadline * (options_.target.ends_with_frontend ? kTimesWithRestarts : 1) +
      (is_soak(test) ? options_.soak : std::chrono::seconds(0));
  const bool is_limited = limit < patience;
  const auto deadline = begin + (is_limited ? limit : patience);
  bool timed_out = false;
  for (bool open = child > 0; open;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    std::array<pollfd, 2> descriptors{{{.fd = read_end.get(), .events = POLLIN, .revents = 0},
                                       {.fd = interruption_.fd(), .events = POLLIN, .revents = 0}}};
    timed_out = left <= 0;
    if (timed_out || interruption_.is_asked()) break;
    if (::poll(descriptors.data(), descriptors.size(), static_cast<int>(left)) <= 0) continue;
    if (descriptors[0].revents == 0) continue;
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
  if (interruption_.is_asked() || (timed_out && is_limited)) {
    Result unfinished =
        result(Outcome::kSkipped,
               interruption_.is_asked() ? "interrupted" : "the time of the run has ended");
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

namespace {

// What first_contact() says of a backend that has to be started for each frontend.
constexpr const char* kEndsWithFrontend = "ends with its frontend";

bool answers(Channel& channel) {
  return channel.send(Request::kGetFeatures) && channel.receive().has_value();
}

// Whether the backend talks to a frontend after the first one. What is wrong with what it says is
// for the tests to find.
void first_contact(Probe& probe) {
  probe.expect_end();
  bool is_gone = false;
  {
    Channel first(probe);
    try {
      if (!answers(first)) return;
    } catch (const Verdict&) {
      return;
    }
  }
  try {
    Channel second(probe);
    is_gone = !answers(second) && second.is_closed(std::chrono::milliseconds(0));
  } catch (const Verdict&) {
    is_gone = true;
  }
  if (!is_gone) return;
  if (!probe.has_own_backend()) {
    Probe::fail(
        "the backend serves one frontend and no second one; with --backend-command it is started "
        "anew for each");
  }
  Backend& backend = probe.own_backend("it is looked at");
  const auto deadline = Clock::now() + kPatience;
  while (backend.end().empty() && Clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (backend.end() == kEndedInOrder) throw Verdict{Outcome::kPassed, kEndsWithFrontend};
}

}  // namespace

Expected<void> Runner::check_backend() {
  // Not a test: it has no statement. Whether the backend is any good is for the tests to say.
  static constexpr Test kFirst{
      .name = "start", .statement = {"", "", Force::kRobust, ""}, .run = first_contact};
  const Result result = run(kFirst, kFirst.deadline);
  if (result.outcome != Outcome::kPassed) return make_error(ErrorKind::kIo, result.text);
  options_.target.ends_with_frontend = result.text == kEndsWithFrontend;
  return {};
}

}  // namespace vblk::conform
