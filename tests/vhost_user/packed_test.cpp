// Packed rings over vhost-user: sizes and bases as messages carry them, kicks and interrupts of two
// threads that both sleep, and drivers that go on with another connection.
#include <algorithm>
#include <array>
#include <random>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/inflight_area.h"
#include "blockdev/virtio/packed_ring.h"
#include "tests/support/seed.h"
#include "tests/vhost_user/block_writes.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using driver::BlkDriverOptions;
using driver::BlkIo;
using driver::Frontend;
using test::BlockWrites;
using test::eventually;
using test::HoldingDisk;
using test::kBlockBytes;
using test::kDiskBytes;
using test::kPatience;
using test::payload_of;
using test::Served;

constexpr std::uint64_t kAllFeatures = ~std::uint64_t{0};

class PackedRings : public ::testing::Test {
 protected:
  BlkDriverOptions options(std::uint16_t queue_size = 100) const {
    return {.queue_count = 2,
            .queue_size = queue_size,
            .memory_bytes = std::size_t{2} << 20,
            .packed = true,
            .frontend = {.timeout = kPatience}};
  }
  std::unique_ptr<BlkDriver> connect(const BlkDriverOptions& chosen) {
    return BlkDriver::connect(served.path(), chosen).value();
  }
  HoldingDisk disk{kDiskBytes};
  Served served{disk};
};

TEST_F(PackedRings, are_missed_where_a_backend_has_none) {
  const std::uint64_t all_but = ~virtio::feature_bit(virtio::kFRingPacked);
  EXPECT_NE(served.device().offered_features() & ~all_but, 0U);
  auto frontend = Frontend::connect(served.path(), {.timeout = kPatience}).value();
  ASSERT_TRUE(frontend->negotiate().has_value());
  EXPECT_EQ(frontend->features() & ~all_but, 0U) << "who does not ask for them gets none";
}

TEST_F(PackedRings, have_any_size_up_to_the_largest) {
  auto frontend =
      Frontend::connect(served.path(), {.timeout = kPatience, .features_mask = kAllFeatures})
          .value();
  ASSERT_TRUE(frontend->negotiate().has_value());
  const auto set = [&frontend](std::uint32_t size) {
    return frontend->command(Request::kSetVringNum, payload_of(VringState{0, size})).has_value();
  };
  for (const std::uint32_t size : {1U, 3U, 100U, 127U, 128U}) EXPECT_TRUE(set(size)) << size;
  for (const std::uint32_t size : {0U, 129U, 32768U, 65537U}) EXPECT_FALSE(set(size)) << size;
}

