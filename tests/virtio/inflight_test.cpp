// In-flight areas as frontends hand them over, and a queue that goes on where a predecessor has
// died. What a kill leaves behind each store is inflight_steps_test.cpp's.
#include <cstdint>
#include <fcntl.h>
#include <memory>
#include <string>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "blockdev/virtio/inflight_area.h"
#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

using testing::EventFd;
using testing::MemFd;
using testing::pattern;
using testing::Rig;
using testing::Used;

constexpr std::uint16_t kSize = 64;
constexpr std::size_t kPage = 4096;

InflightDescription description(std::uint16_t queue_count = 1, std::uint16_t queue_size = kSize) {
  return {.size_bytes = InflightArea::bytes_for(queue_count, queue_size),
          .offset_bytes = 0,
          .queue_count = queue_count,
          .queue_size = queue_size};
}

// An area in a file of its own, and the file.
struct TestArea {
  explicit TestArea(std::uint16_t queue_count = 1) : file(kPage) {
    auto mapped = InflightArea::map(file.fd(), description(queue_count));
    EXPECT_TRUE(mapped.has_value()) << mapped.error().message;
    if (mapped) area = *mapped;
  }
  template <typename T>
  void write(std::size_t offset, T value) const {
    EXPECT_EQ(::pwrite(file.fd(), &value, sizeof value, static_cast<off_t>(offset)),
              static_cast<ssize_t>(sizeof value));
  }
  MemFd file;
  std::shared_ptr<const InflightArea> area;
};

// ---- The layout on the wire.

