// In-flight regions of packed rings: their layout, what is refused, and a queue that goes on where
// a predecessor has died. What a kill leaves behind each store is packed_inflight_steps_test.cpp's.
#include <cstdint>
#include <memory>
#include <string>
#include <unistd.h>
#include <vector>

#include "blockdev/virtio/inflight_area.h"
#include "tests/virtio/packed_fixture.h"

namespace vblk::virtio {
namespace {

using testing::MemFd;
using testing::PackedRig;
using testing::PackedRigOptions;
using testing::PackedTestRing;
using testing::pattern;
using testing::Used;

constexpr std::uint16_t kSize = 60;
constexpr std::size_t kBytes = 8192;

InflightDescription description(std::uint16_t queue_count = 1, bool is_packed = true) {
  return {.size_bytes = InflightArea::bytes_for(queue_count, kSize, is_packed),
          .offset_bytes = 0,
          .queue_count = queue_count,
          .queue_size = kSize,
          .is_packed = is_packed};
}

// An area in a file of its own, a ring, and the file.
struct TestArea {
  explicit TestArea(std::uint16_t queue_count = 1, bool is_packed = true)
      : file(kBytes), ring(kSize * kDescriptorBytes / sizeof(std::uint64_t)) {
    auto mapped = InflightArea::map(file.fd(), description(queue_count, is_packed));
    EXPECT_TRUE(mapped.has_value()) << mapped.error().message;
    if (mapped) area = *mapped;
  }
  Expected<PackedInflightRecovery> recover(PackedInflightRegion& region,
                                           std::uint16_t size = kSize) {
    return region.recover(reinterpret_cast<std::byte*>(ring.data()), size, {});
  }
  template <typename T>
  void write(std::size_t offset, T value) const {
    EXPECT_EQ(::pwrite(file.fd(), &value, sizeof value, static_cast<off_t>(offset)),
              static_cast<ssize_t>(sizeof value));
  }
  MemFd file;
  std::vector<std::uint64_t> ring;
  std::shared_ptr<const InflightArea> area;
};

constexpr std::size_t entry(std::size_t index) {
  return kPackedInflightDescOffset + kPackedInflightDescBytes * index;
}

std::vector<PackedDescriptor> chain(std::size_t length, std::uint16_t id) {
  std::vector<PackedDescriptor> descriptors(length);
  for (std::size_t i = 0; i < length; ++i)
    descriptors[i] = {.guest_address = 0x1000 * (i + 1),
                      .length_bytes = static_cast<std::uint32_t>(16 + i),
                      .id = id,
                      .flags = static_cast<std::uint16_t>(i + 1 < length ? kDescFNext : 0)};
  return descriptors;
}

std::uint16_t pop(PackedInflightRegion& region, const std::vector<PackedDescriptor>& descriptors) {
  for (const PackedDescriptor& descriptor : descriptors) region.popping(descriptor);
  return region.popped();
}

TEST(PackedInflightRegion, is_laid_out_as_the_specification_has_it) {
  TestArea test;
  PackedInflightRegion region = test.area->packed_region(0);
  const auto recovery = test.recover(region);
  ASSERT_TRUE(recovery.has_value());
  EXPECT_TRUE(recovery->is_fresh);
  const std::uint16_t first = pop(region, chain(1, 50));
  const std::uint16_t second = pop(region, chain(3, 7));
  EXPECT_EQ(first, 0U);
  EXPECT_EQ(second, 1U);
  region.publishing(std::span(&first, 1), {.index = 1, .wrap = true});
  std::vector<std::byte> bytes(kBytes);
  ASSERT_EQ(::pread(test.file.fd(), bytes.data(), bytes.size(), 0),
            static_cast<ssize_t>(bytes.size()));
  const auto u8 = [&bytes](std::size_t at) { return std::to_integer<unsigned>(bytes[at]); };
  const auto u16 = [&bytes](std::size_t at) { return load_le<std::uint16_t>(bytes.data() + at); };
  const auto u32 = [&bytes](std::size_t at) { return load_le<std::uint32_t>(bytes.data() + at); };
  const auto u64 = [&bytes](std::size_t at) { return load_le<std::uint64_t>(bytes.data() + at); };
  EXPECT_EQ(u64(0), 0U) << "features";
  EXPECT_EQ(u16(8), 1U) << "version";
  EXPECT_EQ(u16(10), kSize) << "desc_num";
  EXPECT_EQ(u16(12), 0U) << "free_head";
  EXPECT_EQ(u16(14), 4U) << "old_free_head";
  EXPECT_EQ(u16(16), 1U) << "used_idx";
  EXPECT_EQ(u16(18), 0U) << "old_used_idx";
  EXPECT_EQ(u8(20), 1U) << "used_wrap_counter";
  EXPECT_EQ(u8(21), 1U) << "old_used_wrap_counter";
  EXPECT_EQ(u8(entry(1)), 1U) << "desc[1].inflight";
  EXPECT_EQ(u16(entry(1) + 4), 3U) << "desc[1].last";
  EXPECT_EQ(u16(entry(1) + 6), 3U) << "desc[1].num";
  EXPECT_EQ(u64(entry(1) + 8), 1U) << "desc[1].counter";
  EXPECT_EQ(u8(entry(2)), 0U) << "desc[2].inflight: not the head";
  EXPECT_EQ(u16(entry(3) + 16), 7U) << "desc[3].id";
  EXPECT_EQ(u16(entry(2) + 18), kDescFNext) << "desc[2].flags";
  EXPECT_EQ(u32(entry(2) + 20), 17U) << "desc[2].len";
  EXPECT_EQ(u64(entry(3) + 24), 0x3000U) << "desc[3].addr";
  EXPECT_EQ(u16(entry(0) + 2), 4U) << "desc[0].next: the free list as it was";
  EXPECT_EQ(u8(entry(0)), 1U) << "desc[0].inflight: not published yet";
  region.published(std::span(&first, 1));
  ASSERT_EQ(::pread(test.file.fd(), bytes.data(), bytes.size(), 0),
            static_cast<ssize_t>(bytes.size()));
  EXPECT_EQ(u8(entry(0)), 0U);
  EXPECT_EQ(u16(14), 0U) << "old_free_head";
  EXPECT_EQ(u16(18), 1U) << "old_used_idx";
}

TEST(PackedInflightRegion, has_its_entries_taken_and_given_back_in_any_order) {
  TestArea test;
  PackedInflightRegion region = test.area->packed_region(0);
  ASSERT_TRUE(test.recover(region).has_value());
  std::vector<std::uint16_t> taken;
  for (std::uint16_t id = 0; id < kSize / 3; ++id) taken.push_back(pop(region, chain(3, id)));
  const std::vector<std::uint16_t> some{taken[5], taken[1], taken[17]};
  region.publishing(some, {.index = 9, .wrap = true});
  region.published(some);
  EXPECT_EQ(pop(region, chain(2, 5)), taken[17]) << "the last one given back comes first";
  PackedInflightRegion next = test.area->packed_region(0);
  const auto recovery = test.recover(next);
  ASSERT_TRUE(recovery.has_value()) << recovery.error().message;
  EXPECT_EQ(recovery->in_flight.size(), kSize / 3 - 2);
  EXPECT_EQ(recovery->in_flight.back().chain.size(), 2U);
  EXPECT_EQ(recovery->next_used.index, 9U);
  EXPECT_EQ(recovery->next_avail.index, (9 + kSize - 9 + 2) % kSize);
}

TEST(PackedInflightRegion, that_contradicts_itself_or_its_ring_is_refused) {
  const auto refuses = [](std::size_t offset, auto value, std::uint16_t size = kSize) {
    TestArea test;
    PackedInflightRegion region = test.area->packed_region(0);
    EXPECT_TRUE(test.recover(region).has_value());
    pop(region, chain(3, 50));
    pop(region, chain(1, 51));
    test.write(offset, value);
    PackedInflightRegion next = test.area->packed_region(0);
    const auto recovered = test.recover(next, size);
    return !recovered.has_value() && recovered.error().kind == ErrorKind::kInvalidArgument;
  };
  constexpr std::uint16_t kEnd = kSize;
  EXPECT_FALSE(refuses(kBytes - 2, std::uint16_t{0})) << "as it is";
  EXPECT_TRUE(refuses(kInflightVersionOffset, std::uint16_t{2}));
  EXPECT_TRUE(refuses(kInflightFeaturesOffset, std::uint64_t{1}));
  EXPECT_TRUE(refuses(kInflightDescNumOffset, std::uint16_t{kSize - 1}));
  EXPECT_TRUE(refuses(kPackedInflightUsedOffset, std::uint16_t{kSize}));
  EXPECT_TRUE(refuses(kPackedInflightUsedOffset + 2, std::uint16_t{0xffff}));
  EXPECT_TRUE(refuses(kPackedInflightOldFreeHeadOffset, std::uint16_t{1})) << "part of a chain";
  EXPECT_TRUE(refuses(kPackedInflightOldFreeHeadOffset, std::uint16_t{5})) << "one is missing";
  EXPECT_TRUE(refuses(kPackedInflightOldFreeHeadOffset, kEnd)) << "all are";
  EXPECT_TRUE(refuses(entry(10) + 2, std::uint16_t{8})) << "a free list in a circle";
  EXPECT_TRUE(refuses(entry(10) + 2, std::uint16_t{0})) << "a free list into a chain";
  EXPECT_TRUE(refuses(entry(10) + 2, std::uint16_t{0xffff})) << "a free list that ends early";
  EXPECT_TRUE(refuses(entry(0) + 2, std::uint16_t{0})) << "a chain in a circle";
  EXPECT_TRUE(refuses(entry(0) + 2, std::uint16_t{9})) << "a chain into the free list";
  EXPECT_TRUE(refuses(entry(0) + 2, std::uint16_t{3})) << "a chain into another";
  EXPECT_TRUE(refuses(entry(1) + 2, std::uint16_t{0xffff})) << "a chain into nowhere";
  EXPECT_TRUE(refuses(entry(0) + 4, std::uint16_t{1})) << "another last";
  EXPECT_TRUE(refuses(entry(0) + 6, std::uint16_t{0})) << "no length";
  EXPECT_TRUE(refuses(entry(0) + 6, std::uint16_t{2})) << "another length";
  EXPECT_TRUE(refuses(entry(0) + 6, std::uint16_t{0xffff})) << "a length without end";
  EXPECT_TRUE(refuses(entry(0), std::uint8_t{0})) << "entries that are nobody's";
  EXPECT_TRUE(refuses(entry(2) + 16, std::uint16_t{kSize})) << "an id beyond the ring";
  EXPECT_TRUE(refuses(entry(2) + 16, std::uint16_t{51})) << "an id twice";
  EXPECT_FALSE(refuses(entry(1) + 16, std::uint16_t{0xffff})) << "no id but that of the last";
  EXPECT_FALSE(refuses(entry(20), std::uint8_t{1})) << "in flight, and free: killed in between";
  EXPECT_TRUE(refuses(kBytes - 2, std::uint16_t{0}, kSize + 1)) << "a larger ring";
  EXPECT_TRUE(refuses(kBytes - 2, std::uint16_t{0}, 51)) << "a ring without such an id";
  EXPECT_TRUE(refuses(kBytes - 2, std::uint16_t{0}, 3)) << "more descriptors than the ring has";
}

TEST(PackedInflightRegion, of_noise_is_refused_or_survived) {
  std::mt19937_64 random(testing::test_seed());
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    TestArea test;
    PackedInflightRegion region = test.area->packed_region(0);
    ASSERT_TRUE(test.recover(region).has_value());
    std::vector<std::uint16_t> taken;
    for (std::uint16_t id = 0; id < 10; ++id) taken.push_back(pop(region, chain(1 + id % 3, id)));
    region.publishing(taken, {.index = 19, .wrap = true});
    for (auto changes = random() % 4; changes > 0; --changes) {
      const std::size_t offset = 12 + random() % (entry(kSize) - 12);
      test.write(offset, static_cast<std::uint8_t>(random() % (random() % 2 == 0 ? 64 : 256)));
    }
    test.ring[1] = random();
    PackedInflightRegion next = test.area->packed_region(0);
    const auto recovery = test.recover(next);
    if (!recovery) continue;
    ++accepted;
    std::size_t left = kSize;
    for (const auto& buffer : recovery->in_flight) left -= buffer.chain.size();
    for (std::uint16_t i = 0; left > 0; ++i, --left) pop(next, chain(1, i));
  }
  EXPECT_GT(accepted, 100);
  EXPECT_LT(accepted, 2900);
}

TEST(PackedInflightArea, is_larger_than_a_split_one_and_not_taken_for_it) {
  EXPECT_EQ(InflightArea::bytes_for(2, 64, true), 2 * (32 + 32 * 64 + 32) + 8U);
  const MemFd file(kBytes);
  InflightDescription too_small = description(2);
  too_small.size_bytes = InflightArea::bytes_for(2, kSize, false);
  EXPECT_FALSE(InflightArea::map(file.fd(), too_small).has_value());
  const TestArea split(1, false);
  PackedRig rig;
  rig.queue.reset();
  BlkQueueSetup setup = rig.ring->setup();
  setup.inflight = split.area;
  const auto started = BlkQueue::start(*rig.device, *rig.context, rig.memory.shared(), setup);
  ASSERT_FALSE(started.has_value());
  EXPECT_NE(started.error().message.find("other kind"), std::string::npos);
}

// ---- A queue that goes on.

// A predecessor that took writes to sectors 10, 11, ... off the ring and was killed.
class AfterAKill {
 public:
  explicit AfterAKill(const std::vector<std::uint16_t>& ids) : rig({.size = kSize}) {
    rig.queue.reset();
    rig.start(test.area);
    rig.node.hold = true;
    for (const std::uint16_t id : ids) make_available(id);
    rig.run();
    EXPECT_EQ(rig.queue->in_flight(), ids.size());
    // What it has written until now is all that is left of it.
    kept_.resize(kBytes);
    EXPECT_EQ(::pread(test.file.fd(), kept_.data(), kBytes, 0), static_cast<ssize_t>(kBytes));
  }
  void make_available(std::uint16_t id) {
    const auto data = pattern(512, ++count_);
    rig.put({{rig.place(testing::header(kBlkTOut, 10 + std::uint64_t{count_} - 1)), 16},
             {rig.place(data), 512},
             {rig.allocate(1), 1, true}},
            id);
  }
  // The first of these completes in the predecessor, into the ring, but is not published.
  void die_with_used_descriptors(std::size_t count) {
    std::vector<blockdev::BlockRequest*> done(
        rig.node.held.begin(), rig.node.held.begin() + static_cast<std::ptrdiff_t>(count));
    rig.node.held.erase(rig.node.held.begin(),
                        rig.node.held.begin() + static_cast<std::ptrdiff_t>(count));
    for (blockdev::BlockRequest* request : done) rig.context->complete_later(*request, 0);
    rig.context->poll();
    die();
  }
  // The ring stays as it is, and so does the area; the process's own memory goes.
  void die() {
    std::vector<std::byte> ring(std::size_t{kSize} * 16);
    for (std::size_t i = 0; i < ring.size(); ++i) ring[i] = rig.ring->descriptor(i / 16)[i % 16];
    rig.node.release(*rig.context);
    rig.run();
    rig.queue.reset();
    for (std::size_t i = 0; i < ring.size(); ++i) rig.ring->descriptor(i / 16)[i % 16] = ring[i];
    EXPECT_EQ(::pwrite(test.file.fd(), kept_.data(), kBytes, 0), static_cast<ssize_t>(kBytes));
    static_cast<void>(rig.call.take());
    rig.node.records.clear();
  }
  std::vector<std::uint64_t> sectors() const {
    std::vector<std::uint64_t> found;
    for (const auto& record : rig.node.records) found.push_back(record.offset_bytes / 512);
    return found;
  }

