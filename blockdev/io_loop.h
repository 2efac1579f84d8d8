// The loop of one I/O thread: user-space polling in front, Boost.Asio behind.
//
// A cycle polls everything that can be looked at in user space (avail rings, completion rings),
// and repeats while there is progress. Only when a whole cycle found nothing, and the time for
// looking on has passed, does it ask every poller to prepare for sleep (turn notifications on and
// look once more) and sleep in Asio, which waits for kick eventfds, engine fds, timers and posted
// work.
//
//   loop       driver notifications   system calls
//   polling    suppressed             none of its own
//   sleeping   on                     one wait; woken by an fd, a timer or post()
//
// A request must not cost more because there are other queues. So a poller that a sleep has found
// without work, or that had none in many busy cycles, rests: it stays prepared for sleep, and is
// left out of cycles and sleeps until wake(). While the loop is busy it looks at resting pollers in
// turn, at as many as it has done things, so that none waits long for a look at its descriptor.
//
// Thread: everything runs on the thread inside run(), except post() and stop(), which any thread
// may call.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <utility>

namespace vblk::blockdev {

// Something with work that can be seen without a system call.
class Poller {
 public:
  Poller() = default;
  virtual ~Poller() = default;
  Poller(const Poller&) = delete;
  Poller& operator=(const Poller&) = delete;

  // Does what can be done now; how many things that were. May come between prepare_to_sleep() and
  // wake_up().
  virtual std::size_t poll() = 0;
  // End of a cycle: publish what the cycle's polls have gathered (used rings, interrupts).
  virtual void settle() {}
  // Whether what it waits for may come within the time that a loop would look for it. Asked before
  // the loop does.
  [[nodiscard]] virtual bool is_worth_looking() const { return true; }
  // False while it changes how it works, as where it tries engines: what a loop measures of its own
  // ways meanwhile says nothing.
  [[nodiscard]] virtual bool is_steady() const { return true; }
  // Turns notifications on, then looks again; false means there is work: do not sleep. A notified
  // poller of the dispatch stage says so by IoLoop::wake().
  [[nodiscard]] virtual bool prepare_to_sleep() = 0;
  // Back from sleep (or the sleep was called off): suppress notifications again. Harmless where
  // prepare_to_sleep() was not called before.
  virtual void wake_up() = 0;

 private:
  // The loop's own.
  friend class IoLoop;
  static constexpr std::size_t kNotResting = ~std::size_t{0};
  std::size_t resting_index_{kNotResting};
  std::uint64_t last_busy_cycle_{0};
};

// The order in which a cycle polls: dispatch first, so that engines submit one batch for all
// queues. Only dispatch pollers rest.
enum class PollStage : std::uint8_t { kDispatch, kEngine };

struct IoLoopOptions {
  // Longest that a loop without progress goes on looking before it sleeps, where that pays
  // (poll_policy.h, poll_trial.h); 0: it sleeps at once.
  std::chrono::microseconds poll_max{0};
};

// Counters since the loop was made; loop thread.
struct IoLoopStatistics {
  std::uint64_t sleeps{0};
  std::uint64_t polls{0};      // times that it looked on before it slept
  std::uint64_t polls_won{0};  // those that saw work before their time had passed
};

class IoLoop {
 public:
  explicit IoLoop(IoLoopOptions options = {});
  ~IoLoop();
  IoLoop(const IoLoop&) = delete;
  IoLoop& operator=(const IoLoop&) = delete;

  // Runs until stop(). Posted functions that were accepted before stop() still run.
  void run();
  void stop();

  // Runs `function` on the loop's thread, in order, from the loop. Any thread. One allocation per
  // call: for the control plane, not for requests.
  void post(std::move_only_function<void()> function);
  // post(), and what to wait for until it has run. Not from the loop's own thread (asserted): it
  // would wait for itself.
  [[nodiscard]] std::future<void> call(std::move_only_function<void()> function);
  // The same, and waits. For as long as no peer's descriptor can block that thread:
  // IoThread::run_and_wait().
  void run_and_wait(std::move_only_function<void()> function) { call(std::move(function)).wait(); }
  [[nodiscard]] bool is_loop_thread() const;

  [[nodiscard]] const IoLoopStatistics& statistics() const;

  // Registers a poller until remove_poller(). Loop thread, or before run().
  void add_poller(Poller& poller, PollStage stage);
  void remove_poller(Poller& poller);
  // Has a poller that rests polled, and settled, again: there is work for it, or something to
  // publish. Nothing for one that does not rest. Loop thread.
  void wake(Poller& poller) {
    if (poller.resting_index_ != Poller::kNotResting) end_rest(poller);
  }

  // Wakes the loop whenever `fd` becomes readable. Watched until the returned handle dies (loop
  // thread). The fd stays the caller's. `on_readable` runs on the loop thread before the next cycle
  // and must consume the readiness (read the eventfd), itself or in a poller's wake_up(). Returns
  // nullptr if the kernel cannot wait on `fd` (a regular file).
  class Watch {
   public:
    Watch() = default;
    virtual ~Watch() = default;
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;
  };
  [[nodiscard]] std::unique_ptr<Watch> watch(int fd, std::move_only_function<void()> on_readable);

  // Runs its function whenever a time that was set has come. Loop thread. To set it again and again
  // allocates nothing. It may not be destroyed by its own function.
  class Timer {
   public:
    Timer() = default;
    virtual ~Timer() = default;
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

    // Once, `delay` from now; a time that was set before counts no more.
    virtual void start(std::chrono::nanoseconds delay) = 0;
    virtual void cancel() = 0;
    // A time is set and has not come.
    [[nodiscard]] virtual bool is_running() const = 0;
  };
  [[nodiscard]] std::unique_ptr<Timer> make_timer(std::move_only_function<void()> function);

 private:
  void end_rest(Poller& poller);

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vblk::blockdev
