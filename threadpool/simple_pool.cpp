#include "threadpool/simple_pool.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <condition_variable>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <vector>

#include "threadpool/wake_word.h"

namespace vblk::threadpool {

namespace {

constexpr std::size_t kThreadNameLengthMax = 15;

// How workers sleep and are woken. The mutex is the queue's: a worker that finds it empty sleeps
// without letting a submitter in between.
class Wakeup {
 public:
  Wakeup() = default;
  virtual ~Wakeup() = default;
  Wakeup(const Wakeup&) = delete;
  Wakeup& operator=(const Wakeup&) = delete;

  // With `lock` held, before and after.
  virtual void sleep(std::unique_lock<std::mutex>& lock, std::size_t worker) = 0;
  // After `count` works were queued, and the mutex released. Returns the calls that it made.
  virtual std::size_t wake(std::size_t count) = 0;
  virtual void wake_all() = 0;
  // A worker has taken a work and left others; without the mutex. Returns the calls that it made.
  virtual std::size_t left_others() { return 0; }
};

class ConditionWakeup final : public Wakeup {
 public:
  void sleep(std::unique_lock<std::mutex>& lock, std::size_t /*worker*/) override {
    condition_.wait(lock);
  }
  std::size_t wake(std::size_t count) override {
    for (std::size_t i = 0; i < count; ++i) condition_.notify_one();
    return count;
  }
  void wake_all() override { condition_.notify_all(); }

 private:
  std::condition_variable condition_;
};

// One word for all; `chained`: only one is woken at a time.
class OneWordWakeup final : public Wakeup {
 public:
  explicit OneWordWakeup(bool chained) : chained_(chained) {}
  void sleep(std::unique_lock<std::mutex>& lock, std::size_t /*worker*/) override {
    const WakeWord::Ticket ticket = word_.prepare();
    lock.unlock();
    word_.sleep(ticket);
    lock.lock();
  }
  std::size_t wake(std::size_t count) override { return wake_some(chained_ ? 1 : count); }
  void wake_all() override { word_.wake(Pool::kMaxThreads); }
  std::size_t left_others() override { return chained_ ? wake_some(1) : 0; }

 private:
  std::size_t wake_some(std::size_t count) {
    if (word_.sleepers() == 0) return 0;
    word_.wake(count);
    return 1;
  }

  const bool chained_;
  WakeWord word_;
};

// A word for each, and a stack of who sleeps: the last to fall asleep has the warmest cache.
class WordPerWorkerWakeup final : public Wakeup {
 public:
  WordPerWorkerWakeup(std::mutex& mutex, std::size_t worker_count)
      : mutex_(mutex), words_(worker_count) {
    asleep_.reserve(worker_count);
  }
  void sleep(std::unique_lock<std::mutex>& lock, std::size_t worker) override {
    asleep_.push_back(worker);
    const WakeWord::Ticket ticket = words_[worker].prepare();
    lock.unlock();
    words_[worker].sleep(ticket);
    lock.lock();
    // A sleep may end for no reason: then it is still on the stack.
    std::erase(asleep_, worker);
  }
  std::size_t wake(std::size_t count) override {
    std::size_t calls = 0;
    for (; calls < count; ++calls) {
      std::unique_lock lock(mutex_);
      if (asleep_.empty()) break;
      const std::size_t worker = asleep_.back();
      asleep_.pop_back();
      lock.unlock();
      words_[worker].wake(1);
    }
    return calls;
  }
  void wake_all() override {
    for (WakeWord& word : words_) word.wake(1);
  }

 private:
  std::mutex& mutex_;
  std::vector<WakeWord> words_;
  std::vector<std::size_t> asleep_;
};

std::unique_ptr<Wakeup> make_wakeup(PoolKind kind, std::mutex& mutex, std::size_t worker_count) {
  if (kind == PoolKind::kCondition) return std::make_unique<ConditionWakeup>();
  if (kind == PoolKind::kWordPerWorker)
    return std::make_unique<WordPerWorkerWakeup>(mutex, worker_count);
  assert(kind == PoolKind::kOneWord || kind == PoolKind::kChained);
  return std::make_unique<OneWordWakeup>(kind == PoolKind::kChained);
}

}  // namespace

struct SimplePool::State {
  State(PoolKind kind, std::size_t worker_count) : wakeup(make_wakeup(kind, mutex, worker_count)) {}

  void work_until_stopped(std::size_t worker);

  std::mutex mutex;  // of the queue, the waiting and the stopping
  WorkList queue;
  std::size_t waiting{0};  // workers that sleep, or are about to
  bool stopping{false};
  std::unique_ptr<Wakeup> wakeup;
  std::vector<std::thread> threads;
  std::atomic<std::uint64_t> batches{0};
  std::atomic<std::uint64_t> works{0};
  std::atomic<std::uint64_t> wakeups{0};
};

void SimplePool::State::work_until_stopped(std::size_t worker) {
  std::unique_lock lock(mutex);
  for (;;) {
    while (queue.empty() && !stopping) {
      ++waiting;
      wakeup->sleep(lock, worker);
      --waiting;
    }
    Work* const work = queue.pop_front();
    if (work == nullptr) return;
    const bool others = !queue.empty();
    lock.unlock();
    if (others) wakeups.fetch_add(wakeup->left_others(), std::memory_order_relaxed);
    work->run(*work);
    lock.lock();
  }
}

SimplePool::SimplePool(PoolKind kind, const ThreadPoolOptions& options)
    : state_(std::make_unique<State>(kind, options.max_threads)) {
  const std::string name = options.name.substr(0, kThreadNameLengthMax);
  for (std::size_t i = 0; i < options.max_threads; ++i) {
    state_->threads.emplace_back([state = state_.get(), name, i] {
      pthread_setname_np(pthread_self(), name.c_str());
      state->work_until_stopped(i);
    });
  }
}

SimplePool::~SimplePool() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->wakeup->wake_all();
  for (std::thread& thread : state_->threads) thread.join();
}

void SimplePool::submit(WorkList& batch) {
  if (batch.empty()) return;
  const std::size_t count = batch.size();
  state_->batches.fetch_add(1, std::memory_order_relaxed);
  state_->works.fetch_add(count, std::memory_order_relaxed);
  std::size_t sleepers = 0;
  {
    const std::lock_guard lock(state_->mutex);
    state_->queue.append(batch);
    sleepers = state_->waiting;
  }
  // Where nobody waits, every worker looks at the queue again before it does.
  const std::size_t calls = sleepers == 0 ? 0 : state_->wakeup->wake(std::min(count, sleepers));
  state_->wakeups.fetch_add(calls, std::memory_order_relaxed);
}

ThreadPoolStatistics SimplePool::statistics() const {
  return {.batches = state_->batches.load(std::memory_order_relaxed),
          .works = state_->works.load(std::memory_order_relaxed),
          .wakeups = state_->wakeups.load(std::memory_order_relaxed),
          .threads = state_->threads.size()};
}

}  // namespace vblk::threadpool
