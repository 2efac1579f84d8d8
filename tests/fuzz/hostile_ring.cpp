#include "tests/fuzz/hostile_ring.h"

#include <array>
#include <bit>
#include <cstdlib>

#include "tests/fuzz/input.h"
#include "tests/virtio/packed_fixture.h"

namespace vblk::fuzz {

namespace {

using namespace virtio;
using virtio::testing::PackedRig;
using virtio::testing::PackedTestRing;
using virtio::testing::Rig;
using virtio::testing::TestRing;

constexpr int kStepsMax = 400;
constexpr std::uint16_t kSizeMax = 64;
constexpr std::uint64_t kHeaders = Rig::kBuffers;
constexpr std::uint64_t kTables = Rig::kBuffers + 0x1000;
constexpr std::uint64_t kStatuses = Rig::kBuffers + 0x3000;
constexpr std::uint64_t kData = Rig::kBuffers + 0x4000;
constexpr std::size_t kHeaderCount = 32;

// What most descriptors should have for the device to take them.
std::uint64_t address_of(Input& input) {
  const std::uint8_t what = input.byte();
  switch (what % 8) {
    case 0:
    case 1:
    case 2:
      return kHeaders + kBlkRequestHeaderBytes * (what / 8);
    case 3:
    case 4:
      return kData + std::uint64_t{512} * what;
    case 5:
      return kTables + std::uint64_t{16} * what;
    case 6:
      return virtio::testing::kGuestBase + virtio::testing::kRegionBytes -
             what;  // to the next region
    default:
      return input.take<std::uint64_t>();
  }
}

std::uint32_t length_of(Input& input) {
  constexpr std::array<std::uint32_t, 12> kLengths{16, 16, 1, 1, 512, 4096, 20, 0, 32, 48, 513, 17};
  const std::uint8_t what = input.byte();
  return what < 240 ? kLengths[what % kLengths.size()] : input.take<std::uint32_t>();
}

// Both kinds of rings behind the same steps.
struct SplitSide {
  explicit SplitSide(Input& input, std::uint8_t flags)
      : rig({.size = std::bit_floor(static_cast<std::uint16_t>(1 + input.byte() % kSizeMax)),
             .features = features(flags, virtio::testing::kUsualFeatures),
             .start_index = static_cast<std::uint16_t>(input.byte() * 257)}) {}
  static std::uint64_t features(std::uint8_t flags, std::uint64_t usual) {
    if ((flags & 2) != 0) usual |= feature_bit(kFEventIdx);
    if ((flags & 4) == 0) usual &= ~feature_bit(kFIndirectDesc);
    return usual;
  }
  void put_descriptor(Input& input) {
    const std::uint8_t index = input.byte();
    rig.ring->set_descriptor(index % rig.ring->size(), read(input));
  }
  void put_in_table(std::byte* to, Input& input) { TestRing::store_descriptor(to, read(input)); }
  void make_available(Input& input) { rig.ring->make_available(input.byte() % (kSizeMax + 1)); }
  void set_event(Input& input) {
    rig.ring->set_avail_flags(input.byte());
    rig.ring->set_used_event(input.take<std::uint16_t>());
  }
  // A flush that works, unless its descriptors are in use.
  void put_flush(Input& input) {
    const std::uint64_t status = kStatuses + input.byte();
    const auto head = static_cast<std::uint16_t>(input.byte() % rig.ring->size());
    if (head + 1U >= rig.ring->size()) return;
    rig.submit({{kHeaders, 16}, {status, 1, true}}, head);
  }
  [[nodiscard]] std::size_t ring_bytes() const {
    return rig.ring->end() - virtio::testing::kGuestBase;
  }

  Rig rig;

