// What ring_fixture.h has for split rings, for packed ones: a driver's side written by hand, and a
// queue with everything around it. Positions are counted from the first descriptor ever, so that
// neither wrap counters nor the device's arithmetic are taken for granted here.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "blockdev/virtio/packed_ring.h"
#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio::testing {

// Where descriptor number `number` lies, and the flags that make it available or used.
struct PackedPlace {
  std::uint64_t number;
  std::size_t size;

  [[nodiscard]] std::size_t index() const { return number % size; }
  [[nodiscard]] bool wrap() const { return number / size % 2 == 0; }
  [[nodiscard]] std::uint16_t available() const { return wrap() ? 0x0080 : 0x8000; }
  [[nodiscard]] std::uint16_t used() const { return wrap() ? 0x8080 : 0; }
  [[nodiscard]] std::uint16_t event() const {
    return static_cast<std::uint16_t>(index() | (wrap() ? 0x8000U : 0U));
  }
};

class PackedTestRing {
 public:
  PackedTestRing(const TestMemory& memory, std::uint16_t size, std::uint64_t start = 0)
      : memory_(memory), size_(size), next_avail_(start), next_used_(start), length_of_id_(65536) {
    // As whoever ran it before has left it: all used, a part of it in this lap.
    for (std::uint64_t i = 0; i < size; ++i) {
      const std::uint64_t number = start + i;
      if (number < size) continue;  // never written
      store_le<std::uint16_t>(descriptor(number) + 14, place(number - size).used());
    }
  }

  [[nodiscard]] PackedPlace place(std::uint64_t number) const { return {number, size_}; }
  [[nodiscard]] BlkQueueSetup setup() const {
    const std::uint32_t half = place(next_avail_).event();
    return {.size = size_,
            .next_avail = half << 16 | half,
            .descriptor_address = TestRing::user(kGuestBase),
            .avail_address = TestRing::user(events()),
            .used_address = TestRing::user(events() + 4)};
  }

  struct Raw {
    std::uint64_t address{0};
    std::uint32_t length{0};
    std::uint16_t id{0};
    std::uint16_t flags{0};
  };
  static void store(std::byte* to, const Raw& raw) {
    store_le<std::uint64_t>(to, raw.address);
    store_le<std::uint32_t>(to + 8, raw.length);
    store_le<std::uint16_t>(to + 12, raw.id);
    store_le<std::uint16_t>(to + 14, raw.flags);
  }
  // Whatever the test says, at the next place; flags of availability are the test's, too.
  void put_raw(const Raw& raw) { store(descriptor(next_avail_++), raw); }
  // A legal chain: the first becomes available last.
  void put(const std::vector<QueueRig::Piece>& pieces, std::uint16_t id, bool is_table = false) {
    const std::uint64_t first = next_avail_;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      const std::uint64_t number = first + i;
      Raw raw{.address = pieces[i].address, .length = pieces[i].length};
      // "Buffer ID is included in the last descriptor in the list"; elsewhere it means nothing.
      raw.id = i + 1 == pieces.size() ? id : 0xdead;
      raw.flags = place(number).available();
      if (pieces[i].writable) raw.flags |= kDescFWrite;
      if (is_table) raw.flags |= kDescFIndirect;
      if (i + 1 < pieces.size()) raw.flags |= kDescFNext;
      if (i == 0) {
        const std::uint16_t before = load_le<std::uint16_t>(descriptor(number) + 14);
        store(descriptor(number), {raw.address, raw.length, raw.id, before});
        head_flags_ = raw.flags;
      } else {
        store(descriptor(number), raw);
      }
    }
    store_release_le<std::uint16_t>(descriptor(first) + 14, head_flags_);
    next_avail_ += pieces.size();
    length_of_id_[id] = pieces.size();
  }
  [[nodiscard]] std::size_t room() const { return size_ - (next_avail_ - next_used_); }

  // Used descriptors that are new since the last call.
  std::vector<Used> take_used() {
    std::vector<Used> elements;
    while (is_used(next_used_)) {
      const std::byte* const at = descriptor(next_used_);
      const auto id = load_le<std::uint16_t>(at + 12);
      elements.push_back({id, load_le<std::uint32_t>(at + 8)});
      EXPECT_NE(length_of_id_[id], 0U) << "buffer " << id << " was not given";
      if (length_of_id_[id] == 0) break;
      next_used_ += std::exchange(length_of_id_[id], 0);
    }
    return elements;
  }
  [[nodiscard]] bool is_used(std::uint64_t number) const {
    const auto flags = load_acquire_le<std::uint16_t>(descriptor(number) + 14);
    return number < next_avail_ && (flags & 0x8080) == place(number).used();
  }
  [[nodiscard]] std::uint64_t next_avail() const { return next_avail_; }
  [[nodiscard]] std::uint64_t next_used() const { return next_used_; }

  void set_driver_event(std::uint16_t flags, std::uint16_t desc = 0) const {
    store_release_le<std::uint32_t>(memory_.at(events()), std::uint32_t{flags} << 16 | desc);
  }
  [[nodiscard]] std::uint16_t device_event_flags() const {
    return load_le<std::uint16_t>(memory_.at(events() + 6));
  }
  [[nodiscard]] std::uint16_t device_event_desc() const {
    return load_le<std::uint16_t>(memory_.at(events() + 4));
  }
  [[nodiscard]] std::byte* descriptor(std::uint64_t number) const {
    return memory_.at(kGuestBase + 16 * (number % size_));
  }
  [[nodiscard]] std::uint16_t size() const { return size_; }

 private:
  [[nodiscard]] std::uint64_t events() const { return kGuestBase + 16 * std::uint64_t{size_}; }

  const TestMemory& memory_;
  std::uint16_t size_;
  std::uint64_t next_avail_;
  std::uint64_t next_used_;
  std::vector<std::size_t> length_of_id_;
  std::uint16_t head_flags_{0};
};

