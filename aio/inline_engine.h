// The engine that is none: submit() carries each request out by a blocking system call on the
// owner's thread, before it returns. What asynchrony is compared with; no disk is served by it.
#pragma once

#include <memory>

#include "aio/engine.h"
#include "aio/error.h"

namespace vblk::aio {

class InlineEngine final : public Engine {
 public:
  // Error: kExhausted if there is no descriptor left.
  static Expected<std::unique_ptr<InlineEngine>> create();
  ~InlineEngine() override;

  [[nodiscard]] std::string_view name() const override { return "inline"; }
  [[nodiscard]] bool supports(IoKind /*kind*/) const override { return true; }
  void queue(IoRequest& request) override;
  void submit() override;
  std::size_t reap() override;
  // Never readable: whoever is asleep has nothing in flight.
  [[nodiscard]] int completion_fd() const override { return event_fd_; }
  [[nodiscard]] bool prepare_to_sleep() override { return in_flight_ == 0; }
  void wake_up() override {}

 private:
  explicit InlineEngine(int event_fd) : event_fd_(event_fd) {}

  const int event_fd_;
  threadpool::WorkList queued_;
  threadpool::WorkList finished_;
};

}  // namespace vblk::aio
