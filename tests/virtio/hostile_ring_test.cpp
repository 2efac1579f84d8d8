// Rings full of rubbish: nothing crashes or hangs, every chain that was taken completes or the ring
// breaks, no slot leaks, and the next healthy queue works.
#include <unistd.h>

#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

using testing::Rig;

class Rubbish {
 public:
  Rubbish(Rig& rig, std::uint64_t seed) : rig_(rig), random_(seed) {}

  // Descriptors of which most are nearly right: pure noise breaks the ring at its first byte and
  // tests no more than that.
  void fill() {
    const std::uint16_t size = rig_.ring->size();
    for (std::size_t i = 0; i < size; ++i) rig_.ring->set_descriptor(i, descriptor(size));
    for (std::size_t i = 0; i < 64; ++i)
      testing::TestRing::store_descriptor(rig_.memory.at(kTable + i * kDescriptorBytes),
                                          descriptor(64));
    for (std::size_t i = 0; i < 64; ++i) {
      const auto header = testing::header(type(), sector());
      rig_.memory.write(kHeaders + i * 16, header);
    }
    const std::uint64_t entries = pick(size + (chance(20) ? 70000U : 1U));
    for (std::uint64_t i = 0; i < entries && i < std::uint64_t{2} * size; ++i)
      rig_.ring->make_available(static_cast<std::uint16_t>(chance(50) ? pick(65536) : pick(size)));
    if (chance(30)) rig_.ring->set_avail_index(static_cast<std::uint16_t>(pick(65536)));
    rig_.ring->set_used_event(static_cast<std::uint16_t>(pick(65536)));
    rig_.ring->set_avail_flags(static_cast<std::uint16_t>(pick(4)));
  }

  std::uint64_t pick(std::uint64_t below) { return random_() % below; }
  bool chance(unsigned one_in) { return pick(one_in) == 0; }

 private:
  static constexpr std::uint64_t kHeaders = Rig::kBuffers;
  static constexpr std::uint64_t kTable = Rig::kBuffers + 0x2000;

  Descriptor descriptor(std::uint16_t size) {
    Descriptor result{.guest_address = address(),
                      .length_bytes = length(),
                      .flags = static_cast<std::uint16_t>(pick(4)),
                      .next = static_cast<std::uint16_t>(chance(40) ? pick(65536) : pick(size))};
    if (chance(12)) {
      result = {.guest_address = kTable + 16 * pick(8),
                .length_bytes = static_cast<std::uint32_t>(chance(8) ? pick(2000) : 16 * pick(50)),
                .flags = static_cast<std::uint16_t>(kDescFIndirect | (chance(8) ? pick(8) : 0)),
                .next = result.next};
    }
    return result;
  }
  std::uint64_t address() {
    if (chance(60)) return random_();
    if (chance(40)) return testing::kGuestBase + testing::kRegionBytes - pick(4096);
    if (chance(2)) return kHeaders + 16 * pick(64);
    return Rig::kBuffers + 0x8000 + pick(0x20000);
  }
  std::uint32_t length() {
    if (chance(60)) return static_cast<std::uint32_t>(random_());
    constexpr std::array<std::uint32_t, 8> kUsual{16, 16, 1, 512, 513, 4096, 20, 0};
    return kUsual[pick(kUsual.size())];
  }
  std::uint32_t type() {
    constexpr std::array kUsual{kBlkTIn,    kBlkTOut,     kBlkTFlush,
                                kBlkTGetId, kBlkTDiscard, kBlkTWriteZeroes};
    return chance(20) ? static_cast<std::uint32_t>(random_()) : kUsual[pick(kUsual.size())];
  }
  std::uint64_t sector() { return chance(10) ? random_() : pick(Rig::kDiskBytes / 512); }

  Rig& rig_;
  std::mt19937_64 random_;
};