TEST(InflightRegion, is_laid_out_as_the_specification_has_it) {
  const TestArea test;
  InflightRegion region = test.area->region(0);
  const auto recovery = region.recover(7, kSize);
  ASSERT_TRUE(recovery.has_value());
  EXPECT_TRUE(recovery->is_fresh);
  region.popped(3);
  region.popped(5);
  region.completed(3);
  std::vector<std::byte> bytes(kPage);
  ASSERT_EQ(::pread(test.file.fd(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(kPage));
  const auto u16 = [&bytes](std::size_t at) { return load_le<std::uint16_t>(bytes.data() + at); };
  const auto u64 = [&bytes](std::size_t at) { return load_le<std::uint64_t>(bytes.data() + at); };
  EXPECT_EQ(u64(0), 0U) << "features";
  EXPECT_EQ(u16(8), 1U) << "version";
  EXPECT_EQ(u16(10), kSize) << "desc_num";
  EXPECT_EQ(u16(12), 3U) << "last_batch_head";
  EXPECT_EQ(u16(14), 7U) << "used_idx";
  EXPECT_EQ(bytes[16 + 16 * 3], std::byte{1}) << "desc[3].inflight";
  EXPECT_EQ(u64(16 + 16 * 3 + 8), 0U) << "desc[3].counter";
  EXPECT_EQ(bytes[16 + 16 * 5], std::byte{1}) << "desc[5].inflight";
  EXPECT_EQ(u64(16 + 16 * 5 + 8), 1U) << "desc[5].counter";
  EXPECT_EQ(bytes[16 + 16 * 4], std::byte{0}) << "desc[4].inflight";
}

TEST(InflightRegion, of_a_queue_begins_where_the_one_before_ends) {
  const TestArea test(2);
  ASSERT_TRUE(test.area->region(1).recover(0, kSize).has_value());
  std::uint16_t version = 0;
  const auto at = static_cast<off_t>(InflightRegion::region_bytes(kSize) + kInflightVersionOffset);
  ASSERT_EQ(::pread(test.file.fd(), &version, sizeof version, at), 2);
  EXPECT_EQ(version, kInflightVersion);
  EXPECT_TRUE(test.area->region(0).recover(0, kSize)->is_fresh) << "the other one is untouched";
}

// ---- What is refused.

TEST(InflightArea, must_lie_in_its_file_and_hold_all_its_regions) {
  const MemFd file(kPage);
  const auto refuses = [&file](auto change) {
    InflightDescription changed = description();
    change(changed);
    const auto area = InflightArea::map(file.fd(), changed);
    return !area.has_value() && area.error().kind == ErrorKind::kInvalidArgument;
  };
  EXPECT_FALSE(refuses([](auto& /*as it is*/) {}));
  EXPECT_FALSE(refuses([](auto& d) { d.size_bytes -= sizeof(std::uint64_t); }))
      << "as others make them";
  EXPECT_FALSE(refuses([](auto& d) { d.offset_bytes = 8; }));
  EXPECT_TRUE(refuses([](auto& d) { d.queue_count = 0; }));
  EXPECT_TRUE(refuses([](auto& d) { d.queue_size = 0; }));
  EXPECT_TRUE(refuses([](auto& d) { d.queue_count = 2; }));
  EXPECT_TRUE(refuses([](auto& d) { d.size_bytes = 0; }));
  EXPECT_TRUE(refuses([](auto& d) { d.size_bytes -= 2 * sizeof(std::uint64_t); }));
  EXPECT_TRUE(refuses([](auto& d) { d.size_bytes = kPage + 1; }));
  EXPECT_TRUE(refuses([](auto& d) { d.size_bytes = ~std::uint64_t{0}; }));
  EXPECT_TRUE(refuses([](auto& d) { d.offset_bytes = kPage; }));
  EXPECT_TRUE(refuses([](auto& d) { d.offset_bytes = ~std::uint64_t{7}; }));
  EXPECT_TRUE(refuses([](auto& d) { d.offset_bytes = 4; })) << "not aligned";
}

TEST(InflightArea, must_be_a_file_that_can_be_written) {
  const EventFd event;
  std::array<int, 2> pipe{};
  ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC), 0);
  const int directory = ::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  ASSERT_GE(directory, 0);
  const int closed = ::dup(directory);
  ::close(closed);
  for (const int fd : {event.fd(), pipe[0], pipe[1], directory, closed, -1})
    EXPECT_FALSE(InflightArea::map(fd, description()).has_value()) << fd;
  for (const int fd : {pipe[0], pipe[1], directory}) ::close(fd);

  const int sealed = ::memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(::ftruncate(sealed, kPage), 0);
  const std::string path = "/proc/self/fd/" + std::to_string(sealed);
  const int read_only = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  EXPECT_FALSE(InflightArea::map(read_only, description()).has_value());
  EXPECT_TRUE(InflightArea::map(sealed, description()).has_value());
  ASSERT_EQ(::fcntl(sealed, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
  EXPECT_TRUE(InflightArea::map(sealed, description()).has_value()) << "these do not matter";
  ASSERT_EQ(::fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE), 0);
  const auto area = InflightArea::map(sealed, description());
  ASSERT_FALSE(area.has_value());
  EXPECT_EQ(area.error().kind, ErrorKind::kPermission) << area.error().message;
  ::close(read_only);
  ::close(sealed);
}

TEST(InflightArea, must_have_regions_of_the_version_that_is_known) {
  const auto refuses = [](std::size_t offset, auto value) {
    const TestArea test;
    EXPECT_TRUE(test.area->region(0).recover(0, kSize).has_value());
    test.write(offset, value);
    return !InflightArea::map(test.file.fd(), description()).has_value() &&
           !test.area->region(0).recover(0, kSize).has_value();
  };
  EXPECT_TRUE(refuses(kInflightVersionOffset, std::uint16_t{2}));
  EXPECT_TRUE(refuses(kInflightFeaturesOffset, std::uint64_t{1} << 63));
  EXPECT_TRUE(refuses(kInflightDescNumOffset, std::uint16_t{kSize - 1}));
  EXPECT_FALSE(refuses(kInflightLastBatchHeadOffset, std::uint16_t{0xffff})) << "masked";
}

TEST(InflightRegion, of_another_ring_is_refused) {
  const TestArea test;
  InflightRegion region = test.area->region(0);
  ASSERT_TRUE(region.recover(0, kSize).has_value());
  EXPECT_TRUE(region.recover(1000, kSize).has_value()) << "nothing was in flight";
  region.popped(1);
  EXPECT_TRUE(region.recover(1001, kSize).has_value());
  region.popped(1);
  EXPECT_FALSE(region.recover(5, kSize).has_value()) << "64540 completed in one batch";
  EXPECT_FALSE(region.recover(1001, kSize * 2).has_value()) << "more entries than it has";
  test.write(kInflightDescOffset + kInflightDescBytes * 40, std::uint8_t{1});
  EXPECT_FALSE(region.recover(1001, 32).has_value()) << "a buffer beyond the ring";
}

TEST(InflightRegion, whose_list_runs_in_a_circle_ends_all_the_same) {
  const TestArea test;
  InflightRegion region = test.area->region(0);
  ASSERT_TRUE(region.recover(0, kSize).has_value());
  for (std::uint16_t head = 0; head < 4; ++head) region.popped(head);
  // desc[2].next = 2, and beyond the ring.
  test.write(kInflightLastBatchHeadOffset, std::uint16_t{2});
  test.write(kInflightDescOffset + kInflightDescBytes * 2 + kInflightNextOffset, std::uint16_t{2});
  const auto recovery = region.recover(3, kSize);
  ASSERT_TRUE(recovery.has_value());
  EXPECT_EQ(recovery->heads, (std::vector<std::uint16_t>{0, 1, 3}));
}

TEST(InflightArea, keeps_writeback_behind_its_regions_if_there_is_room) {
  const TestArea test;
  EXPECT_FALSE(test.area->writeback().has_value());
  for (const bool value : {false, true}) {
    test.area->keep_writeback(value);
    EXPECT_EQ(InflightArea::map(test.file.fd(), description()).value()->writeback(), value);
  }
  InflightDescription others = description();
  others.size_bytes -= sizeof(std::uint64_t);
  const auto area = InflightArea::map(test.file.fd(), others).value();
  area->keep_writeback(false);
  EXPECT_FALSE(area->writeback().has_value());
  EXPECT_EQ(test.area->writeback(), true) << "it wrote nothing behind its end";
}

// ---- A queue that goes on.

// A predecessor that took writes to sectors 10, 11, ... off the ring, with these heads, and was
// killed. The rig's queue is not started yet.
class AfterAKill {
 public:
  explicit AfterAKill(const std::vector<std::uint16_t>& heads) {
    rig.queue.reset();
    InflightRegion region = test.area->region(0);
    EXPECT_TRUE(region.recover(0, kSize).has_value());
    for (const std::uint16_t head : heads) {
      make_available(head);
      region.popped(head);
    }
  }
  void make_available(std::uint16_t head) {
    const auto data = pattern(512, ++count_);
    const std::uint64_t header =
        rig.place(testing::header(kBlkTOut, 10 + std::uint64_t{count_} - 1));
    rig.submit(
        {{header, kBlkRequestHeaderBytes}, {rig.place(data), 512}, {rig.allocate(1), 1, true}},
        head);
  }
  void start() { rig.start({.inflight = test.area}); }
  std::vector<std::uint64_t> sectors() const {
    std::vector<std::uint64_t> found;
    for (const auto& record : rig.node.records) found.push_back(record.offset_bytes / 512);
    return found;
  }

  TestArea test;
  Rig rig;

 private:
  unsigned count_{0};
};

TEST(BlkQueueRecovery, takes_what_was_in_flight_again_one_by_one_in_its_order_before_all_else) {
  AfterAKill after({30, 3, 9});
  after.make_available(20);
  after.rig.node.hold = true;
  after.start();
  EXPECT_EQ(after.rig.queue->in_flight(), 3U);
  EXPECT_EQ(after.rig.call.take(), 1U) << "the predecessor's interrupt may have got lost";
  for (const std::uint64_t sector : {10U, 11U, 12U}) {
    after.rig.run();
    ASSERT_EQ(after.rig.node.held.size(), 1U);
    EXPECT_EQ(after.sectors().back(), sector);
    EXPECT_TRUE(after.rig.node.records.back().outlives_process);
    after.rig.node.release(*after.rig.context);
  }
  after.rig.run();
  EXPECT_EQ(after.sectors(), (std::vector<std::uint64_t>{10, 11, 12, 13}));
  after.rig.node.release(*after.rig.context);
  after.rig.run();
  EXPECT_EQ(after.rig.ring->take_used(), (std::vector<Used>{{30, 1}, {3, 1}, {9, 1}, {20, 1}}));
  EXPECT_EQ(after.rig.queue->statistics().recovered, 3U);
  EXPECT_EQ(after.rig.queue->statistics().requests, 4U);
  EXPECT_EQ(after.rig.queue->next_avail(), 4U);
  // Nothing is left for the next one.
  const auto left = after.test.area->region(0).recover(4, kSize);
  ASSERT_TRUE(left.has_value());
  EXPECT_TRUE(left->heads.empty());
}

TEST(BlkQueueRecovery, goes_on_at_the_used_index_whatever_the_frontend_says) {
  AfterAKill after({3, 6});
  after.rig.start({.start_index = 77, .inflight = after.test.area});
  after.rig.run();
  EXPECT_EQ(after.rig.ring->take_used(), (std::vector<Used>{{3, 1}, {6, 1}}));
  EXPECT_EQ(after.rig.queue->next_avail(), 2U);
}

TEST(BlkQueueRecovery, that_is_told_to_stop_answers_what_was_in_flight_first) {
  AfterAKill after({3, 6, 9});
  after.make_available(12);
  after.start();
  bool stopped = false;
  after.rig.queue->stop(BlkQueue::Unfinished::kLeave, [&stopped] { stopped = true; });
  after.rig.run();
  EXPECT_EQ(after.rig.ring->take_used(), (std::vector<Used>{{3, 1}, {6, 1}, {9, 1}}));
  EXPECT_EQ(after.rig.queue->in_flight(), 0U);
  EXPECT_EQ(after.rig.queue->next_avail(), 3U) << "what was not popped is the next one's";
  EXPECT_FALSE(stopped) << "it is told from the loop, which does not run here";
}

TEST(BlkQueueRecovery, breaks_the_ring_over_a_buffer_that_cannot_be_answered) {
  AfterAKill after({3});
  InflightRegion region = after.test.area->region(0);
  ASSERT_TRUE(region.recover(0, kSize).has_value());
  region.popped(50);  // a descriptor of zeroes
  after.start();
  after.rig.run();
  EXPECT_TRUE(after.rig.queue->broken());
  EXPECT_EQ(after.rig.queue->in_flight(), 0U);
  EXPECT_EQ(after.rig.error.take(), 1U);
}

TEST(BlkQueueRecovery, refuses_a_queue_that_the_area_does_not_have) {
  const TestArea test;
  Rig rig;
  rig.queue.reset();
  BlkQueueSetup setup = rig.ring->setup();
  setup.index = 1;
  setup.inflight = test.area;
  const auto started = BlkQueue::start(*rig.device, *rig.context, rig.memory.shared(), setup);
  ASSERT_FALSE(started.has_value());
  EXPECT_NE(started.error().message.find("in-flight"), std::string::npos);
  rig.start({});
}

TEST(BlkQueueTracking, asks_no_disk_to_outlive_the_process_where_nobody_keeps_track) {
  Rig rig;
  rig.request(kBlkTOut, 0, pattern(512));
  EXPECT_FALSE(rig.node.records.at(0).outlives_process);
}

TEST(BlkQueueTracking, begins_where_the_frontend_says_if_the_area_is_new) {
  const TestArea test;
  Rig rig({.start_index = 40, .inflight = test.area});
  EXPECT_EQ(rig.call.take(), 0U);
  rig.request(kBlkTOut, 0, pattern(512));
  EXPECT_EQ(rig.queue->next_avail(), 41U);
}

TEST(BlkQueueTracking, breaks_the_ring_when_the_area_is_taken_away) {
  const TestArea test;
  Rig rig({.inflight = test.area});
  rig.request(kBlkTOut, 0, pattern(512));
  ASSERT_EQ(::ftruncate(test.file.fd(), 0), 0);
  rig.queue_request(kBlkTOut, 0, pattern(512));
  rig.run();
  rig.queue_request(kBlkTOut, 0, pattern(512), 0, 8);
  rig.run();
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_TRUE(test.area->faulted());
}

}  // namespace
}  // namespace vblk::virtio
