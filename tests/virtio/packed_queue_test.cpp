// A queue on packed rings, with a driver's side written by hand. What requests get is
// blk_queue_test.cpp's, on split rings; here is what the ring itself does.
#include <algorithm>
#include <array>
#include <cerrno>
#include <map>
#include <random>
#include <set>

#include "blockdev/virtio/packed_virtqueue.h"
#include "tests/virtio/packed_fixture.h"

namespace vblk::virtio {
namespace {

using testing::header;
using testing::kPackedFeatures;
using testing::kUntouched;
using testing::PackedPlace;
using testing::PackedRig;
using testing::PackedTestRing;
using testing::pattern;
using testing::Used;
using Piece = PackedRig::Piece;

constexpr std::uint64_t kEventIdxFeatures = kPackedFeatures | feature_bit(kFEventIdx);

// ---- Positions and events, against plain counting.

TEST(PackedPosition, advances_as_counting_does) {
  for (const std::size_t size : {1U, 2U, 3U, 7U, 8U, 32768U}) {
    PackedPosition position;
    std::uint64_t number = 0;
    for (const std::size_t step : {0U, 1U, 1U, 2U, 3U, 7U, 8U, 5U, 32768U, 1U, 32767U, 32768U}) {
      const std::size_t count = std::min(step, size);
      position.advance(count, size);
      number += count;
      const PackedPlace place{number, size};
      ASSERT_EQ(position.index, place.index());
      ASSERT_EQ(position.wrap, place.wrap());
      ASSERT_EQ(position.encode(), place.event());
      ASSERT_EQ(PackedPosition::decode(place.event()), position);
    }
  }
}

// Every event that a side can ask for, from a lap before to a lap ahead, for every batch.
TEST(PackedEvent, is_due_exactly_when_its_descriptor_was_passed) {
  for (const std::size_t size : {1U, 2U, 3U, 5U, 8U}) {
    for (std::uint64_t now = 2 * size; now < 4 * size; ++now) {
      for (std::uint64_t count = 1; count <= size; ++count) {
        for (std::uint64_t event = now - size; event < now + size; ++event) {
          const bool is_passed = event >= now - count && event < now;
          const std::uint32_t word = 2U << 16 | PackedPlace{event, size}.event();
          ASSERT_EQ(packed_need_event(word, PackedPosition::decode(PackedPlace{now, size}.event()),
                                      static_cast<std::uint16_t>(count), size),
                    is_passed)
              << "size " << size << ", now " << now << ", count " << count << ", event " << event;
        }
      }
    }
  }
}

// ---- Layouts.

// Cuts [address, +length) into `count` pieces.
void cut(std::vector<Piece>& out, std::uint64_t address, std::size_t length, std::size_t count,
         bool writable) {
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t begin = length * i / count;
    const std::size_t end = length * (i + 1) / count;
    out.push_back({address + begin, static_cast<std::uint32_t>(end - begin), writable});
  }
}

TEST(PackedQueue, takes_chains_of_any_length_over_many_laps_of_rings_of_any_size) {
  const auto data = pattern(1024);
  for (const std::uint16_t size : std::to_array<std::uint16_t>({3, 4, 5, 7, 16, 23, 100, 1000})) {
    for (const bool indirect : {false, true}) {
      for (const std::uint64_t start : {std::uint64_t{0}, std::uint64_t{2} * size - 1}) {
        PackedRig rig({.size = size, .start = start});
        const std::size_t longest = std::min<std::size_t>(size, 40);
        for (int i = 0; i < 200; ++i) {
          rig.forget_buffers();
          const std::size_t length = 3 + static_cast<std::size_t>(i) % (longest - 2);
          const auto id = static_cast<std::uint16_t>((i * 7) % size);
          const std::uint64_t status = rig.allocate(1);
          std::vector<Piece> pieces{{rig.place(header(kBlkTOut, 8)), 16}};
          cut(pieces, rig.place(data), data.size(), length - 2, false);
          pieces.push_back({status, 1, true});
          rig.put(pieces, id, indirect);
          rig.run();
          ASSERT_EQ(rig.ring->take_used(), (std::vector<Used>{{id, 1}})) << size << ", " << i;
          ASSERT_EQ(*rig.memory.at(status), std::byte{kBlkSOk});
          ASSERT_TRUE(std::equal(data.begin(), data.end(), rig.node.disk.begin() + 4096));
        }
      }
    }
  }
}

TEST(PackedQueue, works_with_a_single_descriptor) {
  PackedRig rig({.size = 1});
  for (int i = 0; i < 5; ++i) {
    const std::uint64_t status = rig.allocate(1);
    rig.put({{rig.place(header(kBlkTFlush, 0)), 16}, {status, 1, true}}, 0, true);
    rig.run();
    ASSERT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 1}}));
    ASSERT_EQ(*rig.memory.at(status), std::byte{kBlkSOk});
  }
}

