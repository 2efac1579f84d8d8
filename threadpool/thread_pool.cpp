#include "threadpool/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <memory>
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
constexpr std::size_t kCacheLineBytes = 64;
// Before anything has been measured every work gets a worker, as one on a slow disk should.
constexpr std::int64_t kServiceTimeAtStartNs = 1'000'000;
// A new measurement changes the mean by a sixteenth of the difference.
constexpr std::int64_t kServiceTimeWeight = 16;
// How long works may wait behind others that turn out to take longer than the mean.
constexpr std::chrono::milliseconds kGuardPeriod{1};

}  // namespace

// Who sleeps: a worker that has announced itself as a sleeper and then found the queue empty.
// Who wakes: a submitter, after its push. Either the submitter sees the announcement, or the worker
// sees the push: both have a full fence in between.
// Why no work is forgotten: after a push, as many workers as works wait have been woken or started
// by this very call, and each takes one or finds none left; or the guard is on duty, which needs
// nobody's help to find a work that is not taken, and goes off duty only after it has announced
// that and found the queue empty. Counts of who runs decide what is fast, never what is right: they
// may be wrong at any time.
struct ThreadPool::State {
  explicit State(ThreadPoolOptions pool_options)
      : options(std::move(pool_options)),
        workers(std::make_unique<Worker[]>(options.max_threads)) {}

  // What a worker is at. Whoever sets kAway counts it in `away`, and the worker counts itself out.
  enum class Activity : std::uint8_t { kNone, kRunning, kAway };
  struct alignas(kCacheLineBytes) Worker {
    std::atomic<Activity> activity{Activity::kNone};
  };

  void put(WorkList& batch);
  Work* take();
  void refill();
  void work_until_stopped(Worker& worker);
  [[nodiscard]] std::size_t waiting() const;
  [[nodiscard]] std::size_t running_workers() const;
  void run(Work& work, Worker& worker);
  void run_measured(Work& work);
  [[nodiscard]] std::size_t missing_workers(std::size_t queued) const;
  bool provide_workers();
  std::size_t wake_workers(std::size_t count);
  void call_guard();
  void guard_until_stopped();
  void count_running_as_away();
  std::size_t start_workers(std::size_t count);
  void start_guard();
  template <typename Body>
  bool start_thread(Body body);

  const ThreadPoolOptions options;
  const std::unique_ptr<Worker[]> workers;  // of which `worker_count` exist
  WorkQueue queue{kQueueCapacity};
  WakeWord wake;
  WakeWord wake_guard;
  std::atomic<bool> stopping{false};  // set under the mutex: no thread starts after it
  std::atomic<std::size_t> worker_count{0};
  std::atomic<std::size_t> away{0};  // workers at what takes long: nothing is to wait for them
  std::atomic<std::int64_t> service_time_ns{kServiceTimeAtStartNs};
  std::atomic<std::size_t> overflow_size{0};
  std::atomic<bool> guarded{false};  // the guard is on duty, or called to it

