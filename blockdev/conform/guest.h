// A guest with a virtio-blk driver that does what the test says, well-formed or not: a channel,
// memory, and rings. virtio 1.2, "Block Device".
//
// Requests are made one at a time, on descriptors and buffers of the guest's own; what a test wants
// to be special it makes with the ring itself. One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "blockdev/conform/channel.h"
#include "blockdev/conform/probe.h"
#include "blockdev/conform/ring.h"
#include "blockdev/driver/driver_memory.h"
#include "blockdev/virtio/blk_wire.h"

namespace vblk::conform {

// The features that the suite knows how to use, EVENT_IDX and INDIRECT_DESC aside: those change how
// rings are driven.
inline constexpr std::uint64_t kPlainFeatures =
    bit(virtio::kBlkFSizeMax) | bit(virtio::kBlkFSegMax) | bit(virtio::kBlkFRo) |
    bit(virtio::kBlkFBlkSize) | bit(virtio::kBlkFFlush) | bit(virtio::kBlkFTopology) |
    bit(virtio::kBlkFConfigWce) | bit(virtio::kBlkFMq) | bit(virtio::kBlkFDiscard) |
    bit(virtio::kBlkFWriteZeroes) | bit(virtio::kFVersion1) | bit(vhost_user::kFProtocolFeatures);
inline constexpr std::uint64_t kPlainProtocol = bit(vhost_user::kProtocolFMq) |
                                                bit(vhost_user::kProtocolFReplyAck) |
                                                bit(vhost_user::kProtocolFConfig);

// Bytes that every backend can transfer: a multiple of any logical block size.
inline constexpr std::size_t kDefaultBlock = 4096;

struct GuestOptions {
  std::uint64_t features{kPlainFeatures};  // of what is offered
  std::uint64_t protocol_features{kPlainProtocol};
  std::uint16_t queue_count{1};
  std::uint16_t queue_size{64};
  std::uint16_t base{0};
  std::vector<std::size_t> memory_bytes{std::size_t{8} << 20};
  bool starts_rings{true};
  bool has_call_fd{true};
};

// What came back of a request. Fails the test by itself if nothing did, where status is asked for.
struct Answer {
  bool answered{false};
  std::uint8_t status{0xff};
  std::uint32_t used_length{0};
};

struct Segment {
  std::uint64_t sector;
  std::uint32_t sector_count;
  std::uint32_t flags;
};

class Guest {
 public:
  explicit Guest(Probe& probe, const GuestOptions& options = {});
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;

  [[nodiscard]] Channel& channel() { return channel_; }
  [[nodiscard]] const Channel& channel() const { return channel_; }
  [[nodiscard]] driver::DriverMemory& memory() { return *memory_; }
  [[nodiscard]] Ring& ring(std::size_t index = 0) { return *rings_[index]; }
  [[nodiscard]] std::size_t ring_count() const { return rings_.size(); }
  // The guest's own data buffer: 1 MiB.
  [[nodiscard]] std::span<std::byte> data() const { return data_; }
  [[nodiscard]] std::uint64_t address_of(const void* pointer) const {
    return memory_->guest_address(pointer);
  }
  std::span<std::byte> allocate(std::size_t bytes, std::size_t alignment = 4096);

  void share_memory();
  void start_ring(std::uint16_t index);
  // GET_VRING_BASE; the index.
  std::uint16_t stop_ring(std::uint16_t index);

  // What the backend takes in one request. Asked for where CONFIG is negotiated.
  const RequestLimits& limits();
  // Skip the test where a request would exceed them: what becomes of such a one is not the
  // backend's fault. post() and segments() ask by themselves, of requests that get a block or more.
  void need_segment_bytes(std::size_t bytes);
  void need_segments(std::size_t count);

  // One request on ring 0 (or another) of `type`, waited for. `readable` and `writable` are the
  // data, in guest memory.
  Answer request(std::uint32_t type, std::uint64_t sector, std::span<const std::byte> readable,
                 std::span<std::byte> writable, std::size_t ring = 0);
  // The same, not waited for: descriptors [3 * slot, 3 * slot + 3) and the slot's own header and
  // status are used.
  void post(std::size_t ring, std::uint16_t slot, std::uint32_t type, std::uint64_t sector,
            std::span<const std::byte> readable, std::span<std::byte> writable);
  // The two halves of post(). What is to be special about a request is changed between them: from
  // offer() on a backend that looks by itself may have it, kick or not.
  void write_request(std::size_t ring, std::uint16_t slot, std::uint32_t type, std::uint64_t sector,
                     std::span<const std::byte> readable, std::span<std::byte> writable);
  void offer(std::size_t ring, std::uint16_t slot);
  [[nodiscard]] std::uint8_t status_of(std::size_t ring, std::uint16_t slot) const;
  [[nodiscard]] std::byte* header_of(std::size_t ring, std::uint16_t slot) const;
  [[nodiscard]] std::byte* status_byte(std::size_t ring, std::uint16_t slot) const;

