// A queue against hand-built rings: every layout the specification allows, every request, what
// happens to what is wrong, and who is told when.
#include "blockdev/virtio/blk_queue.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <thread>

#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

using testing::header;
using testing::kUntouched;
using testing::pattern;
using testing::Rig;
using testing::segment;
using testing::Used;
using Piece = Rig::Piece;

std::vector<std::byte> join(std::initializer_list<std::span<const std::byte>> parts) {
  std::vector<std::byte> out;
  for (const auto part : parts) out.insert(out.end(), part.begin(), part.end());
  return out;
}

// Cuts [address, +length) into `pieces` descriptors of nearly equal length.
void cut(std::vector<Piece>& out, std::uint64_t address, std::size_t length, std::size_t pieces,
         bool writable) {
  for (std::size_t i = 0; i < pieces; ++i) {
    const std::size_t begin = length * i / pieces;
    const std::size_t end = length * (i + 1) / pieces;
    if (begin != end)
      out.push_back({address + begin, static_cast<std::uint32_t>(end - begin), writable});
  }
}

// --- Layouts -------------------------------------------------------------------------------------

TEST(BlkQueueLayout, a_write_works_however_header_and_data_are_cut) {
  const auto data = pattern(1024);
  for (const bool indirect : {false, true}) {
    for (std::size_t header_pieces = 1; header_pieces <= 16; ++header_pieces) {
      for (const std::size_t data_pieces : {0U, 1U, 3U, 17U}) {
        Rig rig;
        // 0 data pieces: header and data as one buffer, cut by the header's count.
        const auto whole = join({header(kBlkTOut, 8), data});
        const std::uint64_t at = rig.place(whole);
        const std::uint64_t status = rig.allocate(1);
        std::vector<Piece> pieces;
        if (data_pieces == 0) {
          cut(pieces, at, whole.size(), header_pieces, false);
        } else {
          cut(pieces, at, kBlkRequestHeaderBytes, header_pieces, false);
          cut(pieces, at + kBlkRequestHeaderBytes, data.size(), data_pieces, false);
        }
        pieces.push_back({status, 1, true});
        indirect ? rig.submit_indirect(pieces) : rig.submit(pieces);
        rig.run();
        ASSERT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 1}}));
        ASSERT_EQ(*rig.memory.at(status), std::byte{kBlkSOk});
        ASSERT_TRUE(std::equal(data.begin(), data.end(), rig.node.disk.begin() + 4096));
      }
    }
  }
}

TEST(BlkQueueLayout, a_read_works_however_data_and_status_are_cut) {
  const auto data = pattern(1024);
  for (const bool indirect : {false, true}) {
    for (const bool status_apart : {false, true}) {
      for (const std::size_t data_pieces : {1U, 2U, 5U, 31U}) {
        Rig rig;
        std::copy(data.begin(), data.end(), rig.node.disk.begin() + 512);
        const std::uint64_t head = rig.place(header(kBlkTIn, 1));
        const std::uint64_t at = rig.allocate(data.size() + 1);
        std::vector<Piece> pieces{{head, kBlkRequestHeaderBytes}};
        cut(pieces, at, data.size() + (status_apart ? 0 : 1), data_pieces, true);
        if (status_apart) pieces.push_back({at + data.size(), 1, true});
        indirect ? rig.submit_indirect(pieces) : rig.submit(pieces);
        rig.run();
        ASSERT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 1025}}));
        ASSERT_EQ(rig.memory.read(at, data.size()), data);
        ASSERT_EQ(*rig.memory.at(at + data.size()), std::byte{kBlkSOk});
      }
    }
  }
}

TEST(BlkQueueLayout, plain_descriptors_may_come_before_the_indirect_one) {
  Rig rig;
  const auto data = pattern(512);
  const std::uint64_t head = rig.place(header(kBlkTOut, 2));
  rig.submit_indirect({{rig.place(data), 512}, {rig.allocate(1), 1, true}}, 1);
  rig.ring->set_descriptor(
      0, {.guest_address = head, .length_bytes = 16, .flags = kDescFNext, .next = 1});
  // The same chain, entered at its plain descriptor.
  rig.ring->set_avail_index(0);
  rig.ring->make_available(0);
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 1}}));
  EXPECT_TRUE(std::equal(data.begin(), data.end(), rig.node.disk.begin() + 1024));
}

TEST(BlkQueueLayout, descriptors_without_bytes_are_passed_over) {
  Rig rig;
  const std::uint64_t status = rig.allocate(1);
  rig.submit({{rig.place(header(kBlkTFlush, 0)), 16},
              {0, 0},
              {status, 1, true},
              {0xffff'ffff'ffff'ffff, 0, true}});
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 1}}));
  EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSOk});
}

TEST(BlkQueueLayout, a_buffer_may_cross_from_one_memory_region_to_the_next) {
  Rig rig;
  const auto data = pattern(2048);
  std::copy(data.begin(), data.end(), rig.node.disk.begin());
  const std::uint64_t border = testing::kGuestBase + testing::kRegionBytes;
  const std::uint64_t status = rig.allocate(1);
  rig.submit({{rig.place(header(kBlkTIn, 0)), 16}, {border - 100, 2048, true}, {status, 1, true}});
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 2049}}));
  EXPECT_EQ(rig.memory.read(border - 100, 2048), data);
}

TEST(BlkQueueLayout, the_longest_chain_of_the_largest_ring_works) {
  for (const bool indirect : {false, true}) {
    Rig rig({.size = 1024});
    const std::size_t bytes = std::size_t{1022} * 512;
    const auto data = pattern(bytes);
    std::copy(data.begin(), data.end(), rig.node.disk.begin());
    std::vector<Piece> pieces{{rig.place(header(kBlkTIn, 0)), 16}};
    const std::uint64_t at = rig.allocate(bytes + 1);
    cut(pieces, at, bytes, 1022, true);
    pieces.push_back({at + bytes, 1, true});
    indirect ? rig.submit_indirect(pieces) : rig.submit(pieces);
    rig.run();
    ASSERT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, bytes + 1}}));
    EXPECT_EQ(rig.memory.read(at, bytes), data);
  }
}