// A ring of its own over the same memory, device and loop, for one healthy request.
void expect_a_fresh_queue_to_work(Rig& rig) {
  rig.queue.reset();
  rig.ring = std::make_unique<testing::TestRing>(rig.memory, 64);
  rig.ring->set_avail_index(0);
  rig.ring->set_used_index(0);
  rig.ring->set_avail_flags(0);
  rig.start({});
  const auto result = rig.request(kBlkTIn, 0, {}, 512);
  ASSERT_EQ(result.status, kBlkSOk);
  ASSERT_EQ(result.used, (std::vector<testing::Used>{{0, 513}}));
}

TEST(HostileRing, rubbish_never_crashes_hangs_or_leaks_a_slot) {
  const std::uint64_t seed = testing::test_seed();
  constexpr int kRounds = 20000;
  std::uint64_t requests = 0;
  std::uint64_t broken = 0;
  std::uint64_t completed_well = 0;
  Rig rig({.features = testing::kUsualFeatures | feature_bit(kFEventIdx)});
  Rubbish rubbish(rig, seed);
  for (int round = 0; round < kRounds; ++round) {
    rig.queue.reset();
    const auto start = static_cast<std::uint16_t>(rubbish.pick(65536));
    rig.ring->set_avail_index(start);
    rig.ring->set_used_index(start);
    rig.start({.start_index = start});
    rubbish.fill();
    rig.run();
    ASSERT_EQ(rig.queue->in_flight(), 0U) << "round " << round;
    const BlkQueueStatistics& counted = rig.queue->statistics();
    ASSERT_EQ(static_cast<std::uint16_t>(rig.ring->used_index() - start), counted.requests)
        << "round " << round << ": a chain was taken and never returned";
    ASSERT_EQ(rig.error.take(), rig.queue->broken() ? 1U : 0U);
    requests += counted.requests;
    completed_well += counted.requests - counted.errors - counted.unsupported;
    broken += rig.queue->broken() ? 1U : 0U;
    if (round % 100 == 0) expect_a_fresh_queue_to_work(rig);
    rig.node.records.clear();
  }
  // The canary of the generator itself: it must meet all three outcomes often.
  EXPECT_GT(requests, 1000U);
  EXPECT_GT(completed_well, 100U);
  EXPECT_GT(broken, 1000U);
}

TEST(HostileRing, pure_noise_in_all_of_memory_is_survived) {
  std::mt19937_64 random(testing::test_seed());
  Rig rig;
  std::vector<std::byte> noise(0x4000);
  for (int round = 0; round < 500; ++round) {
    rig.queue.reset();
    for (std::byte& byte : noise) byte = static_cast<std::byte>(random());
    rig.memory.write(testing::kGuestBase, noise);
    rig.start({.start_index = static_cast<std::uint16_t>(random())});
    rig.run();
    ASSERT_EQ(rig.queue->in_flight(), 0U);
    static_cast<void>(rig.error.take());
  }
  expect_a_fresh_queue_to_work(rig);
}

// The frontend stops the broken ring and starts it again on the same memory.
TEST(HostileRing, in_memory_that_went_before_it_started_breaks) {
  constexpr std::uint64_t kFileBytes = 8192;
  constexpr std::uint64_t kFileAddress = testing::kGuestBase + 2 * testing::kRegionBytes;
  const testing::MemFd file(kFileBytes);
  testing::RigOptions options;
  options.more_memory = MemoryRegion::map(file.fd(), kFileAddress, kFileBytes,
                                          testing::kUserBase + 2 * testing::kRegionBytes, 0)
                            .value();
  ASSERT_EQ(::ftruncate(file.fd(), 4096), 0);
  static_cast<volatile std::byte*>(options.more_memory->host())[4096] = std::byte{1};
  ASSERT_TRUE(options.more_memory->faulted());
  Rig rig(options);
  rig.queue_request(kBlkTGetId, 0, {}, 20);
  rig.run();
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_EQ(rig.error.take(), 1U);
  EXPECT_TRUE(rig.ring->take_used().empty());
}

}  // namespace
}  // namespace vblk::virtio
