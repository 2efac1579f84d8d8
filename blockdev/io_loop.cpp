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
#include <time.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <boost/asio/bind_allocator.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>

#include "blockdev/bell.h"
#include "blockdev/poll_policy.h"
#include "blockdev/poll_trial.h"

namespace vblk::blockdev {

namespace asio = boost::asio;
using Clock = std::chrono::steady_clock;

namespace {

// While the loop is busy it looks at Asio only this often, because each look is an epoll_wait. 64
// cycles are a few dozen microseconds: timers (the only thing that waits for it) are that late at
// most.
constexpr unsigned kCyclesPerAsioPoll = 64;

// Cycles in which others had work and a poller had none, before it rests. A queue that gets a
// request now and then is kicked for it when it rests: so not few. It is looked at in vain in each:
// so not many.
constexpr std::uint64_t kBusyCyclesBeforeRest = 64;

// Handlers that run before requests are looked at again, however many are posted meanwhile.
constexpr unsigned kHandlersPerAsioPoll = 64;

// An epoch of a trial has at least this much work and lasts at least so long: enough to be told
// from another.
constexpr std::uint64_t kEpochWork = 512;
constexpr std::chrono::milliseconds kEpochTime{10};
constexpr std::uint64_t kCyclesPerEpochCheck = 16;

std::chrono::nanoseconds cpu_time_of_this_thread() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

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
};

Bell make_bell() {
  auto bell = Bell::make("a loop");
  if (bell) return std::move(*bell);
  throw std::system_error(bell.error().errno_value, std::generic_category(), bell.error().message);
}

}  // namespace

struct IoLoop::State {
  explicit State(const IoLoopOptions& options) : poll_policy(options.poll_max) {}

  bool cycle();
  std::size_t poll_active(PollStage stage);
  std::size_t look_at_resting(std::size_t count_max);
  void rest_idle();
  void rest(Poller& poller);
  void end_rest(Poller& poller);
  void leave_resting(Poller& poller);
  [[nodiscard]] bool all_engines(bool (Poller::*are)() const) const;
  [[nodiscard]] bool keep_polling();
  void sleep();
  [[nodiscard]] bool prepare_to_sleep();
  void rest_all();
  void wake_up(PollStage stage, std::size_t count);
  void note_progress();
  void count_work(std::size_t work);
  void arm_watches();
  void arm(const std::shared_ptr<FdWatchState>& watch);
  void compact_active();
  void run_asio_ready();

  WaitProbe probe;
  Bell bell = make_bell();  // posts ring it
  asio::io_context io{1};   // one thread runs it; others only post
  asio::executor_work_guard<asio::io_context::executor_type> guard{io.get_executor()};
  std::vector<Poller*>& active_in(PollStage stage) {
    return active[static_cast<std::size_t>(stage)];
  }

  std::vector<Poller*> active[2];  // by PollStage; nullptr where removed, or put to rest
  bool active_has_gaps{false};
  std::vector<Poller*> resting;
  std::size_t next_resting{0};  // to be looked at
  std::uint64_t busy_cycles{0};
  std::vector<std::shared_ptr<FdWatchState>> watches;
  std::vector<std::shared_ptr<FdWatchState>> unarmed;  // of those; room for all
  std::unique_ptr<Watch> bell_watch;
  std::atomic<bool> posted{false};
  std::atomic<bool> stopping{false};
  std::atomic<std::thread::id> owner;
  unsigned cycles_since_asio{0};
  PollPolicy poll_policy;
  PollTrial poll_trial;
  bool was_steady{true};
  std::uint64_t epoch_work{0};
  Clock::time_point epoch_begin;
  std::chrono::nanoseconds epoch_begin_cpu_time{0};
  bool polling{false};
  Clock::time_point poll_begin;
  IoLoopStatistics statistics;
};

// One look at everything that may have work. Pollers may be added or removed by what they do.
bool IoLoop::State::cycle() {
  const std::size_t seen = poll_active(PollStage::kDispatch);
  const std::size_t dispatched = seen + look_at_resting(seen + 1);
  const std::size_t work = dispatched + poll_active(PollStage::kEngine);
  const bool progress = work > 0;
  if (progress) {
    ++busy_cycles;
    count_work(work);
  }
  for (auto& stage : active) {
    for (std::size_t i = 0; i < stage.size(); ++i) {
      if (stage[i] != nullptr) stage[i]->settle();
    }
  }
  if (progress) rest_idle();
  if (active_has_gaps) compact_active();
  return progress;
}

