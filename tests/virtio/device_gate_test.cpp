// A queue behind its device's gate: paused by command and by failed requests, resumed, stopped
// meanwhile; and at limits.
#include "blockdev/virtio/device_gate.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <sys/mman.h>
#include <utility>
#include <vector>

#include "blockdev/virtio/inflight_area.h"
#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

using testing::MemFd;
using testing::pattern;
using testing::Rig;
using testing::RigOptions;
using testing::segment;
using testing::Used;

constexpr std::uint16_t kSize = 64;

// A device whose error policy is `write` for changes, on a disk that is full while `full` says so.
struct FullDisk {
  explicit FullDisk(ErrorChoice write = ErrorChoice::kEnospc, RigOptions options = {})
      : rig(with(std::move(options), write)) {
    rig.node.fault = [this](const auto& record, std::size_t) {
      if (record.operation == blockdev::BlockOperation::kRead) return read_error;
      return full ? error : 0;
    };
  }
  static RigOptions with(RigOptions options, ErrorChoice write) {
    options.on_error.write = write;
    return options;
  }
  void write(std::uint64_t sector, std::uint16_t head) {
    rig.queue_request(kBlkTOut, sector, pattern(512, static_cast<unsigned>(sector)), 0, head);
  }
  std::vector<std::uint64_t> sectors() const {
    std::vector<std::uint64_t> found;
    for (const auto& record : rig.node.records) found.push_back(record.offset_bytes / 512);
    return found;
  }
  DeviceGate& gate() { return rig.device->gate(); }
  bool has(std::uint64_t sector) const {
    const auto data = pattern(512, static_cast<unsigned>(sector));
    return std::equal(data.begin(), data.end(),
                      rig.node.disk.begin() + static_cast<std::ptrdiff_t>(sector * 512));
  }

  bool full{true};
  int error{ENOSPC};
  int read_error{0};
  Rig rig;
};

// ---- By command.

TEST(PausedDevice, takes_nothing_and_goes_on_where_it_was) {
  Rig rig;
  rig.device->gate().pause();
  rig.queue_request(kBlkTFlush, 0);
  rig.run();
  EXPECT_TRUE(rig.node.records.empty());
  EXPECT_EQ(rig.queue->in_flight(), 0U);
  EXPECT_TRUE(rig.queue->prepare_to_sleep()) << "it must not spin";
  EXPECT_TRUE(rig.device->gate().resume());
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 1}}));
  EXPECT_FALSE(rig.device->gate().resume()) << "there is nothing to resume";
}

TEST(PausedDevice, finishes_what_it_has_taken) {
  Rig rig;
  rig.node.hold = true;
  rig.queue_request(kBlkTFlush, 0);
  rig.run();
  rig.device->gate().pause();
  rig.node.release(*rig.context);
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 1}}));
}

TEST(PausedDevice, stops_at_once_and_leaves_new_requests_in_the_ring) {
  Rig rig;
  rig.device->gate().pause();
  rig.queue_request(kBlkTFlush, 0);
  rig.queue->stop(BlkQueue::Unfinished::kFail, [] {});
  rig.run();
  EXPECT_EQ(rig.queue->next_avail(), 0U);
  EXPECT_TRUE(rig.ring->take_used().empty());
}

// ---- By errors.

TEST(ErrorPolicy, of_stop_keeps_a_failed_request_unanswered_and_takes_no_more) {
  FullDisk disk(ErrorChoice::kStop);
  disk.error = EIO;
  disk.write(10, 0);
  disk.rig.run();
  EXPECT_TRUE(disk.rig.ring->take_used().empty());
  EXPECT_EQ(disk.rig.queue->in_flight(), 1U);
  EXPECT_EQ(disk.rig.queue->kept(), 1U);
  const auto status = disk.gate().status();
  ASSERT_TRUE(status.failed.has_value());
  EXPECT_EQ(status.failed->operation, blockdev::BlockOperation::kWrite);
  EXPECT_EQ(status.failed->offset_bytes, 10 * 512U);
  EXPECT_EQ(status.failed->error, EIO);
  EXPECT_FALSE(status.retries) << "EIO is not looked at again by itself";
  disk.write(11, 10);
  disk.rig.run();
  EXPECT_EQ(disk.sectors(), (std::vector<std::uint64_t>{10}));
  EXPECT_TRUE(disk.rig.queue->prepare_to_sleep());
  disk.full = false;
  disk.gate().resume();
  disk.rig.run();
  EXPECT_EQ(disk.sectors(), (std::vector<std::uint64_t>{10, 10, 11}));
  EXPECT_EQ(disk.rig.ring->take_used(), (std::vector<Used>{{0, 1}, {10, 1}}));
  EXPECT_TRUE(disk.has(10) && disk.has(11));
  EXPECT_EQ(disk.rig.queue->statistics().retried, 1U);
  EXPECT_EQ(disk.rig.queue->statistics().recovered, 0U);
  EXPECT_FALSE(disk.gate().status().failed.has_value());
}

