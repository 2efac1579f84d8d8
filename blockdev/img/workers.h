// Coroutines on several threads, for commands that go over a whole disk.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <span>

#include "aio/error.h"
#include "blockdev/block_node.h"
#include "blockdev/io_context.h"
#include "blockdev/task.h"
#include "blockdev/wait_list.h"

namespace vblk::img {

inline constexpr unsigned kThreadPerProcessor = ~0U;

// Runs `work` `count` times at once, shared out over as many threads as there are processors, with
// engines of their own, the calling thread among them, or over `threads_max` if that is fewer;
// returns when all have ended. `nodes` are attached to each thread. Errors: engines that cannot be
// made; then nothing has been run, or it has ended before.
Expected<void> run_workers(
    unsigned count, unsigned threads_max, std::span<blockdev::BlockNode* const> nodes,
    const std::function<blockdev::Task<int>(blockdev::IoContext& context)>& work);

// Takes coroutines of several threads through a passage in the order of their numbers, which begin
// at 0 and have no gaps.
class Turns {
 public:
  // Waits until it is the turn of `number`.
  blockdev::Task<int> wait(blockdev::IoContext& context, std::uint64_t number);
  // It is over; the next one's comes.
  void pass(blockdev::IoContext& context);

 private:
  std::mutex mutex_;
  std::uint64_t next_{0};
  blockdev::WaitList passed_;
};

}  // namespace vblk::img
