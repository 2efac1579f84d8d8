#include "blockdev/virtio/blk_device.h"

#include <algorithm>
#include <array>
#include <bit>
#include <climits>
#include <cstring>
#include <utility>

#include <fmt/core.h>

#include "blockdev/virtio/blk_request.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::virtio {

namespace {

// Largest segment announced. Any is taken; the value must only not be zero, since drivers believe
// it. 1 MiB keeps a guest's scatter lists short and its single transfers whole.
constexpr std::uint32_t kSegmentBytesMax = std::uint32_t{1} << 20;

// Header and status take two descriptors of a chain, and one kernel I/O takes IOV_MAX iovecs, from
// which the two are spared for a segment that crosses memory regions.
std::uint32_t segments_max(std::uint16_t queue_size_max) {
  constexpr int kHeaderAndStatus = 2;
  return static_cast<std::uint32_t>(
      std::clamp<int>(queue_size_max - kHeaderAndStatus, 1, IOV_MAX - 2));
}

// Of "Reserved Feature Bits", with their reasons, not:
//   IN_ORDER           a fast request would wait for every slow one before it
//   RING_RESET         QEMU 7.2 offers it to the driver when the back-end does, and does not pass a
//                      reset of a block device's queue on; a front-end that does so stops and
//                      starts the ring, which works without the bit
//   NOTIFICATION_DATA  vhost-user kicks by eventfd, whose value means nothing
std::uint64_t features_of(const blockdev::BlockNode& node, const BlkDeviceOptions& options) {
  const blockdev::BlockLimits& limits = node.limits();
  std::uint64_t features =
      feature_bit(kFVersion1) | feature_bit(kFRingPacked) | feature_bit(kFIndirectDesc) |
      feature_bit(kFEventIdx) | feature_bit(kBlkFSizeMax) | feature_bit(kBlkFSegMax) |
      feature_bit(kBlkFBlkSize) | feature_bit(kBlkFTopology) | feature_bit(kBlkFMq) |
      // "Devices SHOULD always offer FLUSH and MUST if they offer CONFIG_WCE."
      feature_bit(kBlkFFlush);
  if (options.config_wce) features |= feature_bit(kBlkFConfigWce);
  // What would change a read-only disk is not offered on one.
  if (limits.read_only) return features | feature_bit(kBlkFRo);
  if (options.discard && limits.can_discard) features |= feature_bit(kBlkFDiscard);
  if (limits.can_write_zeroes) features |= feature_bit(kBlkFWriteZeroes);
  return features;
}

}  // namespace

Expected<std::unique_ptr<BlkDevice>> BlkDevice::create(blockdev::BlockNode& node,
                                                       BlkDeviceOptions options) {
  const std::uint32_t block = options.logical_block_bytes;
  if (block < kSectorBytes || block > 4096 || !std::has_single_bit(block)) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("--logical-block-size {}: use 512, 1024, 2048 or 4096", block));
  }
  if (node.size_bytes() % block != 0) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("the size of '{}', {} bytes, is no multiple of the logical block size {}; use "
                    "--logical-block-size 512 or resize the image",
                    node.name(), node.size_bytes(), block));
  }
  if (!std::has_single_bit(options.queue_size_max) || options.queue_size_max < 2 ||
      options.queue_size_max > kQueueSizeMax) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("--queue-size {}: use a power of two from 2 to {}",
                                  options.queue_size_max, kQueueSizeMax));
  }
  if (options.queue_count == 0)
    return make_error(ErrorKind::kInvalidArgument, "--queues 0: use at least 1");
  if (options.serial.size() > kBlkIdBytes) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("--serial '{}' has {} bytes; virtio-blk takes {}", options.serial,
                                  options.serial.size(), kBlkIdBytes));
  }
  return std::unique_ptr<BlkDevice>(new BlkDevice(node, std::move(options)));
}

BlkDevice::BlkDevice(blockdev::BlockNode& node, BlkDeviceOptions options)
    : node_(node),
      options_(std::move(options)),
      offered_features_(features_of(node_, options_)),
      gate_(node_.name()) {
  gate_.set_limits(options_.limits);
  reset();
}

Expected<void> BlkDevice::set_features(std::uint64_t features) {
  if ((features & ~offered_features_) != 0) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("the driver accepts features that were not offered: {:#x} of {:#x}",
                    features & ~offered_features_, features));
  }
  constexpr std::uint64_t kDecisive = feature_bit(kBlkFConfigWce) | feature_bit(kBlkFFlush);
  const bool choice_changes = !features_set_.load(std::memory_order_relaxed) ||
                              (features & kDecisive) != (negotiated_features() & kDecisive);
  negotiated_features_.store(features, std::memory_order_relaxed);
  features_set_.store(true, std::memory_order_relaxed);
  if (choice_changes) {
    // "Device Initialization": with CONFIG_WCE and without FLUSH, writeback starts as 0.
    const bool volatile_allowed = negotiated(kBlkFFlush);
    bool writeback = options_.write_cache;
    if (set_by_driver_ && negotiated(kBlkFConfigWce)) writeback = *set_by_driver_;
    writeback_.store(writeback && volatile_allowed, std::memory_order_relaxed);
  }
  update_write_through();
  return {};
}

