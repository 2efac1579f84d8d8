#include "threadpool/asio_pool.h"

#include <atomic>

#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>

namespace vblk::threadpool {

struct AsioPool::State {
  explicit State(std::size_t count) : threads(count), pool(count) {}
  const std::size_t threads;
  std::atomic<std::uint64_t> batches{0};
  std::atomic<std::uint64_t> works{0};
  boost::asio::thread_pool pool;
};

AsioPool::AsioPool(const ThreadPoolOptions& options)
    : state_(std::make_unique<State>(options.max_threads)) {}

AsioPool::~AsioPool() { state_->pool.join(); }

void AsioPool::submit(WorkList& batch) {
  state_->batches.fetch_add(1, std::memory_order_relaxed);
  state_->works.fetch_add(batch.size(), std::memory_order_relaxed);
  while (Work* const work = batch.pop_front())
    boost::asio::post(state_->pool, [work] { work->run(*work); });
}

ThreadPoolStatistics AsioPool::statistics() const {
  return {.batches = state_->batches.load(std::memory_order_relaxed),
          .works = state_->works.load(std::memory_order_relaxed),
          .threads = state_->threads};
}

}  // namespace vblk::threadpool