inline constexpr std::uint64_t kPackedFeatures = kUsualFeatures | feature_bit(kFRingPacked);

struct PackedRigOptions {
  std::uint16_t size{64};
  std::uint64_t features{kPackedFeatures};
  std::uint64_t start{0};  // descriptors that were made available and used before
  std::shared_ptr<const InflightArea> inflight;
  InterruptOptions interrupts;  // of the device, at its making
};

// With a packed ring.
class PackedRig : public QueueRig {
 public:
  explicit PackedRig(const PackedRigOptions& options = {})
      : QueueRig({.queue_size_max = 1024, .interrupts = options.interrupts}, options.features) {
    ring = std::make_unique<PackedTestRing>(memory, options.size, options.start);
    start(options.inflight);
  }

  void start(std::shared_ptr<const InflightArea> inflight = nullptr) {
    start(ring->setup(), std::move(inflight));
  }
  void start(BlkQueueSetup setup, std::shared_ptr<const InflightArea> inflight = nullptr) {
    setup.kick_fd = kick.fd();
    setup.inflight = std::move(inflight);
    start_queue(std::move(setup));
  }

  // The guest address of an indirect table of these pieces.
  std::uint64_t table(const std::vector<Piece>& pieces, std::uint16_t extra_flags = 0) {
    const std::uint64_t address = allocate_table(pieces.size());
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      PackedTestRing::store(memory.at(address + 16 * i),
                            {.address = pieces[i].address,
                             .length = pieces[i].length,
                             .id = 0xbeef,
                             .flags = static_cast<std::uint16_t>(
                                 extra_flags | (pieces[i].writable ? kDescFWrite : 0))});
    }
    return address;
  }
  void put(const std::vector<Piece>& pieces, std::uint16_t id, bool indirect = false) {
    if (!indirect) return ring->put(pieces, id);
    ring->put({{table(pieces), static_cast<std::uint32_t>(pieces.size() * 16)}}, id, true);
  }
  // A flush in two descriptors; the guest address of its status.
  std::uint64_t put_flush(std::uint16_t id = 0) {
    const std::uint64_t status = allocate(1);
    put({{place(header(kBlkTFlush, 0)), 16}, {status, 1, true}}, id);
    return status;
  }

  std::unique_ptr<PackedTestRing> ring;
};

}  // namespace vblk::virtio::testing
