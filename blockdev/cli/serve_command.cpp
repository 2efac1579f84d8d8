// `vblk serve`: serves one device, or those of a file, until a signal.
//
// Threads: one device is served by this thread, of several each by a thread of its own. Signals
// arrive on SignalWatcher's thread.
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <pthread.h>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <time.h>
#include <unistd.h>
#include <utility>
#include <variant>
#include <vector>

#include <fmt/core.h>

#include "blockdev/cli/commands.h"
#include "blockdev/cli/config_file.h"
#include "blockdev/cli/options.h"
#include "blockdev/cli/served_device.h"
#include "blockdev/cli/socket_activation.h"
#include "blockdev/log.h"

namespace vblk::cli {

using Devices = std::vector<std::unique_ptr<ServedDevice>>;

namespace {

// What comes so soon after the first signal is no impatience: timeout(1) signals its child and then
// the whole process group, and a terminal's Ctrl-C reaches who is also told by its parent.
constexpr std::chrono::seconds kSameSignal{1};

// After the first, the server is asked again this often, until it has ended: whatever may get lost
// on the way to a thread that waits, an end is not to depend on it.
constexpr timespec kAskAgain{.tv_sec = 1, .tv_nsec = 0};

// SIGTERM and SIGINT as an ordinary thread that waits for them: no handler, nothing to be careful
// about in one. The first asks the server to stop; another one, a second later or more, ends the
// process at once, for a disk that never answers.
class SignalWatcher {
 public:
  // Blocks the signals in the calling thread; threads made later inherit that.
  SignalWatcher() {
    sigemptyset(&signals_);
    for (const int signal : {SIGTERM, SIGINT, kWakeUp}) sigaddset(&signals_, signal);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
  }
  ~SignalWatcher() { stop(); }
  SignalWatcher(const SignalWatcher&) = delete;
  SignalWatcher& operator=(const SignalWatcher&) = delete;

  // `ask` is called at the first signal, and now and then from then on.
  void start(std::move_only_function<void()> ask) {
    thread_ = std::thread([this, ask = std::move(ask)]() mutable {
      using Clock = std::chrono::steady_clock;
      std::optional<Clock::time_point> first;
      for (;;) {
        const int signal = ::sigtimedwait(&signals_, nullptr, first ? &kAskAgain : nullptr);
        if (finished_) return;
        if (signal < 0) {
          if (errno == EAGAIN) ask();  // otherwise EINTR
          continue;
        }
        if (!first) {
          first = Clock::now();
          log::info("{}: draining and flushing", name_of(signal));
          ask();
        } else if (Clock::now() - *first >= kSameSignal) {
          log::error("second {}: leaving without waiting for requests in flight", name_of(signal));
          ::_exit(kExitFailure);
        }
      }
    });
  }

  // What start() was given is not called any more after this.
  void stop() {
    if (!thread_.joinable()) return;
    finished_ = true;
    pthread_kill(thread_.native_handle(), kWakeUp);
    thread_.join();
  }

 private:
  static constexpr int kWakeUp = SIGUSR2;
  static std::string_view name_of(int signal) { return signal == SIGINT ? "SIGINT" : "SIGTERM"; }

  sigset_t signals_{};
  std::atomic<bool> finished_{false};
  std::thread thread_;
};

void print_ready(const Devices& devices) {
  for (const auto& device : devices) {
    const ServeOptions& options = device->options();
    if (options.socket_fd >= 0) {
      fmt::print("vblk: ready on descriptor {}\n", options.socket_fd);
    } else {
      fmt::print("vblk: ready on {}\n", options.socket_path);
    }
  }
  std::fflush(stdout);
}

// All or none: what is wrong with one of them is to be seen at the start.
Expected<Devices> create(const std::vector<ServeOptions>& all) {
  Devices devices;
  for (const ServeOptions& options : all) {
    log::set_thread_subject(options.name);
    auto device = ServedDevice::create(options);
    if (!device) {
      return make_error(device.error().kind,
                        options.name.empty()
                            ? device.error().message
                            : fmt::format("device '{}': {}", options.name, device.error().message),
                        device.error().errno_value);
    }
    (*device)->log_routes();
    devices.push_back(std::move(*device));
  }
  log::set_thread_subject({});
  return devices;
}

// Serves each on a thread of its own. One that fails ends alone; the first failure is the outcome.
Expected<void> run_all(const Devices& devices) {
  std::vector<Expected<void>> outcomes(devices.size());
  {
    std::vector<std::jthread> threads;
    threads.reserve(devices.size());
    try {
      for (std::size_t i = 0; i < devices.size(); ++i) {
        threads.emplace_back([&device = *devices[i], &outcome = outcomes[i]] {
          log::set_thread_subject(device.options().name);
          outcome = device.run();
          if (!outcome) log::error("{}", outcome.error().message);
        });
      }
    } catch (const std::system_error&) {
      // No thread is left for one of them. Those that run would be joined for ever.
      for (const auto& device : devices) device->request_stop();
      throw;
    }
  }
  for (std::size_t i = 0; i < devices.size(); ++i) {
    if (outcomes[i]) continue;
    return make_error(
        outcomes[i].error().kind,
        fmt::format("device '{}': {}", devices[i]->options().name, outcomes[i].error().message),
        outcomes[i].error().errno_value);
  }
  return {};
}

Expected<void> serve(const std::vector<ServeOptions>& all, SignalWatcher& signals) {
  const auto devices = create(all);
  if (!devices) return std::unexpected(devices.error());
  signals.start([&devices] {
    for (const auto& device : *devices) device->request_stop();
  });
  print_ready(*devices);
  if (devices->size() == 1) log::set_thread_subject(devices->front()->options().name);
  auto outcome = devices->size() == 1 ? devices->front()->run() : run_all(*devices);
  signals.stop();
  return outcome;
}

int fail(const Error& error, int status) {
  fmt::print(stderr, "vblk: serve: {}\n", error.message);
  return status;
}

}  // namespace

int serve_command(std::span<const std::string> arguments) {
  const auto activated_fd = activated_socket();
  if (!activated_fd) return fail(activated_fd.error(), kExitUsage);
  auto parsed = parse_serve_options(arguments, *activated_fd);
  if (!parsed) return fail(parsed.error(), kExitUsage);
  if (const auto* answer = std::get_if<Answer>(&*parsed)) {
    fmt::print("{}", answer->text);
    return 0;
  }
  auto& options = std::get<ServeOptions>(*parsed);
  log::set_level(options.log_level);
  std::vector<ServeOptions> all;
  if (options.config_path.empty()) {
    all.push_back(std::move(options));
  } else {
    auto devices = read_config(options.config_path);
    if (!devices) return fail(devices.error(), kExitUsage);
    all = std::move(*devices);
  }
  SignalWatcher signals;
  const auto status = serve(all, signals);
  return status ? 0 : fail(status.error(), kExitFailure);
}

}  // namespace vblk::cli