  // Of the guest's data buffer, `bytes` long.
  Answer read(std::uint64_t sector, std::size_t bytes, std::size_t ring = 0);
  Answer write(std::uint64_t sector, std::size_t bytes, std::size_t ring = 0);
  Answer flush(std::size_t ring = 0);
  // Discard or write zeroes.
  Answer segments(std::uint32_t type, std::span<const Segment> list);
  // The same for what must succeed.
  void must_read(std::uint64_t sector, std::size_t bytes, std::size_t ring = 0);
  void must_write(std::uint64_t sector, std::size_t bytes, std::size_t ring = 0);
  void must_flush(std::size_t ring = 0);
  // As many reads as ring 0 has room for, of a block each from the disk's begin on; kicked. How
  // many.
  std::uint16_t post_reads();
  // Waits for all of them, which have to succeed; `under_what`: what was done meanwhile.
  void await_reads(std::uint16_t count, const char* under_what);
  // Waits for the one request that is in flight on a ring, which has to come back as `id`.
  Answer await(std::size_t ring, std::uint16_t slot);

  // Fills the data buffer's first bytes with what follows from `stamp`, and looks whether they are
  // that: the offset of the first byte that is not, or nothing.
  void fill(std::size_t bytes, std::uint64_t stamp);
  [[nodiscard]] std::optional<std::size_t> differs(std::size_t bytes, std::uint64_t stamp) const;
  // Fails the test where they are not: "byte 7 of WHAT is wrong".
  void expect_data(std::size_t bytes, std::uint64_t stamp, const std::string& what) const;

  [[nodiscard]] std::uint64_t capacity_sectors();
  [[nodiscard]] std::uint64_t config_field(std::uint32_t offset, std::size_t bytes);
  // The smallest transfer: 512, or the logical block size.
  [[nodiscard]] std::size_t block_bytes();
  [[nodiscard]] bool has(unsigned feature) const { return channel_.has(feature); }

 private:
  Probe& probe_;
  const GuestOptions options_;
  Channel channel_;
  std::unique_ptr<driver::DriverMemory> memory_;
  std::vector<std::unique_ptr<Ring>> rings_;
  std::vector<std::span<std::byte>> headers_;   // per ring
  std::vector<std::span<std::byte>> statuses_;  // per ring
  std::span<std::byte> data_;
  std::span<std::byte> segments_;
};

inline void need_feature(const Guest& guest, unsigned feature, const char* name) {
  need_feature(guest.channel(), feature, name);
}

// Says of a ring all that it takes, up to its kick descriptor. With PROTOCOL_FEATURES it is still
// disabled then: start_ring() enables it, too. Split rings and packed ones.
template <typename AnyRing>
void set_up_ring(Channel& channel, const AnyRing& ring, std::uint32_t index, std::uint32_t base,
                 bool has_call_fd = true) {
  using namespace vhost_user;
  const std::uint64_t number = index;
  const int kick[] = {ring.kick_fd()};
  const int call[] = {ring.call_fd()};
  const int error[] = {ring.error_fd()};
  channel.command(Request::kSetVringNum, payload_of(VringState{index, ring.size()}));
  channel.command(Request::kSetVringBase, payload_of(VringState{index, base}));
  channel.command(Request::kSetVringAddr, payload_of(ring.addresses(index)));
  channel.command(Request::kSetVringErr, payload_of(number), error);
  if (has_call_fd) {
    channel.command(Request::kSetVringCall, payload_of(number), call);
  } else {
    channel.command(Request::kSetVringCall, payload_of(number | kVringNoFd));
  }
  channel.command(Request::kSetVringKick, payload_of(number), kick);
}
void enable_ring(Channel& channel, std::uint32_t index, bool enable = true);
template <typename AnyRing>
void start_ring(Channel& channel, const AnyRing& ring, std::uint32_t index, std::uint32_t base,
                bool has_call_fd = true) {
  set_up_ring(channel, ring, index, base, has_call_fd);
  if (channel.has(vhost_user::kFProtocolFeatures)) enable_ring(channel, index);
}
// What may be wrong about a ring, of queue 0.
struct RingStart {
  std::uint32_t size;
  std::uint32_t base;
  vhost_user::VringAddress addresses;
};
// The same by messages that the backend may refuse. False: it has ended the connection.
bool try_start_ring(Channel& channel, const Doorbells& bells, const RingStart& start);
// SET_MEM_TABLE.
void share_table(Channel& channel, const driver::DriverMemory& memory);

// How many queues the backend has, of which no more than so many are of interest. Connects.
[[nodiscard]] std::uint16_t queues_of(Probe& probe, std::uint16_t most = 64);
// Skips the test where packed rings are not offered. Connects.
void need_packed(Probe& probe);
// Skips the test if they are fewer.
void need_queues(Probe& probe, std::uint16_t count);

}  // namespace vblk::conform
