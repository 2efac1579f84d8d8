// Queues that are suspended: what waits stays in flight for a successor, what is at the disk is
// finished first, and each request is carried out once, in the order of the ring.
#include <cstdint>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/io_limits.h"
#include "blockdev/virtio/blk_queue.h"
#include "blockdev/virtio/inflight_area.h"
#include "tests/virtio/packed_fixture.h"
#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

using testing::MemFd;
using testing::PackedRig;
using testing::pattern;
using testing::QueueRig;
using testing::Rig;

constexpr std::uint16_t kSize = 64;
constexpr std::size_t kAreaBytes = 8192;

std::shared_ptr<const InflightArea> area_in(const MemFd& file, bool is_packed) {
  return InflightArea::map(file.fd(), {.size_bytes = kAreaBytes,
                                       .queue_count = 1,
                                       .queue_size = kSize,
                                       .is_packed = is_packed})
      .value();
}

// The two kinds of rings behind the same words.
struct Split {
  static constexpr bool kIsPacked = false;
  explicit Split(std::shared_ptr<const InflightArea> area) : rig({.inflight = std::move(area)}) {}
  void put_write(std::uint16_t number) {
    rig.queue_request(kBlkTOut, number, pattern(512, number), 0,
                      static_cast<std::uint16_t>(3 * number));
  }
  // A base that only who knows nothing of the past would take.
  void start(std::shared_ptr<const InflightArea> area) {
    rig.start({.start_index = 99, .inflight = std::move(area)});
  }
  std::size_t used() { return rig.ring->take_used().size(); }
  Rig rig;
};
struct Packed {
  static constexpr bool kIsPacked = true;
  explicit Packed(const std::shared_ptr<const InflightArea>& area) {
    rig.queue.reset();
    rig.start(area);
  }
  void put_write(std::uint16_t number) {
    const auto status = rig.allocate(1);
    rig.put({{rig.place(testing::header(kBlkTOut, number)), kBlkRequestHeaderBytes},
             {rig.place(pattern(512, number)), 512},
             {status, 1, true}},
            number);
  }
  void start(std::shared_ptr<const InflightArea> area) { rig.start(std::move(area)); }
  std::size_t used() { return rig.ring->take_used().size(); }
  PackedRig rig;
};

template <typename Kind>
class Suspended : public ::testing::Test {
 protected:
  QueueRig& rig() { return kind.rig; }
  void limit(const char* limits) {
    rig().device->gate().set_limits(blockdev::IoLimits::parse(limits, "", {}).value());
  }
  // The limit lets one through at once, and no more while the test runs.
  void put_writes(std::uint16_t count) {
    for (std::uint16_t i = 0; i < count; ++i) kind.put_write(number++);
    rig().run();
  }
  void suspend() {
    rig().queue->stop(BlkQueue::Unfinished::kSuspend, [] {});
  }
  // Another queue on the same ring, by what is in the area alone.
  void succeed() {
    rig().queue.reset();
    kind.start(area_in(file, Kind::kIsPacked));
  }
  std::vector<std::uint64_t> sectors() {
    std::vector<std::uint64_t> found;
    for (const auto& record : rig().node.records) found.push_back(record.offset_bytes / 512);
    return found;
  }

  MemFd file{kAreaBytes};
  Kind kind{area_in(file, Kind::kIsPacked)};
  std::uint16_t number{0};
};

using Kinds = ::testing::Types<Split, Packed>;
TYPED_TEST_SUITE(Suspended, Kinds);

