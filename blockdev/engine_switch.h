// Changes the engines of all I/O threads under running guests, or of none.
//
// Each I/O thread owns its engines, so a change goes to each: it says what it lacks, this thread
// makes that for it, and only when everything is made does each I/O thread take its part. What
// takes time happens here: to make an engine (0.1 ms and more, seconds where it pins memory), and
// to destroy one (io_destroy(2) waits 30 to 40 ms for the kernel's readers). An I/O thread is held
// up for a few microseconds. Between two of them some queues go the old way and some the new.
//
//   control thread               I/O threads              disposal thread
//   begin_change() on each  ---> what is lacking
//   make for each
//   prepare on each         ---> what was made will wake it
//   commit or cancel on each --> new requests go the new way
//                                ... last request of an
//                                engine completes     --> destroys it
//
// Thread: one that is no I/O thread, always the same (the control thread); selection() too.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/io_thread.h"

namespace vblk::blockdev {

// What a change has come to.
struct EngineSwitchOutcome {
  std::vector<std::string> notes;  // what the user should know of it, one line each
  // How long each I/O thread was held up by it, in all steps together: no request is looked at
  // meanwhile.
  std::vector<std::chrono::nanoseconds> held_up;
};

class EngineSwitch {
 public:
  // `current` is what the I/O threads started with. Must outlive the I/O threads: they hand over
  // engines until they end.
  EngineSwitch(const aio::AioSelection& current, aio::EngineMaker maker);
  ~EngineSwitch();
  EngineSwitch(const EngineSwitch&) = delete;
  EngineSwitch& operator=(const EngineSwitch&) = delete;

  // When it returns, requests are routed as `wanted`; those in flight complete where they are.
  // Errors: an engine cannot be made (EngineSet::create()), or cannot wake its thread
  // (IoContext::prepare_change()); everything is as it was.
  Expected<EngineSwitchOutcome> change(std::span<const std::unique_ptr<IoThread>> threads,
                                       const aio::AioSelection& wanted);
  [[nodiscard]] const aio::AioSelection& selection() const { return selection_; }

 private:
  // Engines that wait to be destroyed: more would be memory and kernel contexts (fs.aio-max-nr) for
  // changes that come faster than they can be.
  static constexpr std::size_t kFormerEnginesMax = 16;

  Expected<void> make(std::span<aio::EngineChange> changes);
  void start_disposal();
  void dispose(std::unique_ptr<aio::Engine> engine);
  void run_disposal();

  aio::AioSelection selection_;
  const aio::EngineMaker maker_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<aio::Engine>> former_;
  bool is_stopping_{false};
  std::thread disposal_;
};

}  // namespace vblk::blockdev