std::size_t IoLoop::State::poll_active(PollStage stage) {
  auto& pollers = active_in(stage);
  std::size_t done = 0;
  for (std::size_t i = 0; i < pollers.size(); ++i) {
    if (pollers[i] == nullptr) continue;
    const std::size_t done_here = pollers[i]->poll();
    done += done_here;
    if (done_here > 0 && pollers[i] != nullptr) pollers[i]->last_busy_cycle_ = busy_cycles;
  }
  return done;
}

std::size_t IoLoop::State::look_at_resting(std::size_t count_max) {
  std::size_t done = 0;
  for (std::size_t count = std::min(count_max, resting.size()); count > 0 && !resting.empty();
       --count) {
    const std::size_t index = next_resting < resting.size() ? next_resting : 0;
    Poller* const poller = resting[index];
    const std::size_t done_here = poller->poll();
    done += done_here;
    next_resting = index + 1;
    // It may have left, or been woken, while it worked.
    if (done_here > 0 && index < resting.size() && resting[index] == poller) end_rest(*poller);
  }
  return done;
}

void IoLoop::State::rest_idle() {
  auto& pollers = active_in(PollStage::kDispatch);
  for (std::size_t i = 0; i < pollers.size(); ++i) {
    Poller* const poller = pollers[i];
    if (poller == nullptr || busy_cycles - poller->last_busy_cycle_ < kBusyCyclesBeforeRest)
      continue;
    poller->last_busy_cycle_ = busy_cycles;
    if (poller->prepare_to_sleep()) {
      rest(*poller);
      pollers[i] = nullptr;
      active_has_gaps = true;
    } else {
      poller->wake_up();
    }
  }
}

// The caller takes it off the active ones.
void IoLoop::State::rest(Poller& poller) {
  poller.resting_index_ = resting.size();
  resting.push_back(&poller);
}

void IoLoop::State::end_rest(Poller& poller) {
  leave_resting(poller);
  poller.last_busy_cycle_ = busy_cycles;
  active_in(PollStage::kDispatch).push_back(&poller);
  poller.wake_up();
}

void IoLoop::State::leave_resting(Poller& poller) {
  const std::size_t index = std::exchange(poller.resting_index_, Poller::kNotResting);
  Poller* const last = resting.back();
  resting.pop_back();
  if (last == &poller) return;
  resting[index] = last;
  last->resting_index_ = index;
}

void IoLoop::State::compact_active() {
  for (auto& stage : active) std::erase(stage, nullptr);
  active_has_gaps = false;
}

void IoLoop::State::run_asio_ready() {
  cycles_since_asio = 0;
  posted.store(false, std::memory_order_relaxed);
  // The exchange of data is Asio's own (its queue is locked); the flag only says when to look.
  for (unsigned i = 0; i < kHandlersPerAsioPoll; ++i) {
    if (io.poll_one() == 0) return;
  }
  posted.store(true, std::memory_order_relaxed);  // there may be more
}

// Waits are armed just before a sleep, after the pollers have drained their descriptors: arming a
// descriptor that is still readable would end the next sleep at once.
void IoLoop::State::arm_watches() {
  for (const auto& watch : unarmed) arm(watch);
  unarmed.clear();
}

void IoLoop::State::arm(const std::shared_ptr<FdWatchState>& watch) {
  watch->descriptor.async_wait(
      asio::posix::stream_descriptor::wait_read,
      asio::bind_allocator(OperationAllocator<void>(watch->memory),
                           [this, watch](const boost::system::error_code& error) {
                             if (watch->closed) return;
                             unarmed.push_back(watch);
                             if (!error) watch->run_callback();
                           }));
}

bool IoLoop::State::all_engines(bool (Poller::*are)() const) const {
  return std::ranges::all_of(
      active[static_cast<std::size_t>(PollStage::kEngine)],
      [are](const Poller* poller) { return poller == nullptr || (poller->*are)(); });
}

