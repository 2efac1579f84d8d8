// `vblk serve`: puts the parts together, in the order in which they can fail without leaving anything behind.
//
//   image -> device -> I/O threads (engines) -> socket -> monitor -> ready line -> serve until a signal
//
// Threads: this one serves the vhost-user socket; each I/O thread owns its queues and engines; the
// monitor has its own. Signals arrive on this thread's server through SignalWatcher's thread.
#include <fmt/core.h>
#include <fmt/format.h>
#include <pthread.h>
#include <unistd.h>

#include <boost/json.hpp>
#include <csignal>
#include <cstdio>
#include <thread>
#include <utility>
#include <vector>

#include "blockdev/byte_size.h"
#include "blockdev/cli/commands.h"
#include "blockdev/cli/monitor.h"
#include "blockdev/cli/options.h"
#include "blockdev/io_thread.h"
#include "blockdev/log.h"
#include "blockdev/vhost_user/server.h"

namespace vblk::cli {

namespace json = boost::json;
using IoThreads = std::vector<std::unique_ptr<blockdev::IoThread>>;

namespace {

// SIGTERM and SIGINT as an ordinary thread that waits for them: no handler, nothing to be careful about in one.
// The first asks the server to stop; a second ends the process at once, for a disk that never answers.
class SignalWatcher {
 public:
  // Blocks the signals in the calling thread; threads made later inherit that.
  SignalWatcher() {
    sigemptyset(&signals_);
    for (const int signal : {SIGTERM, SIGINT, kWakeUp}) sigaddset(&signals_, signal);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
  }
  ~SignalWatcher() {
    if (!thread_.joinable()) return;
    finished_ = true;
    pthread_kill(thread_.native_handle(), kWakeUp);
    thread_.join();
  }
  SignalWatcher(const SignalWatcher&) = delete;
  SignalWatcher& operator=(const SignalWatcher&) = delete;

  void start(std::move_only_function<void()> on_first) {
    thread_ = std::thread([this, on_first = std::move(on_first)]() mutable {
      int signal = 0;
      bool first = true;
      while (sigwait(&signals_, &signal) == 0 && !finished_) {
        if (!std::exchange(first, false)) {
          log::error("second {}: leaving without waiting for requests in flight", strsignal_name(signal));
          ::_exit(kExitFailure);
        }
        log::info("{}: draining and flushing", strsignal_name(signal));
        on_first();
      }
    });
  }

 private:
  static constexpr int kWakeUp = SIGUSR2;
  static std::string_view strsignal_name(int signal) { return signal == SIGINT ? "SIGINT" : "SIGTERM"; }

  sigset_t signals_{};
  std::atomic<bool> finished_{false};
  std::thread thread_;
};

Expected<IoThreads> start_io_threads(const ServeOptions& options) {
  IoThreads threads;
  for (unsigned i = 0; i < options.iothread_count; ++i) {
    auto thread = blockdev::IoThread::start(fmt::format("vblk-io-{}", i), {}, [&options] {
      return aio::EngineSet::create(options.aio, options.engine);
    });
    if (!thread) return std::unexpected(std::move(thread.error()));
    threads.push_back(std::move(*thread));
  }
  return threads;
}

// Runs `read` on the thread that owns the engines and returns what it saw.
template <typename Function>
auto on_io_thread(blockdev::IoThread& thread, Function read) {
  decltype(read(thread.context())) result;
  thread.loop().run_and_wait([&] { result = read(thread.context()); });
  return result;
}

// Every I/O thread made the same choice on the same kernel, so one of them tells it.
void log_routes(blockdev::IoThread& thread) {
  const auto lines = on_io_thread(thread, [](blockdev::IoContext& context) {
    std::vector<std::string> text;
    for (const auto& route : context.engines().routes()) {
      text.push_back(fmt::format("{} by {}{}", aio::to_string(route.kind), route.chosen,
                                 route.reason.empty() ? "" : fmt::format(" instead of {}: {}", route.requested,
                                                                         route.reason)));
    }
    for (const auto& engine : context.engines().engines()) {
      for (const auto& note : engine->notes()) text.push_back(fmt::format("{}: {}", engine->name(), note));
    }
    return text;
  });
  for (const auto& line : lines) log::info("engine: {}", line);
}

json::object engine_counters(const aio::Engine& engine) {
  const auto& statistics = engine.statistics();
  return {{"engine", engine.name()},
          {"in-flight", engine.in_flight()},
          {"requests", statistics.requests},
          {"submit-calls", statistics.submit_calls},
          {"submitted", statistics.submitted},
          {"resubmitted", statistics.resubmitted},
          {"reap-calls", statistics.reap_calls},
          {"completed", statistics.completed},
          {"notes", json::value_from(engine.notes())}};
}

json::value query_aio(const IoThreads& threads) {
  json::array answer;
  for (const auto& thread : threads) {
    answer.push_back(on_io_thread(*thread, [](blockdev::IoContext& context) {
      json::array routes;
      for (const auto& route : context.engines().routes()) {
        routes.push_back({{"kind", aio::to_string(route.kind)},
                          {"requested", route.requested},
                          {"engine", route.chosen},
                          {"reason", route.reason}});
      }
      json::array engines;
      for (const auto& engine : context.engines().engines()) engines.push_back(engine_counters(*engine));
      return json::object{{"routes", std::move(routes)}, {"engines", std::move(engines)}};
    }));
  }
  return json::object{{"iothreads", std::move(answer)}};
}

Expected<int> serve(const ServeOptions& options, SignalWatcher& signals) {
  auto node = blockdev::open_image(options.image);
  if (!node) return std::unexpected(std::move(node.error()));
  auto device = virtio::BlkDevice::create(**node, options.device);
  if (!device) return std::unexpected(std::move(device.error()));
  auto threads = start_io_threads(options);
  if (!threads) return std::unexpected(std::move(threads.error()));
  log_routes(*threads->front());
  return 0;
}

}  // namespace

int serve_command(std::span<const std::string> arguments) {
  const auto parsed = parse_serve_options(arguments);
  if (!parsed) {
    fmt::print(stderr, "vblk: serve: {}\n", parsed.error().message);
    return kExitUsage;
  }
  if (const auto* answer = std::get_if<Answer>(&*parsed)) {
    fmt::print("{}", answer->text);
    return 0;
  }
  const auto& options = std::get<ServeOptions>(*parsed);
  log::set_level(options.log_level);
  SignalWatcher signals;
  const auto status = serve(options, signals);
  if (!status) {
    fmt::print(stderr, "vblk: serve: {}\n", status.error().message);
    return kExitFailure;
  }
  return *status;
}

}  // namespace vblk::cli