// --- Requests ------------------------------------------------------------------------------------

TEST(BlkQueueRequest, get_id_is_padded_with_zeroes_and_not_terminated) {
  for (const std::string& serial : {std::string(), std::string("abc"), std::string(20, 'x')}) {
    Rig rig({.serial = serial});
    const auto result = rig.request(kBlkTGetId, 0, {}, 20);
    EXPECT_EQ(result.status, kBlkSOk);
    EXPECT_EQ(result.used, (std::vector<Used>{{0, 21}}));
    std::vector<std::byte> expected(20);
    std::memcpy(expected.data(), serial.data(), serial.size());
    EXPECT_EQ(result.data, expected);
  }
}

TEST(BlkQueueRequest, get_id_with_another_length_gets_what_fits) {
  Rig rig({.serial = "0123456789"});
  const auto shorter = rig.request(kBlkTGetId, 0, {}, 4);
  EXPECT_EQ(shorter.status, kBlkSOk);
  EXPECT_EQ(shorter.used.at(0).length, 5U);
  EXPECT_EQ(shorter.data.at(3), std::byte{'3'});
  const auto longer = rig.request(kBlkTGetId, 0, {}, 30);
  EXPECT_EQ(longer.status, kBlkSOk);
  EXPECT_EQ(longer.used.at(0).length, 20U) << "the bytes behind the id were not written";
  EXPECT_EQ(longer.data.at(20), kUntouched);
}

// What each request gets, and how many bytes the used element says were written.
TEST(BlkQueueRequest, gets_the_status_and_the_used_length_of_the_specification) {
  constexpr std::uint64_t kEnd = Rig::kDiskBytes / 512;
  const auto data = pattern(512);
  const auto odd = pattern(513);
  const auto seg = [](auto... s) { return join({s...}); };
  struct Case {
    const char* what;
    std::uint32_t type;
    std::uint64_t sector;
    std::vector<std::byte> readable;
    std::size_t writable;
    std::uint8_t status;
    std::uint32_t used_length;
    bool read_only{false};
  };
  const std::vector<Case> cases{
      {"read", kBlkTIn, 0, {}, 512, kBlkSOk, 513},
      {"read the last sector", kBlkTIn, kEnd - 1, {}, 512, kBlkSOk, 513},
      {"read nothing", kBlkTIn, 0, {}, 0, kBlkSOk, 1},
      {"read past the end", kBlkTIn, kEnd, {}, 512, kBlkSIoErr, 0},
      {"read across the end", kBlkTIn, kEnd - 1, {}, 1024, kBlkSIoErr, 0},
      {"read at 2^63", kBlkTIn, std::uint64_t{1} << 63, {}, 512, kBlkSIoErr, 0},
      {"read where sector times 512 wraps to 0",
       kBlkTIn,
       std::uint64_t{1} << 55,
       {},
       512,
       kBlkSIoErr,
       0},
      {"read an odd length", kBlkTIn, 0, {}, 513, kBlkSIoErr, 0},
      {"read with readable bytes left over", kBlkTIn, 0, data, 512, kBlkSOk, 513},
      {"write", kBlkTOut, 0, data, 0, kBlkSOk, 1},
      {"write nothing", kBlkTOut, 0, {}, 0, kBlkSOk, 1},
      {"write an odd length", kBlkTOut, 0, odd, 0, kBlkSIoErr, 1},
      {"write past the end", kBlkTOut, kEnd, data, 0, kBlkSIoErr, 1},
      {"write with writable bytes left over", kBlkTOut, 0, data, 4, kBlkSOk, 0},
      {"write a read-only disk", kBlkTOut, 0, data, 0, kBlkSIoErr, 1, true},
      {"flush", kBlkTFlush, 0, {}, 0, kBlkSOk, 1},
      {"flush with a sector", kBlkTFlush, 77, {}, 0, kBlkSOk, 1},
      {"flush with data", kBlkTFlush, 0, data, 0, kBlkSOk, 1},
      {"flush a read-only disk", kBlkTFlush, 0, {}, 0, kBlkSOk, 1, true},
      {"discard", kBlkTDiscard, 0, seg(segment(8, 8)), 0, kBlkSOk, 1},
      {"discard no sectors", kBlkTDiscard, 0, seg(segment(8, 0)), 0, kBlkSOk, 1},
      {"discard without a segment", kBlkTDiscard, 0, {}, 0, kBlkSIoErr, 1},
      {"discard with a torn segment", kBlkTDiscard, 0, pattern(15), 0, kBlkSIoErr, 1},
      {"discard with one and a half", kBlkTDiscard, 0, pattern(24), 0, kBlkSIoErr, 1},
      {"discard with unmap", kBlkTDiscard, 0, seg(segment(8, 8, 1)), 0, kBlkSUnsupp, 1},
      {"discard with an unknown flag", kBlkTDiscard, 0, seg(segment(8, 8, 2)), 0, kBlkSUnsupp, 1},
      {"discard past the end", kBlkTDiscard, 0, seg(segment(kEnd, 1)), 0, kBlkSIoErr, 1},
      {"a bad flag outweighs a bad range", kBlkTDiscard, 0, seg(segment(kEnd, 1), segment(0, 1, 4)),
       0, kBlkSUnsupp, 1},
      {"discard a read-only disk", kBlkTDiscard, 0, seg(segment(8, 8)), 0, kBlkSIoErr, 1, true},
      {"write zeroes", kBlkTWriteZeroes, 0, seg(segment(8, 8)), 0, kBlkSOk, 1},
      {"write zeroes with unmap", kBlkTWriteZeroes, 0, seg(segment(8, 8, 1)), 0, kBlkSOk, 1},
      {"write zeroes with an unknown flag", kBlkTWriteZeroes, 0, seg(segment(8, 8, 3)), 0,
       kBlkSUnsupp, 1},
      {"write zeroes past the end", kBlkTWriteZeroes, 0, seg(segment(kEnd - 1, 2)), 0, kBlkSIoErr,
       1},
      {"write zeroes of more than is announced", kBlkTWriteZeroes, 0, seg(segment(0, 0xffff'ffff)),
       0, kBlkSIoErr, 1},
      {"write zeroes on a read-only disk", kBlkTWriteZeroes, 0, seg(segment(8, 8)), 0, kBlkSIoErr,
       1, true},
      {"get lifetime", 10, 0, {}, 6, kBlkSUnsupp, 0},
      {"secure erase", 14, 0, seg(segment(8, 8)), 0, kBlkSUnsupp, 1},
      {"an old SCSI command", 2, 0, {}, 0, kBlkSUnsupp, 1},
      {"an unknown type", 0xdead'beef, 0, data, 512, kBlkSUnsupp, 0},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.what);
    Rig rig({.read_only = c.read_only});
    const auto before = rig.node.disk;
    const auto result = rig.request(c.type, c.sector, c.readable, c.writable);
    EXPECT_EQ(result.status, c.status);
    EXPECT_EQ(result.used, (std::vector<Used>{{0, c.used_length}}));
    EXPECT_FALSE(rig.queue->broken());
    const BlkQueueStatistics& counted = rig.queue->statistics();
    EXPECT_EQ(counted.requests, 1U);
    EXPECT_EQ(counted.errors, c.status == kBlkSIoErr ? 1U : 0U);
    EXPECT_EQ(counted.unsupported, c.status == kBlkSUnsupp ? 1U : 0U);
    if (c.status != kBlkSOk) {
      EXPECT_TRUE(rig.node.records.empty()) << "a refused request reached the disk";
      EXPECT_EQ(rig.node.disk, before);
      for (const std::byte byte : result.data) ASSERT_EQ(byte, kUntouched);
    }
  }
}

TEST(BlkQueueRequest, a_header_that_is_too_short_is_an_error) {
  for (const std::uint32_t length : {1U, 8U, 15U}) {
    Rig rig;
    const std::uint64_t status = rig.allocate(1);
    rig.submit({{rig.place(header(kBlkTFlush, 0)), length}, {status, 1, true}});
    rig.run();
    EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 1}}));
    EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSIoErr});
  }
  Rig rig;
  const std::uint64_t status = rig.allocate(1);
  rig.submit({{status, 1, true}});
  rig.run();
  EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSIoErr}) << "no header at all";
}