TEST(PackedQueue, marks_used_descriptors_as_written) {
  PackedRig rig;
  rig.put_flush(5);
  rig.run();
  const std::byte* const used = rig.ring->descriptor(0);
  EXPECT_EQ(load_le<std::uint16_t>(used + 14), 0x8080 | kDescFWrite);
  EXPECT_EQ(load_le<std::uint16_t>(used + 12), 5U);
}

// "The VIRTQ_DESC_F_WRITE flags bit is the only valid flag for descriptors in the indirect table.
// Others are reserved and are ignored by the device."
TEST(PackedQueue, ignores_reserved_flags_in_a_table_and_write_of_the_table) {
  PackedRig rig;
  const std::uint64_t status = rig.allocate(1);
  const std::vector<Piece> pieces{{rig.place(header(kBlkTFlush, 0)), 16}, {status, 1, true}};
  const std::uint64_t table = rig.table(pieces, 0xfffd);
  rig.ring->put({{table, 32, true}}, 3, true);
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{3, 1}}));
  EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSOk});
}

TEST(PackedQueue, shows_a_batch_at_once_and_interrupts_once) {
  for (const std::uint64_t features : {kPackedFeatures, kEventIdxFeatures}) {
    PackedRig rig({.features = features});
    rig.node.hold = true;
    for (std::uint16_t i = 0; i < 10; ++i) rig.put_flush(i);
    rig.run();
    rig.node.release(*rig.context, true);
    rig.context->poll();
    for (std::uint64_t number = 0; number < 20; number += 2) {
      EXPECT_EQ(rig.ring->is_used(number), number > 0) << "the first is held back";
    }
    EXPECT_TRUE(rig.ring->take_used().empty());
    rig.queue->settle();
    const auto used = rig.ring->take_used();
    ASSERT_EQ(used.size(), 10U);
    for (std::uint32_t i = 0; i < 10; ++i) EXPECT_EQ(used[i], (Used{9 - i, 1}));
    EXPECT_EQ(rig.call.take(), 1U);
  }
}

// ---- Anything that a driver may do, against a model.

struct Sent {
  std::uint64_t status;
  std::uint64_t data;
  std::vector<std::byte> expected;  // of a read
  std::uint32_t used_length;
};

class RandomDriver {
 public:
  RandomDriver(PackedRig& rig, std::mt19937_64& random)
      : rig_(rig), random_(random), buffers_(rig.ring->size()) {
    for (std::uint16_t id = 0; id < rig.ring->size(); ++id) {
      free_ids_.push_back(id);
      buffers_[id] = testing::Rig::kBuffers + kBufferBytes * (id % kBufferCount);
    }
  }

