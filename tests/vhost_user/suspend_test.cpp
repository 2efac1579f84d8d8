// GET_VRING_BASE_INFLIGHT: rings that are stopped with requests in flight, which go to whoever is
// given the in-flight area next: this server again, or the one to which the guest migrates. What a
// queue does by itself is tests/virtio/suspend_test.cpp's.
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/handover_node.h"
#include "blockdev/io_limits.h"
#include "blockdev/virtio/blk_wire.h"
#include "tests/vhost_user/block_writes.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using test::bit;
using test::BlockWrites;
using test::eventually;
using test::HoldingDisk;
using test::kBlockBytes;
using test::kDiskBytes;
using test::kPatience;
using test::payload_of;
using test::RawFrontend;
using test::Served;

constexpr std::uint64_t kSuspends = bit(kProtocolFGetVringBaseInflight);

std::unique_ptr<BlkDriver> drive(const Served& served, bool packed, bool suspends = true) {
  driver::FrontendOptions frontend{.timeout = kPatience};
  if (suspends) frontend.protocol_features_mask |= kSuspends;
  return BlkDriver::connect(served.path(), {.queue_count = 2,
                                            .queue_size = 64,
                                            .memory_bytes = std::size_t{2} << 20,
                                            .packed = packed,
                                            .inflight = true,
                                            .frontend = frontend})
      .value();
}

std::array<std::uint32_t, 2> stop_rings(BlkDriver& driver) {
  std::array<std::uint32_t, 2> bases{};
  for (std::uint16_t i = 0; i < 2; ++i) bases[i] = driver.frontend().stop_ring(i).value();
  return bases;
}

// As QEMU does when its machine goes on.
void start_rings(BlkDriver& driver, const std::array<std::uint32_t, 2>& bases) {
  ASSERT_TRUE(driver.frontend().set_inflight(*driver.inflight()).has_value());
  for (std::uint16_t i = 0; i < 2; ++i)
    ASSERT_TRUE(driver.frontend().start_ring(i, driver.queue(i), bases[i]).has_value());
}

void limit(Served& served, const char* limits) {
  served.device().gate().set_limits(blockdev::IoLimits::parse(limits, "", {}).value());
}

// Both kinds of rings.
class SuspendedRings : public ::testing::TestWithParam<bool> {
 protected:
  std::size_t count_rings(std::size_t RingStatus::* what) {
    std::size_t count = 0;
    if (const auto status = served.server().status()) {
      for (const auto& ring : status->rings) count += ring.*what;
    }
    return count;
  }
  void expect_on_disk(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i)
      EXPECT_EQ(disk.at(i * kBlockBytes + 100), static_cast<std::byte>(i + 1)) << i;
  }

  HoldingDisk disk{kDiskBytes};
  Served served{disk};
};

TEST_P(SuspendedRings, stop_with_what_waits_for_the_limits) {
  limit(served, "iops-total=1");
  const auto driver = drive(served, GetParam());
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] { return count_rings(&RingStatus::waiting) == 7; }));
  const auto bases = stop_rings(*driver);
  writes.look();
  EXPECT_EQ(writes.failed(), 0U);
  EXPECT_LT(writes.done(), 8U);
  EXPECT_EQ(disk.writes(), writes.done()) << "what was not answered was not begun";
  EXPECT_EQ(disk.in_hand(), 0U);
  limit(served, "none");
  start_rings(*driver, bases);
  writes.wait();
  EXPECT_EQ(writes.done(), 8U);
  EXPECT_EQ(disk.writes(), 8U) << "lost or repeated";
  expect_on_disk(8);
}

TEST_P(SuspendedRings, finish_what_waits_where_it_was_not_negotiated) {
  limit(served, "iops-total=1");
  const auto driver = drive(served, GetParam(), false);
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] { return count_rings(&RingStatus::waiting) == 7; }));
  stop_rings(*driver);
  writes.look();
  EXPECT_EQ(writes.done(), 8U);
}

TEST_P(SuspendedRings, finish_what_is_at_the_disk) {
  const auto driver = drive(served, GetParam());
  disk.hold(true);
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] { return disk.in_hand() == 8; }));
  std::thread release([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    disk.hold(false);
  });
  const auto bases = stop_rings(*driver);
  release.join();
  EXPECT_EQ(disk.in_hand(), 0U);
  writes.look();
  EXPECT_EQ(writes.done(), 8U);
  start_rings(*driver, bases);
  EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk);
}