TEST(BlkQueueRequest, errors_of_the_disk_reach_the_guest) {
  for (const auto& [error, status] : {std::pair{EIO, kBlkSIoErr}, std::pair{ENOSPC, kBlkSIoErr},
                                      std::pair{EOPNOTSUPP, kBlkSUnsupp}}) {
    Rig rig;
    rig.node.fault = [error](const auto&, std::size_t) { return error; };
    const auto read = rig.request(kBlkTIn, 0, {}, 512);
    EXPECT_EQ(read.status, status);
    EXPECT_EQ(read.used, (std::vector<Used>{{0, 0}})) << "nothing was read that could be counted";
    EXPECT_EQ(rig.request(kBlkTOut, 0, pattern(512)).status, status);
    EXPECT_EQ(rig.request(kBlkTFlush, 0).status, status);
  }
}

TEST(BlkQueueRequest, several_segments_are_carried_out_one_after_another) {
  for (const std::uint32_t type : {kBlkTDiscard, kBlkTWriteZeroes}) {
    Rig rig;
    std::vector<std::byte> segments;
    for (std::uint32_t i = 0; i < 32; ++i) {
      const auto one = segment(std::uint64_t{i} * 16, i + 1, type == kBlkTWriteZeroes ? i % 2 : 0);
      segments.insert(segments.end(), one.begin(), one.end());
    }
    rig.node.hold = true;
    const std::uint64_t status = rig.queue_request(type, 0, segments);
    for (std::uint32_t i = 0; i < 32; ++i) {
      rig.run();
      ASSERT_EQ(rig.node.records.size(), i + 1) << "more than one segment at a time";
      EXPECT_EQ(rig.node.records[i].offset_bytes, std::uint64_t{i} * 16 * 512);
      EXPECT_EQ(rig.node.records[i].length_bytes, std::uint64_t{i + 1} * 512);
      EXPECT_EQ(rig.node.records[i].may_unmap, type == kBlkTWriteZeroes && i % 2 == 1);
      EXPECT_TRUE(rig.ring->take_used().empty());
      rig.node.release(*rig.context);
    }
    rig.run();
    EXPECT_EQ(rig.ring->take_used().size(), 1U);
    EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSOk});
  }
}

TEST(BlkQueueRequest, more_segments_than_announced_are_not_supported) {
  Rig rig;
  std::vector<std::byte> segments;
  for (std::uint32_t i = 0; i < 33; ++i) {
    const auto one = segment(i, 1);
    segments.insert(segments.end(), one.begin(), one.end());
  }
  EXPECT_EQ(rig.request(kBlkTDiscard, 0, segments).status, kBlkSUnsupp);
  EXPECT_TRUE(rig.node.records.empty());
}

TEST(BlkQueueRequest, one_bad_segment_keeps_all_from_being_carried_out) {
  Rig rig;
  const auto segments = join({segment(0, 1), segment(8, 1), segment(1 << 30, 1)});
  EXPECT_EQ(rig.request(kBlkTWriteZeroes, 0, segments).status, kBlkSIoErr);
  EXPECT_TRUE(rig.node.records.empty());
}