// Whether to look again instead of sleeping. Asked when a cycle found nothing.
bool IoLoop::State::keep_polling() {
  if (!polling) {
    if (!poll_trial.looks() || !all_engines(&Poller::is_worth_looking) || !poll_policy.looks_now())
      return false;
    polling = true;
    poll_begin = Clock::now();
    ++statistics.polls;
  } else if (Clock::now() - poll_begin >= poll_policy.window()) {
    polling = false;
    poll_policy.saw_nothing();
    return false;
  }
  cpu_relax();
  return true;
}

void IoLoop::State::count_work(std::size_t work) {
  epoch_work += work;
  if (epoch_work < kEpochWork || busy_cycles % kCyclesPerEpochCheck != 0 ||
      poll_policy.window().count() == 0)
    return;
  const auto now = Clock::now();
  if (now - epoch_begin < kEpochTime) return;
  const auto cpu_time = cpu_time_of_this_thread();
  const auto per_unit = [this](std::chrono::nanoseconds time) {
    return static_cast<double>(time.count()) / static_cast<double>(epoch_work);
  };
  const bool steady = all_engines(&Poller::is_steady);
  if (steady && was_steady) {
    poll_trial.epoch_ended({.time = per_unit(now - epoch_begin),
                            .cpu_time = per_unit(cpu_time - epoch_begin_cpu_time)});
  } else if (steady != was_steady) {
    poll_trial.begin_anew();
  }
  was_steady = steady;
  epoch_work = 0;
  epoch_begin = now;
  epoch_begin_cpu_time = cpu_time;
}

void IoLoop::State::note_progress() {
  if (!std::exchange(polling, false)) return;
  ++statistics.polls_won;
  poll_policy.saw_work(Clock::now() - poll_begin);
}

void IoLoop::State::sleep() {
  if (!prepare_to_sleep()) return;
  rest_all();
  arm_watches();
  posted.store(false, std::memory_order_relaxed);
  ++statistics.sleeps;
  io.run_one();
  // A handler may have added or removed pollers: wake_up() of one that was never asleep is harmless
  // by contract.
  wake_up(PollStage::kEngine, active_in(PollStage::kEngine).size());
  if (active_has_gaps) compact_active();
}

// False: one of them has work, and all are awake again.
bool IoLoop::State::prepare_to_sleep() {
  for (const PollStage stage : {PollStage::kDispatch, PollStage::kEngine}) {
    const auto& pollers = active_in(stage);
    for (std::size_t i = 0; i < pollers.size(); ++i) {
      if (pollers[i] == nullptr || pollers[i]->prepare_to_sleep()) continue;
      wake_up(stage, i + 1);
      if (stage == PollStage::kEngine)
        wake_up(PollStage::kDispatch, active_in(PollStage::kDispatch).size());
      return false;
    }
  }
  return true;
}

void IoLoop::State::rest_all() {
  auto& pollers = active_in(PollStage::kDispatch);
  for (Poller* const poller : pollers) {
    if (poller != nullptr) rest(*poller);
  }
  pollers.clear();
}

// The first `count` of a stage.
void IoLoop::State::wake_up(PollStage stage, std::size_t count) {
  const auto& pollers = active_in(stage);
  for (std::size_t i = 0; i < count; ++i) {
    if (pollers[i] != nullptr) pollers[i]->wake_up();
  }
}

IoLoop::IoLoop(IoLoopOptions options) : state_(std::make_unique<State>(options)) {
  state_->bell_watch = watch(state_->bell.fd(), [this] { state_->bell.silence(); });
}

IoLoop::~IoLoop() {
  state_->bell_watch.reset();
  assert(state_->watches.empty() && "watches must die before their loop");
}

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
      state.note_progress();
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
  state_->bell.ring();
}

std::future<void> IoLoop::call(std::move_only_function<void()> function) {
  assert(!is_loop_thread());
  std::promise<void> done;
  auto outcome = done.get_future();
  post([function = std::move(function), done = std::move(done)]() mutable {
    function();
    done.set_value();
  });
  return outcome;
}