  // Sends what fits now, in a random shape.
  void send() {
    for (auto wanted = random_() % 4; wanted > 0 && !free_ids_.empty(); --wanted) {
      if (sent_.size() == kBufferCount) return;
      const bool indirect = random_() % 3 == 0;
      const std::size_t data_pieces = random_() % 4;
      const std::size_t length = indirect ? 1 : data_pieces + 2;
      if (rig_.ring->room() < length) return;
      const auto which = random_() % free_ids_.size();
      const std::uint16_t id = free_ids_[which];
      if (in_use_.contains(buffers_[id])) continue;
      free_ids_.erase(free_ids_.begin() + static_cast<std::ptrdiff_t>(which));
      send_one(id, data_pieces, indirect);
    }
  }
  // Everything that came back is right and was missing. The number.
  std::size_t receive() {
    const auto used = rig_.ring->take_used();
    for (const Used& element : used) {
      const auto found = sent_.find(static_cast<std::uint16_t>(element.id));
      EXPECT_NE(found, sent_.end()) << "came back twice";
      if (found == sent_.end()) continue;
      const Sent& sent = found->second;
      EXPECT_EQ(element.length, sent.used_length);
      EXPECT_EQ(*rig_.memory.at(sent.status), std::byte{kBlkSOk});
      EXPECT_EQ(rig_.memory.read(sent.data, sent.expected.size()), sent.expected);
      in_use_.erase(buffers_[found->first]);
      free_ids_.push_back(found->first);
      sent_.erase(found);
    }
    return used.size();
  }
  [[nodiscard]] std::size_t in_flight() const { return sent_.size(); }

 private:
  // A header, two sectors, a status and a table.
  static constexpr std::uint64_t kBufferBytes = 2048;
  static constexpr std::size_t kBufferCount = 256;

  void send_one(std::uint16_t id, std::size_t data_pieces, bool indirect) {
    const std::uint64_t base = buffers_[id];
    in_use_.insert(base);
    const std::uint64_t sector = random_() % 1000;
    const bool is_read = data_pieces > 0;
    const std::size_t bytes = is_read ? 1024 : 0;
    Sent sent{
        .status = base + 16 + bytes,
        .data = base + 16,
        .expected = {rig_.node.disk.begin() + static_cast<std::ptrdiff_t>(sector * 512),
                     rig_.node.disk.begin() + static_cast<std::ptrdiff_t>(sector * 512 + bytes)},
        .used_length = static_cast<std::uint32_t>(bytes + 1)};
    rig_.memory.write(base, header(is_read ? kBlkTIn : kBlkTFlush, is_read ? sector : 0));
    *rig_.memory.at(sent.status) = kUntouched;
    std::vector<Piece> pieces{{base, 16}};
    if (is_read) cut(pieces, sent.data, bytes, data_pieces, true);
    pieces.push_back({sent.status, 1, true});
    if (indirect) {
      const std::uint64_t table = base + 1536;
      for (std::size_t i = 0; i < pieces.size(); ++i) {
        PackedTestRing::store(rig_.memory.at(table + 16 * i),
                              {.address = pieces[i].address,
                               .length = pieces[i].length,
                               .flags = pieces[i].writable ? kDescFWrite : std::uint16_t{0}});
      }
      rig_.ring->put({{table, static_cast<std::uint32_t>(16 * pieces.size())}}, id, true);
    } else {
      rig_.ring->put(pieces, id);
    }
    sent_.emplace(id, std::move(sent));
  }

  PackedRig& rig_;
  std::mt19937_64& random_;
  std::vector<std::uint64_t> buffers_;  // by id
  std::set<std::uint64_t> in_use_;
  std::vector<std::uint16_t> free_ids_;
  std::map<std::uint16_t, Sent> sent_;
};

TEST(PackedQueue, returns_each_buffer_once_whatever_comes_in_whatever_order) {
  std::mt19937_64 random(testing::test_seed());
  for (const std::uint16_t size : std::to_array<std::uint16_t>({5, 6, 7, 8, 31, 64, 129, 1024})) {
    PackedRig rig({.size = size, .features = kEventIdxFeatures, .start = random() % 4096});
    std::ranges::generate(rig.node.disk, [&random] { return static_cast<std::byte>(random()); });
    rig.node.hold = true;
    RandomDriver driver(rig, random);
    std::size_t returned = 0;
    while (returned < 3000 || driver.in_flight() > 0) {
      if (returned < 3000) driver.send();
      if (random() % 2 == 0) rig.run();
      for (auto count = random() % 5; count > 0 && !rig.node.held.empty(); --count) {
        const auto which = random() % rig.node.held.size();
        blockdev::BlockRequest* const request = rig.node.held[which];
        rig.node.held.erase(rig.node.held.begin() + static_cast<std::ptrdiff_t>(which));
        rig.context->complete_later(*request, 0);
      }
      rig.run();
      returned += driver.receive();
      rig.node.records.clear();
      ASSERT_FALSE(rig.queue->broken());
      ASSERT_FALSE(::testing::Test::HasFailure()) << "ring of " << size;
    }
    EXPECT_EQ(rig.queue->in_flight(), 0U);
    const std::uint32_t half = rig.ring->place(rig.ring->next_avail()).event();
    EXPECT_EQ(rig.queue->next_avail(), half << 16 | half);
  }
}

