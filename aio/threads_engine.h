// The `threads` engine: blocking system calls on a pool of worker threads. Works on everything.
//
//   owner thread   queue() collects; submit() answers what the page cache has by itself, for that
//                  costs less than handing it over, and gives the rest of the batch to the pool;
//                  reap() completes
//   worker         perform_blocking(), pushes the request on the completion queue, and writes the
//                  eventfd if the owner is asleep: once per batch of completions, not once per
//                  request
#pragma once

#include <memory>

#include "aio/engine.h"
#include "aio/engine_options.h"
#include "aio/error.h"
#include "threadpool/completion_queue.h"
#include "threadpool/pool.h"

namespace vblk::aio {

class ThreadsEngine final : public Engine {
 public:
  // Error: kExhausted if there is no descriptor left.
  static Expected<std::unique_ptr<ThreadsEngine>> create(const EngineOptions& options);
  ~ThreadsEngine() override;

  [[nodiscard]] std::string_view name() const override { return "threads"; }
  [[nodiscard]] bool supports(IoKind /*kind*/) const override { return true; }
  void queue(IoRequest& request) override;
  void submit() override;
  std::size_t reap() override;
  [[nodiscard]] int completion_fd() const override { return event_fd_; }
  [[nodiscard]] bool prepare_to_sleep() override;
  void wake_up() override;

  [[nodiscard]] threadpool::ThreadPoolStatistics pool_statistics() const {
    return pool_->statistics();
  }

 private:
  ThreadsEngine(const EngineOptions& options, int event_fd);
  static void run_on_worker(threadpool::Work& work) noexcept;
  void answer_from_page_cache();
  bool try_page_cache(IoRequest& request);

  int event_fd_;
  threadpool::WorkList batch_;
  threadpool::WorkList cached_;  // answered already, to be completed
  bool batch_may_be_cached_{false};
  unsigned misses_in_row_{0};
  threadpool::WorkList finished_;
  threadpool::CompletionQueue completions_;
  std::unique_ptr<threadpool::Pool> pool_;
};

}  // namespace vblk::aio