TEST(BlkQueueRequest, a_segment_that_fails_ends_the_request) {
  Rig rig;
  rig.node.fault = [](const auto&, std::size_t index) { return index == 1 ? EIO : 0; };
  const auto segments = join({segment(0, 1), segment(8, 1), segment(16, 1)});
  const auto result = rig.request(kBlkTDiscard, 0, segments);
  EXPECT_EQ(result.status, kBlkSIoErr);
  EXPECT_EQ(result.used.size(), 1U);
  EXPECT_EQ(rig.node.records.size(), 2U);
}

TEST(BlkQueueRequest, discard_that_is_not_offered_is_not_supported) {
  struct Plain final : blockdev::BlockNode {
    Plain() { size_bytes_ = 4096; }
    void do_submit(blockdev::BlockRequest&, blockdev::IoContext&) override { FAIL(); }
  } node;
  Rig rig;
  const auto device = BlkDevice::create(node, {}).value();
  ASSERT_TRUE(device->set_features(testing::kUsualFeatures).has_value());
  rig.queue.reset();
  rig.queue =
      BlkQueue::start(*device, *rig.context, rig.memory.shared(), rig.ring->setup()).value();
  EXPECT_EQ(rig.request(kBlkTDiscard, 0, segment(0, 1)).status, kBlkSUnsupp);
  EXPECT_EQ(rig.request(kBlkTWriteZeroes, 0, segment(0, 1)).status, kBlkSUnsupp);
  rig.queue.reset();
  rig.start({});
}

TEST(BlkQueueRequest, writes_are_write_through_as_the_device_says_when_they_are_taken) {
  Rig rig({.features = testing::kUsualFeatures | feature_bit(kBlkFConfigWce)});
  const auto write_through_of = [&](std::uint32_t type, std::span<const std::byte> payload) {
    rig.node.records.clear();
    EXPECT_EQ(rig.request(type, 0, payload).status, kBlkSOk);
    return rig.node.records.at(0).write_through;
  };
  const std::array off{std::byte{0}};
  const std::array on{std::byte{1}};
  const auto data = pattern(512);
  EXPECT_FALSE(write_through_of(kBlkTOut, data));
  EXPECT_FALSE(write_through_of(kBlkTWriteZeroes, segment(0, 1)));
  ASSERT_TRUE(rig.device->write_config(kBlkConfigWriteback, off).has_value());
  EXPECT_TRUE(write_through_of(kBlkTOut, data));
  EXPECT_TRUE(write_through_of(kBlkTWriteZeroes, segment(0, 1)));
  ASSERT_TRUE(rig.device->write_config(kBlkConfigWriteback, on).has_value());
  EXPECT_FALSE(write_through_of(kBlkTOut, data));
}

TEST(BlkQueueRequest, completions_may_come_in_any_order) {
  Rig rig;
  rig.node.hold = true;
  for (std::uint16_t i = 0; i < 8; ++i)
    rig.queue_request(kBlkTIn, i, {}, 512, static_cast<std::uint16_t>(3 * i));
  rig.run();
  EXPECT_EQ(rig.queue->in_flight(), 8U);
  EXPECT_TRUE(rig.ring->take_used().empty());
  rig.node.release(*rig.context, true);
  rig.run();
  const auto used = rig.ring->take_used();
  ASSERT_EQ(used.size(), 8U);
  for (std::uint32_t i = 0; i < 8; ++i) EXPECT_EQ(used[i], (Used{3 * (7 - i), 513}));
}

// --- Memory that goes away -----------------------------------------------------------------------

// A frontend may shorten the file of a region at any time: the data of this write is gone before
// the disk reads it, and what it reads in its place is not what the driver wrote.
TEST(BlkQueueMemory, that_is_taken_away_fails_the_write_and_breaks_the_ring) {
  constexpr std::uint64_t kFileBytes = 65536;
  constexpr std::uint64_t kFileAddress = testing::kGuestBase + 2 * testing::kRegionBytes;
  const testing::MemFd file(kFileBytes);
  testing::RigOptions options;
  options.more_memory = MemoryRegion::map(file.fd(), kFileAddress, kFileBytes,
                                          testing::kUserBase + 2 * testing::kRegionBytes, 0)
                            .value();
  Rig rig(options);
  const std::uint64_t request = rig.place(header(kBlkTOut, 8));
  const std::uint64_t status = rig.allocate(1);
  rig.submit({{request, 16}, {kFileAddress + 8192, 512}, {status, 1, true}});
  ASSERT_EQ(::ftruncate(file.fd(), 4096), 0);
  rig.run();
  EXPECT_EQ(std::to_integer<unsigned>(*rig.memory.at(status)), kBlkSIoErr);
  EXPECT_EQ(rig.ring->take_used().size(), 1U);
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_EQ(rig.error.take(), 1U);
  rig.queue_request(kBlkTGetId, 0, {}, 20);
  rig.run();
  EXPECT_TRUE(rig.ring->take_used().empty()) << "a broken ring takes nothing more";
}

// What stands in its place reads as a ring in which nothing has happened yet.
TEST(BlkQueueMemory, that_holds_the_ring_is_missed_before_a_sleep) {
  constexpr std::uint64_t kFileBytes = 65536;
  constexpr std::uint64_t kUserAddress = testing::kUserBase + 2 * testing::kRegionBytes;
  const testing::MemFd file(kFileBytes);
  testing::RigOptions options;
  options.more_memory =
      MemoryRegion::map(file.fd(), testing::kGuestBase + 2 * testing::kRegionBytes, kFileBytes,
                        kUserAddress, 0)
          .value();
  Rig rig(options);
  rig.queue.reset();
  rig.queue = BlkQueue::start(*rig.device, *rig.context, rig.memory.shared(),
                              {.size = 8,
                               .descriptor_address = kUserAddress,
                               .avail_address = kUserAddress + 4096,
                               .used_address = kUserAddress + 8192,
                               .kick_fd = rig.kick.fd(),
                               .error_fd = rig.error.fd()})
                  .value();
  rig.run();
  ASSERT_TRUE(rig.queue->prepare_to_sleep());
  rig.queue->wake_up();
  ASSERT_FALSE(rig.queue->broken());
  ASSERT_EQ(::ftruncate(file.fd(), 0), 0);
  EXPECT_EQ(rig.queue->poll(), 0U);
  EXPECT_TRUE(rig.queue->prepare_to_sleep());
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_EQ(rig.error.take(), 1U);
}

