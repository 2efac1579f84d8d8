#include "aio/engine_set.h"

#include <algorithm>
#include <optional>
#include <poll.h>
#include <utility>

#include <fmt/core.h>

#include "aio/io_uring_engine.h"
#include "aio/native_engine.h"
#include "aio/threads_engine.h"

namespace vblk::aio {

namespace {

constexpr std::array kAllKinds{IoKind::kRead, IoKind::kWrite, IoKind::kFlush, IoKind::kDiscard,
                               IoKind::kWriteZeroes};

constexpr std::size_t index_of(IoKind kind) { return static_cast<std::size_t>(kind); }

std::optional<EngineName> engine_named(std::string_view text) {
  for (const EngineName name : kAllEngineNames) {
    if (to_string(name) == text) return name;
  }
  return std::nullopt;
}

std::optional<IoKind> kind_named(std::string_view text) {
  for (const IoKind kind : kAllKinds) {
    if (to_string(kind) == text) return kind;
  }
  return std::nullopt;
}

std::unexpected<Error> unknown_engine(std::string_view text) {
  return make_error(
      ErrorKind::kInvalidArgument,
      fmt::format("--aio: unknown engine '{}'; there are threads, native and io_uring", text));
}

// Takes the text up to `separator` off the front of `rest`.
std::string_view next_word(std::string_view& rest, char separator) {
  const std::size_t end = rest.find(separator);
  const std::string_view word = rest.substr(0, end);
  rest = end == std::string_view::npos ? std::string_view{} : rest.substr(end + 1);
  return word;
}

std::string_view why_not(EngineName engine, IoKind kind) {
  if (engine == EngineName::kNative) {
    return kind == IoKind::kFlush ? "this kernel has no IOCB_CMD_FDSYNC (Linux 4.18)"
                                  : "Linux AIO has no fallocate";
  }
  return "this kernel has no IORING_OP_FALLOCATE (Linux 5.6)";
}

template <typename Made>
Expected<std::unique_ptr<Engine>> as_engine(Expected<std::unique_ptr<Made>> made) {
  if (!made) return std::unexpected(std::move(made.error()));
  return std::unique_ptr<Engine>(std::move(*made));
}

Expected<std::unique_ptr<Engine>> make_engine(EngineName name, const EngineOptions& options) {
  switch (name) {
    case EngineName::kThreads:
      return as_engine(ThreadsEngine::create(options));
    case EngineName::kNative:
      return as_engine(NativeEngine::create(options));
    case EngineName::kIoUring:
      return as_engine(IoUringEngine::create(options));
  }
  return unknown_engine("?");
}

}  // namespace

std::string_view to_string(EngineName name) {
  switch (name) {
    case EngineName::kThreads:
      return "threads";
    case EngineName::kNative:
      return "native";
    case EngineName::kIoUring:
      return "io_uring";
  }
  return "?";
}

std::string_view to_string(IoKind kind) {
  switch (kind) {
    case IoKind::kRead:
      return "read";
    case IoKind::kWrite:
      return "write";
    case IoKind::kFlush:
      return "flush";
    case IoKind::kDiscard:
      return "discard";
    case IoKind::kWriteZeroes:
      return "write-zeroes";
  }
  return "?";
}

Expected<AioSelection> AioSelection::parse(std::string_view text) {
  AioSelection selection;
  if (text.find('=') == std::string_view::npos) {
    const auto engine = engine_named(text);
    if (!engine) return unknown_engine(text);
    selection.engine_of_kind.fill(*engine);
    return selection;
  }
  std::array<bool, kIoKindCount> named{};
  for (std::string_view rest = text; !rest.empty();) {
    std::string_view pair = next_word(rest, ',');
    const std::string_view kind_text = next_word(pair, '=');
    const auto kind = kind_named(kind_text);
    if (!kind) {
      return make_error(
          ErrorKind::kInvalidArgument,
          fmt::format(
              "--aio: unknown kind of operation '{}'; there are read, write, flush, discard and "
              "write-zeroes",
              kind_text));
    }
    const auto engine = engine_named(pair);
    if (!engine) return unknown_engine(pair);
    if (std::exchange(named[index_of(*kind)], true)) {
      return make_error(ErrorKind::kInvalidArgument,
                        fmt::format("--aio: '{}' is named twice", kind_text));
    }
    selection.engine_of_kind[index_of(*kind)] = *engine;
  }
  if (named[index_of(IoKind::kDiscard)] && !named[index_of(IoKind::kWriteZeroes)]) {
    selection.engine_of_kind[index_of(IoKind::kWriteZeroes)] =
        selection.engine_of_kind[index_of(IoKind::kDiscard)];
  }
  return selection;
}

std::string AioSelection::to_string() const {
  if (std::ranges::all_of(engine_of_kind,
                          [this](EngineName name) { return name == engine_of_kind[0]; })) {
    return std::string(aio::to_string(engine_of_kind[0]));
  }
  std::string text;
  for (const IoKind kind : kAllKinds) {
    text += fmt::format("{}{}={}", text.empty() ? "" : ",", aio::to_string(kind),
                        aio::to_string(engine_of_kind[index_of(kind)]));
  }
  return text;
}

Expected<std::unique_ptr<EngineSet>> EngineSet::create(const AioSelection& selection,
                                                       const EngineOptions& options) {
  std::unique_ptr<EngineSet> set(new EngineSet);
  std::array<Engine*, kAllEngineNames.size()> made{};
  const auto engine_for = [&](EngineName name) -> Expected<Engine*> {
    Engine*& engine = made[static_cast<std::size_t>(name)];
    if (engine == nullptr) {
      auto created = make_engine(name, options);
      if (!created) return std::unexpected(std::move(created.error()));
      set->engines_.push_back(std::move(*created));
      engine = set->engines_.back().get();
    }
    return engine;
  };
  for (const IoKind kind : kAllKinds) {
    const EngineName requested = selection.engine_of_kind[index_of(kind)];
    auto engine = engine_for(requested);
    if (!engine) return std::unexpected(std::move(engine.error()));
    EngineRoute route{.kind = kind,
                      .requested = std::string(aio::to_string(requested)),
                      .chosen = {},
                      .reason = {}};
    if (!(*engine)->supports(kind)) {
      route.reason = why_not(requested, kind);
      engine = engine_for(EngineName::kThreads);
      if (!engine) return std::unexpected(std::move(engine.error()));
    }
    route.chosen = (*engine)->name();
    set->engine_of_kind_[index_of(kind)] = *engine;
    set->routes_.push_back(std::move(route));
  }
  // BLKDISCARD is an ioctl: nothing but a thread can wait for it.
  auto blocking = engine_for(EngineName::kThreads);
  if (!blocking) return std::unexpected(std::move(blocking.error()));
  set->block_device_discard_engine_ = *blocking;
  return set;
}

EngineSet::EngineSet(std::unique_ptr<Engine> engine) {
  engine_of_kind_.fill(engine.get());
  block_device_discard_engine_ = engine.get();
  for (const IoKind kind : kAllKinds) {
    routes_.push_back({.kind = kind,
                       .requested = std::string(engine->name()),
                       .chosen = std::string(engine->name()),
                       .reason = {}});
  }
  engines_.push_back(std::move(engine));
}

EngineSet::~EngineSet() = default;

Expected<void> EngineSet::register_file(int fd) {
  Expected<void> outcome;
  for (const auto& engine : engines_) {
    auto registered = engine->register_file(fd);
    if (outcome) outcome = std::move(registered);
  }
  return outcome;
}

void EngineSet::unregister_file(int fd) {
  for (const auto& engine : engines_) engine->unregister_file(fd);
}

Expected<void> EngineSet::register_memory(const iovec& range) {
  Expected<void> outcome;
  for (const auto& engine : engines_) {
    auto registered = engine->register_memory(range);
    if (outcome) outcome = std::move(registered);
  }
  return outcome;
}

void EngineSet::unregister_memory(const iovec& range) {
  for (const auto& engine : engines_) engine->unregister_memory(range);
}

void EngineSet::submit() {
  for (const auto& engine : engines_) engine->submit();
}

std::size_t EngineSet::reap() {
  std::size_t count = 0;
  for (const auto& engine : engines_) count += engine->reap();
  return count;
}

bool EngineSet::prepare_to_sleep() {
  return std::ranges::all_of(engines_,
                             [](const auto& engine) { return engine->prepare_to_sleep(); });
}

void EngineSet::wake_up() {
  for (const auto& engine : engines_) engine->wake_up();
}

std::size_t EngineSet::in_flight() const {
  std::size_t count = 0;
  for (const auto& engine : engines_) count += engine->in_flight();
  return count;
}

bool EngineSet::is_worth_looking() const {
  return std::ranges::all_of(engines_,
                             [](const auto& engine) { return engine->is_worth_looking(); });
}

void EngineSet::drain() {
  while (in_flight() > 0) {
    submit();
    if (reap() > 0) continue;
    if (prepare_to_sleep()) {
      std::array<pollfd, kAllEngineNames.size()> descriptors{};
      for (std::size_t i = 0; i < engines_.size(); ++i)
        descriptors[i] = {engines_[i]->completion_fd(), POLLIN, 0};
      ::poll(descriptors.data(), engines_.size(), -1);
    }
    wake_up();
  }
}

}  // namespace vblk::aio
