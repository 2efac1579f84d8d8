#include "threadpool/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <mutex>
#include <pthread.h>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "threadpool/wake_word.h"
#include "threadpool/work_queue.h"

namespace vblk::threadpool {

namespace {

using Clock = std::chrono::steady_clock;

// The kernel takes 15 characters and a terminating zero.
constexpr std::size_t kThreadNameLengthMax = 15;
// Works in the ring; what is beyond waits in a list under a lock. 64 KiB.
constexpr std::size_t kQueueCapacity = 4096;
// Before anything has been measured every work gets a worker, as one on a slow disk should.
constexpr std::int64_t kServiceTimeAtStartNs = 1'000'000;
// A new measurement changes the mean by a sixteenth of the difference.
constexpr std::int64_t kServiceTimeWeight = 16;
// How long works may wait behind others that turn out to take longer than the mean.
constexpr std::chrono::milliseconds kGuardPeriod{1};

}  // namespace

// Who may sleep: a worker that has announced itself as a sleeper and then found the queue empty.
// Who wakes: a submitter, after its push. Either the submitter sees the announcement, or the worker
// sees the push (both have a full fence in between), so a submitter may rely on workers that it
// sees running: each looks at the queue once more before it sleeps.
// Not every worker on which a submitter relied keeps that promise: one may turn out to run what
// takes long, and the guard may leave for a work of its own. Such a worker looks after what still
// waits first, just as a submitter does (provide_workers).
struct ThreadPool::State {
  explicit State(ThreadPoolOptions pool_options) : options(std::move(pool_options)) {}

  void put(WorkList& batch);
  Work* take();
  void refill();
  void work_until_stopped();
  bool sleep(WakeWord::Ticket ticket);
  void sleep_on_guard();
  [[nodiscard]] std::size_t waiting() const;
  [[nodiscard]] std::size_t running_workers() const;
  void run(Work& work);
  void run_measured(Work& work);
  [[nodiscard]] std::size_t missing_workers() const;
  bool provide_workers();
  bool start_threads(std::size_t count);
  bool start_thread();

  const ThreadPoolOptions options;
  WorkQueue queue{kQueueCapacity};
  WakeWord wake;
  WakeWord wake_guard;  // the guard's own: who is woken for a work should be somebody else
  std::atomic<bool> stopping{false};  // set under the mutex: no thread starts after it
  std::atomic<std::size_t> thread_count{0};
  std::atomic<std::size_t> away{0};  // workers that run what takes long
  std::atomic<std::int64_t> service_time_ns{kServiceTimeAtStartNs};
  std::atomic<std::size_t> overflow_size{0};
  std::atomic<bool> guarded{false};  // a sleeper is on guard

  std::mutex mutex;  // of what follows: nothing of it is touched for a work in the steady state
  WorkList overflow;
  std::vector<std::thread> threads;

