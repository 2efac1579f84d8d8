// `vblk serve`: puts the parts together, in the order in which they can fail without leaving
// anything behind.
//
//   image -> device -> I/O threads (engines) -> socket -> monitor -> ready line -> serve until a
//   signal
//
// Threads: this one serves the vhost-user socket; each I/O thread owns its queues and engines; the
// monitor has its own. Signals arrive on this thread's server through SignalWatcher's thread.
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <pthread.h>
#include <string>
#include <string_view>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <boost/json.hpp>
#include <fmt/core.h>
#include <fmt/format.h>

#include "blockdev/byte_size.h"
#include "blockdev/cli/commands.h"
#include "blockdev/cli/monitor.h"
#include "blockdev/cli/options.h"
#include "blockdev/cli/socket_activation.h"
#include "blockdev/engine_switch.h"
#include "blockdev/image/open_image.h"
#include "blockdev/io_thread.h"
#include "blockdev/log.h"
#include "blockdev/vhost_user/server.h"

namespace vblk::cli {

namespace json = boost::json;
using IoThreads = std::vector<std::unique_ptr<blockdev::IoThread>>;

namespace {

// What comes so soon after the first signal is no impatience: timeout(1) signals its child and then
// the whole process group, and a terminal's Ctrl-C reaches who is also told by its parent.
constexpr std::chrono::seconds kSameSignal{1};

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

