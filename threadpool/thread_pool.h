// A bounded pool of worker threads that runs Work nodes. Knows nothing of I/O.
//
// Threads are created on demand, up to `max_threads`, and kept until the pool is destroyed:
// creating a thread costs tens of microseconds, an idle one costs a stack that is not touched. A
// batch costs one lock and at most one futex call per worker that is woken; when every worker is
// busy already, submitting makes no system call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "threadpool/work.h"

namespace vblk::threadpool {

struct ThreadPoolOptions {
  std::size_t min_threads{0};     // started by the constructor
  std::size_t max_threads{64};    // QEMU's bound for one pool; 1 to kMaxThreads
  std::string name{"vblk-pool"};  // thread name, at most 15 characters
};

// Counters since construction; each is read without a lock and may be a moment old.
struct ThreadPoolStatistics {
  std::uint64_t batches{0};
  std::uint64_t works{0};
  std::uint64_t wakeups{0};  // calls into the kernel to wake a worker
  std::size_t threads{0};
};

class ThreadPool {
 public:
  static constexpr std::size_t kMaxThreads = 1024;

  // `options` out of bounds is the caller's mistake (asserted): option parsing checks first.
  explicit ThreadPool(ThreadPoolOptions options);
  // Runs everything that was submitted, then joins all threads.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Hands over every node of `batch` and leaves it empty. Starts threads where all are busy and the
  // bound allows; if the kernel refuses a thread and none exists at all, the batch is run on the
  // calling thread (nothing is ever lost). Thread-safe. Nodes start in FIFO order.
  void submit(WorkList& batch);

  [[nodiscard]] ThreadPoolStatistics statistics() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vblk::threadpool