TEST(ErrorPolicy, takes_failed_requests_again_one_by_one_in_the_order_of_the_ring) {
  FullDisk disk;
  disk.rig.node.hold = true;
  const std::vector<std::uint16_t> heads{30, 3, 21, 12};
  for (std::size_t i = 0; i < heads.size(); ++i) disk.write(20 + i, heads[i]);
  disk.rig.run();
  ASSERT_EQ(disk.rig.node.held.size(), 4U);
  // They fail in the opposite order.
  std::ranges::reverse(disk.rig.node.held);
  for (auto* request : std::exchange(disk.rig.node.held, {}))
    disk.rig.context->complete_later(*request, ENOSPC);
  disk.rig.run();
  EXPECT_EQ(disk.rig.queue->kept(), 4U);
  disk.full = false;
  disk.gate().resume();
  for (std::uint64_t sector = 20; sector < 24; ++sector) {
    disk.rig.run();
    ASSERT_EQ(disk.rig.node.held.size(), 1U) << "more than one at a time";
    EXPECT_EQ(disk.sectors().back(), sector);
    disk.rig.node.release(*disk.rig.context);
  }
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used(), (std::vector<Used>{{30, 1}, {3, 1}, {21, 1}, {12, 1}}));
}

TEST(ErrorPolicy, pauses_again_at_the_request_that_fails_again) {
  FullDisk disk;
  for (std::uint16_t i = 0; i < 3; ++i) disk.write(i, static_cast<std::uint16_t>(3 * i));
  disk.rig.run();
  EXPECT_EQ(disk.rig.queue->kept(), 3U);
  // There is room for one of them.
  disk.rig.node.fault = [&](const auto& record, std::size_t) {
    return record.offset_bytes == 0 ? 0 : ENOSPC;
  };
  disk.gate().resume();
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used(), (std::vector<Used>{{0, 1}}));
  EXPECT_EQ(disk.rig.queue->kept(), 2U);
  EXPECT_TRUE(disk.gate().is_paused());
  disk.rig.node.fault = nullptr;
  disk.gate().resume();
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used(), (std::vector<Used>{{3, 1}, {6, 1}}));
}

TEST(ErrorPolicy, does_not_try_again_by_itself_what_space_does_not_help) {
  FullDisk disk(ErrorChoice::kStop);
  disk.rig.node.hold = true;
  disk.write(1, 0);
  disk.write(2, 3);
  disk.rig.run();
  ASSERT_EQ(disk.rig.node.held.size(), 2U);
  const auto held = std::exchange(disk.rig.node.held, {});
  disk.rig.node.hold = false;
  disk.rig.context->complete_later(*held[0], ENOSPC);
  disk.rig.run();
  EXPECT_TRUE(disk.gate().is_worth_retrying());
  disk.rig.context->complete_later(*held[1], EIO);
  disk.rig.run();
  EXPECT_FALSE(disk.gate().is_worth_retrying());
  EXPECT_EQ(disk.gate().status().failed->error, EIO) << "what has to be told now";
  disk.gate().space_is_back();
  EXPECT_TRUE(disk.gate().is_paused());
  disk.full = false;
  disk.gate().resume();
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used().size(), 2U);
}

TEST(ErrorPolicy, by_default_pauses_for_a_full_disk_and_reports_the_rest) {
  FullDisk disk;
  disk.error = EIO;
  EXPECT_EQ(disk.rig.request(kBlkTOut, 0, pattern(512)).status, kBlkSIoErr);
  disk.error = EOPNOTSUPP;
  EXPECT_EQ(disk.rig.request(kBlkTDiscard, 0, segment(0, 1)).status, kBlkSUnsupp);
  disk.read_error = ENOSPC;
  EXPECT_EQ(disk.rig.request(kBlkTIn, 0, {}, 512).status, kBlkSIoErr) << "not for reads";
  EXPECT_FALSE(disk.gate().is_paused());
  disk.error = ENOSPC;
  disk.write(1, 0);
  disk.rig.run();
  EXPECT_TRUE(disk.gate().is_worth_retrying());
  EXPECT_TRUE(disk.rig.ring->take_used().empty());
  disk.full = false;
  disk.gate().resume();
  disk.rig.run();
  EXPECT_TRUE(disk.has(1));
}

TEST(ErrorPolicy, of_ignore_says_that_it_is_done) {
  FullDisk disk(ErrorChoice::kIgnore);
  const auto result = disk.rig.request(kBlkTOut, 0, pattern(512));
  EXPECT_EQ(result.status, kBlkSOk);
  EXPECT_FALSE(disk.gate().is_paused());
}

