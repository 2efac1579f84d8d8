#include "blockdev/io_loop.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstddef>
#include <future>
#include <sys/epoll.h>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <boost/asio/bind_allocator.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>

namespace vblk::blockdev {

namespace asio = boost::asio;
using Clock = std::chrono::steady_clock;

namespace {

// While the loop is busy it looks at Asio only this often, because each look is an epoll_wait. 64
// cycles are a few dozen microseconds: timers (the only thing that waits for it) are that late at
// most.
constexpr unsigned kCyclesPerAsioPoll = 64;

// A window that starts, or has shrunk, below this is none: a look at every ring takes longer.
constexpr std::chrono::nanoseconds kPollWindowMin{4000};

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Room for one Asio operation, so that waiting on a descriptor never allocates.
// One operation at a time: a watch has one wait outstanding.
class OperationMemory {
 public:
  void* allocate(std::size_t bytes) {
    if (in_use_ || bytes > sizeof(storage_)) return ::operator new(bytes);
    in_use_ = true;
    return &storage_;
  }
  void deallocate(void* pointer) {
    if (pointer == &storage_) {
      in_use_ = false;
    } else {
      ::operator delete(pointer);
    }
  }

 private:
  alignas(std::max_align_t) std::array<std::byte, 256> storage_;
  bool in_use_{false};
};

template <typename T>
struct OperationAllocator {
  using value_type = T;
  explicit OperationAllocator(OperationMemory& room) : memory(&room) {}
  template <typename U>
  explicit OperationAllocator(const OperationAllocator<U>& other) : memory(other.memory) {}
  T* allocate(std::size_t count) { return static_cast<T*>(memory->allocate(count * sizeof(T))); }
  void deallocate(T* pointer, std::size_t /*count*/) { memory->deallocate(pointer); }
  template <typename U>
  bool operator==(const OperationAllocator<U>& other) const {
    return memory == other.memory;
  }
  OperationMemory* memory;
};

// Asks epoll whether it can wait on a descriptor. Asio takes one that epoll refuses (EPERM: regular
// files, /dev/zero) and then reports it ready for ever. Its descriptor is made beforehand, so that
// the answer does not depend on whether one is left.
class WaitProbe {
 public:
  WaitProbe() : epoll_fd_(::epoll_create1(EPOLL_CLOEXEC)) {
    if (epoll_fd_ < 0) throw std::system_error(errno, std::generic_category(), "epoll_create1");
  }
  ~WaitProbe() { ::close(epoll_fd_); }
  WaitProbe(const WaitProbe&) = delete;
  WaitProbe& operator=(const WaitProbe&) = delete;

  [[nodiscard]] bool can_be_waited_on(int fd) const {
    epoll_event event{};
    event.events = EPOLLIN;
    if (::epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) return false;
    ::epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, fd, nullptr);
    return true;
  }

 private:
  int epoll_fd_;
};

// What outlives a Watch handle until Asio has let go of the descriptor.
struct FdWatchState {
  explicit FdWatchState(asio::io_context& io) : descriptor(io) {}

  // The callback may destroy its own watch: it runs outside the state and goes back if that lives.
  void run_callback() {
    if (closed) return;
    auto callback = std::move(on_readable);
    callback();
    if (!closed) on_readable = std::move(callback);
  }

  asio::posix::stream_descriptor descriptor;
  std::move_only_function<void()> on_readable;
  bool closed{false};
  OperationMemory memory;
  bool waiting{false};
};

}  // namespace

struct IoLoop::State {
  explicit State(IoLoopOptions loop_options) : options(loop_options) {}

  bool cycle();
  [[nodiscard]] bool keep_polling();
  void sleep();
  void adapt_window(std::chrono::nanoseconds slept);
  void arm_watches();
  void arm(const std::shared_ptr<FdWatchState>& watch);
  void compact_pollers();
  void run_asio_ready();