TEST(BlkQueueMemory, of_another_device_that_is_taken_away_changes_nothing_here) {
  const testing::MemFd file(8192);
  const auto other = MemoryRegion::map(file.fd(), 0, 8192, 0, 0).value();
  Rig rig;
  ASSERT_EQ(::ftruncate(file.fd(), 4096), 0);
  static_cast<volatile std::byte*>(other->host())[4096] = std::byte{1};
  ASSERT_TRUE(other->faulted());
  EXPECT_EQ(rig.request(kBlkTOut, 0, pattern(512)).status, kBlkSOk);
  EXPECT_FALSE(rig.queue->broken());
}

// --- Malformed chains and rings ------------------------------------------------------------------

void expect_broken(Rig& rig) {
  rig.run();
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_EQ(rig.error.take(), 1U) << "the error descriptor is signalled once";
  EXPECT_TRUE(rig.ring->take_used().empty());
  EXPECT_TRUE(rig.node.records.empty());
  EXPECT_EQ(rig.queue->in_flight(), 0U);
  // Nothing more is taken, and nobody is told again.
  rig.submit({{rig.place(header(kBlkTFlush, 0)), 16}, {rig.allocate(1), 1, true}}, 20);
  rig.run();
  EXPECT_EQ(rig.error.take(), 0U);
  EXPECT_TRUE(rig.ring->take_used().empty());
  EXPECT_TRUE(rig.queue->prepare_to_sleep());
}

TEST(BlkQueueMalformed, a_chain_whose_status_can_be_reached_gets_an_error) {
  constexpr std::uint64_t kNowhere = 0x7fff'0000'0000;
  Rig rig;
  const std::uint64_t head = rig.place(header(kBlkTIn, 0));
  const std::uint64_t status = rig.allocate(1);
  const std::uint64_t data = rig.allocate(512);
  const std::uint64_t last = testing::kGuestBase + 2 * testing::kRegionBytes;
  const std::vector<std::pair<const char*, std::vector<Piece>>> chains{
      {"data outside of memory", {{head, 16}, {kNowhere, 512, true}, {status, 1, true}}},
      {"data that leaves memory", {{head, 16}, {last - 100, 512, true}, {status, 1, true}}},
      {"data that wraps around",
       {{head, 16}, {0xffff'ffff'ffff'ff00, 512, true}, {status, 1, true}}},
      {"header outside of memory", {{kNowhere, 16}, {data, 512, true}, {status, 1, true}}},
      {"readable behind writable", {{head, 16}, {data, 512, true}, {head, 16}, {status, 1, true}}},
  };
  for (const auto& [what, pieces] : chains) {
    SCOPED_TRACE(what);
    *rig.memory.at(status) = kUntouched;
    rig.submit(pieces);
    rig.run();
    EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 0}}));
    EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSIoErr});
    EXPECT_FALSE(rig.queue->broken());
  }
  EXPECT_TRUE(rig.node.records.empty());
  EXPECT_EQ(rig.request(kBlkTIn, 0, {}, 512).status, kBlkSOk) << "the ring goes on";
}

TEST(BlkQueueMalformed, more_pieces_than_there_is_room_for_are_an_error) {
  Rig rig({.size = 16});
  // Every descriptor crosses the border between the regions: two pieces each.
  const std::uint64_t border = testing::kGuestBase + testing::kRegionBytes;
  const std::uint64_t head = rig.place(header(kBlkTIn, 0));
  const std::uint64_t status = rig.allocate(1);
  const auto read_by = [&](std::size_t descriptors) {
    std::vector<Piece> pieces{{head, 16}};
    pieces.insert(pieces.end(), descriptors, {border - 256, 512, true});
    pieces.push_back({status, 1, true});
    rig.submit_indirect(pieces);
    rig.run();
    return rig.ring->take_used();
  };
  EXPECT_EQ(read_by(14), (std::vector<Used>{{0, 14 * 512 + 1}}));
  EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSOk});
  EXPECT_EQ(read_by(1022), (std::vector<Used>{{0, 0}}));
  EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSIoErr});
  EXPECT_FALSE(rig.queue->broken());
}

// Linux sizes its tables by seg_max, whatever the ring's size.
TEST(BlkQueueLayout, an_indirect_table_may_be_longer_than_the_ring) {
  Rig rig({.size = 8});
  const auto data = pattern(std::size_t{200} * 512);
  const std::uint64_t at = rig.place(data);
  const std::uint64_t status = rig.allocate(1);
  std::vector<Piece> pieces{{rig.place(header(kBlkTOut, 0)), 16}};
  cut(pieces, at, data.size(), 200, false);
  pieces.push_back({status, 1, true});
  rig.submit_indirect(pieces);
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 1}}));
  EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSOk});
  EXPECT_TRUE(std::equal(data.begin(), data.end(), rig.node.disk.begin()));
}