 private:
  Descriptor read(Input& input) const {
    Descriptor descriptor{};
    descriptor.guest_address = address_of(input);
    descriptor.length_bytes = length_of(input);
    descriptor.flags = input.byte() % 8;
    descriptor.next = input.byte();
    return descriptor;
  }
};

struct PackedSide {
  explicit PackedSide(Input& input, std::uint8_t flags)
      : rig({.size = static_cast<std::uint16_t>(1 + input.byte() % kSizeMax),
             .features = SplitSide::features(flags, virtio::testing::kPackedFeatures),
             .start = input.byte()}) {}
  // Available at once: the next of the ring.
  void put_descriptor(Input& input) {
    PackedTestRing::Raw raw = read(input);
    const std::uint8_t what = input.byte();
    const std::uint16_t available = rig.ring->place(rig.ring->next_avail()).available();
    raw.flags |= what < 224 ? available : static_cast<std::uint16_t>(what << 7 | what << 14);
    rig.ring->put_raw(raw);
  }
  void put_in_table(std::byte* to, Input& input) { PackedTestRing::store(to, read(input)); }
  // A chain of two whose flags are in order.
  void make_available(Input& input) {
    const std::uint8_t id = input.byte();
    rig.ring->put({{address_of(input), length_of(input)},
                   {address_of(input), length_of(input), (id & 128) == 0}},
                  id % 128);
  }
  void set_event(Input& input) {
    const std::uint8_t flags = input.byte();
    rig.ring->set_driver_event(flags, input.take<std::uint16_t>());
  }
  void put_flush(Input& input) {
    const std::uint64_t status = kStatuses + input.byte();
    rig.put({{kHeaders, 16}, {status, 1, true}}, input.byte() % rig.ring->size());
  }
  [[nodiscard]] std::size_t ring_bytes() const { return std::size_t{rig.ring->size()} * 16 + 8; }

  PackedRig rig;

 private:
  static PackedTestRing::Raw read(Input& input) {
    PackedTestRing::Raw raw;
    raw.address = address_of(input);
    raw.length = length_of(input);
    raw.id = input.byte();
    raw.flags = input.byte() % 8;
    return raw;
  }
};

template <typename Side>
void step(Side& side, Input& input) {
  auto& rig = side.rig;
  switch (input.byte() % 10) {
    case 0:
    case 1:
      return side.put_descriptor(input);
    case 2:
      return side.make_available(input);
    case 3: {
      std::byte* const to = rig.memory.at(kTables + std::uint64_t{16} * input.byte());
      return side.put_in_table(to, input);
    }
    case 4:  // anything anywhere in the ring
      for (unsigned i = 0; i < 4; ++i) {
        const std::uint64_t offset = input.take<std::uint16_t>() % side.ring_bytes();
        *rig.memory.at(virtio::testing::kGuestBase + offset) = static_cast<std::byte>(input.byte());
      }
      return;
    case 5:
      return side.set_event(input);
    case 6:
      rig.node.release(*rig.context, input.flag());
      return;
    case 7:
      if (rig.queue->prepare_to_sleep()) rig.queue->wake_up();
      return;
    case 8:
      return side.put_flush(input);
    default:
      rig.cycle();
  }
}

template <typename Side>
RingOutcome run(Input& input, std::uint8_t flags) {
  Side side(input, flags);
  auto& rig = side.rig;
  rig.node.hold = (flags & 8) != 0;
  for (std::size_t i = 0; i < kHeaderCount; ++i) {
    constexpr std::array kTypes{kBlkTFlush, kBlkTIn,      kBlkTOut,         kBlkTGetId,
                                kBlkTIn,    kBlkTDiscard, kBlkTWriteZeroes, 77U};
    rig.memory.write(kHeaders + kBlkRequestHeaderBytes * i,
                     virtio::testing::header(kTypes[i % kTypes.size()], i));
  }
  for (int steps = 0; steps < kStepsMax && !input.is_empty(); ++steps) step(side, input);
  rig.node.hold = false;
  rig.node.release(*rig.context);
  rig.run();
  RingOutcome outcome{.requests = rig.queue->statistics().requests,
                      .is_broken = rig.queue->broken(),
                      .failure = {}};
  const std::uint64_t errors = rig.error.take();
  if (rig.queue->in_flight() != 0) outcome.failure = "a request never ended";
  if (errors != (outcome.is_broken ? 1U : 0U)) outcome.failure = "the error descriptor lies";
  if (outcome.requests > 0 && std::getenv("VBLK_FUZZ_CANARY") != nullptr)
    outcome.failure = "a request is lost";
  return outcome;
}

}  // namespace

RingOutcome run_hostile_ring(std::span<const std::uint8_t> bytes) {
  Input input(bytes);
  const std::uint8_t flags = input.byte();
  return (flags & 1) != 0 ? run<PackedSide>(input, flags) : run<SplitSide>(input, flags);
}

}  // namespace vblk::fuzz
