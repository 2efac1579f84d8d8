// What the whole machine has done so far, read from /proc and /sys.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "aio/error.h"

namespace vblk::bench {

// proc(5), /proc/stat. In ticks of 10 ms: only for runs of seconds.
struct MachineUsage {
  std::chrono::milliseconds busy{0};   // user, nice, system, irq, softirq of all processors
  std::chrono::milliseconds steal{0};  // what the hypervisor gave to others
  std::chrono::milliseconds idle{0};   // with and without waiting for I/O
};
[[nodiscard]] MachineUsage machine_usage();

// A block device's own count of the flushes it was sent (Documentation/block/stat.rst).
class FlushCounter {
 public:
  // `path`: a block device, or a file, whose device is meant then. Errors: kNotFound; kNotSupported
  // where the kernel does not count.
  static Expected<FlushCounter> open(const std::string& path);
  // Nothing if the device is gone.
  [[nodiscard]] std::optional<std::uint64_t> count() const;

 private:
  explicit FlushCounter(std::string stat_path) : stat_path_(std::move(stat_path)) {}
  std::string stat_path_;
};

}  // namespace vblk::bench
