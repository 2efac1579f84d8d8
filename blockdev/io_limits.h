// How much I/O a device may do, as QEMU's users know it (qemu(1), "throttling."): operations and
// bytes per second, in total and for reads and writes apart, each with a burst.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "aio/error.h"

namespace vblk::blockdev {

// One limit, in operations or bytes per second.
struct IoLimit {
  // 1e15 per second, for products with times to fit 128 bits by far.
  static constexpr std::uint64_t kRateMax = 1'000'000'000'000'000;
  static constexpr std::uint32_t kBurstSecondsMax = 86'400;

  std::uint64_t rate{0};           // 0: no limit
  std::uint64_t burst_rate{0};     // 0: no burst; otherwise `rate` at least
  std::uint32_t burst_seconds{1};  // a burst that uses burst_rate fully lasts so long

  bool operator==(const IoLimit&) const = default;
};

struct IoLimits {
  // In the order of the names "iops-total", "iops-read", "iops-write", "bps-total", ...
  enum class Kind : std::uint8_t {
    kIopsTotal,
    kIopsRead,
    kIopsWrite,
    kBpsTotal,
    kBpsRead,
    kBpsWrite
  };
  static constexpr std::size_t kKindCount = 6;

  std::array<IoLimit, kKindCount> limits{};
  // An operation of more bytes counts as so many of these, in fractions; 0: each as one.
  std::uint64_t iops_size_bytes{0};

  // "iops-total=1000,bps-write=10M,iops-total-max=2000,iops-total-max-length=5,iops-size=8k": names
  // that are not there stay as in `base`; 0 takes a limit away, "none" (alone) takes all. `option`
  // names the culprit in messages. Errors: kInvalidArgument: an unknown name, no number, a burst
  // without its limit or below it, a length without its burst.
  static Expected<IoLimits> parse(std::string_view text, std::string_view option,
                                  const IoLimits& base);
  // What parse() takes: all that is not 0; "none" if nothing is limited.
  [[nodiscard]] std::string to_string() const;

  [[nodiscard]] const IoLimit& of(Kind kind) const {
    return limits[static_cast<std::size_t>(kind)];
  }
  [[nodiscard]] bool any() const;

  bool operator==(const IoLimits&) const = default;
};

}  // namespace vblk::blockdev