TEST_P(SuspendedRings, leave_failed_requests_that_are_kept) {
  const auto driver = drive(served, GetParam());
  disk.fail(ENOSPC);
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] { return count_rings(&RingStatus::kept) > 0; }));
  const auto bases = stop_rings(*driver);
  writes.look();
  EXPECT_EQ(writes.failed() + writes.done(), 0U);
  EXPECT_FALSE(served.device().gate().is_paused()) << "nobody here keeps anything any more";
  disk.fail(0);
  start_rings(*driver, bases);
  writes.wait();
  EXPECT_EQ(writes.done(), 8U);
  EXPECT_EQ(disk.writes(), 8U);
}

TEST_P(SuspendedRings, lose_and_repeat_nothing_over_many_stops) {
  limit(served, "iops-total=4000");
  const auto driver = drive(served, GetParam());
  BlockWrites writes(*driver, 48);
  writes.submit();
  std::size_t left = 0;
  for (std::size_t round = 1; round <= 60; ++round) {
    const auto bases = stop_rings(*driver);
    writes.look();
    const std::size_t unanswered = driver->queue(0).in_flight() + driver->queue(1).in_flight();
    left += unanswered;
    EXPECT_EQ(disk.in_hand(), 0U);
    start_rings(*driver, bases);
    if (round % 4 != 0) continue;
    writes.wait();
    EXPECT_EQ(disk.writes(), writes.done()) << "lost or repeated";
    if (round < 60) writes.submit();
  }
  EXPECT_EQ(writes.done(), 15U * 48);
  EXPECT_EQ(writes.failed(), 0U);
  EXPECT_GT(left, 0U) << "it never stopped with anything in flight";
  expect_on_disk(48);
}

INSTANTIATE_TEST_SUITE_P(Kinds, SuspendedRings, ::testing::Bool(),
                         [](const auto& param) { return param.param ? "packed" : "split"; });

// ---- Who is offered it.

TEST(SuspendedRing, is_offered_with_the_in_flight_area_alone) {
  HoldingDisk disk(kDiskBytes);
  {
    Served served(disk);
    RawFrontend frontend(served.path());
    ASSERT_TRUE(frontend.polite().negotiate().has_value());
    const auto offered = frontend.call_u64(Request::kGetProtocolFeatures);
    ASSERT_TRUE(offered.has_value());
    EXPECT_NE(*offered & kSuspends, 0U);
    const std::uint64_t without = *offered & ~bit(kProtocolFInflightShmfd);
    EXPECT_EQ(frontend.acknowledged(Request::kSetProtocolFeatures, payload_of(without)), 1U);
    EXPECT_EQ(
        frontend.acknowledged(Request::kSetProtocolFeatures, payload_of(without & ~kSuspends)), 0U);
  }
  Served without(disk, {.offers_recovery = false});
  RawFrontend frontend(without.path());
  ASSERT_TRUE(frontend.polite().negotiate().has_value());
  EXPECT_EQ(frontend.call_u64(Request::kGetProtocolFeatures).value() & kSuspends, 0U);
}

TEST(SuspendedRing, without_an_area_finishes_all) {
  HoldingDisk disk(kDiskBytes);
  Served served(disk);
  limit(served, "iops-total=1");
  RawFrontend frontend(served.path());
  ASSERT_TRUE(frontend.polite().negotiate().has_value());
  ASSERT_NE(frontend.polite().protocol_features() & kSuspends, 0U);
  const auto memory = driver::DriverMemory::create({std::size_t{1} << 20}).value();
  const auto ring = driver::DriverQueue::create(*memory, {.size = 16}).value();
  ASSERT_TRUE(frontend.polite().set_memory(*memory).has_value());
  ASSERT_TRUE(frontend.polite().start_ring(0, *ring).has_value());
  for (int i = 0; i < 3; ++i) {
    const auto head = memory->allocate(virtio::kBlkRequestHeaderBytes, 16);
    std::ranges::fill(head, std::byte{0});
    head[0] = std::byte{virtio::kBlkTOut};
    const auto data = memory->allocate(512, 512);
    const auto status = memory->allocate(1, 1);
    const std::array chain{
        driver::Buffer{memory->guest_address(head.data()), virtio::kBlkRequestHeaderBytes, false},
        driver::Buffer{memory->guest_address(data.data()), 512, false},
        driver::Buffer{memory->guest_address(status.data()), 1, true}};
    ASSERT_TRUE(ring->add(chain).has_value());
  }
  ring->publish();
  ASSERT_TRUE(eventually([&served] {
    const auto status = served.server().status();
    return status && status->rings[0].waiting == 2;
  }));
  EXPECT_EQ(frontend.polite().stop_ring(0).value(), 3U);
  EXPECT_EQ(disk.writes(), 3U);
}

