// One I/O thread: a loop, an I/O context with its own engines, and whatever queues are put on it.
#pragma once

#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/io_context.h"
#include "blockdev/io_loop.h"

namespace vblk::blockdev {

// Makes the engines of a thread, on that thread. Tests hand in one that makes simulated disks.
using EngineSetFactory = std::function<Expected<std::unique_ptr<aio::EngineSet>>()>;

class IoThread {
 public:
  // Starts the thread and makes its engines there; an engine that cannot be made is the error.
  static Expected<std::unique_ptr<IoThread>> start(const std::string& name,
                                                   IoLoopOptions loop_options,
                                                   const EngineSetFactory& make_engines);
  // Drains the engines, stops the loop and joins. Queues on it must have been stopped.
  ~IoThread();
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;

  [[nodiscard]] IoLoop& loop() { return loop_; }
  // To be used on the loop's thread only.
  [[nodiscard]] IoContext& context() { return *context_; }

  // Makes a system call that the thread is blocked in end with EINTR. Any thread; harmless at any
  // time. For descriptors that a peer has handed over and can make blocking again at will.
  void interrupt();
  // Waits until there is an outcome of what this thread has been given to do. That it does not hang
  // in such a descriptor is seen to meanwhile; a slow disk does not mind being asked now and then.
  // Any other thread.
  template <typename Outcome>
  void wait_for(const std::future<Outcome>& outcome) {
    while (outcome.wait_for(kInterruptAfter) != std::future_status::ready) interrupt();
  }
  // Runs `function` on this thread, from its loop, and waits for it in that way.
  void run_and_wait(std::move_only_function<void()> function) {
    wait_for(loop_.call(std::move(function)));
  }

 private:
  static constexpr std::chrono::milliseconds kInterruptAfter{200};

  explicit IoThread(IoLoopOptions loop_options) : loop_(loop_options) {}
  std::optional<Error> prepare(const EngineSetFactory& make_engines);

  IoLoop loop_;
  std::unique_ptr<IoContext> context_;
  std::thread thread_;
};

}  // namespace vblk::blockdev