// ---- Malformed rings.

void expect_broken(PackedRig& rig) {
  rig.run();
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_EQ(rig.error.take(), 1U) << "the error descriptor is signalled once";
  EXPECT_TRUE(rig.node.records.empty());
  EXPECT_EQ(rig.queue->in_flight(), 0U);
  EXPECT_FALSE(rig.ring->is_used(0));
  // Nothing more is taken, and nobody is told again.
  rig.run();
  EXPECT_EQ(rig.error.take(), 0U);
  EXPECT_TRUE(rig.queue->prepare_to_sleep());
}

TEST(PackedQueueMalformed, a_chain_that_goes_on_where_nothing_is_available_breaks_the_ring) {
  PackedRig rig;
  rig.ring->put_raw({rig.allocate(16), 16, 0, 0x0080 | kDescFNext});
  expect_broken(rig);
}

TEST(PackedQueueMalformed, a_chain_whose_later_descriptors_are_of_another_lap_breaks_the_ring) {
  for (const std::uint16_t flags : std::to_array<std::uint16_t>({0x8000, 0x8080, 0})) {
    PackedRig rig;
    rig.ring->put_raw({rig.allocate(16), 16, 0, 0x0080 | kDescFNext});
    rig.ring->put_raw({rig.allocate(1), 1, 0, static_cast<std::uint16_t>(flags | kDescFWrite)});
    expect_broken(rig);
  }
}

TEST(PackedQueueMalformed, a_chain_without_an_end_breaks_the_ring) {
  for (const std::uint16_t size : std::to_array<std::uint16_t>({1, 3, 64})) {
    PackedRig rig({.size = size});
    // The ring's end changes the counter: a chain that runs in a circle claims to know that.
    for (std::uint16_t i = 0; i < size; ++i)
      rig.ring->put_raw({rig.allocate(16), 16, 0, 0x0080 | kDescFNext});
    expect_broken(rig);
  }
}

TEST(PackedQueueMalformed, an_id_beyond_the_queue_size_breaks_the_ring) {
  for (const std::uint16_t id : std::to_array<std::uint16_t>({64, 65, 0xffff})) {
    PackedRig rig;
    rig.put_flush(id);
    expect_broken(rig);
  }
}

TEST(PackedQueueMalformed, a_chain_without_a_reachable_status_byte_breaks_the_ring) {
  PackedRig rig;
  rig.put({{rig.place(header(kBlkTFlush, 0)), 16}}, 0);
  expect_broken(rig);
}

TEST(PackedQueueMalformed, a_chain_whose_status_can_be_reached_gets_an_error) {
  PackedRig rig;
  const std::uint64_t head = rig.place(header(kBlkTIn, 0));
  const std::uint64_t status = rig.allocate(1);
  rig.put({{head, 16}, {0x7fff'0000'0000, 512, true}, {status, 1, true}}, 9);
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{9, 0}}));
  EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSIoErr});
  EXPECT_FALSE(rig.queue->broken());
}

