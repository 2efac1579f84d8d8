#include "blockdev/virtio/device_status.h"

#include <fmt/core.h>

namespace vblk::virtio {

Expected<void> DeviceStatus::write(std::uint64_t value, bool features_accepted) {
  constexpr std::uint64_t kOfTheDriver =
      kStatusAcknowledge | kStatusDriver | kStatusDriverOk | kStatusFeaturesOk | kStatusFailed;
  if ((value & ~(kOfTheDriver | kStatusNeedsReset)) != 0) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("status {:#x} has bits that are not known", value));
  }
  if ((value_ & ~value) != 0) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("status {:#x} lacks bits of {:#x}, which only a reset clears", value, value_));
  }
  value &= kOfTheDriver;
  // "the device MUST ... leave FEATURES_OK unset" if it does not take the driver's choice.
  if (!features_accepted) value &= ~std::uint64_t{kStatusFeaturesOk};
  value_ = static_cast<std::uint8_t>(value);
  return {};
}

}  // namespace vblk::virtio
