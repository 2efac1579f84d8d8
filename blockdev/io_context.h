// What one I/O thread lends to the nodes that work on it: its engines, its bounce buffers and its
// list of completions that need no kernel call.
//
// A node is shared by all I/O threads; everything a request needs that must not be shared comes
// from here. One IoContext per I/O thread, created and destroyed on it.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "aio/engine_set.h"
#include "blockdev/block_request.h"
#include "blockdev/bounce_pool.h"
#include "blockdev/io_loop.h"

namespace vblk::blockdev {

class IoContext final : public Poller {
 public:
  // Registers itself and the engines' descriptors with `loop`, which must outlive it. Loop thread.
  IoContext(IoLoop& loop, std::unique_ptr<aio::EngineSet> engines);
  // Drains the engines first.
  ~IoContext() override;

  [[nodiscard]] IoLoop& loop() { return loop_; }
  [[nodiscard]] aio::EngineSet& engines() { return *engines_; }
  [[nodiscard]] BouncePool& bounce_pool() { return bounce_pool_; }

  // Completes `request` with `error` from the loop, not from here (law 1: never inside submit).
  void complete_later(BlockRequest& request, int error);

  // Runs completions until no engine has a request in flight and nothing is left to complete.
  // Loop thread; blocks it. For shutdown and tests: a running loop makes progress by itself.
  void drain();

  std::size_t poll() override;
  [[nodiscard]] bool is_worth_looking() const override { return engines_->is_worth_looking(); }
  [[nodiscard]] bool prepare_to_sleep() override;
  void wake_up() override;

 private:
  std::size_t run_deferred();

  IoLoop& loop_;
  std::unique_ptr<aio::EngineSet> engines_;
  BouncePool bounce_pool_;
  BlockRequest* deferred_head_{nullptr};
  BlockRequest* deferred_tail_{nullptr};
  std::vector<std::unique_ptr<IoLoop::Watch>> watches_;
};

}  // namespace vblk::blockdev
