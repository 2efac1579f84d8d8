#include "blockdev/virtio/device_gate.h"

#include <cassert>
#include <cerrno>
#include <utility>

#include "aio/engine_name.h"
#include "aio/error.h"
#include "blockdev/log.h"

namespace vblk::virtio {

DeviceGate::Registration::Registration(DeviceGate& gate, blockdev::IoLoop& loop,
                                       std::function<void()> look_again)
    : gate_(gate), entry_(std::make_shared<Entry>(&loop, std::move(look_again))) {
  const std::lock_guard lock(gate_.mutex_);
  gate_.entries_.push_back(entry_);
}

DeviceGate::Registration::~Registration() {
  entry_->look_again = nullptr;
  const std::lock_guard lock(gate_.mutex_);
  std::erase(gate_.entries_, entry_);
}

void DeviceGate::notify() {
  for (const auto& entry : entries_) {
    entry->loop->post([entry] {
      if (entry->look_again) entry->look_again();
    });
  }
}

void DeviceGate::keep(const FailedRequest& failed, bool is_first) {
  const std::lock_guard lock(mutex_);
  if (is_first) ++keeping_count_;
  const unsigned before = pauses_.load(std::memory_order_relaxed);
  const bool is_space = failed.error == ENOSPC;
  if ((before & kByError) != 0) {
    // It is not for want of space alone any more.
    if (!is_space && (before & kForSpace) != 0) {
      failed_ = failed;
      pauses_.store(before & ~kForSpace, std::memory_order_relaxed);
    }
    return;
  }
  failed_ = failed;
  pauses_.store(before | kByError | (is_space ? kForSpace : 0U), std::memory_order_relaxed);
  if (log::peer_line_allowed()) {
    log::error("'{}': a {} of {} bytes at {} failed: {}; the device is paused {}", name_,
               aio::to_string(failed.operation), failed.length_bytes, failed.offset_bytes,
               describe_errno(failed.error),
               is_space ? "until there is space again, or 'vblk ctl MONITOR resume'"
                        : "until 'vblk ctl MONITOR resume'");
  }
  notify();
}

void DeviceGate::is_rid() {
  {
    const std::lock_guard lock(mutex_);
    assert(keeping_count_ > 0);
    if (--keeping_count_ > 0) return;
  }
  // Nothing is left that could be tried again.
  end(kByError | kForSpace);
}

void DeviceGate::space_is_back() {
  // Another queue may keep what space does not help.
  if (is_worth_retrying() && end(kByError | kForSpace) && log::peer_line_allowed())
    log::info("'{}': there is space again; the device goes on", name_);
}

void DeviceGate::pause() {
  const std::lock_guard lock(mutex_);
  pauses_.store(pauses_.load(std::memory_order_relaxed) | kByCommand, std::memory_order_relaxed);
  notify();
}

bool DeviceGate::resume() { return end(kByCommand | kByError | kForSpace); }

bool DeviceGate::end(unsigned pauses) {
  const std::lock_guard lock(mutex_);
  const unsigned before = pauses_.load(std::memory_order_relaxed);
  if ((before & pauses) == 0) return false;
  if ((pauses & kByError) != 0) failed_.reset();
  pauses_.store(before & ~pauses, std::memory_order_relaxed);
  notify();
  return true;
}

void DeviceGate::set_limits(const blockdev::IoLimits& limits) {
  limiter_.set(limits);
  const std::lock_guard lock(mutex_);
  notify();
}

DeviceGate::Status DeviceGate::status() const {
  const std::lock_guard lock(mutex_);
  return {.by_command = is_paused_by_command(), .failed = failed_, .retries = is_worth_retrying()};
}

}  // namespace vblk::virtio
