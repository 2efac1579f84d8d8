// The virtio-blk device as all of its queues share it: features, config space, write stability.
//
// virtio 1.2, "Block Device". The config space never says anything else than what is done:
// `writeback` in it is the very flag that write_through() reads for every write.
//
// Threads: negotiation and config writes come from the control thread; queues read single atomics.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "aio/error.h"
#include "blockdev/block_node.h"
#include "blockdev/io_limits.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/device_gate.h"
#include "blockdev/virtio/error_policy.h"
#include "blockdev/virtio/interrupt_hold.h"

namespace vblk::virtio {

struct BlkDeviceOptions {
  std::uint16_t queue_count{1};
  std::uint16_t queue_size_max{128};       // power of two, 2 to 32768; decides seg_max
  std::uint32_t logical_block_bytes{512};  // 512, 1024, 2048 or 4096
  std::string serial{"vblk"};              // at most 20 bytes (VIRTIO_BLK_ID_BYTES)
  bool discard{true};                      // offer DISCARD where the node can (--discard unmap)
  bool config_wce{true};                   // offer CONFIG_WCE: the driver may change `writeback`
  bool write_cache{true};  // initial `writeback`: false for writethrough and directsync
  ErrorPolicy on_error;
  blockdev::IoLimits limits;  // at the start; DeviceGate::set_limits() changes them
  InterruptOptions interrupts;
};

class BlkDevice {
 public:
  // "Queue Size ... maximum is 32768".
  static constexpr std::uint16_t kQueueSizeMax = 32768;
  // Longest config space served to GET_CONFIG; beyond the structure it reads as zero.
  static constexpr std::size_t kConfigBytesMax = 256;

  // `node` must outlive the device. Error: kInvalidArgument for options that do not fit each other
  // or the node (a size that is no multiple of the logical block size, a serial that is too long).
  static Expected<std::unique_ptr<BlkDevice>> create(blockdev::BlockNode& node,
                                                     BlkDeviceOptions options);

  // virtio feature bits offered, VERSION_1 and ring features included, vhost-user's own excluded.
  [[nodiscard]] std::uint64_t offered_features() const { return offered_features_; }
  // The driver's choice; resets nothing. Error: kInvalidArgument if a bit was not offered.
  // CONFIG_WCE without FLUSH sets writeback to 0 ("Device Initialization").
  // May be repeated with other bits (the frontend does so for its own, in migration): writeback
  // changes only where the choice of FLUSH and CONFIG_WCE does. What a driver has set by
  // write_config() is set again where CONFIG_WCE is chosen.
  Expected<void> set_features(std::uint64_t features);
  [[nodiscard]] std::uint64_t negotiated_features() const;

  // Back to the state of a device nobody has talked to: no features, the initial writeback.
  void reset();
  // The driver has reset the device: as reset(), but a writeback that was set stays. A frontend
  // that shows the driver a copy of the config space (QEMU's) goes on showing it what was set, and
  // a driver that finds write-through there sends no flushes.
  void forget_features();

  // Config space bytes [offset, offset + out.size()), zero beyond the structure. `writeback` in it
  // is the initial value until features are negotiated (QEMU reads it then, once, and shows the
  // driver that copy), and says what is done with writes from then on.
  // Error: kInvalidArgument if the range leaves kConfigBytesMax.
  Expected<void> read_config(std::uint32_t offset, std::span<std::byte> out) const;
  // Only `writeback` can be written, and only to 0 or 1, with CONFIG_WCE negotiated. Decides for
  // writes that are parsed afterwards. Error: kInvalidArgument.
  Expected<void> write_config(std::uint32_t offset, std::span<const std::byte> bytes);

  // Whether a write that is parsed now must be stable when it completes: "Device Operation", the
  // three cases of when a write is considered stable. Any thread; one relaxed load.
  [[nodiscard]] bool write_through() const {
    return write_through_.load(std::memory_order_relaxed);
  }

  [[nodiscard]] blockdev::BlockNode& node() const { return node_; }
  [[nodiscard]] const BlkDeviceOptions& options() const { return options_; }
  // Whether requests reach the node now, and how fast. Any thread.
  [[nodiscard]] DeviceGate& gate() { return gate_; }
  [[nodiscard]] const DeviceGate& gate() const { return gate_; }
  // What becomes of an operation that the node has failed with `error`. Any thread.
  [[nodiscard]] ErrorAction action_on(blockdev::BlockOperation operation, int error) const;

 private:
  BlkDevice(blockdev::BlockNode& node, BlkDeviceOptions options);
  void update_write_through();
  [[nodiscard]] std::array<std::byte, kBlkConfigBytes> config() const;
  [[nodiscard]] bool negotiated(unsigned bit) const;

  blockdev::BlockNode& node_;
  BlkDeviceOptions options_;
  std::uint64_t offered_features_{0};
  DeviceGate gate_;
  std::atomic<std::uint64_t> negotiated_features_{0};
  std::atomic<bool> writeback_{true};  // as the driver or the options last set it
  std::optional<bool> set_by_driver_;  // by write_config(), since reset()
  std::atomic<bool> features_set_{false};
  std::atomic<bool> write_through_{true};
};

}  // namespace vblk::virtio
