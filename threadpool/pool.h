// What all pools of threads have in common, and which there are.
//
// `adaptive` is the pool of the product (thread_pool.h). The others exist to be compared with it
// and with each other: one queue under a mutex, every worker started at once, and a different
// answer to one question: how does whoever submits k works wake k workers?
//
//   condition        std::condition_variable, notified once per work, as QEMU's pool does it
//   one-word         all workers sleep on one futex word, woken by one FUTEX_WAKE of k
//   word-per-worker  each worker sleeps on a word of its own cache line: k calls of FUTEX_WAKE
//   chained          one FUTEX_WAKE of 1; a worker that leaves works behind wakes the next
//   asio             boost::asio::thread_pool and post()
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "threadpool/work.h"

namespace vblk::threadpool {

enum class PoolKind : std::uint8_t {
  kAdaptive,
  kCondition,
  kOneWord,
  kWordPerWorker,
  kChained,
  kAsio,
};
inline constexpr std::array kAllPoolKinds{PoolKind::kAdaptive, PoolKind::kCondition,
                                          PoolKind::kOneWord,  PoolKind::kWordPerWorker,
                                          PoolKind::kChained,  PoolKind::kAsio};
// "adaptive", "condition", "one-word", "word-per-worker", "chained", "asio".
[[nodiscard]] std::string_view to_string(PoolKind kind);
[[nodiscard]] std::optional<PoolKind> pool_kind_named(std::string_view name);

struct ThreadPoolOptions {
  std::size_t min_threads{0};     // started by the constructor; all but `adaptive` start all
  std::size_t max_threads{64};    // QEMU's bound for one pool; 1 to kMaxThreads
  std::string name{"vblk-pool"};  // thread name, at most 15 characters; not of `asio`
  // What it takes to wake a worker: the call, and the time until it runs. 0: wake one for every
  // work. Of `adaptive` alone.
  std::chrono::nanoseconds wake_cost{10'000};
};

// Counters since construction; each is read without a lock and may be a moment old.
struct ThreadPoolStatistics {
  std::uint64_t batches{0};
  std::uint64_t works{0};
  // Calls into the kernel to wake workers; of `condition`, notifications; of `asio` unknown, 0.
  std::uint64_t wakeups{0};
  std::size_t threads{0};
  std::chrono::nanoseconds service_time{0};  // of `adaptive`: mean of late
};

class Pool {
 public:
  static constexpr std::size_t kMaxThreads = 1024;

  Pool() = default;
  // Runs everything that was submitted, then joins all threads.
  virtual ~Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Hands over every node of `batch` and leaves it empty. Thread-safe. Nodes start in FIFO order.
  virtual void submit(WorkList& batch) = 0;
  [[nodiscard]] virtual ThreadPoolStatistics statistics() const = 0;
};

// `options` out of bounds is the caller's mistake (asserted). Throws std::system_error where the
// kernel refuses a thread that is to be started at once.
[[nodiscard]] std::unique_ptr<Pool> make_pool(PoolKind kind, const ThreadPoolOptions& options);

}  // namespace vblk::threadpool