TEST(ErrorPolicy, of_reads_is_their_own) {
  FullDisk disk(ErrorChoice::kReport, {.on_error = {.read = ErrorChoice::kStop}});
  disk.read_error = EIO;
  const auto data = disk.rig.queue_request(kBlkTIn, 8, {}, 512);
  disk.rig.run();
  EXPECT_EQ(disk.rig.queue->kept(), 1U);
  disk.read_error = 0;
  std::ranges::fill(disk.rig.node.disk, std::byte{7});
  disk.gate().resume();
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used(), (std::vector<Used>{{0, 513}}));
  EXPECT_EQ(*disk.rig.memory.at(data), std::byte{7});
}

TEST(ErrorPolicy, keeps_a_discard_whole_and_begins_it_again) {
  FullDisk disk;
  std::vector<std::byte> segments;
  for (std::uint64_t i = 0; i < 3; ++i) {
    const auto one = segment(i * 8, 8);
    segments.insert(segments.end(), one.begin(), one.end());
  }
  disk.rig.node.fault = [&](const auto& record, std::size_t) {
    return record.offset_bytes == 8 * 512 && disk.full ? ENOSPC : 0;
  };
  disk.rig.queue_request(kBlkTWriteZeroes, 0, segments);
  disk.rig.run();
  EXPECT_EQ(disk.sectors(), (std::vector<std::uint64_t>{0, 8}));
  EXPECT_EQ(disk.rig.queue->kept(), 1U);
  disk.full = false;
  disk.gate().resume();
  disk.rig.run();
  EXPECT_EQ(disk.sectors(), (std::vector<std::uint64_t>{0, 8, 0, 8, 16}));
  EXPECT_EQ(disk.rig.ring->take_used().size(), 1U);
}

TEST(ErrorPolicy, looks_up_the_memory_again_which_a_node_may_have_rewritten) {
  FullDisk disk;
  disk.rig.node.hold = true;
  disk.write(5, 0);
  disk.rig.run();
  ASSERT_EQ(disk.rig.node.held.size(), 1U);
  blockdev::BlockRequest& request = *disk.rig.node.held.front();
  request.iov[0] = {};
  request.iov_count = 0;
  disk.rig.node.held.clear();
  disk.rig.context->complete_later(request, ENOSPC);
  disk.rig.node.hold = false;
  disk.rig.run();
  disk.full = false;
  disk.gate().resume();
  disk.rig.run();
  EXPECT_TRUE(disk.has(5));
}

// ---- Stopped while it keeps requests.

TEST(KeptRequests, of_a_queue_that_is_not_continued_are_answered_with_an_error) {
  FullDisk disk;
  disk.write(1, 6);
  disk.write(2, 3);
  disk.rig.run();
  ASSERT_EQ(disk.rig.queue->kept(), 2U);
  disk.rig.queue->stop(BlkQueue::Unfinished::kFail, [] {});
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used(), (std::vector<Used>{{6, 1}, {3, 1}}));
  EXPECT_EQ(disk.rig.queue->in_flight(), 0U);
  EXPECT_TRUE(disk.rig.queue->left().heads.empty());
  EXPECT_EQ(disk.rig.queue->statistics().errors, 2U);
  EXPECT_FALSE(disk.gate().is_paused()) << "nobody keeps anything any more";
}

TEST(KeptRequests, are_handed_on_to_the_next_queue_of_the_same_ring) {
  FullDisk disk;
  disk.write(1, 6);
  disk.write(2, 3);
  disk.rig.run();
  disk.write(3, 9);
  disk.rig.queue->stop(BlkQueue::Unfinished::kLeave, [] {});
  disk.rig.run();
  EXPECT_TRUE(disk.rig.ring->take_used().empty());
  const auto left = disk.rig.queue->left();
  EXPECT_EQ(left.heads, (std::vector<std::uint16_t>{6, 3}));
  EXPECT_EQ(disk.rig.queue->next_avail(), 2U);
  disk.full = false;
  disk.rig.queue.reset();
  disk.rig.start({.start_index = 2, .left = left});
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used(), (std::vector<Used>{{6, 1}, {3, 1}, {9, 1}}));
  EXPECT_TRUE(disk.has(1) && disk.has(2) && disk.has(3));
}

TEST(KeptRequests, do_not_fit_a_smaller_ring) {
  Rig rig;
  rig.queue.reset();
  BlkQueueSetup setup = rig.ring->setup();
  setup.left.heads = {setup.size};
  EXPECT_FALSE(BlkQueue::start(*rig.device, *rig.context, rig.memory.shared(), setup).has_value());
  rig.start({});
}