bool IoLoop::is_loop_thread() const { return state_->owner.load() == std::this_thread::get_id(); }

const IoLoopStatistics& IoLoop::statistics() const { return state_->statistics; }

void IoLoop::add_poller(Poller& poller, PollStage stage) {
  poller.last_busy_cycle_ = state_->busy_cycles;
  state_->active_in(stage).push_back(&poller);
  // Going to rest, and coming back, is no place to allocate.
  auto& dispatch = state_->active_in(PollStage::kDispatch);
  const std::size_t count_max = dispatch.size() + state_->resting.size();
  dispatch.reserve(count_max);
  state_->resting.reserve(count_max);
}

// Of the active ones it only marks the place: the loop may be walking the list right now.
void IoLoop::remove_poller(Poller& poller) {
  if (poller.resting_index_ != Poller::kNotResting) return state_->leave_resting(poller);
  for (auto& stage : state_->active)
    std::replace(stage.begin(), stage.end(), &poller, static_cast<Poller*>(nullptr));
  state_->active_has_gaps = true;
}

void IoLoop::end_rest(Poller& poller) { state_->end_rest(poller); }

namespace {

class FdWatch final : public IoLoop::Watch {
 public:
  using Registry = std::vector<std::shared_ptr<FdWatchState>>;
  FdWatch(std::shared_ptr<FdWatchState> state, Registry& registry, Registry& unarmed)
      : state_(std::move(state)), registry_(registry), unarmed_(unarmed) {}
  ~FdWatch() override {
    std::erase(registry_, state_);
    std::erase(unarmed_, state_);
    state_->closed = true;
    state_->on_readable = nullptr;
    state_->descriptor.release();  // the descriptor is the caller's; a pending wait is aborted
  }

 private:
  std::shared_ptr<FdWatchState> state_;
  Registry& registry_;
  Registry& unarmed_;
};

class LoopTimer final : public IoLoop::Timer {
 public:
  LoopTimer(asio::io_context& io, std::move_only_function<void()> function)
      : state_(std::make_shared<State>(io, std::move(function))) {}
  ~LoopTimer() override {
    state_->function = nullptr;
    cancel();
  }

  void start(std::chrono::nanoseconds delay) override {
    // Calls the former wait off, whose handler may be on its way already: hence the number.
    state_->timer.expires_after(std::chrono::duration_cast<Clock::duration>(delay));
    state_->running = true;
    const std::uint64_t number = ++state_->number;
    state_->timer.async_wait(
        asio::bind_allocator(OperationAllocator<void>(state_->memory),
                             [state = state_, number](const boost::system::error_code& error) {
                               if (error || number != state->number || !state->running) return;
                               state->running = false;
                               state->function();
                             }));
  }
  void cancel() override {
    if (!std::exchange(state_->running, false)) return;
    state_->timer.cancel();
  }
  [[nodiscard]] bool is_running() const override { return state_->running; }

 private:
  // What a wait that was called off still looks at.
  struct State {
    State(asio::io_context& io, std::move_only_function<void()> call)
        : timer(io), function(std::move(call)) {}
    asio::steady_timer timer;
    std::move_only_function<void()> function;
    std::uint64_t number{0};
    bool running{false};
    OperationMemory memory;
  };
  std::shared_ptr<State> state_;
};

}  // namespace

std::unique_ptr<IoLoop::Timer> IoLoop::make_timer(std::move_only_function<void()> function) {
  return std::make_unique<LoopTimer>(state_->io, std::move(function));
}

std::unique_ptr<IoLoop::Watch> IoLoop::watch(int fd, std::move_only_function<void()> on_readable) {
  if (!state_->probe.can_be_waited_on(fd)) return nullptr;
  auto state = std::make_shared<FdWatchState>(state_->io);
  state->on_readable = std::move(on_readable);
  boost::system::error_code error;
  state->descriptor.assign(fd, error);
  if (error) return nullptr;
  state_->watches.push_back(state);
  state_->unarmed.reserve(state_->watches.size());
  state_->unarmed.push_back(state);
  return std::make_unique<FdWatch>(std::move(state), state_->watches, state_->unarmed);
}

}  // namespace vblk::blockdev