TYPED_TEST(Suspended, leaves_what_waits_for_the_limits_to_a_successor) {
  this->limit("iops-total=1");
  this->put_writes(5);
  ASSERT_EQ(this->rig().queue->waiting(), 4U);
  this->suspend();
  this->rig().run();
  EXPECT_EQ(this->kind.used(), 1U) << "the one that was done";
  EXPECT_EQ(this->rig().queue->in_flight(), 0U) << "it does not wait for the rest";
  EXPECT_EQ(this->rig().queue->left().heads.size(), 4U);
  this->limit("none");
  this->succeed();
  EXPECT_EQ(this->rig().queue->in_flight(), 4U);
  this->rig().run();
  EXPECT_EQ(this->kind.used(), 4U);
  EXPECT_EQ(this->sectors(), (std::vector<std::uint64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(this->rig().queue->statistics().recovered, 4U);
  this->put_writes(2);
  EXPECT_EQ(this->kind.used(), 2U) << "the ring goes on behind them";
}

TYPED_TEST(Suspended, waits_for_what_is_at_the_disk) {
  this->rig().node.hold = true;
  this->put_writes(2);
  this->limit("iops-total=1");
  this->put_writes(3);
  ASSERT_EQ(this->rig().node.held.size(), 3U);
  ASSERT_EQ(this->rig().queue->waiting(), 2U);
  this->suspend();
  this->rig().run();
  EXPECT_EQ(this->rig().queue->in_flight(), 5U);
  this->rig().node.release(*this->rig().context);
  this->rig().run();
  EXPECT_EQ(this->kind.used(), 3U);
  EXPECT_EQ(this->rig().queue->in_flight(), 0U);
  this->rig().node.hold = false;
  this->limit("none");
  this->succeed();
  this->rig().run();
  EXPECT_EQ(this->kind.used(), 2U);
  EXPECT_EQ(this->sectors(), (std::vector<std::uint64_t>{0, 1, 2, 3, 4}));
}

TYPED_TEST(Suspended, leaves_what_a_predecessor_had_left) {
  this->limit("iops-total=1");
  this->put_writes(4);
  this->suspend();
  this->rig().run();
  EXPECT_EQ(this->kind.used(), 1U);
  this->limit("none");
  this->rig().node.hold = true;
  this->succeed();
  this->rig().run();
  ASSERT_EQ(this->rig().node.held.size(), 1U) << "one after another";
  this->suspend();
  this->rig().node.release(*this->rig().context);
  this->rig().run();
  EXPECT_EQ(this->kind.used(), 1U);
  EXPECT_EQ(this->rig().queue->left().heads.size(), 2U);
  this->rig().node.hold = false;
  this->succeed();
  this->rig().run();
  EXPECT_EQ(this->kind.used(), 2U);
  EXPECT_EQ(this->sectors(), (std::vector<std::uint64_t>{0, 1, 2, 3}));
}

TYPED_TEST(Suspended, leaves_nothing_where_nothing_waits) {
  this->put_writes(3);
  this->suspend();
  this->rig().run();
  EXPECT_EQ(this->kind.used(), 3U);
  EXPECT_TRUE(this->rig().queue->left().heads.empty());
  this->succeed();
  EXPECT_EQ(this->rig().queue->in_flight(), 0U);
  this->put_writes(1);
  EXPECT_EQ(this->kind.used(), 1U);
}

TYPED_TEST(Suspended, does_not_pause_its_device) {
  this->limit("iops-total=1");
  this->put_writes(3);
  this->suspend();
  this->rig().run();
  EXPECT_FALSE(this->rig().device->gate().is_paused());
  this->limit("none");
  this->succeed();
  this->rig().run();
  EXPECT_EQ(this->kind.used(), 3U);
}

// ---- The area of a ring that changes its kind.

TEST(RenewedInflightArea, is_for_the_other_kind_of_rings_where_it_is_large_enough) {
  const MemFd file(kAreaBytes);
  const auto split = area_in(file, false);
  InflightRegion region = split->region(0);
  ASSERT_TRUE(region.recover(0, kSize).has_value());
  region.popped(7);
  split->keep_writeback(false);
  const auto packed = split->renewed(true);
  ASSERT_TRUE(packed.has_value()) << packed.error().message;
  EXPECT_TRUE((*packed)->is_packed());
  EXPECT_TRUE((*packed)->packed_region(0).is_fresh()) << "nothing is known of the rings before";
  EXPECT_EQ((*packed)->writeback(), false);
  const auto again = (*packed)->renewed(false);
  ASSERT_TRUE(again.has_value());
  InflightRegion fresh = (*again)->region(0);
  EXPECT_TRUE(fresh.recover(0, kSize).value().is_fresh);
}

TEST(RenewedInflightArea, is_refused_to_packed_rings_that_take_more) {
  const MemFd file(kAreaBytes);
  const auto split = InflightArea::map(file.fd(), {.size_bytes = InflightArea::bytes_for(1, kSize),
                                                   .queue_count = 1,
                                                   .queue_size = kSize})
                         .value();
  EXPECT_FALSE(split->renewed(true).has_value());
  EXPECT_TRUE(split->renewed(false).has_value());
}

}  // namespace
}  // namespace vblk::virtio
