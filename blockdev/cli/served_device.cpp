#include "blockdev/cli/served_device.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include <boost/json.hpp>
#include <fmt/core.h>
#include <fmt/format.h>

#include "aio/engine_name.h"
#include "blockdev/byte_size.h"
#include "blockdev/cpu_list.h"
#include "blockdev/flush_now.h"
#include "blockdev/image/open_image.h"
#include "blockdev/log.h"

namespace vblk::cli {

namespace json = boost::json;

namespace {

// How long pause waits for what is in flight before it says that it is not over: less than vblk ctl
// waits for an answer.
constexpr std::chrono::seconds kPausePatience{8};
constexpr std::chrono::milliseconds kPauseLook{5};

// Runs `read` on the thread that owns the engines and returns what it saw.
template <typename Function>
auto on_io_thread(blockdev::IoThread& thread, Function read) {
  decltype(read(thread.context())) result;
  thread.run_and_wait([&] { result = read(thread.context()); });
  return result;
}

// The word that a command takes.
Expected<std::string> text_of(const json::object& arguments, std::string_view name,
                              std::string_view command, std::string_view what) {
  const json::value* const text =
      arguments.if_contains(json::string_view(name.data(), name.size()));
  if (text != nullptr && text->is_string()) return std::string(text->as_string());
  return make_error(ErrorKind::kInvalidArgument,
                    fmt::format("{}: the argument '{}' is missing; it is {}", command, name, what));
}

// Why the device takes no requests; null if it does.
json::value pause_of(const virtio::DeviceGate::Status& status) {
  if (!status.by_command && !status.failed) return nullptr;
  json::object pause{{"by-command", status.by_command}, {"failed", nullptr}};
  if (status.failed) {
    pause["failed"] = {{"operation", aio::to_string(status.failed->operation)},
                       {"offset", status.failed->offset_bytes},
                       {"length", status.failed->length_bytes},
                       {"error", describe_errno(status.failed->error)},
                       {"retries", status.retries}};
  }
  return pause;
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

}  // namespace

Expected<std::unique_ptr<ServedDevice>> ServedDevice::create(const ServeOptions& options) {
  std::unique_ptr<ServedDevice> made(new ServedDevice(options));
  if (auto opened = made->open_disk(); !opened) return std::unexpected(std::move(opened.error()));
  auto device = virtio::BlkDevice::create(*made->node_, options.device);
  if (!device) return std::unexpected(std::move(device.error()));
  made->device_ = std::move(*device);
  made->engine_switch_ = std::make_unique<blockdev::EngineSwitch>(
      options.aio, [engine = options.engine](aio::EngineName name) {
        return aio::EngineSet::make_engine(name, engine);
      });
  if (auto started = made->start_io_threads(); !started)
    return std::unexpected(std::move(started.error()));
  auto server = vhost_user::Server::create(
      {.socket_path = options.socket_path,
       .socket_fd = options.socket_fd,
       .socket_must_listen = options.socket_is_activated,
       .backend = {.offers_recovery = options.recovery, .handover = made->handover_}},
      *made->device_, made->threads_);
  if (!server) return std::unexpected(std::move(server.error()));
  made->server_ = std::move(*server);
  if (!options.monitor_path.empty()) {
    auto started = Monitor::start(options.monitor_path, made->handlers());
    if (!started) return std::unexpected(std::move(started.error()));
    made->monitor_ = std::move(*started);
  }
  return made;
}

Expected<void> ServedDevice::open_disk() {
  const blockdev::ImageOptions& image = options_.image;
  if (!options_.migration) {
    auto node = blockdev::open_image(image);
    if (!node) {
      if (node.error().kind == ErrorKind::kBusy && !image.read_only)
        node.error().message += ", or add --read-only if that one only reads";
      return std::unexpected(std::move(node.error()));
    }
    node_ = std::move(*node);
    return {};
  }
  auto shape = blockdev::look_at_image(image);
  if (!shape) return std::unexpected(std::move(shape.error()));
  auto node = std::make_unique<blockdev::HandoverNode>(
      std::move(*shape), [&image] { return blockdev::open_image(image); });
  handover_ = node.get();
  node_ = std::move(node);
  return {};
}

Expected<void> ServedDevice::run() { return server_->run(); }

Expected<void> ServedDevice::start_io_threads() {
  for (unsigned i = 0; i < options_.iothread_count; ++i) {
    const std::string name = options_.name.empty() ? fmt::format("vblk-io-{}", i)
                                                   : fmt::format("{}-io-{}", options_.name, i);
    const auto& cpus = options_.iothread_cpus;
    auto thread = blockdev::IoThread::start(
        name, options_.loop, [this, i, &cpus]() -> Expected<std::unique_ptr<aio::EngineSet>> {
          log::set_thread_subject(options_.name);
          // First of all: the engines' own threads are to be there too.
          if (!cpus.empty()) {
            if (auto pinned = blockdev::pin_this_thread(cpus[i % cpus.size()]); !pinned) {
              return make_error(pinned.error().kind,
                                fmt::format("--iothread-cpus: {}", pinned.error().message));
            }
          }
          return aio::EngineSet::create(options_.aio, options_.engine);
        });
    if (!thread) return std::unexpected(std::move(thread.error()));
    threads_.push_back(std::move(*thread));
  }
  return {};
}

MonitorHandlers ServedDevice::handlers() {
  MonitorHandlers handlers;
  const auto add = [this, &handlers](const char* name, auto command) {
    handlers[name] = [this, command](const Arguments& arguments) {
      log::set_thread_subject(options_.name);
      return command(arguments);
    };
  };
  add("query-aio", [this](const Arguments&) { return query_aio(); });
  add("query-status", [this](const Arguments&) { return query_status(); });
  add("set-aio", [this](const Arguments& arguments) { return set_aio(arguments); });
  add("resize", [this](const Arguments& arguments) { return resize(arguments); });
  add("set-limits", [this](const Arguments& arguments) { return set_limits(arguments); });
  add("pause", [this](const Arguments&) { return pause(); });
  add("resume", [this](const Arguments&) { return resume(); });
  return handlers;
}

// Every I/O thread made the same choice on the same kernel, so one of them tells it.
void ServedDevice::log_routes() {
  const auto lines = on_io_thread(*threads_.front(), [](blockdev::IoContext& context) {
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

ServedDevice::Answer ServedDevice::query_aio() {
  json::array answer;
  for (const auto& thread : threads_) {
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

ServedDevice::Answer ServedDevice::set_aio(const Arguments& arguments) {
  const auto text = text_of(arguments, "aio", "set-aio", "ENGINE or KIND=ENGINE,...");
  if (!text) return std::unexpected(text.error());
  const auto wanted = aio::AioSelection::parse(*text, "set-aio", engine_switch_->selection());
  if (!wanted) return std::unexpected(wanted.error());
  const std::string before = engine_switch_->selection().to_string();
  const auto changed = engine_switch_->change(threads_, *wanted);
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
ServedDevice::Answer ServedDevice::resize(const Arguments& arguments) {
  const auto text = text_of(arguments, "size", "resize", "a text such as 10G");
  if (!text) return std::unexpected(text.error());
  const auto size = blockdev::parse_byte_size(*text);
  if (!size) return make_error(size.error().kind, fmt::format("resize: {}", size.error().message));
  if (*size % options_.device.logical_block_bytes != 0) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("resize: {} bytes are no multiple of the logical block size {}",
                                  *size, options_.device.logical_block_bytes));
  }
  blockdev::BlockNode& node = *node_;
  blockdev::IoThread& thread = *threads_.front();
  const std::uint64_t before = node.size_bytes();
  std::promise<Expected<void>> outcome;
  thread.loop().post([&] {
    node.resize(*size, thread.context(),
                [&outcome](Expected<void> result) { outcome.set_value(std::move(result)); });
  });
  auto resized = outcome.get_future();
  thread.wait_for(resized);
  if (auto result = resized.get(); !result) {
    return make_error(result.error().kind, fmt::format("resize: {}", result.error().message),
                      result.error().errno_value);
  }
  log::info("'{}' had {} bytes and has {} now", node.name(), before, *size);
  server_->notify_config_change();
  return json::object{{"size", *size}, {"before", before}};
}

ServedDevice::Answer ServedDevice::set_limits(const Arguments& arguments) {
  const auto text = text_of(arguments, "limits", "set-limits", "NAME=VALUE,... or none");
  if (!text) return std::unexpected(text.error());
  virtio::DeviceGate& gate = device_->gate();
  const auto before = gate.limiter().limits();
  const auto wanted = blockdev::IoLimits::parse(*text, "set-limits", before);
  if (!wanted) return std::unexpected(wanted.error());
  gate.set_limits(*wanted);
  log::info("limits changed from {} to {}", before.to_string(), wanted->to_string());
  return json::object{{"limits", wanted->to_string()}, {"before", before.to_string()}};
}

// When it answers, nothing is at the disk any more, and what was written is stable. What a failed
// request has paused already stays kept.
ServedDevice::Answer ServedDevice::pause() {
  virtio::DeviceGate& gate = device_->gate();
  gate.pause();
  const auto deadline = std::chrono::steady_clock::now() + kPausePatience;
  for (;;) {
    const auto status = server_->status();
    std::size_t at_the_disk = 0;
    if (status) {
      for (const auto& ring : status->rings) at_the_disk += ring.in_flight - ring.kept;
      if (at_the_disk == 0) break;
    }
    if (std::chrono::steady_clock::now() >= deadline) {
      return make_error(
          ErrorKind::kBusy,
          fmt::format("pause: after {} s {} requests are still at the disk; no new ones are taken, "
                      "and query-status tells when these are done",
                      kPausePatience.count(), status ? at_the_disk : 0));
    }
    std::this_thread::sleep_for(kPauseLook);
  }
  if (auto flushed = blockdev::flush_now(*node_, *threads_.front()); !flushed) {
    return make_error(flushed.error().kind,
                      fmt::format("pause: it is paused, but {}", flushed.error().message),
                      flushed.error().errno_value);
  }
  // The flush may have a format put in order what it had kept for later.
  while (!blockdev::is_quiet(threads_)) {
    if (std::chrono::steady_clock::now() >= deadline) {
      return make_error(ErrorKind::kBusy,
                        fmt::format("pause: it is paused, but after {} s '{}' is still being "
                                    "written; try again",
                                    kPausePatience.count(), node_->name()));
    }
    std::this_thread::sleep_for(kPauseLook);
  }
  log::info("paused by command");
  return json::object{{"state", "paused"}};
}

ServedDevice::Answer ServedDevice::resume() {
  const bool was_paused = device_->gate().resume();
  if (was_paused) log::info("resumed by command");
  return json::object{{"state", "running"}, {"was-paused", was_paused}};
}

ServedDevice::Answer ServedDevice::query_status() {
  const blockdev::BlockNode& node = *node_;
  const auto status = server_->status();
  if (!status) return json::object{{"busy", true}};
  json::array rings;
  for (const auto& ring : status->rings) {
    rings.push_back({{"running", ring.running},
                     {"broken", ring.broken},
                     {"in-flight", ring.in_flight},
                     {"waiting", ring.waiting},
                     {"kept", ring.kept},
                     {"requests", ring.statistics.requests},
                     {"recovered", ring.statistics.recovered},
                     {"retried", ring.statistics.retried},
                     {"errors", ring.statistics.errors},
                     {"unsupported", ring.statistics.unsupported},
                     {"interrupts", ring.statistics.interrupts},
                     {"interrupts-merged", ring.statistics.interrupts_merged},
                     {"kicks", ring.statistics.kicks}});
  }
  const auto flushes = node.flush_statistics();
  const virtio::InterruptOptions& interrupts = options_.device.interrupts;
  return json::object{{"image", node.name()},
                      {"size", node.size_bytes()},
                      {"read-only", node.limits().read_only},
                      {"writeback", !device_->write_through()},
                      {"state", device_->gate().is_paused() ? "paused" : "running"},
                      {"paused", pause_of(device_->gate().status())},
                      {"limits", device_->gate().limiter().limits().to_string()},
                      {"rerror", virtio::to_string(options_.device.on_error.read)},
                      {"werror", virtio::to_string(options_.device.on_error.write)},
                      {"holds-image", handover_ == nullptr || handover_->is_taken()},
                      {"connected", status->connected},
                      {"features", status->features},
                      {"device-status", status->device_status},
                      {"interrupt-max-us", interrupts.hold_max.count()},
                      {"interrupt-max-batch", interrupts.batch_max},
                      {"flushes",
                       {{"requested", flushes.submitted},
                        {"issued", flushes.begun},
                        {"elided", flushes.elided},
                        {"gathered", flushes.gathered}}},
                      {"queues", std::move(rings)}};
}

}  // namespace vblk::cli