TEST(BlkQueueMalformed, a_chain_without_a_reachable_status_byte_breaks_the_ring) {
  constexpr std::uint64_t kNowhere = 0x7fff'0000'0000;
  const auto chains = [&](Rig& rig) {
    const std::uint64_t head = rig.place(header(kBlkTFlush, 0));
    return std::vector<std::vector<Piece>>{{{head, 16}},
                                           {{head, 16}, {rig.allocate(8), 0, true}},
                                           {{head, 16}, {kNowhere, 1, true}},
                                           {{head, 16}, {0xffff'ffff'ffff'ffff, 2, true}}};
  };
  for (std::size_t i = 0; i < 4; ++i) {
    SCOPED_TRACE(i);
    Rig rig;
    rig.submit(chains(rig).at(i));
    expect_broken(rig);
  }
}

TEST(BlkQueueMalformed, more_new_entries_than_the_ring_has_break_it) {
  for (const std::uint16_t claimed : std::to_array<std::uint16_t>({65, 1000, 65535})) {
    Rig rig;
    rig.ring->set_avail_index(claimed);
    expect_broken(rig);
  }
}

TEST(BlkQueueMalformed, a_head_beyond_the_table_breaks_the_ring) {
  for (const std::uint16_t head : std::to_array<std::uint16_t>({64, 65, 65535})) {
    Rig rig;
    rig.ring->make_available(head);
    expect_broken(rig);
  }
}

TEST(BlkQueueMalformed, a_next_beyond_the_table_breaks_the_ring) {
  for (const std::uint16_t next : std::to_array<std::uint16_t>({64, 65535})) {
    Rig rig;
    rig.ring->set_descriptor(
        0,
        {.guest_address = rig.allocate(16), .length_bytes = 16, .flags = kDescFNext, .next = next});
    rig.ring->make_available(0);
    expect_broken(rig);
  }
}

TEST(BlkQueueMalformed, a_loop_breaks_the_ring) {
  for (const std::uint16_t next :
       std::to_array<std::uint16_t>({0, 1})) {  // onto itself; and in a circle of two
    Rig rig;
    rig.ring->set_descriptor(
        0,
        {.guest_address = rig.allocate(16), .length_bytes = 16, .flags = kDescFNext, .next = next});
    rig.ring->set_descriptor(
        1, {.guest_address = rig.allocate(16), .length_bytes = 16, .flags = kDescFNext, .next = 0});
    rig.ring->make_available(0);
    expect_broken(rig);
  }
}

struct IndirectFault {
  const char* what;
  std::uint32_t length;
  std::uint16_t flags;
  std::uint16_t inner_flags;
  std::uint16_t inner_next;
  std::uint64_t features;
  bool outside;
};

TEST(BlkQueueMalformed, bad_indirect_descriptors_break_the_ring) {
  constexpr std::uint16_t kIndirectNext = kDescFIndirect | kDescFNext;
  const std::vector<IndirectFault> faults{
      {"an empty table", 0, kDescFIndirect, 0, 0, testing::kUsualFeatures, false},
      {"a table of more than 1024 entries", 1025 * 16, kDescFIndirect, 0, 0,
       testing::kUsualFeatures, false},
      {"a torn table", 40, kDescFIndirect, 0, 0, testing::kUsualFeatures, false},
      {"a table that is shorter than an entry", 8, kDescFIndirect, 0, 0, testing::kUsualFeatures,
       false},
      {"a table outside of memory", 32, kDescFIndirect, 0, 0, testing::kUsualFeatures, true},
      {"a next behind it", 32, kIndirectNext, 0, 0, testing::kUsualFeatures, false},
      {"a table in a table", 32, kDescFIndirect, kDescFIndirect, 0, testing::kUsualFeatures, false},
      {"a next beyond the table", 32, kDescFIndirect, kDescFNext, 2, testing::kUsualFeatures,
       false},
      {"a loop in the table", 32, kDescFIndirect, kDescFNext, 0, testing::kUsualFeatures, false},
      {"not negotiated", 32, kDescFIndirect, 0, 0, feature_bit(kFVersion1), false},
  };
  for (const IndirectFault& fault : faults) {
    SCOPED_TRACE(fault.what);
    Rig rig({.features = fault.features});
    const std::uint64_t table = rig.allocate(64);
    for (std::size_t i = 0; i < 2; ++i)
      testing::TestRing::store_descriptor(rig.memory.at(table + i * kDescriptorBytes),
                                          {.guest_address = rig.allocate(64),
                                           .length_bytes = 16,
                                           .flags = fault.inner_flags,
                                           .next = fault.inner_next});
    rig.ring->set_descriptor(0, {.guest_address = fault.outside ? 0x7fff'0000'0000 : table,
                                 .length_bytes = fault.length,
                                 .flags = fault.flags,
                                 .next = 1});
    rig.ring->set_descriptor(
        1, {.guest_address = rig.allocate(1), .length_bytes = 1, .flags = kDescFWrite, .next = 0});
    rig.ring->make_available(0);
    expect_broken(rig);
  }
}

TEST(BlkQueueMalformed, the_write_flag_of_an_indirect_descriptor_is_ignored) {
  Rig rig;
  const std::uint64_t status = rig.allocate(1);
  rig.submit_indirect({{rig.place(header(kBlkTFlush, 0)), 16}, {status, 1, true}});
  store_le<std::uint16_t>(rig.ring->descriptor_pointer(0) + 12, kDescFIndirect | kDescFWrite);
  rig.run();
  EXPECT_EQ(*rig.memory.at(status), std::byte{kBlkSOk});
}

TEST(BlkQueueMalformed, the_same_head_twice_breaks_the_ring_and_harms_nobody) {
  Rig rig;
  rig.node.hold = true;
  const std::uint64_t data = rig.queue_request(kBlkTIn, 0, {}, 512);
  rig.ring->make_available(0);
  rig.run();
  EXPECT_TRUE(rig.queue->broken());
  EXPECT_EQ(rig.error.take(), 1U);
  EXPECT_EQ(rig.queue->in_flight(), 1U);
  rig.node.release(*rig.context);
  rig.run();
  EXPECT_EQ(rig.ring->take_used(), (std::vector<Used>{{0, 513}})) << "the first still completes";
  EXPECT_EQ(*rig.memory.at(data + 512), std::byte{kBlkSOk});
}

// --- Start, notifications, stop ------------------------------------------------------------------

TEST(BlkQueueStart, refuses_rings_that_are_not_in_memory_or_not_aligned) {
  Rig rig;
  const auto refused = [&](auto change) {
    BlkQueueSetup setup = rig.ring->setup();
    change(setup);
    const auto queue = BlkQueue::start(*rig.device, *rig.context, rig.memory.shared(), setup);
    return !queue && queue.error().kind == ErrorKind::kInvalidArgument;
  };
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.size = 0; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.size = 3; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.size = 2048; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.descriptor_address = 0; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.avail_address = ~std::uint64_t{0}; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.descriptor_address += 8; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.avail_address += 1; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) { s.used_address += 2; }));
  EXPECT_TRUE(refused([](BlkQueueSetup& s) {
    s.used_address = testing::kUserBase + 2 * testing::kRegionBytes - 64;
  })) << "its end lies outside";
}

