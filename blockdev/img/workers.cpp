#include "blockdev/img/workers.h"

#include <algorithm>
#include <latch>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "blockdev/img/engines.h"

namespace vblk::img {

namespace {

using Work = std::function<blockdev::Task<int>(blockdev::IoContext& context)>;

blockdev::Detached start(blockdev::Task<int> task) {
  // What went wrong the work has told by itself.
  [[maybe_unused]] const int ignored = co_await task;
}

void run_thread(blockdev::PrivateContext& own, unsigned count,
                std::span<blockdev::BlockNode* const> nodes, const Work& work, std::latch& ended) {
  blockdev::IoContext& context = own.context();
  for (blockdev::BlockNode* const node : nodes) node->attach(context);
  for (unsigned i = 0; i < count; ++i) start(work(context));
  context.drain();
  // Another thread may still be waking this one up, for the last time.
  ended.arrive_and_wait();
  for (blockdev::BlockNode* const node : nodes) node->detach(context);
}

}  // namespace

Expected<void> run_workers(unsigned count, unsigned threads_max,
                           std::span<blockdev::BlockNode* const> nodes, const Work& work) {
  const unsigned threads =
      std::clamp(std::thread::hardware_concurrency(), 1U, std::min(count, threads_max));
  // On this thread, so that what is lacking is known before anything is begun.
  auto own = make_context();
  if (!own) return std::unexpected(std::move(own.error()));
  std::latch ended(threads);
  std::vector<std::jthread> others;
  for (unsigned i = 1; i < threads; ++i) {
    const unsigned share = count / threads + (i < count % threads ? 1 : 0);
    others.emplace_back([share, nodes, &work, &ended] {
      const auto context = make_context();
      // Who gets no engines leaves the work to the others.
      if (!context) return ended.count_down();
      run_thread(**context, share, nodes, work, ended);
    });
  }
  run_thread(**own, count / threads + (count % threads > 0 ? 1 : 0), nodes, work, ended);
  return {};
}

blockdev::Task<int> Turns::wait(blockdev::IoContext& context, std::uint64_t number) {
  blockdev::BlockRequest token;
  token.context = &context;
  std::unique_lock lock(mutex_);
  while (next_ != number) co_await passed_.wait(lock, token);
  co_return 0;
}

void Turns::pass(blockdev::IoContext& context) {
  const std::lock_guard lock(mutex_);
  ++next_;
  passed_.wake_all(context);
}

}  // namespace vblk::img