TEST(PackedQueueMalformed, bad_indirect_descriptors_break_the_ring) {
  struct Fault {
    const char* what;
    std::uint64_t address;  // 0: of a table
    std::uint32_t length;
    std::uint16_t flags;
    std::uint64_t features;
  };
  const std::vector<Fault> faults{
      {"an empty table", 0, 0, 0, kPackedFeatures},
      {"a torn table", 0, 40, 0, kPackedFeatures},
      {"a table of more than 1024 entries", 0, 1025 * 16, 0, kPackedFeatures},
      {"a table outside of memory", 0x7fff'0000'0000, 32, 0, kPackedFeatures},
      {"a table in a chain", 0, 32, kDescFNext, kPackedFeatures},
      {"not negotiated", 0, 32, 0, kPackedFeatures & ~feature_bit(kFIndirectDesc)},
  };
  for (const Fault& fault : faults) {
    SCOPED_TRACE(fault.what);
    PackedRig rig({.features = fault.features});
    const std::uint64_t status = rig.allocate(1);
    const std::uint64_t table =
        rig.table({{rig.place(header(kBlkTFlush, 0)), 16}, {status, 1, true}});
    rig.ring->put_raw({});  // the first comes last
    rig.ring->put_raw({status, 1, 0, 0x0080 | kDescFWrite});
    PackedTestRing::store(rig.ring->descriptor(0),
                          {fault.address != 0 ? fault.address : table, fault.length, 0,
                           static_cast<std::uint16_t>(0x0080 | kDescFIndirect | fault.flags)});
    expect_broken(rig);
  }
}

TEST(PackedQueueMalformed, the_same_id_twice_breaks_the_ring_and_harms_nobody) {
  PackedRig rig;
  rig.node.hold = true;
  const std::uint64_t status = rig.put_flush(7);
  rig.run();
  rig.put_flush(7);
  rig.run();
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_EQ(rig.error.take(), 1U);
  rig.node.release(*rig.context);
  rig.run();
  EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSOk}) << "the first still completes";
  EXPECT_TRUE(rig.ring->is_used(0));
}

TEST(PackedQueueMalformed, more_descriptors_than_the_ring_has_break_it) {
  PackedRig rig({.size = 4});
  rig.node.hold = true;
  rig.put_flush(0);
  rig.put_flush(1);
  rig.run();
  EXPECT_EQ(rig.queue->in_flight(), 2U);
  // Available in the next lap, though nothing has been used.
  rig.put_flush(2);
  rig.run();
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_EQ(rig.queue->in_flight(), 2U);
}

// Descriptors of which most are nearly right: pure noise breaks the ring at its first byte.
TEST(PackedQueueMalformed, rubbish_never_crashes_hangs_or_leaks_a_slot) {
  std::mt19937_64 random(testing::test_seed());
  const auto pick = [&random](std::uint64_t below) { return random() % below; };
  PackedRig rig({.size = 61, .features = kEventIdxFeatures});
  std::uint64_t requests = 0;
  std::uint64_t broken = 0;
  constexpr int kRounds = 20000;
  for (int round = 0; round < kRounds; ++round) {
    rig.queue.reset();
    const auto size = static_cast<std::uint16_t>(1 + pick(64));
    rig.ring = std::make_unique<PackedTestRing>(rig.memory, size, pick(std::uint64_t{4} * size));
    rig.start();
    rig.node.records.clear();
    const std::uint64_t headers = testing::Rig::kBuffers;
    for (std::size_t i = 0; i < 64; ++i) {
      constexpr std::array kTypes{kBlkTIn,    kBlkTOut,     kBlkTFlush,
                                  kBlkTGetId, kBlkTDiscard, kBlkTWriteZeroes};
      rig.memory.write(headers + 16 * i, header(kTypes[pick(kTypes.size())], pick(8192)));
    }
    for (auto count = pick(std::uint64_t{2} * size + 2); count > 0; --count) {
      constexpr std::array<std::uint32_t, 8> kLengths{16, 16, 1, 512, 513, 4096, 20, 0};
      PackedTestRing::Raw raw{
          .address = pick(2) == 0 ? headers + 16 * pick(64) : headers + 0x8000 + pick(0x20000),
          .length = kLengths[pick(kLengths.size())],
          .id = static_cast<std::uint16_t>(pick(20) == 0 ? pick(65536) : pick(size)),
          .flags = static_cast<std::uint16_t>(pick(4))};
      if (pick(40) == 0) raw.address = random();
      if (pick(40) == 0) raw.length = static_cast<std::uint32_t>(random());
      if (pick(8) == 0) {
        raw.length = static_cast<std::uint32_t>(pick(6) == 0 ? pick(2000) : 16 * pick(50));
        raw.flags |= kDescFIndirect;
      }
      const std::uint16_t availability = rig.ring->place(rig.ring->next_avail()).available();
      raw.flags |= pick(30) == 0 ? static_cast<std::uint16_t>(random() & 0x8080) : availability;
      rig.ring->put_raw(raw);
    }
    rig.ring->set_driver_event(static_cast<std::uint16_t>(random()),
                               static_cast<std::uint16_t>(random()));
    rig.run();
    ASSERT_EQ(rig.queue->in_flight(), 0U) << "round " << round;
    ASSERT_EQ(rig.error.take(), rig.queue->broken() ? 1U : 0U);
    requests += rig.queue->statistics().requests;
    broken += rig.queue->broken() ? 1U : 0U;
  }
  // The canary of the generator itself.
  EXPECT_GT(requests, 1000U);
  EXPECT_GT(broken, 1000U);
  EXPECT_LT(broken, std::uint64_t{kRounds});
}