  TestArea test;
  PackedRig rig;

 private:
  unsigned count_{0};
  std::vector<std::byte> kept_;
};

TEST(PackedQueueRecovery, takes_what_was_in_flight_again_one_by_one_in_its_order_before_all_else) {
  AfterAKill after({30, 3, 9});
  after.die();
  after.make_available(20);
  after.rig.node.hold = true;
  after.rig.start(after.test.area);
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
  EXPECT_EQ(after.rig.queue->next_avail(), 0x800c'800cU);
}

// Two were written into the ring behind a third whose flags were held back. The next process
// completes one: the driver must see no more than that.
TEST(PackedQueueRecovery, takes_back_used_descriptors_that_were_not_published) {
  AfterAKill after({30, 3, 9, 12});
  after.die_with_used_descriptors(3);
  EXPECT_TRUE(after.rig.ring->is_used(3)) << "left by the predecessor";
  after.rig.node.hold = true;
  after.rig.start(after.test.area);
  EXPECT_TRUE(after.rig.ring->take_used().empty());
  after.rig.run();
  after.rig.node.release(*after.rig.context);
  after.rig.run();
  EXPECT_EQ(after.rig.ring->take_used(), (std::vector<Used>{{30, 1}}));
  after.rig.node.hold = false;
  after.rig.node.release(*after.rig.context);
  after.rig.run();
  EXPECT_EQ(after.rig.ring->take_used(), (std::vector<Used>{{3, 1}, {9, 1}, {12, 1}}));
}

TEST(PackedQueueRecovery, goes_on_where_the_region_says_whatever_the_frontend_does) {
  AfterAKill after({3});
  after.die();
  BlkQueueSetup setup = after.rig.ring->setup();
  setup.next_avail = 0x8011'8005;
  setup.inflight = after.test.area;
  auto started =
      BlkQueue::start(*after.rig.device, *after.rig.context, after.rig.memory.shared(), setup);
  ASSERT_TRUE(started.has_value());
  after.rig.queue = std::move(*started);
  after.rig.node.hold = false;
  after.rig.run();
  EXPECT_EQ(after.rig.ring->take_used(), (std::vector<Used>{{3, 1}}));
  EXPECT_EQ(after.rig.queue->next_avail(), 0x8003'8003U);
}

TEST(PackedQueueRecovery, believes_its_own_copy_and_not_the_ring) {
  AfterAKill after({3, 6});
  after.die();
  for (std::uint64_t number = 0; number < 6; ++number)
    PackedTestRing::store(after.rig.ring->descriptor(number), {.address = ~std::uint64_t{0}});
  after.rig.node.hold = false;
  after.rig.start(after.test.area);
  after.rig.run();
  EXPECT_EQ(after.sectors(), (std::vector<std::uint64_t>{10, 11}));
  EXPECT_EQ(after.rig.ring->take_used(), (std::vector<Used>{{3, 1}, {6, 1}}));
}

TEST(PackedQueueTracking, breaks_the_ring_when_the_area_is_taken_away) {
  const TestArea test;
  PackedRig rig({.size = kSize});
  rig.queue.reset();
  rig.start(test.area);
  rig.put_flush(1);
  rig.run();
  ASSERT_EQ(::ftruncate(test.file.fd(), 0), 0);
  rig.put_flush(2);
  rig.run();
  rig.put_flush(3);
  rig.run();
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_TRUE(test.area->faulted());
}

}  // namespace
}  // namespace vblk::virtio