  IoLoopOptions options;
  WaitProbe probe;
  asio::io_context io{1};  // one thread runs it; others only post
  asio::executor_work_guard<asio::io_context::executor_type> guard{io.get_executor()};
  std::vector<Poller*> pollers[2];  // by PollStage; nullptr where removed during a cycle
  bool pollers_removed{false};
  std::vector<std::shared_ptr<FdWatchState>> watches;
  std::atomic<bool> posted{false};
  std::atomic<bool> stopping{false};
  std::atomic<std::thread::id> owner;
  unsigned cycles_since_asio{0};
  bool polling{false};
  Clock::time_point poll_until;
  IoLoopStatistics statistics;
};

// One look at everything. Pollers may be added or removed by what they do.
bool IoLoop::State::cycle() {
  bool progress = false;
  for (auto& stage : pollers) {
    for (std::size_t i = 0; i < stage.size(); ++i) {
      if (stage[i] != nullptr) progress |= stage[i]->poll();
    }
  }
  for (auto& stage : pollers) {
    for (std::size_t i = 0; i < stage.size(); ++i) {
      if (stage[i] != nullptr) stage[i]->settle();
    }
  }
  if (pollers_removed) compact_pollers();
  return progress;
}

void IoLoop::State::compact_pollers() {
  for (auto& stage : pollers) std::erase(stage, nullptr);
  pollers_removed = false;
}

void IoLoop::State::run_asio_ready() {
  cycles_since_asio = 0;
  posted.store(false, std::memory_order_relaxed);
  // The exchange of data is Asio's own (its queue is locked); the flag only says when to look.
  io.poll();
}

// Waits are armed just before a sleep, after the pollers have drained their descriptors: arming a
// descriptor that is still readable would end the next sleep at once.
void IoLoop::State::arm_watches() {
  for (const auto& watch : watches) {
    if (!watch->waiting) arm(watch);
  }
}

void IoLoop::State::arm(const std::shared_ptr<FdWatchState>& watch) {
  watch->waiting = true;
  watch->descriptor.async_wait(
      asio::posix::stream_descriptor::wait_read,
      asio::bind_allocator(OperationAllocator<void>(watch->memory),
                           [watch](const boost::system::error_code& error) {
                             watch->waiting = false;
                             if (!error) watch->run_callback();
                           }));
}

// Whether to look again instead of sleeping. Asked when a cycle found nothing.
bool IoLoop::State::keep_polling() {
  if (statistics.poll_window.count() == 0) return false;
  const auto now = Clock::now();
  if (!polling) {
    polling = true;
    poll_until = now + statistics.poll_window;
  }
  if (now < poll_until) {
    cpu_relax();
    return true;
  }
  polling = false;
  return false;
}

void IoLoop::State::adapt_window(std::chrono::nanoseconds slept) {
  auto& window = statistics.poll_window;
  if (slept <= options.poll_max) {
    window =
        std::min<std::chrono::nanoseconds>(std::max(2 * window, kPollWindowMin), options.poll_max);
  } else {
    window /= 2;
    if (window < kPollWindowMin) window = {};
  }
}

void IoLoop::State::sleep() {
  std::size_t prepared[2] = {0, 0};
  bool may_sleep = true;
  for (std::size_t stage = 0; stage < 2 && may_sleep; ++stage) {
    for (std::size_t i = 0; i < pollers[stage].size() && may_sleep; ++i) {
      may_sleep = pollers[stage][i] == nullptr || pollers[stage][i]->prepare_to_sleep();
      prepared[stage] = i + 1;
    }
  }
  if (may_sleep) {
    arm_watches();
    posted.store(false, std::memory_order_relaxed);
    ++statistics.sleeps;
    if (options.poll_max.count() > 0) {
      const auto begin = Clock::now();
      io.run_one();
      adapt_window(Clock::now() - begin);
    } else {
      io.run_one();
    }
  }
  // A handler may have added or removed pollers: those that are there are awake now, and wake_up()
  // of one that was never asleep is harmless by contract.
  for (std::size_t stage = 0; stage < 2; ++stage) {
    const std::size_t count =
        may_sleep ? pollers[stage].size() : std::min(prepared[stage], pollers[stage].size());
    for (std::size_t i = 0; i < count; ++i) {
      if (pollers[stage][i] != nullptr) pollers[stage][i]->wake_up();
    }
  }
  if (pollers_removed) compact_pollers();
}

IoLoop::IoLoop(IoLoopOptions options) : state_(std::make_unique<State>(options)) {}