// ---- Start, notifications, stop.

TEST(PackedQueueStart, refuses_rings_that_are_not_in_memory_or_not_aligned) {
  PackedRig rig;
  const auto refused = [&](auto change) {
    BlkQueueSetup setup = rig.ring->setup();
    change(setup);
    const auto queue = BlkQueue::start(*rig.device, *rig.context, rig.memory.shared(), setup);
    return !queue && queue.error().kind == ErrorKind::kInvalidArgument;
  };
  EXPECT_FALSE(refused([](BlkQueueSetup& s) { s.size = 63; })) << "any size will do";
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.size = 0; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.size = 1025; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.descriptor_address = 0; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.descriptor_address += 8; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.avail_address += 2; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.used_address += 2; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.avail_address = ~std::uint64_t{3}; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.used_address = 0; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) {
    s.descriptor_address = testing::kUserBase + 2 * testing::kRegionBytes - 512;
  })) << "its end lies outside";
}

TEST(PackedQueueStart, takes_the_base_of_a_ring_that_nothing_is_in_flight_on) {
  PackedRig rig;
  const auto starts = [&](std::uint32_t base) {
    BlkQueueSetup setup = rig.ring->setup();
    setup.next_avail = base;
    const auto queue = BlkQueue::start(*rig.device, *rig.context, rig.memory.shared(), setup);
    return queue.has_value() && (base >> 16 == 0 || (*queue)->next_avail() == base);
  };
  EXPECT_TRUE(starts(kPackedBaseInitial));
  EXPECT_TRUE(starts(0x8005'8005));
  EXPECT_TRUE(starts(0x0005'0005));
  EXPECT_TRUE(starts(0x0000'8005)) << "a frontend that knows no upper half";
  EXPECT_FALSE(starts(0x8040'8040)) << "beyond the ring";
  EXPECT_FALSE(starts(0x8004'8005)) << "a buffer is in flight of which nothing is known";
  EXPECT_FALSE(starts(0x0005'8005)) << "64 descriptors are";
}

TEST(PackedQueueNotification, without_event_index_the_flags_suppress_and_ask) {
  PackedRig rig;
  EXPECT_EQ(rig.ring->device_event_flags(), 1U) << "awake: no kicks are wanted";
  EXPECT_TRUE(rig.queue->prepare_to_sleep());
  EXPECT_EQ(rig.ring->device_event_flags(), 0U);
  rig.queue->wake_up();
  EXPECT_EQ(rig.ring->device_event_flags(), 1U);
  rig.put_flush();
  EXPECT_FALSE(rig.queue->prepare_to_sleep()) << "there is work already";
  rig.queue->wake_up();
  rig.run();
  EXPECT_EQ(rig.call.take(), 1U);
  EXPECT_EQ(rig.ring->take_used().size(), 1U);
  for (const std::uint16_t flags : std::to_array<std::uint16_t>({1, 0, 2, 3})) {
    rig.ring->set_driver_event(flags, 0x1234);
    rig.put_flush();
    rig.run();
    EXPECT_EQ(rig.ring->take_used().size(), 1U);
    EXPECT_EQ(rig.call.take(), flags == 1 ? 0U : 1U) << flags;
  }
}

TEST(PackedQueueNotification, with_event_index_a_kick_is_asked_for_at_the_next_descriptor) {
  PackedRig rig({.size = 5, .features = kEventIdxFeatures});
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(rig.queue->prepare_to_sleep());
    EXPECT_EQ(rig.ring->device_event_flags(), 2U);
    EXPECT_EQ(rig.ring->device_event_desc(), rig.ring->place(rig.ring->next_avail()).event());
    rig.queue->wake_up();
    EXPECT_EQ(rig.ring->device_event_flags(), 1U);
    rig.put_flush();
    EXPECT_FALSE(rig.queue->prepare_to_sleep());
    rig.run();
    EXPECT_EQ(rig.ring->take_used().size(), 1U);
  }
}

TEST(PackedQueueNotification, with_event_index_an_interrupt_comes_when_its_descriptor_is_used) {
  PackedRig rig({.size = 7, .features = kEventIdxFeatures});
  rig.put_flush();
  rig.run();
  EXPECT_EQ(rig.ring->take_used().size(), 1U);
  EXPECT_EQ(rig.call.take(), 1U) << "the first is always sent: a predecessor may owe it";
  for (int i = 0; i < 50; ++i) {
    // In the middle of the second chain from here.
    rig.ring->set_driver_event(2, rig.ring->place(rig.ring->next_used() + 3).event());
    rig.put_flush();
    rig.run();
    EXPECT_EQ(rig.call.take(), 0U) << i;
    rig.put_flush(1);
    rig.run();
    EXPECT_EQ(rig.call.take(), 1U) << i;
    EXPECT_EQ(rig.ring->take_used().size(), 2U);
  }
}

TEST(PackedQueueStop, leaves_the_ring_for_whoever_comes_next) {
  for (const std::uint64_t features : {kPackedFeatures, kEventIdxFeatures}) {
    PackedRig rig({.size = 9, .features = features});
    for (int i = 0; i < 7; ++i) {
      rig.put_flush();
      rig.run();
      EXPECT_EQ(rig.ring->take_used().size(), 1U);
      rig.queue->stop(BlkQueue::Unfinished::kLeave, [] {});
      rig.run();
      const std::uint32_t half = rig.ring->place(rig.ring->next_avail()).event();
      EXPECT_EQ(rig.queue->next_avail(), half << 16 | half);
      EXPECT_NE(rig.ring->device_event_flags(), 1U) << "the next one may need a kick";
      rig.queue.reset();
      rig.start();
    }
  }
}

TEST(PackedQueueKeeps, a_failed_request_whose_descriptors_are_overwritten_meanwhile) {
  for (const bool fails_at_the_end : {false, true}) {
    PackedRig rig({.size = 9});
    const auto first = pattern(512, 1);
    const auto second = pattern(512, 2);
    bool full = true;
    rig.node.fault = [&full](const auto& record, std::size_t) {
      return full && record.offset_bytes == 0 ? ENOSPC : 0;
    };
    const std::uint64_t first_status = rig.allocate(1);
    rig.put({{rig.place(testing::header(kBlkTOut, 0)), 16},
             {rig.place(first), 512},
             {first_status, 1, true}},
            4);
    rig.put({{rig.place(testing::header(kBlkTOut, 1)), 16},
             {rig.place(second), 512},
             {rig.allocate(1), 1, true}},
            7);
    rig.run();
    // The second one's used descriptor lies where the first one's chain begins.
    EXPECT_EQ(rig.ring->take_used().size(), 1U);
    EXPECT_EQ(rig.queue->kept(), 1U);
    EXPECT_TRUE(rig.device->gate().is_paused());
    if (fails_at_the_end) {
      rig.queue->stop(BlkQueue::Unfinished::kFail, [] {});
      rig.run();
      EXPECT_EQ(*rig.memory.at(first_status), std::byte{kBlkSIoErr});
    } else {
      full = false;
      rig.device->gate().resume();
      rig.run();
      EXPECT_EQ(*rig.memory.at(first_status), std::byte{kBlkSOk});
      EXPECT_TRUE(std::equal(first.begin(), first.end(), rig.node.disk.begin()));
    }
    EXPECT_EQ(rig.ring->take_used().size(), 1U);
  }
}

}  // namespace
}  // namespace vblk::virtio