  std::mutex mutex;  // of what follows: nothing of it is touched for a work in the steady state
  WorkList overflow;
  std::vector<std::thread> threads;  // the workers and the guard
  bool has_guard{false};

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

void ThreadPool::State::work_until_stopped(Worker& worker) {
  for (;;) {
    while (Work* const work = take()) run(*work, worker);
    const WakeWord::Ticket ticket = wake.prepare();
    Work* const work = take();
    if (work == nullptr && !stopping.load(std::memory_order_acquire)) {
      wake.sleep(ticket);
      continue;
    }
    wake.cancel();
    if (work == nullptr) return;
    run(*work, worker);
  }
}

std::size_t ThreadPool::State::waiting() const {
  return queue.size() + overflow_size.load(std::memory_order_relaxed);
}

std::size_t ThreadPool::State::running_workers() const {
  const std::size_t existing = worker_count.load(std::memory_order_relaxed);
  const std::size_t not_running = wake.sleepers() + away.load(std::memory_order_relaxed);
  return existing > not_running ? existing - not_running : 0;
}

void ThreadPool::State::run(Work& work, Worker& worker) {
  if (work.takes_long) {
    worker.activity.store(Activity::kAway, std::memory_order_relaxed);
    away.fetch_add(1, std::memory_order_relaxed);
    provide_workers();  // for those who counted on this one
    work.run(work);
  } else {
    worker.activity.store(Activity::kRunning, std::memory_order_relaxed);
    run_measured(work);
  }
  if (worker.activity.exchange(Activity::kNone, std::memory_order_relaxed) == Activity::kAway)
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

// How many more workers `queued` works are worth.
std::size_t ThreadPool::State::missing_workers(std::size_t queued) const {
  const std::size_t running = running_workers();
  const auto wake_cost_ns = static_cast<std::size_t>(options.wake_cost.count());
  const auto service_ns = static_cast<std::size_t>(service_time_ns.load(std::memory_order_relaxed));
  std::size_t wanted = running + queued;
  if (wake_cost_ns > 0) wanted = std::max<std::size_t>(1, queued * service_ns / wake_cost_ns);
  return wanted > running ? std::min(wanted - running, queued) : 0;
}

// False if there is no worker at all, and none can be had.
bool ThreadPool::State::provide_workers() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const std::size_t queued = waiting();
  if (queued == 0) return true;
  const std::size_t missing = missing_workers(queued);
  const std::size_t asleep = std::min(missing, wake.sleepers());
  std::size_t provided = wake_workers(asleep);
  if (missing > asleep) provided += start_workers(missing - asleep);
  const std::size_t existing = worker_count.load(std::memory_order_relaxed);
  // Where nobody sleeps and nobody can be started, every worker looks again or never will.
  const bool can_provide_more = wake.sleepers() > 0 || existing < options.max_threads;
  if (provided < queued && can_provide_more) call_guard();
  return existing > 0;
}

// How many were asleep and are not any more.
std::size_t ThreadPool::State::wake_workers(std::size_t count) {
  if (count == 0) return 0;
  wakeups.fetch_add(1, std::memory_order_relaxed);
  return wake.wake(count);
}

void ThreadPool::State::call_guard() {
  if (guarded.exchange(true, std::memory_order_seq_cst)) return;
  wakeups.fetch_add(1, std::memory_order_relaxed);
  if (wake_guard.wake(1) > 0) return;
  const std::lock_guard lock(mutex);
  if (stopping.load(std::memory_order_relaxed)) return;
  start_guard();
  // Out of threads: works depend on the workers that there are.
  if (!has_guard) guarded.store(false, std::memory_order_seq_cst);
}

// With the mutex held. No-op if there is one.
void ThreadPool::State::start_guard() {
  if (!has_guard) has_guard = start_thread([this] { guard_until_stopped(); });
}

void ThreadPool::State::guard_until_stopped() {
  while (!stopping.load(std::memory_order_acquire)) {
    const std::uint64_t taken = queue.taken();
    wake_guard.sleep(wake_guard.prepare(), kGuardPeriod);
    if (queue.taken() != taken) continue;
    if (const std::size_t stuck = waiting(); stuck > 0) {
      count_running_as_away();
      const std::size_t asleep = std::min(stuck, wake.sleepers());
      wake_workers(asleep);
      if (stuck > asleep) start_workers(stuck - asleep);
      continue;
    }
    // Nothing has happened for a period: off duty.
    const WakeWord::Ticket ticket = wake_guard.prepare();
    guarded.store(false, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (waiting() > 0 || stopping.load(std::memory_order_acquire)) {
      wake_guard.cancel();
      guarded.store(true, std::memory_order_seq_cst);
    } else {
      wake_guard.sleep(ticket);
    }
  }
}

// None of them has taken a work for a whole period: until they do, they are of no use to others.
void ThreadPool::State::count_running_as_away() {
  const std::size_t existing = worker_count.load(std::memory_order_relaxed);
  for (std::size_t i = 0; i < existing; ++i) {
    auto expected = Activity::kRunning;
    if (workers[i].activity.compare_exchange_strong(expected, Activity::kAway,
                                                    std::memory_order_relaxed)) {
      away.fetch_add(1, std::memory_order_relaxed);
    }
  }
}

// Returns how many it has started: fewer than `count` where the bound or the kernel says so.
std::size_t ThreadPool::State::start_workers(std::size_t count) {
  if (worker_count.load(std::memory_order_relaxed) == options.max_threads) return 0;
  const std::lock_guard lock(mutex);
  if (stopping.load(std::memory_order_relaxed)) return 0;
  std::size_t started = 0;
  for (; started < count && worker_count.load(std::memory_order_relaxed) < options.max_threads;
       ++started) {
    Worker& worker = workers[worker_count.fetch_add(1, std::memory_order_relaxed)];
    if (start_thread([this, &worker] { work_until_stopped(worker); })) continue;
    worker_count.fetch_sub(1, std::memory_order_relaxed);
    break;  // out of threads: those that exist do the work
  }
  // One worker alone needs no guard. With the first of several, so that none starts later, in the
  // steady state.
  if (started > 0 && options.max_threads > 1) start_guard();
  return started;
}

// With the mutex held.
template <typename Body>
bool ThreadPool::State::start_thread(Body body) {
  try {
    threads.emplace_back([this, body] {
      pthread_setname_np(pthread_self(), options.name.substr(0, kThreadNameLengthMax).c_str());
      body();
    });
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

ThreadPool::ThreadPool(ThreadPoolOptions options)
    : state_(std::make_unique<State>(std::move(options))) {
  assert(state_->options.max_threads >= 1 && state_->options.max_threads <= kMaxThreads);
  assert(state_->options.min_threads <= state_->options.max_threads);
  state_->start_workers(state_->options.min_threads);
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
          .threads = state_->worker_count.load(std::memory_order_relaxed),
          .service_time =
              std::chrono::nanoseconds(state_->service_time_ns.load(std::memory_order_relaxed))};
}

}  // namespace vblk::threadpool
