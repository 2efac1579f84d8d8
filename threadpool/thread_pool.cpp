#include "threadpool/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <condition_variable>
#include <mutex>
#include <pthread.h>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace vblk::threadpool {

namespace {

// A worker asleep. Each has a condition variable of its own, so that waking several of them does
// not make them meet on one futex word.
struct Sleeper {
  std::condition_variable wake;
  bool woken{false};
};

// The kernel takes 15 characters and a terminating zero.
constexpr std::size_t kThreadNameLengthMax = 15;

}  // namespace

// One lock guards the queue and the list of sleepers; it is taken once per batch by the submitter
// and once per work by a worker. Workers take one work at a time: each may block in the kernel for
// long.
struct ThreadPool::State {
  explicit State(ThreadPoolOptions pool_options) : options(std::move(pool_options)) {}

  void work_until_stopped();
  void wake_sleepers(std::size_t count, std::unique_lock<std::mutex>& lock);
  bool start_thread();

  const ThreadPoolOptions options;
  std::mutex mutex;
  WorkList queue;
  std::vector<Sleeper*> sleepers;  // the last one fell asleep last: its cache is warmest
  std::vector<std::thread> threads;
  bool stopping{false};

  std::atomic<std::uint64_t> batches{0};
  std::atomic<std::uint64_t> works{0};
  std::atomic<std::uint64_t> wakeups{0};
  std::atomic<std::size_t> thread_count{0};
};

void ThreadPool::State::work_until_stopped() {
  Sleeper self;
  std::unique_lock lock(mutex);
  for (;;) {
    while (Work* const work = queue.pop_front()) {
      lock.unlock();
      work->run(*work);
      lock.lock();
    }
    if (stopping) return;
    self.woken = false;
    sleepers.push_back(&self);
    self.wake.wait(lock, [&self] { return self.woken; });
  }
}

// Wakes at most `count` sleepers, the last asleep first, and releases the lock.
void ThreadPool::State::wake_sleepers(std::size_t count, std::unique_lock<std::mutex>& lock) {
  while (count-- > 0 && !sleepers.empty()) {
    Sleeper* const sleeper = sleepers.back();
    sleepers.pop_back();
    sleeper->woken = true;
    wakeups.fetch_add(1, std::memory_order_relaxed);
    // Notified under the lock: the sleeper lives on its worker's stack and may go as soon as it
    // sees `woken`.
    sleeper->wake.notify_one();
  }
  lock.unlock();
}

bool ThreadPool::State::start_thread() {
  try {
    threads.emplace_back([this] {
      pthread_setname_np(pthread_self(), options.name.substr(0, kThreadNameLengthMax).c_str());
      work_until_stopped();
    });
  } catch (const std::system_error&) {
    return false;  // out of threads: those that exist do the work
  }
  thread_count.fetch_add(1, std::memory_order_relaxed);
  return true;
}

ThreadPool::ThreadPool(ThreadPoolOptions options)
    : state_(std::make_unique<State>(std::move(options))) {
  assert(state_->options.max_threads >= 1 && state_->options.max_threads <= kMaxThreads);
  assert(state_->options.min_threads <= state_->options.max_threads);
  const std::unique_lock lock(state_->mutex);
  for (std::size_t i = 0; i < state_->options.min_threads; ++i) state_->start_thread();
}

ThreadPool::~ThreadPool() {
  std::unique_lock lock(state_->mutex);
  state_->stopping = true;
  state_->wake_sleepers(state_->sleepers.size(), lock);
  for (auto& thread : state_->threads) thread.join();
}

void ThreadPool::submit(WorkList& batch) {
  if (batch.empty()) return;
  State& state = *state_;
  const std::size_t count = batch.size();
  state.batches.fetch_add(1, std::memory_order_relaxed);
  state.works.fetch_add(count, std::memory_order_relaxed);

  std::unique_lock lock(state.mutex);
  state.queue.append(batch);
  // Works that no sleeper will take need new threads, as far as the bound allows.
  const std::size_t unserved =
      state.queue.size() - std::min(state.queue.size(), state.sleepers.size());
  const std::size_t room = state.options.max_threads - state.threads.size();
  for (std::size_t i = std::min({unserved, room, count}); i > 0 && state.start_thread(); --i) {
  }
  if (!state.threads.empty()) {
    state.wake_sleepers(count, lock);
    return;
  }
  // The kernel gives no thread at all: better late than never.
  while (Work* const work = state.queue.pop_front()) {
    lock.unlock();
    work->run(*work);
    lock.lock();
  }
}

ThreadPoolStatistics ThreadPool::statistics() const {
  return {.batches = state_->batches.load(std::memory_order_relaxed),
          .works = state_->works.load(std::memory_order_relaxed),
          .wakeups = state_->wakeups.load(std::memory_order_relaxed),
          .threads = state_->thread_count.load(std::memory_order_relaxed)};
}

}  // namespace vblk::threadpool