TEST_F(PackedRings, are_refused_with_a_base_that_says_something_is_in_flight) {
  auto frontend =
      Frontend::connect(served.path(), {.timeout = kPatience, .features_mask = kAllFeatures})
          .value();
  ASSERT_TRUE(frontend->negotiate().has_value());
  const auto memory = driver::DriverMemory::create({std::size_t{1} << 20}).value();
  ASSERT_TRUE(frontend->set_memory(*memory).has_value());
  const auto ring = driver::DriverQueue::create(*memory, {.size = 100, .packed = true}).value();
  EXPECT_FALSE(frontend->start_ring(0, *ring, 0x8004'8005).has_value());
  EXPECT_FALSE(frontend->start_ring(0, *ring, 0x8064'8064).has_value()) << "beyond its end";
  EXPECT_TRUE(frontend->start_ring(0, *ring, 0x8063'8063).has_value());
  EXPECT_EQ(frontend->stop_ring(0).value(), 0x8063'8063U);
  EXPECT_TRUE(frontend->start_ring(0, *ring, 0x8063).has_value()) << "without an upper half";
  EXPECT_EQ(frontend->stop_ring(0).value(), 0x8063'8063U);
}

TEST_F(PackedRings, begin_at_their_beginning_where_no_base_is_told) {
  auto frontend =
      Frontend::connect(served.path(), {.timeout = kPatience, .features_mask = kAllFeatures})
          .value();
  ASSERT_TRUE(frontend->negotiate().has_value());
  EXPECT_EQ(frontend->stop_ring(0).value(), 0x8000'8000U);
}

TEST_F(PackedRings, stop_after_what_is_in_flight_and_go_on_at_their_base) {
  for (const bool indirect : {false, true}) {
    auto chosen = options();
    chosen.indirect = indirect;
    const auto driver = connect(chosen);
    disk.hold(true);
    BlockWrites writes(*driver, 20);
    writes.submit();
    ASSERT_TRUE(eventually([this] { return disk.in_hand() == 20; }));
    std::thread release([this] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      disk.hold(false);
    });
    const auto base = driver->frontend().stop_ring(0);
    release.join();
    const std::uint32_t half = indirect ? 0x800a : 0x801e;  // 10 chains of 1 or 3
    ASSERT_EQ(base.value(), half << 16 | half);
    EXPECT_EQ(driver->queue(0).resume_base(), *base) << "the ring says so, too";
    ASSERT_TRUE(driver->frontend().start_ring(0, driver->queue(0), *base).has_value());
    writes.wait();
    EXPECT_TRUE(writes.each_done_once());
    EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk);
  }
}

// A lost kick or interrupt is a wait without end. Both sides sleep whenever they can.
TEST_F(PackedRings, lose_no_kick_and_no_interrupt) {
  std::mt19937_64 random(test::test_seed());
  constexpr int kRounds = 1500;
  for (const std::uint16_t size : std::to_array<std::uint16_t>({3, 4, 7, 64, 127})) {
    for (const bool event_idx : {false, true}) {
      for (const bool indirect : {false, true}) {
        auto chosen = options(size);
        chosen.event_idx = event_idx;
        chosen.indirect = indirect;
        const auto driver = connect(chosen);
        std::vector<BlkIo> ios(size);
        for (int round = 0; round < kRounds; ++round) {
          std::size_t sent = 0;
          const std::size_t wanted = 1 + random() % size;
          for (; sent < wanted; ++sent) {
            ios[sent] = {.type = virtio::kBlkTFlush};
            if (!driver->submit(0, ios[sent])) break;
            if (random() % 2 == 0) driver->kick(0);
          }
          driver->kick(0);
          ASSERT_GT(sent, 0U);
          for (std::size_t done = 0; done < sent;) {
            const auto count = driver->wait(0, kPatience);
            ASSERT_TRUE(count.has_value())
                << count.error().message << ", ring of " << size << ", event_idx " << event_idx;
            done += *count;
          }
          if (random() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
        }
      }
    }
  }
}

TEST_F(PackedRings, hold_what_was_written) {
  std::mt19937_64 random(test::test_seed());
  const auto driver = connect(options(37));
  std::vector<std::byte> model(kDiskBytes);
  const auto data = driver->memory().allocate(kBlockBytes * 4, kBlockBytes);
  for (int i = 0; i < 2000; ++i) {
    const std::size_t bytes = 512 * (1 + random() % 32);
    const std::uint64_t sector = random() % ((kDiskBytes - bytes) / 512);
    const auto part = data.first(bytes);
    const auto expected = std::span(model).subspan(sector * 512, bytes);
    if (random() % 2 == 0) {
      std::ranges::generate(part, [&random] { return static_cast<std::byte>(random()); });
      std::ranges::copy(part, expected.begin());
      ASSERT_EQ(driver->write(sector, part).value(), virtio::kBlkSOk);
    } else {
      ASSERT_EQ(driver->read(sector, part).value(), virtio::kBlkSOk);
      ASSERT_TRUE(std::ranges::equal(part, expected)) << sector;
    }
  }
  EXPECT_EQ(driver->get_id().value(), "served");
}

// ---- Going on with another connection.

TEST_F(PackedRings, have_areas_of_their_own_kind_for_what_is_in_flight) {
  auto chosen = options();
  chosen.inflight = true;
  const auto driver = connect(chosen);
  EXPECT_EQ(driver->inflight()->description.mmap_size,
            virtio::InflightArea::bytes_for(2, 100, true));
}

TEST_F(PackedRings, are_gone_on_with_on_another_connection) {
  for (const bool indirect : {false, true}) {
    auto chosen = options();
    chosen.inflight = true;
    chosen.indirect = indirect;
    const auto driver = connect(chosen);
    const std::size_t writes_before = disk.writes();
    BlockWrites writes(*driver, 24);
    disk.hold(true);
    writes.enqueue();
    // One queue has been kicked, the other's requests wait in its ring.
    driver->kick(0);
    ASSERT_TRUE(eventually([this] { return disk.in_hand() == 12; }));
    ::shutdown(driver->frontend().socket(), SHUT_RDWR);
    std::thread release([this] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      disk.hold(false);
    });
    driver->kick(1);
    const auto reconnected = driver->reconnect(served.path());
    release.join();
    ASSERT_TRUE(reconnected.has_value()) << reconnected.error().message;
    writes.wait();
    EXPECT_TRUE(writes.each_done_once());
    EXPECT_EQ(disk.writes() - writes_before, 24U) << "lost or repeated";
    writes.expect_on(disk);
    EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk);
  }
}

TEST_F(PackedRings, that_are_broken_start_again_with_the_next_kick_descriptor) {
  auto frontend =
      Frontend::connect(served.path(), {.timeout = kPatience, .features_mask = kAllFeatures})
          .value();
  ASSERT_TRUE(frontend->negotiate().has_value());
  const auto memory = driver::DriverMemory::create({std::size_t{1} << 20}).value();
  ASSERT_TRUE(frontend->set_memory(*memory).has_value());
  const auto ring = driver::DriverQueue::create(*memory, {.size = 100, .packed = true}).value();
  ASSERT_TRUE(frontend->start_ring(0, *ring).has_value());
  const std::array no_status{driver::Buffer{memory->guest_address(memory->begin()), 16, false}};
  ASSERT_TRUE(ring->add(no_status).has_value());
  ring->publish();
  ASSERT_TRUE(eventually([this] { return served.server().status()->rings[0].broken; }));
  // Something else changes meanwhile, which is not to fail for it.
  const auto more = driver::DriverMemory::create({std::size_t{1} << 20}).value();
  auto region = more->regions()[0];
  region.description.guest_address += std::uint64_t{1} << 30;
  ASSERT_TRUE(frontend->add_region(region).has_value());
  ASSERT_TRUE(frontend->stop_ring(0).has_value());
  const auto fresh = driver::DriverQueue::create(*memory, {.size = 100, .packed = true}).value();
  ASSERT_TRUE(frontend->start_ring(0, *fresh).has_value());
  EXPECT_TRUE(served.server().status()->rings[0].running);
  EXPECT_FALSE(served.server().status()->rings[0].broken);
}

}  // namespace
}  // namespace vblk::vhost_user
