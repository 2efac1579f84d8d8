// What stands between the queues of a device and its disk: whether requests are taken at all, and
// how fast (io_limiter.h).
//
// A device pauses by command, or because of a failed request that the error policy keeps. While it
// pauses its queues take nothing off their rings. What they keep counts as in flight; they take it
// again, in order, when the device is resumed.
//
//   paused by     new requests         kept requests                       ends by
//   command       stay in the rings    none, or until it is resumed        resume()
//   error         stay in the rings    taken again when it is resumed      resume(), or nobody
//   keeps
//                                                                          one any more
//   no space      the same             the first of a queue is tried       the same, or the trial's
//                                      every kRetryInterval                success
//
// Threads: the state is one atomic, read by queues in each poll. Changes come from any thread and
// reach the queues as posts to their loops.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "blockdev/block_request.h"
#include "blockdev/io_limiter.h"
#include "blockdev/io_loop.h"

namespace vblk::virtio {

// The request for which a device has paused.
struct FailedRequest {
  blockdev::BlockOperation operation{blockdev::BlockOperation::kRead};
  std::uint64_t offset_bytes{0};
  std::uint64_t length_bytes{0};
  int error{0};  // errno
};

class DeviceGate {
 public:
  // Between two looks at a full disk: what people wait who have just made space.
  static constexpr std::chrono::seconds kRetryInterval{1};

  // `name` is the disk's, for messages.
  explicit DeviceGate(std::string name) : name_(std::move(name)) {}
  DeviceGate(const DeviceGate&) = delete;
  DeviceGate& operator=(const DeviceGate&) = delete;

  // ---- For queues.

  // A queue wants to be told of changes: `look_again` runs on `loop`, which must outlive the
  // registration. Made and destroyed on the loop's thread.
  class Registration {
   public:
    Registration(DeviceGate& gate, blockdev::IoLoop& loop, std::function<void()> look_again);
    ~Registration();
    Registration(const Registration&) = delete;
    Registration& operator=(const Registration&) = delete;

   private:
    friend class DeviceGate;
    // Outlives the registration in posts that are under way.
    struct Entry {
      blockdev::IoLoop* loop;
      std::function<void()> look_again;  // loop thread; empty once it is gone
    };
    DeviceGate& gate_;
    std::shared_ptr<Entry> entry_;
  };

  [[nodiscard]] bool is_paused() const { return pauses_.load(std::memory_order_relaxed) != 0; }
  [[nodiscard]] bool is_paused_by_command() const {
    return (pauses_.load(std::memory_order_relaxed) & kByCommand) != 0;
  }
  // Paused for want of space alone: trying again may end it.
  [[nodiscard]] bool is_worth_retrying() const {
    return pauses_.load(std::memory_order_relaxed) == (kByError | kForSpace);
  }
  // The calling queue keeps `failed`; the device pauses, if it has not. `is_first`: it kept none
  // before. To be answered by one is_rid().
  void keep(const FailedRequest& failed, bool is_first);
  // The calling queue keeps none any more: answered, taken again, or left for a successor.
  void is_rid();
  // A kept request was tried again and did not fail.
  void space_is_back();

  [[nodiscard]] blockdev::IoLimiter& limiter() { return limiter_; }

  // ---- For who is in charge.

  // Takes effect in a queue with its next poll; whoever needs to know asks the queues.
  void pause();
  // Ends every pause. False: there was none.
  bool resume();
  void set_limits(const blockdev::IoLimits& limits);

  struct Status {
    bool by_command{false};
    std::optional<FailedRequest> failed;  // the first one for which it paused
    bool retries{false};                  // now and then, by itself
  };
  [[nodiscard]] Status status() const;

 private:
  static constexpr unsigned kByCommand = 1;
  static constexpr unsigned kByError = 2;
  static constexpr unsigned kForSpace = 4;  // with kByError: nothing but ENOSPC

  void notify();  // under the mutex
  bool end(unsigned pauses);

  const std::string name_;
  blockdev::IoLimiter limiter_;
  std::atomic<unsigned> pauses_{0};  // written under the mutex
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Registration::Entry>> entries_;
  std::optional<FailedRequest> failed_;
  unsigned keeping_count_{0};  // queues
};

}  // namespace vblk::virtio