  void start(std::move_only_function<void()> on_first) {
    thread_ = std::thread([this, on_first = std::move(on_first)]() mutable {
      using Clock = std::chrono::steady_clock;
      int signal = 0;
      std::optional<Clock::time_point> first;
      while (sigwait(&signals_, &signal) == 0 && !finished_) {
        if (!first) {
          first = Clock::now();
          log::info("{}: draining and flushing", name_of(signal));
          on_first();
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

Expected<IoThreads> start_io_threads(const ServeOptions& options) {
  IoThreads threads;
  for (unsigned i = 0; i < options.iothread_count; ++i) {
    auto thread = blockdev::IoThread::start(fmt::format("vblk-io-{}", i), options.loop, [&options] {
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
      text.push_back(fmt::format(
          "{} by {}{}", aio::to_string(route.kind), route.chosen,
          route.reason.empty() ? ""
                               : fmt::format(" instead of {}: {}", route.requested, route.reason)));
    }
    for (const auto& engine : context.engines().engines()) {
      for (const auto& note : engine->notes())
        text.push_back(fmt::format("{}: {}", engine->name(), note));
    }
    return text;
  });
  for (const auto& line : lines) log::info("engine: {}", line);
}

json::object engine_counters(const aio::Engine& engine) {
  const auto& statistics = engine.statistics();
  json::object of_kinds;
  for (const aio::IoKind kind : aio::kAllKinds)
    of_kinds[aio::to_string(kind)] = engine.statistics_of(kind).queued;
  return {{"engine", engine.name()},
          {"in-flight", engine.in_flight()},
          {"requests", statistics.requests},
          {"requests-by-kind", std::move(of_kinds)},
          {"submit-calls", statistics.submit_calls},
          {"submitted", statistics.submitted},
          {"resubmitted", statistics.resubmitted},
          {"reap-calls", statistics.reap_calls},
          {"completed", statistics.completed},
          {"page-cache-hits", statistics.page_cache_hits},
          {"registered-files", statistics.registered_files},
          {"registered-buffers", statistics.registered_buffers},
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
      for (const auto& engine : context.engines().engines())
        engines.push_back(engine_counters(*engine));
      const auto& loop = context.loop().statistics();
      return json::object{{"aio", context.engines().selection().to_string()},
                          {"routes", std::move(routes)},
                          {"auto", json::value_from(context.engines().auto_report())},
                          {"engines", std::move(engines)},
                          {"sleeps", loop.sleeps},
                          {"polls", loop.polls},
                          {"polls-won", loop.polls_won}};
    }));
  }
  return json::object{{"iothreads", std::move(answer)}};
}

Expected<json::value> set_aio(blockdev::EngineSwitch& engine_switch, const IoThreads& threads,
                              const json::object& arguments) {
  const json::value* const text = arguments.if_contains("aio");
  if (text == nullptr || !text->is_string()) {
    return make_error(ErrorKind::kInvalidArgument,
                      "set-aio: the argument 'aio' is missing; it is ENGINE or KIND=ENGINE,...");
  }
  const auto wanted = aio::AioSelection::parse(std::string_view(text->as_string()), "set-aio",
                                               engine_switch.selection());
  if (!wanted) return std::unexpected(wanted.error());
  const std::string before = engine_switch.selection().to_string();
  const auto changed = engine_switch.change(threads, *wanted);
  if (!changed) {
    return make_error(changed.error().kind,
                      fmt::format("set-aio: nothing is changed: {}", changed.error().message),
                      changed.error().errno_value);
  }
  log::info("engines changed from {} to {}", before, wanted->to_string());
  for (const auto& note : changed->notes) log::warning("{}", note);
  json::array held_up_us;
  for (const auto time : changed->held_up)
    held_up_us.emplace_back(std::chrono::duration<double, std::micro>(time).count());
  return json::object{{"aio", wanted->to_string()},
                      {"before", before},
                      {"notes", json::value_from(changed->notes)},
                      {"held-up-us", std::move(held_up_us)}};
}

// Waits for the I/O thread that does it: as long as the requests beyond a smaller end take.
Expected<json::value> resize(blockdev::BlockNode& node, const virtio::BlkDeviceOptions& device,
                             blockdev::IoThread& thread, vhost_user::Server& server,
                             const json::object& arguments) {
  const json::value* const text = arguments.if_contains("size");
  if (text == nullptr || !text->is_string()) {
    return make_error(ErrorKind::kInvalidArgument,
                      "resize: the argument 'size' is missing; it is a text such as 10G");
  }
  const auto size = blockdev::parse_byte_size(std::string_view(text->as_string()));
  if (!size) return make_error(size.error().kind, fmt::format("resize: {}", size.error().message));
  if (*size % device.logical_block_bytes != 0) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("resize: {} bytes are no multiple of the logical block size {}",
                                  *size, device.logical_block_bytes));
  }
  const std::uint64_t before = node.size_bytes();
  std::promise<Expected<void>> outcome;
  thread.loop().post([&] {
    node.resize(*size, thread.context(),
                [&outcome](Expected<void> result) { outcome.set_value(std::move(result)); });
  });
  if (auto result = outcome.get_future().get(); !result) {
    return make_error(result.error().kind, fmt::format("resize: {}", result.error().message),
                      result.error().errno_value);
  }
  log::info("'{}' had {} bytes and has {} now", node.name(), before, *size);
  server.notify_config_change();
  return json::object{{"size", *size}, {"before", before}};
}

json::value query_status(vhost_user::Server& server, const virtio::BlkDevice& device) {
  const blockdev::BlockNode& node = device.node();
  const auto status = server.status();
  if (!status) return json::object{{"busy", true}};
  json::array rings;
  for (const auto& ring : status->rings) {
    rings.push_back({{"running", ring.running},
                     {"broken", ring.broken},
                     {"in-flight", ring.in_flight},
                     {"requests", ring.statistics.requests},
                     {"recovered", ring.statistics.recovered},
                     {"errors", ring.statistics.errors},
                     {"unsupported", ring.statistics.unsupported},
                     {"interrupts", ring.statistics.interrupts},
                     {"kicks", ring.statistics.kicks}});
  }
  const auto flushes = node.flush_statistics();
  return json::object{
      {"image", node.name()},
      {"size", node.size_bytes()},
      {"read-only", node.limits().read_only},
      {"writeback", !device.write_through()},
      {"connected", status->connected},
      {"features", status->features},
      {"flushes",
       {{"requested", flushes.submitted}, {"issued", flushes.begun}, {"elided", flushes.elided}}},
      {"queues", std::move(rings)}};
}

void print_ready(const ServeOptions& options) {
  if (options.socket_fd >= 0) {
    fmt::print("vblk: ready on descriptor {}\n", options.socket_fd);
  } else {
    fmt::print("vblk: ready on {}\n", options.socket_path);
  }
  std::fflush(stdout);
}

Expected<void> serve(const ServeOptions& options, SignalWatcher& signals) {
  const auto node = blockdev::open_image(options.image);
  if (!node) return std::unexpected(node.error());
  const auto device = virtio::BlkDevice::create(**node, options.device);
  if (!device) return std::unexpected(device.error());
  blockdev::EngineSwitch engine_switch(options.aio, [&options](aio::EngineName name) {
    return aio::EngineSet::make_engine(name, options.engine);
  });
  const auto threads = start_io_threads(options);
  if (!threads) return std::unexpected(threads.error());
  const auto server = vhost_user::Server::create({.socket_path = options.socket_path,
                                                  .socket_fd = options.socket_fd,
                                                  .socket_must_listen = options.socket_is_activated,
                                                  .backend = {.offers_recovery = options.recovery}},
                                                 **device, *threads);
  if (!server) return std::unexpected(server.error());
  std::unique_ptr<Monitor> monitor;
  if (!options.monitor_path.empty()) {
    MonitorHandlers handlers;
    handlers["query-aio"] = [&](const json::object&) { return query_aio(*threads); };
    handlers["query-status"] = [&](const json::object&) {
      return query_status(**server, **device);
    };
    handlers["set-aio"] = [&](const json::object& arguments) {
      return set_aio(engine_switch, *threads, arguments);
    };
    handlers["resize"] = [&](const json::object& arguments) {
      return resize(**node, options.device, *threads->front(), **server, arguments);
    };
    auto started = Monitor::start(options.monitor_path, std::move(handlers));
    if (!started) return std::unexpected(std::move(started.error()));
    monitor = std::move(*started);
  }
  log_routes(*threads->front());
  signals.start([&server] { (*server)->request_stop(); });
  print_ready(options);
  auto outcome = (*server)->run();
  signals.stop();
  return outcome;
}

}  // namespace

int serve_command(std::span<const std::string> arguments) {
  const auto activated_fd = activated_socket();
  if (!activated_fd) {
    fmt::print(stderr, "vblk: serve: {}\n", activated_fd.error().message);
    return kExitUsage;
  }
  const auto parsed = parse_serve_options(arguments, *activated_fd);
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
  return 0;
}

}  // namespace vblk::cli