TEST(KeptRequests, stay_in_flight_for_a_successor) {
  const MemFd file(4096);
  const InflightDescription description{
      .size_bytes = InflightArea::bytes_for(1, kSize), .queue_count = 1, .queue_size = kSize};
  const auto area = InflightArea::map(file.fd(), description).value();
  FullDisk disk(ErrorChoice::kEnospc, {.inflight = area});
  disk.full = false;
  disk.write(1, 6);
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used().size(), 1U);
  disk.full = true;
  disk.write(2, 3);
  disk.write(3, 12);
  disk.rig.run();
  ASSERT_EQ(disk.rig.queue->kept(), 2U);
  disk.write(4, 20);
  disk.rig.queue->stop(BlkQueue::Unfinished::kLeave, [] {});
  disk.rig.run();
  disk.rig.queue.reset();
  disk.full = false;
  disk.rig.start({.start_index = 99, .inflight = area});
  EXPECT_EQ(disk.rig.queue->in_flight(), 2U);
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used(), (std::vector<Used>{{3, 1}, {12, 1}, {20, 1}}));
  EXPECT_TRUE(disk.has(2) && disk.has(3) && disk.has(4));
}

TEST(KeptRequests, that_fail_while_the_queue_stops_do_not_hold_it_up) {
  using enum BlkQueue::Unfinished;
  for (const auto unfinished : {kFail, kLeave, kSuspend}) {
    FullDisk disk;
    disk.rig.node.hold = true;
    disk.write(1, 0);
    disk.write(2, 3);
    disk.rig.run();
    disk.rig.queue->stop(unfinished, [] {});
    for (auto* request : std::exchange(disk.rig.node.held, {}))
      disk.rig.context->complete_later(*request, ENOSPC);
    disk.rig.run();
    EXPECT_EQ(disk.rig.queue->in_flight(), 0U);
    const bool leaves = unfinished != kFail;
    EXPECT_EQ(disk.rig.ring->take_used().size(), leaves ? 0U : 2U);
    EXPECT_EQ(disk.rig.queue->left().heads.size(), leaves ? 2U : 0U);
  }
}

TEST(KeptRequests, whose_head_is_made_available_again_are_answered_first) {
  FullDisk disk;
  disk.write(1, 0);
  disk.rig.run();
  disk.rig.ring->make_available(0);
  disk.full = false;
  disk.gate().resume();
  disk.rig.run();
  EXPECT_EQ(disk.rig.ring->take_used().size(), 2U) << "it was answered first";
  EXPECT_FALSE(disk.rig.queue->broken());
}

// ---- At limits.

TEST(LimitedQueue, waits_in_flight_and_goes_on_at_once_when_it_stops) {
  Rig rig({.limits = blockdev::IoLimits::parse("iops-total=1", "", {}).value()});
  for (std::uint16_t i = 0; i < 4; ++i)
    rig.queue_request(kBlkTOut, i, pattern(512), 0, static_cast<std::uint16_t>(3 * i));
  rig.run();
  EXPECT_EQ(rig.queue->in_flight(), 3U);
  EXPECT_EQ(rig.queue->waiting(), 3U);
  EXPECT_EQ(rig.ring->take_used().size(), 1U);
  rig.queue->stop(BlkQueue::Unfinished::kFail, [] {});
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{3, 1}, {6, 1}, {9, 1}}));
}

TEST(LimitedQueue, counts_what_moves_data_and_lets_flushes_pass) {
  Rig rig({.limits = blockdev::IoLimits::parse("iops-write=1,bps-total=512", "", {}).value()});
  rig.queue_request(kBlkTOut, 0, pattern(512), 0, 0);
  rig.queue_request(kBlkTFlush, 0, {}, 0, 3);
  rig.queue_request(kBlkTGetId, 0, {}, 20, 6);
  rig.queue_request(kBlkTIn, 0, {}, 512, 9);
  rig.queue_request(kBlkTDiscard, 0, segment(0, 1), 0, 12);
  rig.run();
  EXPECT_EQ(rig.queue->waiting(), 2U) << "the read for its bytes, the discard as an operation";
  EXPECT_EQ(rig.ring->take_used().size(), 3U);
  rig.queue->stop(BlkQueue::Unfinished::kFail, [] {});
  rig.run();
}

TEST(LimitedQueue, counts_a_request_of_many_segments_once) {
  Rig rig({.limits = blockdev::IoLimits::parse("iops-total=1", "", {}).value()});
  std::vector<std::byte> segments;
  for (std::uint64_t i = 0; i < 8; ++i) {
    const auto one = segment(i * 8, 8);
    segments.insert(segments.end(), one.begin(), one.end());
  }
  rig.queue_request(kBlkTDiscard, 0, segments);
  rig.run();
  EXPECT_EQ(rig.node.records.size(), 8U);
  EXPECT_EQ(rig.queue->waiting(), 0U);
}

}  // namespace
}  // namespace vblk::virtio
