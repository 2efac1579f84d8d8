#include "blockdev/engine_switch.h"

#include <algorithm>
#include <exception>
#include <pthread.h>
#include <string>
#include <utility>

#include <fmt/core.h>

namespace vblk::blockdev {

EngineSwitch::EngineSwitch(const aio::AioSelection& current, aio::EngineMaker maker)
    : selection_(current), maker_(std::move(maker)) {}

EngineSwitch::~EngineSwitch() {
  if (!disposal_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  changed_.notify_all();
  disposal_.join();
}

Expected<EngineSwitchOutcome> EngineSwitch::change(
    std::span<const std::unique_ptr<IoThread>> threads, const aio::AioSelection& wanted) {
  EngineSwitchOutcome outcome;
  outcome.held_up.resize(threads.size());
  const auto on_each = [&](auto step) {
    for (std::size_t i = 0; i < threads.size(); ++i) {
      threads[i]->run_and_wait([&] {
        const auto begin = std::chrono::steady_clock::now();
        step(i, threads[i]->context());
        outcome.held_up[i] += std::chrono::steady_clock::now() - begin;
      });
    }
  };
  std::vector<aio::EngineChange> changes(threads.size());
  on_each([&](std::size_t i, IoContext& context) {
    changes[i] = context.engines().begin_change(wanted);
  });
  auto made = make(changes);
  if (made) {
    on_each([&](std::size_t i, IoContext& context) {
      if (auto prepared = context.prepare_change(changes[i]); !prepared) made = std::move(prepared);
    });
  }
  if (!made) {
    on_each(
        [&](std::size_t i, IoContext& context) { context.cancel_change(std::move(changes[i])); });
    return std::unexpected(std::move(made.error()));
  }
  // Of one machine's kernel all I/O threads learn the same.
  outcome.notes = changes.front().notes();
  on_each([&](std::size_t i, IoContext& context) {
    context.change_engines(std::move(changes[i]), [this](std::unique_ptr<aio::Engine> engine) {
      dispose(std::move(engine));
    });
  });
  selection_ = wanted;
  return outcome;
}

Expected<void> EngineSwitch::make(std::span<aio::EngineChange> changes) {
  try {
    start_disposal();
    for (auto& change : changes) {
      if (auto made = change.make(maker_); !made) return made;
    }
    return {};
  } catch (const std::exception& exception) {
    // Nothing throws by intention: memory, threads or descriptors have run out.
    return make_error(ErrorKind::kExhausted,
                      fmt::format("cannot set up an engine: {}; raise 'ulimit -v', 'ulimit -u' or "
                                  "'ulimit -n'",
                                  exception.what()));
  }
}

// Starts the thread with the first change, and waits for it where it is behind.
void EngineSwitch::start_disposal() {
  if (!disposal_.joinable()) disposal_ = std::thread([this] { run_disposal(); });
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return former_.size() < kFormerEnginesMax; });
}

void EngineSwitch::dispose(std::unique_ptr<aio::Engine> engine) {
  {
    const std::lock_guard lock(mutex_);
    former_.push_back(std::move(engine));
  }
  changed_.notify_all();
}

void EngineSwitch::run_disposal() {
  pthread_setname_np(pthread_self(), "vblk-disposal");
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return is_stopping_ || !former_.empty(); });
    if (former_.empty()) return;
    // It counts among the former ones until it is gone.
    std::unique_ptr<aio::Engine> engine = std::move(former_.back());
    lock.unlock();
    engine.reset();
    lock.lock();
    std::erase(former_, nullptr);
    changed_.notify_all();
  }
}

}  // namespace vblk::blockdev