// ---- Guests that migrate.

// One disk for several servers, each of which has it in turn. Writes fail while it is full.
class SharedDisk final : public blockdev::BlockNode {
 public:
  SharedDisk(HoldingDisk& disk, const std::atomic<bool>& full) : disk_(disk), full_(full) {
    size_bytes_ = disk.size_bytes();
    name_ = "shared";
  }

 protected:
  void do_submit(blockdev::BlockRequest& request, blockdev::IoContext& context) override {
    if (full_ && request.operation == blockdev::BlockOperation::kWrite)
      return context.complete_later(request, ENOSPC);
    disk_.submit(request, context);
  }

 private:
  HoldingDisk& disk_;
  const std::atomic<bool>& full_;
};

class MigratingGuest : public ::testing::TestWithParam<bool> {
 protected:
  std::unique_ptr<blockdev::HandoverNode> node() {
    return std::make_unique<blockdev::HandoverNode>(
        blockdev::DiskShape{
            .size_bytes = kDiskBytes, .limits = SharedDisk(disk, full).limits(), .name = "shared"},
        [this]() -> Expected<std::unique_ptr<blockdev::BlockNode>> {
          return std::make_unique<SharedDisk>(disk, full);
        });
  }
  static std::size_t kept(Served& served) {
    std::size_t count = 0;
    if (const auto status = served.server().status()) {
      for (const auto& ring : status->rings) count += ring.kept;
    }
    return count;
  }

  HoldingDisk disk{kDiskBytes};
  std::atomic<bool> full{false};
  std::unique_ptr<blockdev::HandoverNode> source_node = node();
  std::unique_ptr<blockdev::HandoverNode> target_node = node();
  Served source{*source_node, {.handover = source_node.get()}};
  Served target{*target_node, {.handover = target_node.get()}};
};

TEST_P(MigratingGuest, takes_what_waits_and_what_has_failed_along) {
  limit(source, "iops-total=1");
  const auto driver = drive(source, GetParam());
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] {
    const auto status = source.server().status();
    return status && status->rings[0].waiting + status->rings[1].waiting == 7;
  }));
  stop_rings(*driver);
  EXPECT_FALSE(source_node->is_taken());
  ASSERT_TRUE(driver->reconnect(target.path()).has_value());
  writes.wait();
  EXPECT_EQ(writes.done(), 8U);
  EXPECT_EQ(disk.writes(), 8U) << "lost or repeated";
  // And back, from a disk that is full.
  limit(source, "none");
  full = true;
  writes.submit();
  ASSERT_TRUE(eventually([this] { return kept(target) > 0; }));
  stop_rings(*driver);
  EXPECT_FALSE(target_node->is_taken());
  full = false;
  ASSERT_TRUE(driver->reconnect(source.path()).has_value());
  writes.wait();
  EXPECT_EQ(writes.done(), 16U);
  EXPECT_EQ(writes.failed(), 0U);
}

TEST_P(MigratingGuest, is_told_that_kept_requests_failed_where_it_takes_nothing_along) {
  const auto driver = drive(source, GetParam(), false);
  full = true;
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] { return kept(source) > 0; }));
  stop_rings(*driver);
  writes.look();
  EXPECT_GT(writes.failed(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Kinds, MigratingGuest, ::testing::Bool(),
                         [](const auto& param) { return param.param ? "packed" : "split"; });

}  // namespace
}  // namespace vblk::vhost_user
