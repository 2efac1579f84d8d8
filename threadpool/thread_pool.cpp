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
struct ThreadPool::State {
  explicit State(ThreadPoolOptions pool_options) : options(std::move(pool_options)) {}

  void put(WorkList& batch);
  Work* take();
  void refill();
  void work_until_stopped();
  void sleep(WakeWord::Ticket ticket);
  void sleep_on_guard(WakeWord::Ticket ticket);
  [[nodiscard]] std::size_t running_workers() const;
  void run_measured(Work& work);
  [[nodiscard]] std::size_t missing_workers() const;
  bool start_threads(std::size_t count);
  bool start_thread();

  const ThreadPoolOptions options;
  WorkQueue queue{kQueueCapacity};
  WakeWord wake;
  std::atomic<bool> stopping{false};
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
  for (;;) {
    while (Work* const work = take()) run_measured(*work);
    const WakeWord::Ticket ticket = wake.prepare();
    if (Work* const work = take()) {
      wake.cancel();
      run_measured(*work);
      continue;
    }
    if (stopping.load(std::memory_order_acquire)) return wake.cancel();
    sleep(ticket);
  }
}

std::size_t ThreadPool::State::running_workers() const {
  const std::size_t threads_now = thread_count.load(std::memory_order_relaxed);
  const std::size_t not_running = wake.sleepers() + away.load(std::memory_order_relaxed);
  return threads_now > not_running ? threads_now - not_running : 0;
}

// One sleeper is on guard while others run; where nobody runs, nobody is disturbed.
void ThreadPool::State::sleep(WakeWord::Ticket ticket) {
  if (running_workers() > 0 && !guarded.exchange(true, std::memory_order_acq_rel)) {
    sleep_on_guard(ticket);
    guarded.store(false, std::memory_order_release);
  } else {
    wake.sleep(ticket);
  }
}

void ThreadPool::State::sleep_on_guard(WakeWord::Ticket ticket) {
  for (;;) {
    const std::uint64_t taken = queue.taken();
    if (!wake.sleep(ticket, kGuardPeriod)) return;
    if (queue.size() > 0 && queue.taken() == taken) return;
    ticket = wake.prepare();
    if (running_workers() == 0 || stopping.load(std::memory_order_acquire)) return wake.cancel();
  }
}

void ThreadPool::State::run_measured(Work& work) {
  if (work.takes_long) {
    away.fetch_add(1, std::memory_order_relaxed);
    work.run(work);
    away.fetch_sub(1, std::memory_order_relaxed);
    return;
  }
  const auto begin = Clock::now();
  work.run(work);
  const std::int64_t took_ns = std::chrono::nanoseconds(Clock::now() - begin).count();
  // Workers may overwrite each other's contribution: it is a mean all the same.
  const std::int64_t mean = service_time_ns.load(std::memory_order_relaxed);
  service_time_ns.store(mean + (took_ns - mean) / kServiceTimeWeight, std::memory_order_relaxed);
}

// How many more workers the works that wait now are worth.
std::size_t ThreadPool::State::missing_workers() const {
  const std::size_t queued = queue.size() + overflow_size.load(std::memory_order_relaxed);
  const std::size_t running = running_workers();
  const auto wake_cost_ns = static_cast<std::size_t>(options.wake_cost.count());
  const auto service_ns = static_cast<std::size_t>(service_time_ns.load(std::memory_order_relaxed));
  std::size_t wanted = running + queued;
  if (wake_cost_ns > 0) wanted = std::max<std::size_t>(1, queued * service_ns / wake_cost_ns);
  // Nobody waits without a guard.
  if (!guarded.load(std::memory_order_acquire)) wanted = std::max(wanted, running + 1);
  return wanted > running ? std::min(wanted - running, queued) : 0;
}

bool ThreadPool::State::start_threads(std::size_t count) {
  const std::lock_guard lock(mutex);
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
  state_->stopping.store(true, std::memory_order_release);
  state_->wake.wake(kMaxThreads);
  for (auto& thread : state_->threads) thread.join();
}

void ThreadPool::submit(WorkList& batch) {
  if (batch.empty()) return;
  State& state = *state_;
  const std::size_t count = batch.size();
  state.batches.fetch_add(1, std::memory_order_relaxed);
  state.works.fetch_add(count, std::memory_order_relaxed);
  state.put(batch);

  std::atomic_thread_fence(std::memory_order_seq_cst);
  const std::size_t missing = state.missing_workers();
  const std::size_t to_wake = std::min(missing, state.wake.sleepers());
  if (state.wake.wake(to_wake)) state.wakeups.fetch_add(1, std::memory_order_relaxed);
  const std::size_t threads = state.thread_count.load(std::memory_order_relaxed);
  if (missing == to_wake || threads == state.options.max_threads) return;
  if (state.start_threads(missing - to_wake)) return;
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