TEST(BlkQueueStart, goes_on_where_the_ring_stands_and_over_the_end_of_the_index) {
  for (const std::uint16_t start : std::to_array<std::uint16_t>({0, 5, 65530})) {
    Rig rig({.size = 8, .start_index = start});
    for (int i = 0; i < 20; ++i) {
      ASSERT_EQ(rig.request(kBlkTFlush, 0).used.size(), 1U);
      ASSERT_EQ(rig.queue->next_avail(), static_cast<std::uint16_t>(start + i + 1));
      ASSERT_EQ(rig.ring->used_index(), static_cast<std::uint16_t>(start + i + 1));
    }
  }
}

TEST(BlkQueueNotification, without_event_index_the_flags_suppress_and_ask) {
  Rig rig;
  rig.ring->set_avail_event(0xabcd);
  EXPECT_EQ(rig.ring->used_flags(), kUsedFNoNotify) << "awake: no kicks are wanted";
  EXPECT_TRUE(rig.queue->prepare_to_sleep());
  EXPECT_EQ(rig.ring->used_flags(), 0U);
  rig.queue->wake_up();
  EXPECT_EQ(rig.ring->used_flags(), kUsedFNoNotify);
  rig.queue_request(kBlkTFlush, 0);
  EXPECT_FALSE(rig.queue->prepare_to_sleep()) << "there is work already";
  rig.queue->wake_up();
  rig.run();
  EXPECT_EQ(rig.call.take(), 1U);
  rig.ring->set_avail_flags(kAvailFNoInterrupt);
  rig.request(kBlkTFlush, 0);
  EXPECT_EQ(rig.call.take(), 0U);
  EXPECT_EQ(rig.ring->avail_event(), 0xabcd) << "avail_event is not ours without EVENT_IDX";
  EXPECT_EQ(rig.queue->statistics().interrupts, 1U);
}

TEST(BlkQueueNotification, with_event_index_a_kick_is_asked_for_at_the_next_entry) {
  Rig rig({.features = testing::kUsualFeatures | feature_bit(kFEventIdx), .start_index = 65534});
  EXPECT_EQ(rig.ring->used_flags(), 0U);
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(rig.queue->prepare_to_sleep());
    EXPECT_EQ(rig.ring->avail_event(), static_cast<std::uint16_t>(65534 + i));
    rig.queue->wake_up();
    EXPECT_EQ(rig.ring->used_flags(), 0U);
    rig.request(kBlkTFlush, 0);
  }
  rig.queue_request(kBlkTFlush, 0);
  EXPECT_FALSE(rig.queue->prepare_to_sleep());
  rig.run();
}

TEST(BlkQueueNotification, with_event_index_an_interrupt_comes_when_used_event_is_passed) {
  for (const std::uint16_t start : std::to_array<std::uint16_t>({0, 65533})) {
    Rig rig({.features = testing::kUsualFeatures | feature_bit(kFEventIdx), .start_index = start});
    rig.ring->set_used_event(static_cast<std::uint16_t>(start - 1));
    rig.request(kBlkTFlush, 0);  // index start
    EXPECT_EQ(rig.call.take(), 1U) << "the first is always sent: a predecessor may owe it";
    rig.ring->set_used_event(static_cast<std::uint16_t>(start + 3));
    rig.request(kBlkTFlush, 0);
    rig.request(kBlkTFlush, 0);
    EXPECT_EQ(rig.call.take(), 0U);
    rig.request(kBlkTFlush, 0);  // index start + 3
    EXPECT_EQ(rig.call.take(), 1U);
    rig.request(kBlkTFlush, 0);
    EXPECT_EQ(rig.call.take(), 0U);
  }
}

TEST(BlkQueueNotification, a_batch_is_published_at_once_with_one_interrupt) {
  for (const std::uint64_t extra : {std::uint64_t{0}, feature_bit(kFEventIdx)}) {
    Rig rig({.features = testing::kUsualFeatures | extra});
    rig.node.hold = true;
    for (std::uint16_t i = 0; i < 10; ++i)
      rig.queue_request(kBlkTIn, i, {}, 512, static_cast<std::uint16_t>(3 * i));
    rig.run();
    rig.node.release(*rig.context);
    rig.context->poll();
    EXPECT_EQ(rig.ring->used_index(), 0U) << "published before the end of the cycle";
    rig.queue->settle();
    EXPECT_EQ(rig.ring->used_index(), 10U);
    EXPECT_EQ(rig.call.take(), 1U);
  }
}

TEST(BlkQueueNotification, without_a_kick_descriptor_the_loop_may_not_sleep) {
  Rig rig({.with_kick = false});
  EXPECT_FALSE(rig.queue->prepare_to_sleep());
  EXPECT_EQ(rig.request(kBlkTFlush, 0).status, kBlkSOk);
}

