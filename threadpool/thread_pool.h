// A bounded pool of worker threads that runs Work nodes. Knows nothing of I/O.
//
// Threads are created on demand, up to `max_threads`, and kept until the pool is destroyed:
// creating a thread costs tens of microseconds, an idle one costs a stack that is not touched.
// Works move without a lock. A batch costs at most one call to wake workers, however many it wakes,
// and none where the workers that run already will come to it sooner than a sleeper would.
//
// How many should run: a work that waits behind `queued` others with `running` workers of mean
// service time S starts after about queued * S / running. A worker is woken while that is longer
// than waking one takes. So works that block for long, as on a slow disk, get a worker each, and
// short ones keep few workers busy instead of putting many to sleep and waking them again. The mean
// can be wrong about a work that runs now, so a thread of its own stays on guard while works wait:
// if nothing was taken for a millisecond, it gets them workers.
// docs/decisions/0003-when-to-wake-a-worker.md.
#pragma once

#include <memory>

#include "threadpool/pool.h"
#include "threadpool/work.h"

namespace vblk::threadpool {

class ThreadPool final : public Pool {
 public:
  // `options` out of bounds is the caller's mistake (asserted): option parsing checks first.
  explicit ThreadPool(ThreadPoolOptions options);
  // Runs everything that was submitted, then joins all threads.
  ~ThreadPool() override;

  // Hands over every node of `batch` and leaves it empty. Starts threads where that helps and the
  // bound allows; if the kernel refuses a thread and none exists at all, the batch is run on the
  // calling thread (nothing is ever lost). Thread-safe. Nodes start in FIFO order.
  void submit(WorkList& batch) override;

  [[nodiscard]] ThreadPoolStatistics statistics() const override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vblk::threadpool