IoLoop::~IoLoop() { assert(state_->watches.empty() && "watches must die before their loop"); }

void IoLoop::run() {
  State& state = *state_;
  state.owner.store(std::this_thread::get_id());
  for (;;) {
    const bool progress = state.cycle();
    if (state.posted.load(std::memory_order_acquire) ||
        ++state.cycles_since_asio >= kCyclesPerAsioPoll) {
      state.run_asio_ready();
    }
    if (progress) {
      if (std::exchange(state.polling, false)) ++state.statistics.polls_won;
      continue;
    }
    if (state.stopping.load(std::memory_order_acquire)) break;
    if (state.keep_polling()) continue;
    state.sleep();
  }
  // What was posted before stop() still runs.
  state.io.poll();
  state.owner.store(std::thread::id{});
}

void IoLoop::stop() {
  state_->stopping.store(true, std::memory_order_release);
  post([] {});
}

void IoLoop::post(std::move_only_function<void()> function) {
  asio::post(state_->io, std::move(function));
  state_->posted.store(true, std::memory_order_release);
}

void IoLoop::run_and_wait(std::move_only_function<void()> function) {
  assert(!is_loop_thread());
  std::promise<void> done;
  post([&function, &done] {
    function();
    done.set_value();
  });
  done.get_future().wait();
}

bool IoLoop::is_loop_thread() const { return state_->owner.load() == std::this_thread::get_id(); }

const IoLoopStatistics& IoLoop::statistics() const { return state_->statistics; }

void IoLoop::add_poller(Poller& poller, PollStage stage) {
  state_->pollers[static_cast<std::size_t>(stage)].push_back(&poller);
}

// Only marks the place: the loop may be walking the list right now.
void IoLoop::remove_poller(Poller& poller) {
  for (auto& stage : state_->pollers)
    std::replace(stage.begin(), stage.end(), &poller, static_cast<Poller*>(nullptr));
  state_->pollers_removed = true;
}

namespace {

class FdWatch final : public IoLoop::Watch {
 public:
  FdWatch(std::shared_ptr<FdWatchState> state, std::vector<std::shared_ptr<FdWatchState>>& registry)
      : state_(std::move(state)), registry_(registry) {}
  ~FdWatch() override {
    std::erase(registry_, state_);
    state_->closed = true;
    state_->on_readable = nullptr;
    state_->descriptor.release();  // the descriptor is the caller's; a pending wait is aborted
  }

 private:
  std::shared_ptr<FdWatchState> state_;
  std::vector<std::shared_ptr<FdWatchState>>& registry_;
};

class TimerWatch final : public IoLoop::Watch {
 public:
  TimerWatch(asio::io_context& io, std::chrono::nanoseconds delay,
             std::move_only_function<void()> function)
      : timer_(io, std::chrono::duration_cast<Clock::duration>(delay)),
        function_(std::make_shared<std::move_only_function<void()>>(std::move(function))) {
    timer_.async_wait([function = function_](const boost::system::error_code& error) {
      if (error || !*function) return;
      // It may destroy its own handle, so it runs outside of what the handle clears.
      auto call = std::move(*function);
      call();
    });
  }
  ~TimerWatch() override { *function_ = nullptr; }

 private:
  asio::steady_timer timer_;
  std::shared_ptr<std::move_only_function<void()>> function_;
};

}  // namespace

std::unique_ptr<IoLoop::Watch> IoLoop::watch(int fd, std::move_only_function<void()> on_readable) {
  if (!state_->probe.can_be_waited_on(fd)) return nullptr;
  auto state = std::make_shared<FdWatchState>(state_->io);
  state->on_readable = std::move(on_readable);
  boost::system::error_code error;
  state->descriptor.assign(fd, error);
  if (error) return nullptr;
  state_->watches.push_back(state);
  return std::make_unique<FdWatch>(std::move(state), state_->watches);
}

std::unique_ptr<IoLoop::Watch> IoLoop::call_after(std::chrono::nanoseconds delay,
                                                  std::move_only_function<void()> function) {
  return std::make_unique<TimerWatch>(state_->io, delay, std::move(function));
}

}  // namespace vblk::blockdev