TEST(BlkQueueNotification, a_kick_descriptor_that_cannot_be_waited_on_breaks_the_ring) {
  for (const char* const path : {"/proc/self/exe", "/dev/zero"}) {
    Rig rig;
    const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
    ASSERT_GE(fd, 0);
    rig.queue->set_kick_fd(fd);
    EXPECT_TRUE(rig.queue->broken()) << path;
    EXPECT_EQ(rig.error.take(), 1U);
    ::close(fd);
  }
}

TEST(BlkQueueNotification, a_full_call_descriptor_blocks_nobody) {
  Rig rig;
  const int fd = ::eventfd(0, EFD_CLOEXEC);  // blocking
  const std::uint64_t almost_full = 0xffff'ffff'ffff'fffe;
  ASSERT_EQ(::write(fd, &almost_full, sizeof almost_full), 8);
  rig.queue->set_call_fd(fd);
  EXPECT_EQ(rig.request(kBlkTFlush, 0).status, kBlkSOk);
  std::array<int, 2> pipe_ends{};
  ASSERT_EQ(::pipe2(pipe_ends.data(), O_CLOEXEC), 0);
  rig.queue->set_call_fd(pipe_ends[1]);
  for (int i = 0; i < 10000; ++i) rig.request(kBlkTFlush, 0);  // 80 kB into a pipe of 64
  rig.queue->set_call_fd(-1);
  EXPECT_EQ(rig.request(kBlkTFlush, 0).status, kBlkSOk);
  for (const int end : {fd, pipe_ends[0], pipe_ends[1]}) ::close(end);
}

TEST(BlkQueueFairness, one_poll_takes_a_bounded_number_of_chains) {
  Rig rig({.size = 1024});
  rig.node.hold = true;
  const std::uint64_t head = rig.place(header(kBlkTFlush, 0));
  const std::uint64_t status = rig.allocate(512);
  for (std::uint16_t i = 0; i < 512; ++i)
    rig.submit({{head, 16}, {status + i, 1, true}}, static_cast<std::uint16_t>(2 * i));
  EXPECT_TRUE(rig.queue->poll());
  EXPECT_LT(rig.queue->in_flight(), 512U);
  rig.run();
  EXPECT_EQ(rig.queue->in_flight(), 512U);
}

// On a loop of its own thread, driven by kicks only.
class RunningRig : public ::testing::Test {
 protected:
  void SetUp() override {
    thread_ = std::thread([this] { rig.loop.run(); });
  }
  void TearDown() override {
    rig.loop.stop();
    thread_.join();
  }
  void kick() const {
    const std::uint64_t one = 1;
    ASSERT_EQ(::write(rig.kick.fd(), &one, sizeof one), 8);
  }
  template <typename Condition>
  static void wait_for(Condition condition) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!condition() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    ASSERT_TRUE(condition());
  }
  Rig rig;
  std::thread thread_;
};

TEST_F(RunningRig, is_woken_by_kicks_and_interrupts_each_time) {
  const std::uint64_t head = rig.place(header(kBlkTFlush, 0));
  const std::uint64_t status = rig.allocate(1);
  for (std::uint16_t i = 1; i <= 2000; ++i) {
    rig.submit({{head, 16}, {status, 1, true}});
    kick();
    wait_for([&] { return rig.ring->used_index() == i; });
  }
}

TEST_F(RunningRig, stop_waits_for_what_is_in_flight_and_leaves_the_ring_alone) {
  rig.loop.run_and_wait([&] { rig.node.hold = true; });
  rig.queue_request(kBlkTIn, 0, {}, 512);
  kick();
  wait_for([&] {
    std::size_t held = 0;
    rig.loop.run_and_wait([&] { held = rig.node.held.size(); });
    return held == 1;
  });
  std::atomic<bool> stopped{false};
  rig.loop.run_and_wait(
      [&] { rig.queue->stop(BlkQueue::Unfinished::kLeave, [&] { stopped = true; }); });
  rig.loop.run_and_wait([] {});
  EXPECT_FALSE(stopped.load()) << "a request is in flight";
  rig.loop.run_and_wait([&] { rig.node.release(*rig.context); });
  wait_for([&] { return stopped.load(); });
  EXPECT_EQ(rig.ring->used_index(), 1U);
  EXPECT_EQ(rig.queue->next_avail(), 1U);
  EXPECT_EQ(rig.ring->used_flags(), 0U) << "the next owner may need a kick";
  // New entries stay for whoever comes next.
  rig.submit({{Rig::kBuffers, 16}, {Rig::kBuffers + 600, 1, true}}, 10);
  kick();
  rig.loop.run_and_wait([&] {
    rig.queue->wake_up();
    EXPECT_FALSE(rig.queue->poll());
  });
  EXPECT_EQ(rig.queue->next_avail(), 1U);
  EXPECT_EQ(rig.ring->used_flags(), 0U);
}

TEST_F(RunningRig, a_queue_may_be_destroyed_from_its_stopped_callback) {
  std::atomic<bool> gone{false};
  rig.loop.run_and_wait([&] {
    rig.queue->stop(BlkQueue::Unfinished::kLeave, [&] {
      rig.queue.reset();
      rig.start({});
      gone = true;
    });
  });
  wait_for([&] { return gone.load(); });
}

TEST_F(RunningRig, a_kick_pipe_that_is_closed_does_not_spin) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC | O_NONBLOCK), 0);
  rig.loop.run_and_wait([&] { rig.queue->set_kick_fd(ends[0]); });
  ::close(ends[1]);
  std::uint64_t kicks = 0;
  for (int i = 0; i < 50; ++i) {
    rig.loop.run_and_wait([&] { kicks = rig.queue->statistics().kicks; });
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_LE(kicks, 1U);
  rig.loop.run_and_wait([&] { rig.queue->set_kick_fd(rig.kick.fd()); });
  ::close(ends[0]);
}

}  // namespace
}  // namespace vblk::virtio