  std::atomic<std::uint64_t> batches{0};
  std::atomic<std::uint64_t> works{0};
  std::atomic<std::uint64_t> wakeups{0};
};

void ThreadPool::State::put(WorkList& batch) {
  // Behind works that wait in the list there is no way around them.
  if (overflow_size.load(std::memory_order_acquire) == 0) {
    while (Work* const work = batch.pop_front()) {
      if (queue.push(*work)) continue;
      const std::lock_guard lock(mutex);
      overflow.push_back(*work);
      overflow.append(batch);
      overflow_size.store(overflow.size(), std::memory_order_release);
    }
    return;
  }
  const std::lock_guard lock(mutex);
  overflow.append(batch);
  overflow_size.store(overflow.size(), std::memory_order_release);
}

void ThreadPool::State::refill() {
  const std::lock_guard lock(mutex);
  // Only as many as have room for certain: a work taken off the list cannot be put back in front.
  for (std::size_t room = kQueueCapacity / 2; room > 0 && queue.size() < kQueueCapacity / 2;
       --room) {
    Work* const work = overflow.pop_front();
    if (work == nullptr) break;
    if (!queue.push(*work)) {
      overflow.push_back(*work);
      break;
    }
  }
  overflow_size.store(overflow.size(), std::memory_order_release);
}

Work* ThreadPool::State::take() {
  if (Work* const work = queue.pop()) return work;
  if (overflow_size.load(std::memory_order_acquire) == 0) return nullptr;
  refill();
  return queue.pop();
}

void ThreadPool::State::work_until_stopped() {
  bool was_guard = false;
  for (;;) {
    Work* work = take();
    if (work == nullptr) {
      const WakeWord::Ticket ticket = wake.prepare();
      work = take();
      if (work == nullptr && !stopping.load(std::memory_order_acquire)) {
        was_guard = sleep(ticket);
        continue;
      }
      wake.cancel();
      if (work == nullptr) return;
    }
    if (std::exchange(was_guard, false)) provide_workers();
    run(*work);
  }
}

std::size_t ThreadPool::State::waiting() const {
  return queue.size() + overflow_size.load(std::memory_order_relaxed);
}

std::size_t ThreadPool::State::running_workers() const {
  const std::size_t threads_now = thread_count.load(std::memory_order_relaxed);
  const std::size_t not_running =
      wake.sleepers() + wake_guard.sleepers() + away.load(std::memory_order_relaxed);
  return threads_now > not_running ? threads_now - not_running : 0;
}

// One sleeper is on guard while others run; where nobody runs, nobody is disturbed. True if it was
// on guard.
bool ThreadPool::State::sleep(WakeWord::Ticket ticket) {
  if (running_workers() == 0 || guarded.exchange(true, std::memory_order_seq_cst)) {
    wake.sleep(ticket);
    return false;
  }
  wake.cancel();
  sleep_on_guard();
  guarded.store(false, std::memory_order_seq_cst);
  return true;
}

void ThreadPool::State::sleep_on_guard() {
  // A submitter may have counted on waking it before it went on guard.
  bool overlooked = true;
  for (;;) {
    const std::uint64_t taken = queue.taken();
    const WakeWord::Ticket ticket = wake_guard.prepare();
    if (running_workers() == 0 || (overlooked && waiting() > 0) ||
        stopping.load(std::memory_order_acquire)) {
      return wake_guard.cancel();
    }
    overlooked = false;
    if (!wake_guard.sleep(ticket, kGuardPeriod)) return;
    if (waiting() > 0 && queue.taken() == taken) return;
  }
}

void ThreadPool::State::run(Work& work) {
  if (!work.takes_long) return run_measured(work);
  away.fetch_add(1, std::memory_order_seq_cst);
  provide_workers();
  work.run(work);
  away.fetch_sub(1, std::memory_order_relaxed);
}

void ThreadPool::State::run_measured(Work& work) {
  const auto begin = Clock::now();
  work.run(work);
  const std::int64_t took_ns = std::chrono::nanoseconds(Clock::now() - begin).count();
  // Workers may overwrite each other's contribution: it is a mean all the same.
  const std::int64_t mean = service_time_ns.load(std::memory_order_relaxed);
  service_time_ns.store(mean + (took_ns - mean) / kServiceTimeWeight, std::memory_order_relaxed);
}

// How many more workers the works that wait now are worth.
std::size_t ThreadPool::State::missing_workers() const {
  const std::size_t queued = waiting();
  if (queued == 0) return 0;
  const std::size_t running = running_workers();
  const auto wake_cost_ns = static_cast<std::size_t>(options.wake_cost.count());
  const auto service_ns = static_cast<std::size_t>(service_time_ns.load(std::memory_order_relaxed));
  std::size_t wanted = running + queued;
  if (wake_cost_ns > 0) wanted = std::max<std::size_t>(1, queued * service_ns / wake_cost_ns);
  // Nobody waits without a guard: one more than those who take what waits.
  if (!guarded.load(std::memory_order_seq_cst))
    wanted = std::max(wanted, std::max<std::size_t>(running, 1) + 1);
  return wanted > running ? std::min(wanted - running, queued) : 0;
}

// False if there is no thread at all, and none can be had.
bool ThreadPool::State::provide_workers() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  std::size_t missing = missing_workers();
  if (missing == 0) return true;
  const std::size_t to_wake = std::min(missing, wake.sleepers());
  if (wake.wake(to_wake)) wakeups.fetch_add(1, std::memory_order_relaxed);
  missing -= to_wake;
  if (missing == 0) return true;
  if (thread_count.load(std::memory_order_relaxed) < options.max_threads)
    return start_threads(missing);
  // Everybody else runs: there is nothing to guard any more.
  if (wake_guard.wake(1)) wakeups.fetch_add(1, std::memory_order_relaxed);
  return true;
}

bool ThreadPool::State::start_threads(std::size_t count) {
  const std::lock_guard lock(mutex);
  if (stopping.load(std::memory_order_relaxed)) return true;
  count = std::min(count, options.max_threads - threads.size());
  for (; count > 0 && start_thread(); --count) {
  }
  return !threads.empty();
}

bool ThreadPool::State::start_thread() {
  thread_count.fetch_add(1, std::memory_order_relaxed);
  try {
    threads.emplace_back([this] {
      pthread_setname_np(pthread_self(), options.name.substr(0, kThreadNameLengthMax).c_str());
      work_until_stopped();
    });
  } catch (const std::system_error&) {
    thread_count.fetch_sub(1, std::memory_order_relaxed);
    return false;  // out of threads: those that exist do the work
  }
  return true;
}

ThreadPool::ThreadPool(ThreadPoolOptions options)
    : state_(std::make_unique<State>(std::move(options))) {
  assert(state_->options.max_threads >= 1 && state_->options.max_threads <= kMaxThreads);
  assert(state_->options.min_threads <= state_->options.max_threads);
  if (state_->options.min_threads > 0) state_->start_threads(state_->options.min_threads);
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping.store(true, std::memory_order_release);
  }
  state_->wake.wake(kMaxThreads);
  state_->wake_guard.wake(1);
  for (auto& thread : state_->threads) thread.join();
}

void ThreadPool::submit(WorkList& batch) {
  if (batch.empty()) return;
  State& state = *state_;
  const std::size_t count = batch.size();
  state.batches.fetch_add(1, std::memory_order_relaxed);
  state.works.fetch_add(count, std::memory_order_relaxed);
  state.put(batch);

  if (state.provide_workers()) return;
  // The kernel gives no thread at all: better late than never.
  while (Work* const work = state.take()) state.run_measured(*work);
}

ThreadPoolStatistics ThreadPool::statistics() const {
  return {.batches = state_->batches.load(std::memory_order_relaxed),
          .works = state_->works.load(std::memory_order_relaxed),
          .wakeups = state_->wakeups.load(std::memory_order_relaxed),
          .threads = state_->thread_count.load(std::memory_order_relaxed),
          .service_time =
              std::chrono::nanoseconds(state_->service_time_ns.load(std::memory_order_relaxed))};
}

}  // namespace vblk::threadpool
