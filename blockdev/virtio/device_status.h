// The device status field, where a transport keeps it for the device. virtio 1.2, "Device Status
// Field". Holds what the driver has written; what follows from that is done elsewhere.
#pragma once

#include <cstdint>

#include "aio/error.h"

namespace vblk::virtio {

inline constexpr std::uint8_t kStatusAcknowledge = 1;
inline constexpr std::uint8_t kStatusDriver = 2;
inline constexpr std::uint8_t kStatusDriverOk = 4;
inline constexpr std::uint8_t kStatusFeaturesOk = 8;
inline constexpr std::uint8_t kStatusNeedsReset = 64;  // the device's own
inline constexpr std::uint8_t kStatusFailed = 128;

class DeviceStatus {
 public:
  // Takes bits in any order (QEMU sets FEATURES_OK first), FEATURES_OK only if the device has
  // accepted the driver's features, and NEEDS_RESET, which comes back from who has read it, not at
  // all. 0 is a reset, and the caller's to do.
  // Error: kInvalidArgument for bits that are not known, and for a bit that was set and is not any
  // more: "The driver MUST NOT clear a device status bit." Nothing is changed then.
  Expected<void> write(std::uint64_t value, bool features_accepted);
  void reset() { value_ = 0; }

  [[nodiscard]] std::uint8_t value() const { return value_; }
  [[nodiscard]] bool is_driver_ok() const { return (value_ & kStatusDriverOk) != 0; }

 private:
  std::uint8_t value_{0};
};

}  // namespace vblk::virtio
