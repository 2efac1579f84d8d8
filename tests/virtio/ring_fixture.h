// A virtio-blk queue with everything around it that a test needs: guest memory, a driver's side of
// the ring built by hand (any layout, legal or not), and a disk in memory whose completions the
// test controls. No thread and no sleep: run() turns the loop's cycle by hand.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "aio/simulated_engine.h"
#include "blockdev/block_node.h"
#include "blockdev/io_context.h"
#include "blockdev/log.h"
#include "blockdev/virtio/blk_device.h"
#include "blockdev/virtio/blk_queue.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/guest_memory.h"
#include "blockdev/virtio/little_endian.h"
#include "blockdev/virtio/split_ring.h"

namespace vblk::virtio::testing {

// Of random tests: printed, and taken from the environment to repeat one.
inline std::uint64_t test_seed() {
  const char* const text = std::getenv("VBLK_TEST_SEED");
  const std::uint64_t seed =
      text != nullptr ? std::strtoull(text, nullptr, 0) : std::random_device{}();
  ::testing::Test::RecordProperty("seed", std::to_string(seed));
  std::printf("VBLK_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

// A disk in memory that remembers what it was asked and fails on demand.
class MemoryNode final : public blockdev::BlockNode {
 public:
  struct Record {
    blockdev::BlockOperation operation;
    std::uint64_t offset_bytes;
    std::uint64_t length_bytes;
    bool write_through;
    bool may_unmap;
    bool outlives_process;
  };

  explicit MemoryNode(std::size_t size_bytes, bool read_only = false) : disk(size_bytes) {
    size_bytes_ = size_bytes;
    name_ = "memory";
    limits_.optimal_alignment_bytes = 4096;
    limits_.read_only = read_only;
    limits_.can_discard = true;
    limits_.can_write_zeroes = true;
    limits_.write_zeroes_may_unmap = true;
  }
  blockdev::BlockLimits& mutable_limits() { return limits_; }

  // Completes what hold has kept back, last first if `reversed`.
  void release(blockdev::IoContext& context, bool reversed = false) {
    if (reversed) std::reverse(held.begin(), held.end());
    for (blockdev::BlockRequest* request : std::exchange(held, {}))
      context.complete_later(*request, 0);
  }

  std::vector<std::byte> disk;
  std::vector<Record> records;
  std::vector<blockdev::BlockRequest*> held;
  bool hold{false};
  std::function<int(const Record&, std::size_t index)> fault;

 protected:
  void do_submit(blockdev::BlockRequest& request, blockdev::IoContext& context) override {
    const Record record{.operation = request.operation,
                        .offset_bytes = request.offset_bytes,
                        .length_bytes = request.length_bytes,
                        .write_through = request.write_through,
                        .may_unmap = request.may_unmap,
                        .outlives_process = request.outlives_process};
    records.push_back(record);
    const int error = fault ? fault(record, records.size() - 1) : 0;
    if (error == 0) carry_out(request);
    if (hold)
      held.push_back(&request);
    else
      context.complete_later(request, error);
  }

 private:
  void carry_out(const blockdev::BlockRequest& request) {
    using enum blockdev::BlockOperation;
    std::byte* at = disk.data() + request.offset_bytes;
    if (request.operation == kWriteZeroes || request.operation == kDiscard)
      std::memset(at, 0, request.length_bytes);
    if (request.operation != kRead && request.operation != kWrite) return;
    for (std::uint32_t i = 0; i < request.iov_count; ++i) {
      const iovec& piece = request.iov[i];
      if (request.operation == kRead)
        std::memcpy(piece.iov_base, at, piece.iov_len);
      else
        std::memcpy(at, piece.iov_base, piece.iov_len);
      at += piece.iov_len;
    }
  }
};

// Guest addresses of the pieces of the memory below. Two regions that touch, so that a buffer can
// cross from one to the other although they lie apart in our address space.
inline constexpr std::uint64_t kGuestBase = 0x10000;
inline constexpr std::size_t kRegionBytes = std::size_t{1} << 20;
inline constexpr std::uint64_t kUserBase = 0x7000'0000'0000;

// A file as frontends share their memory by.
class MemFd {
 public:
  explicit MemFd(std::size_t size_bytes) : fd_(::memfd_create("guest-memory", MFD_CLOEXEC)) {
    EXPECT_EQ(::ftruncate(fd_, static_cast<off_t>(size_bytes)), 0);
  }
  ~MemFd() { ::close(fd_); }
  MemFd(const MemFd&) = delete;
  MemFd& operator=(const MemFd&) = delete;
  [[nodiscard]] int fd() const { return fd_; }

 private:
  int fd_;
};

class TestMemory {
 public:
  explicit TestMemory(std::shared_ptr<const MemoryRegion> more = nullptr)
      : low_(kRegionBytes + kAlign), high_(kRegionBytes + kAlign) {
    std::vector<std::shared_ptr<const MemoryRegion>> regions{
        MemoryRegion::wrap(aligned(low_), kGuestBase, kRegionBytes, kUserBase),
        MemoryRegion::wrap(aligned(high_), kGuestBase + kRegionBytes, kRegionBytes,
                           kUserBase + kRegionBytes)};
    if (more) regions.push_back(std::move(more));
    memory_ = GuestMemory::create(std::move(regions)).value();
  }
  [[nodiscard]] std::shared_ptr<const GuestMemory> shared() const { return memory_; }
  // A pointer to one byte; the next may lie in the other region.
  [[nodiscard]] std::byte* at(std::uint64_t guest_address) const {
    return AddressTranslator(*memory_).translate(guest_address, 1);
  }
  void write(std::uint64_t guest_address, std::span<const std::byte> bytes) const {
    for (std::size_t i = 0; i < bytes.size(); ++i) *at(guest_address + i) = bytes[i];
  }
  [[nodiscard]] std::vector<std::byte> read(std::uint64_t guest_address, std::size_t count) const {
    std::vector<std::byte> bytes(count);
    for (std::size_t i = 0; i < count; ++i) bytes[i] = *at(guest_address + i);
    return bytes;
  }

 private:
  static constexpr std::size_t kAlign = 64;
  static std::byte* aligned(std::vector<std::byte>& storage) {
    void* start = storage.data();
    std::size_t room = storage.size();
    return static_cast<std::byte*>(std::align(kAlign, kRegionBytes, start, room));
  }
  std::vector<std::byte> low_;
  std::vector<std::byte> high_;
  std::shared_ptr<const GuestMemory> memory_;
};

// A used element.
struct Used {
  std::uint32_t id;
  std::uint32_t length;
  bool operator==(const Used&) const = default;
};

// The driver's side of a ring, without any check: it writes what the test says.
class TestRing {
 public:
  TestRing(const TestMemory& memory, std::uint16_t size, std::uint64_t guest_address = kGuestBase)
      : memory_(memory),
        size_(size),
        descriptors_(guest_address),
        avail_(descriptors_ + descriptor_table_bytes(size)),
        used_((avail_ + avail_ring_bytes(size) + 3) & ~std::uint64_t{3}) {}

  static std::uint64_t user(std::uint64_t guest_address) {
    return guest_address - kGuestBase + kUserBase;
  }
  [[nodiscard]] BlkQueueSetup setup() const {
    return {.size = size_,
            .descriptor_address = user(descriptors_),
            .avail_address = user(avail_),
            .used_address = user(used_)};
  }

  static void store_descriptor(std::byte* to, const Descriptor& descriptor) {
    store_le<std::uint64_t>(to, descriptor.guest_address);
    store_le<std::uint32_t>(to + 8, descriptor.length_bytes);
    store_le<std::uint16_t>(to + 12, descriptor.flags);
    store_le<std::uint16_t>(to + 14, descriptor.next);
  }
  void set_descriptor(std::size_t index, const Descriptor& descriptor) const {
    store_descriptor(descriptor_pointer(index), descriptor);
  }
  [[nodiscard]] std::byte* descriptor_pointer(std::size_t index) const {
    return memory_.at(descriptors_ + kDescriptorBytes * index);
  }
  void make_available(std::uint16_t head) {
    store_le<std::uint16_t>(avail(kAvailRingOffset + std::size_t{2} * (avail_index_ % size_)),
                            head);
    set_avail_index(static_cast<std::uint16_t>(avail_index_ + 1));
  }
  void set_avail_index(std::uint16_t index) {
    avail_index_ = index;
    store_release_le<std::uint16_t>(avail(kAvailIndexOffset), index);
  }
  void set_avail_flags(std::uint16_t flags) const {
    store_le<std::uint16_t>(avail(kAvailFlagsOffset), flags);
  }
  void set_used_event(std::uint16_t index) const {
    store_le<std::uint16_t>(avail(avail_used_event_offset(size_)), index);
  }
  void set_used_index(std::uint16_t index) {
    used_seen_ = index;
    store_le<std::uint16_t>(used(kUsedIndexOffset), index);
  }
  void set_avail_event(std::uint16_t index) const {
    store_le<std::uint16_t>(used(used_avail_event_offset(size_)), index);
  }
  [[nodiscard]] std::uint16_t avail_event() const {
    return load_le<std::uint16_t>(used(used_avail_event_offset(size_)));
  }
  [[nodiscard]] std::uint16_t used_flags() const {
    return load_le<std::uint16_t>(used(kUsedFlagsOffset));
  }
  [[nodiscard]] std::uint16_t used_index() const {
    return load_acquire_le<std::uint16_t>(used(kUsedIndexOffset));
  }
  [[nodiscard]] std::uint16_t avail_index() const { return avail_index_; }
  // Used elements that are new since the last call.
  std::vector<Used> take_used() {
    std::vector<Used> elements;
    for (; used_seen_ != used_index(); ++used_seen_) {
      const std::byte* const element =
          used(kUsedRingOffset + kUsedElementBytes * (used_seen_ % size_));
      elements.push_back({load_le<std::uint32_t>(element), load_le<std::uint32_t>(element + 4)});
    }
    return elements;
  }
  // First guest address behind the ring.
  [[nodiscard]] std::uint64_t end() const { return used_ + used_ring_bytes(size_); }
  [[nodiscard]] std::byte* avail(std::size_t offset) const { return memory_.at(avail_ + offset); }
  [[nodiscard]] std::byte* used(std::size_t offset) const { return memory_.at(used_ + offset); }
  [[nodiscard]] std::uint16_t size() const { return size_; }

 private:
  const TestMemory& memory_;
  std::uint16_t size_;
  std::uint64_t descriptors_;
  std::uint64_t avail_;
  std::uint64_t used_;
  std::uint16_t avail_index_{0};
  std::uint16_t used_seen_{0};
};

class EventFd {
 public:
  EventFd() : fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}
  ~EventFd() { ::close(fd_); }
  EventFd(const EventFd&) = delete;
  EventFd& operator=(const EventFd&) = delete;
  [[nodiscard]] int fd() const { return fd_; }
  // What was added since the last call.
  [[nodiscard]] std::uint64_t take() const {
    std::uint64_t value = 0;
    return ::read(fd_, &value, sizeof value) == static_cast<ssize_t>(sizeof value) ? value : 0;
  }

 private:
  int fd_;
};

inline std::array<std::byte, kBlkRequestHeaderBytes> header(std::uint32_t type,
                                                            std::uint64_t sector) {
  std::array<std::byte, kBlkRequestHeaderBytes> bytes{};
  store_le<std::uint32_t>(bytes.data(), type);
  store_le<std::uint64_t>(bytes.data() + 8, sector);
  return bytes;
}

inline std::array<std::byte, kBlkDiscardSegmentBytes> segment(std::uint64_t sector,
                                                              std::uint32_t sector_count,
                                                              std::uint32_t flags = 0) {
  std::array<std::byte, kBlkDiscardSegmentBytes> bytes{};
  store_le<std::uint64_t>(bytes.data(), sector);
  store_le<std::uint32_t>(bytes.data() + 8, sector_count);
  store_le<std::uint32_t>(bytes.data() + 12, flags);
  return bytes;
}

inline constexpr std::byte kUntouched{0xee};  // what writable buffers hold beforehand

inline constexpr std::uint64_t kRingFeatures =
    feature_bit(kFVersion1) | feature_bit(kFIndirectDesc);
inline constexpr std::uint64_t kUsualFeatures = kRingFeatures | feature_bit(kBlkFFlush);

struct RigOptions {
  std::uint16_t size{64};
  std::uint64_t features{kUsualFeatures};
  bool read_only{false};
  bool write_cache{true};
  std::uint16_t start_index{0};  // of both rings
  std::string serial{"serial"};
  bool with_kick{true};
  std::shared_ptr<const MemoryRegion> more_memory;
  std::shared_ptr<const InflightArea> inflight;
  LeftRequests left;
  // Of the device, at its making.
  ErrorPolicy on_error{.read = ErrorChoice::kReport, .write = ErrorChoice::kReport};
  blockdev::IoLimits limits;
  InterruptOptions interrupts;
};

// Device and queue together, with buffers in guest memory: all that does not depend on the kind of
// ring. Who derives from it has the ring, and starts the queue.
class QueueRig {
 public:
  static constexpr std::size_t kDiskBytes = std::size_t{4} << 20;
  static constexpr std::uint64_t kBuffers = kGuestBase + 0x40000;  // behind any ring

  struct Piece {
    std::uint64_t address;
    std::uint32_t length;
    bool writable{false};
  };

  QueueRig(const QueueRig&) = delete;
  QueueRig& operator=(const QueueRig&) = delete;

  // One cycle of the loop. True if something was done.
  bool cycle() {
    bool progress = queue != nullptr && queue->poll() > 0;
    progress |= context->poll() > 0;
    if (queue != nullptr) queue->settle();
    return progress;
  }
  void run() {
    for (int cycles = 0; cycle(); ++cycles) ASSERT_LT(cycles, 100000) << "it never comes to rest";
  }

  // Guest memory for a buffer, filled; used again when nothing is in flight.
  std::uint64_t allocate(std::size_t bytes, std::byte fill = kUntouched) {
    const std::uint64_t address = next_buffer_;
    next_buffer_ += bytes;
    for (std::size_t i = 0; i < bytes; ++i) *memory.at(address + i) = fill;
    return address;
  }
  std::uint64_t place(std::span<const std::byte> bytes) {
    const std::uint64_t address = allocate(bytes.size());
    memory.write(address, bytes);
    return address;
  }

  void forget_buffers() { next_buffer_ = kBuffers; }

  TestMemory memory;
  blockdev::IoLoop loop;
  aio::SimulatedDisk disk{{}};
  MemoryNode node;
  EventFd kick;
  EventFd call;
  EventFd error;
  std::unique_ptr<blockdev::IoContext> context;
  std::unique_ptr<BlkDevice> device;
  std::unique_ptr<BlkQueue> queue;

 protected:
  QueueRig(const BlkDeviceOptions& options, std::uint64_t features, bool read_only = false,
           std::shared_ptr<const MemoryRegion> more_memory = nullptr)
      : memory(std::move(more_memory)), node(kDiskBytes, read_only) {
    log::set_level(log::Level::kOff);
    context = std::make_unique<blockdev::IoContext>(
        loop, std::make_unique<aio::EngineSet>(aio::SimulatedEngine::create(disk).value()));
    device = BlkDevice::create(node, options).value();
    EXPECT_TRUE(device->set_features(features).has_value());
  }
  ~QueueRig() {
    node.hold = false;
    node.release(*context);
    run();
    if (queue != nullptr) {
      EXPECT_EQ(queue->in_flight(), 0U) << "a slot leaked";
    }
    queue.reset();
  }

  void start_queue(BlkQueueSetup setup) {
    setup.call_fd = call.fd();
    setup.error_fd = error.fd();
    auto started = BlkQueue::start(*device, *context, memory.shared(), setup);
    ASSERT_TRUE(started.has_value()) << started.error().message;
    queue = std::move(*started);
  }
  // Guest memory for an indirect table of so many descriptors, aligned as it must be.
  std::uint64_t allocate_table(std::size_t descriptors) {
    next_buffer_ = (next_buffer_ + 15) & ~std::uint64_t{15};
    return allocate(descriptors * kDescriptorBytes);
  }

 private:
  std::uint64_t next_buffer_{kBuffers};
};

// With a split ring.
class Rig : public QueueRig {
 public:
  explicit Rig(const RigOptions& options = {})
      : QueueRig({.queue_size_max = 1024,
                  .serial = options.serial,
                  .write_cache = options.write_cache,
                  .on_error = options.on_error,
                  .limits = options.limits,
                  .interrupts = options.interrupts},
                 options.features, options.read_only, options.more_memory) {
    ring = std::make_unique<TestRing>(memory, options.size);
    ring->set_avail_index(options.start_index);
    ring->set_used_index(options.start_index);
    start(options);
  }

  void start(const RigOptions& options) {
    BlkQueueSetup setup = ring->setup();
    setup.next_avail = options.start_index;
    if (options.with_kick) setup.kick_fd = kick.fd();
    setup.inflight = options.inflight;
    setup.left = options.left;
    start_queue(std::move(setup));
  }

  // Chains the pieces from descriptor `head` on and makes them available.
  void submit(const std::vector<Piece>& pieces, std::uint16_t head = 0) {
    write_chain(pieces, [&](std::size_t i) { return ring->descriptor_pointer(i); }, head);
    ring->make_available(head);
  }
  void submit_indirect(const std::vector<Piece>& pieces, std::uint16_t head = 0) {
    const std::uint64_t table = allocate_table(pieces.size());
    write_chain(pieces, [&](std::size_t i) { return memory.at(table + i * kDescriptorBytes); }, 0);
    ring->set_descriptor(
        head, {.guest_address = table,
               .length_bytes = static_cast<std::uint32_t>(pieces.size() * kDescriptorBytes),
               .flags = kDescFIndirect,
               .next = 0});
    ring->make_available(head);
  }

  struct Result {
    std::vector<Used> used;
    std::uint8_t status;
    std::vector<std::byte> data;
  };
  // A request in the usual layout, run until it is done. `readable` and `writable_bytes` are what
  // lies between header and status.
  Result request(std::uint32_t type, std::uint64_t sector, std::span<const std::byte> readable = {},
                 std::size_t writable_bytes = 0) {
    const auto data = queue_request(type, sector, readable, writable_bytes);
    run();
    const std::vector<Used> used = ring->take_used();
    return {.used = used,
            .status = std::to_integer<std::uint8_t>(*memory.at(data + writable_bytes)),
            .data = memory.read(data, writable_bytes)};
  }
  // The same without running it. Returns the guest address of data and status.
  std::uint64_t queue_request(std::uint32_t type, std::uint64_t sector,
                              std::span<const std::byte> readable = {},
                              std::size_t writable_bytes = 0, std::uint16_t head = 0) {
    // Nobody uses what was placed before.
    if (queue->in_flight() == 0 && queue->next_avail() == ring->avail_index()) forget_buffers();
    std::vector<Piece> pieces{{place(header(type, sector)), kBlkRequestHeaderBytes}};
    if (!readable.empty())
      pieces.push_back({place(readable), static_cast<std::uint32_t>(readable.size())});
    const std::uint64_t data = allocate(writable_bytes + 1);
    if (writable_bytes > 0)
      pieces.push_back({data, static_cast<std::uint32_t>(writable_bytes), true});
    pieces.push_back({data + writable_bytes, 1, true});
    submit(pieces, head);
    return data;
  }

  std::unique_ptr<TestRing> ring;

 private:
  void write_chain(const std::vector<Piece>& pieces,
                   const std::function<std::byte*(std::size_t)>& descriptor, std::uint16_t first) {
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      const bool last = i + 1 == pieces.size();
      const auto flags = static_cast<std::uint16_t>((pieces[i].writable ? kDescFWrite : 0) |
                                                    (last ? 0 : kDescFNext));
      TestRing::store_descriptor(descriptor(first + i),
                                 {.guest_address = pieces[i].address,
                                  .length_bytes = pieces[i].length,
                                  .flags = flags,
                                  .next = static_cast<std::uint16_t>(first + i + 1)});
    }
  }
};

inline std::vector<std::byte> pattern(std::size_t bytes, unsigned seed = 1) {
  std::vector<std::byte> out(bytes);
  for (std::size_t i = 0; i < bytes; ++i)
    out[i] = static_cast<std::byte>((i * 31 + std::size_t{seed} * 7 + i / 251) & 0xff);
  return out;
}

}  // namespace vblk::virtio::testing