ErrorAction BlkDevice::action_on(blockdev::BlockOperation operation, int error) const {
  const ErrorAction action = options_.on_error.action(operation, error);
  // Kept, it would be tried for ever: the node fails it whatever becomes of the disk.
  if (action == ErrorAction::kStop && node_.has_lost_writes()) return ErrorAction::kReport;
  return action;
}

std::uint64_t BlkDevice::negotiated_features() const {
  return negotiated_features_.load(std::memory_order_relaxed);
}

bool BlkDevice::negotiated(unsigned bit) const {
  return (negotiated_features() & feature_bit(bit)) != 0;
}

void BlkDevice::reset() {
  set_by_driver_.reset();
  writeback_.store(options_.write_cache, std::memory_order_relaxed);
  forget_features();
}

void BlkDevice::forget_features() {
  negotiated_features_.store(0, std::memory_order_relaxed);
  features_set_.store(false, std::memory_order_relaxed);
  update_write_through();
}

// "Device Operation": when a write is stable at its completion.
//   neither FLUSH nor CONFIG_WCE negotiated   always
//   CONFIG_WCE negotiated                     if writeback is 0
//   FLUSH alone                               where the cache mode has no write cache
// writeback_ is kept so that it says all three (set_features, write_config).
void BlkDevice::update_write_through() {
  const bool no_way_to_flush = !negotiated(kBlkFFlush) && !negotiated(kBlkFConfigWce);
  write_through_.store(no_way_to_flush || !writeback_.load(std::memory_order_relaxed),
                       std::memory_order_relaxed);
}

std::array<std::byte, kBlkConfigBytes> BlkDevice::config() const {
  std::array<std::byte, kBlkConfigBytes> config{};
  const blockdev::BlockLimits& limits = node_.limits();
  const std::uint32_t block = options_.logical_block_bytes;
  const std::uint32_t physical = std::max(block, limits.optimal_alignment_bytes);
  store_le<std::uint64_t>(config.data() + kBlkConfigCapacity, node_.size_bytes() / kSectorBytes);
  store_le<std::uint32_t>(config.data() + kBlkConfigSizeMax, kSegmentBytesMax);
  store_le<std::uint32_t>(config.data() + kBlkConfigSegMax, segments_max(options_.queue_size_max));
  store_le<std::uint32_t>(config.data() + kBlkConfigBlkSize, block);
  config[kBlkConfigPhysicalBlockExp] = static_cast<std::byte>(std::countr_zero(physical / block));
  store_le<std::uint16_t>(config.data() + kBlkConfigMinIoSize,
                          static_cast<std::uint16_t>(physical / block));
  // Until features are negotiated this is the initial value, afterwards what is done.
  const bool writeback = features_set_.load(std::memory_order_relaxed)
                             ? !write_through()
                             : set_by_driver_.value_or(options_.write_cache);
  config[kBlkConfigWriteback] = static_cast<std::byte>(writeback);
  store_le<std::uint16_t>(config.data() + kBlkConfigNumQueues, options_.queue_count);
  if ((offered_features_ & feature_bit(kBlkFDiscard)) != 0) {
    store_le<std::uint32_t>(config.data() + kBlkConfigMaxDiscardSectors, kBlkSegmentSectorsMax);
    store_le<std::uint32_t>(config.data() + kBlkConfigMaxDiscardSeg, kBlkSegmentsMax);
    store_le<std::uint32_t>(config.data() + kBlkConfigDiscardSectorAlignment,
                            static_cast<std::uint32_t>(physical / kSectorBytes));
  }
  if ((offered_features_ & feature_bit(kBlkFWriteZeroes)) != 0) {
    store_le<std::uint32_t>(config.data() + kBlkConfigMaxWriteZeroesSectors, kBlkSegmentSectorsMax);
    store_le<std::uint32_t>(config.data() + kBlkConfigMaxWriteZeroesSeg, kBlkSegmentsMax);
    config[kBlkConfigWriteZeroesMayUnmap] = static_cast<std::byte>(limits.write_zeroes_may_unmap);
  }
  return config;
}

Expected<void> BlkDevice::read_config(std::uint32_t offset, std::span<std::byte> out) const {
  if (offset > kConfigBytesMax || out.size() > kConfigBytesMax - offset) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("config space read of {} bytes at {} goes beyond {}", out.size(),
                                  offset, kConfigBytesMax));
  }
  const auto bytes = config();
  std::ranges::fill(out, std::byte{0});
  if (offset < bytes.size()) {
    std::memcpy(out.data(), bytes.data() + offset,
                std::min<std::size_t>(out.size(), bytes.size() - offset));
  }
  return {};
}

Expected<void> BlkDevice::write_config(std::uint32_t offset, std::span<const std::byte> bytes) {
  const bool is_writeback = offset == kBlkConfigWriteback && bytes.size() == 1;
  if (!is_writeback || !negotiated(kBlkFConfigWce)) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format(
            "config space write of {} bytes at {}: only writeback can be written, with CONFIG_WCE "
            "negotiated",
            bytes.size(), offset));
  }
  const auto value = std::to_integer<unsigned>(bytes[0]);
  if (value > 1) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("writeback can be 0 or 1, not {}", value));
  }
  set_by_driver_ = value == 1;
  writeback_.store(value == 1, std::memory_order_relaxed);
  update_write_through();
  return {};
}

}  // namespace vblk::virtio
