// Block requests: what they do and what they are answered.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/test.h"

namespace vblk::conform {

using namespace virtio;

namespace {

constexpr std::uint64_t kTestSector = 2048;
constexpr std::uint32_t kBlockSectors = kDefaultBlock / kSectorBytes;
constexpr std::uint64_t kStamp = 0x51;

// Writes blocks [0, count) at the test's place, each of a stamp of its own.
void write_blocks(Guest& guest, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) {
    guest.fill(kDefaultBlock, kStamp + 1000 * i);
    guest.must_write(kTestSector + i * kBlockSectors, kDefaultBlock);
  }
}

// Whether block `i` still is what write_blocks() has made it.
void expect_block(Guest& guest, std::uint32_t i, const char* after_what) {
  guest.must_read(kTestSector + i * kBlockSectors, kDefaultBlock);
  const auto wrong = guest.differs(kDefaultBlock, kStamp + 1000 * i);
  Probe::expect(!wrong, fmt::format("{}: byte {} of block {}, which was not meant, has changed",
                                    after_what, wrong.value_or(0), i));
}

void expect_zeroes(Guest& guest, std::uint64_t sector, std::size_t bytes) {
  const std::size_t at_once = std::min<std::uint64_t>(kDefaultBlock, guest.limits().segment_bytes) /
                              kSectorBytes * kSectorBytes;
  Probe::expect(at_once > 0, "size_max is less than a sector");
  for (std::size_t at = 0; at < bytes; at += at_once) {
    const std::size_t length = std::min(at_once, bytes - at);
    guest.fill(length, 3);
    guest.must_read(sector + at / kSectorBytes, length);
    const auto data = guest.data().first(length);
    const auto found =
        std::ranges::find_if(data, [](std::byte byte) { return byte != std::byte{0}; });
    const auto wrong = at + static_cast<std::size_t>(found - data.begin());
    Probe::expect(found == data.end(),
                  fmt::format("byte {} behind sector {} is not 0", wrong, sector));
  }
}

void reads_what_was_written(Probe& probe) {
  Guest guest(probe);
  std::uint64_t sector = kTestSector;
  for (const std::size_t bytes : std::to_array<std::size_t>({1, 2, 3, 8, 16, 64})) {
    const std::size_t length = bytes * kDefaultBlock;
    if (length > guest.limits().segment_bytes) break;
    guest.fill(length, kStamp + bytes);
    guest.must_write(sector, length);
    std::ranges::fill(guest.data(), std::byte{0});
    guest.must_read(sector, length);
    guest.expect_data(length, kStamp + bytes, fmt::format("{}", length));
    sector += length / kSectorBytes;
  }
}

void queues_see_one_disk(Probe& probe) {
  need_queues(probe, 2);
  Guest guest(probe, {.queue_count = 2});
  for (std::uint64_t i = 0; i < 50; ++i) {
    guest.fill(kDefaultBlock, i);
    guest.must_write(kTestSector, kDefaultBlock, i % 2);
    std::ranges::fill(guest.data(), std::byte{0});
    guest.must_read(kTestSector, kDefaultBlock, (i + 1) % 2);
    Probe::expect(
        !guest.differs(kDefaultBlock, i),
        fmt::format("queue {} does not read what queue {} has written", (i + 1) % 2, i % 2));
  }
}

void sectors_are_512_bytes(Probe& probe) {
  Guest guest(probe);
  const std::size_t block = guest.block_bytes();
  guest.fill(4 * block, kStamp);
  guest.must_write(kTestSector, 4 * block);
  const Bytes written(guest.data().begin(), guest.data().begin() + static_cast<long>(4 * block));
  for (std::size_t i = 0; i < 4; ++i) {
    guest.must_read(kTestSector + i * block / kSectorBytes, block);
    Probe::expect(
        std::equal(guest.data().begin(), guest.data().begin() + static_cast<long>(block),
                   written.begin() + static_cast<long>(i * block)),
        fmt::format("sector {} is not at its place in units of 512 bytes", i * block / 512));
  }
}

void expect_status(const Answer& answer, std::uint8_t wanted, std::string_view what) {
  Probe::expect(answer.status == wanted,
                fmt::format("{} has status {} instead of {}", what, answer.status, wanted));
}

std::vector<std::pair<std::uint64_t, std::size_t>> ranges_beyond(std::uint64_t capacity) {
  return {{capacity, kDefaultBlock},
          {capacity - kBlockSectors, 2 * kDefaultBlock},
          {capacity + 1'000'000, kDefaultBlock},
          {std::uint64_t{1} << 55, kDefaultBlock},  // times 512 does not fit 64 bits
          {std::uint64_t{1} << 63, kDefaultBlock},
          {~std::uint64_t{0} - 7, kDefaultBlock},
          {~std::uint64_t{0}, kDefaultBlock}};
}

void reads_beyond_fail(Probe& probe) {
  Guest guest(probe);
  for (const auto& [sector, bytes] : ranges_beyond(guest.capacity_sectors()))
    expect_status(guest.read(sector, bytes), kBlkSIoErr,
                  fmt::format("a read of {} bytes at sector {}", bytes, sector));
}

void writes_beyond_fail(Probe& probe) {
  Guest guest(probe);
  const std::uint64_t capacity = guest.capacity_sectors();
  const std::uint64_t last = capacity - kBlockSectors;
  guest.fill(kDefaultBlock, kStamp);
  guest.must_write(last, kDefaultBlock);
  guest.must_write(0, kDefaultBlock);
  for (const auto& [sector, bytes] : ranges_beyond(capacity)) {
    guest.fill(bytes, 99);
    expect_status(guest.write(sector, bytes), kBlkSIoErr,
                  fmt::format("a write of {} bytes at sector {}", bytes, sector));
  }
  for (const std::uint64_t sector : {last, std::uint64_t{0}}) {
    guest.must_read(sector, kDefaultBlock);
    Probe::expect(!guest.differs(kDefaultBlock, kStamp),
                  fmt::format("a write beyond the end has changed sector {}", sector));
  }
  const std::uint64_t after = guest.capacity_sectors();
  Probe::expect(after == capacity,
                fmt::format("a write beyond the end has made the disk {} sectors", after));
}

void odd_lengths_fail(Probe& probe) {
  Guest guest(probe);
  for (const std::size_t bytes : std::to_array<std::size_t>({1, 511, 513, 1000})) {
    const Answer answer = guest.read(0, bytes);
    Probe::expect(answer.status != kBlkSOk, fmt::format("a read of {} bytes has status 0", bytes));
  }
}

void unknown_types_are_unsupported(Probe& probe) {
  Guest guest(probe);
  for (const std::uint32_t type : {6U, 7U, 9U, 12U, 29U, 100U, 0x1000U, 0x7fff'fffeU}) {
    expect_status(guest.request(type, 0, {}, guest.data().first(kDefaultBlock)), kBlkSUnsupp,
                  fmt::format("a request of type {} with data to be written", type));
    expect_status(guest.request(type, 0, guest.data().first(kDefaultBlock), {}), kBlkSUnsupp,
                  fmt::format("a request of type {} with data", type));
    expect_status(guest.request(type, 0, {}, {}), kBlkSUnsupp,
                  fmt::format("a request of type {} without data", type));
  }
}

void zone_requests_are_unsupported(Probe& probe) {
  constexpr unsigned kZoned = 17;  // VIRTIO_BLK_F_ZONED
  Guest guest(probe);
  if ((guest.channel().offered() & bit(kZoned)) != 0)
    Probe::skip("ZONED is offered: this suite knows no zones");
  for (const std::uint32_t type : {15U, 16U, 18U, 20U, 22U, 24U, 26U}) {
    expect_status(guest.request(type, 0, {}, guest.data().first(kDefaultBlock)), kBlkSUnsupp,
                  fmt::format("a zone request of type {}", type));
  }
}

void erase_and_lifetime_are_unsupported(Probe& probe) {
  constexpr std::uint32_t kGetLifetime = 10;
  constexpr std::uint32_t kSecureErase = 14;
  constexpr unsigned kLifetimeFeature = 15;     // VIRTIO_BLK_F_LIFETIME
  constexpr unsigned kSecureEraseFeature = 16;  // VIRTIO_BLK_F_SECURE_ERASE
  Guest guest(probe);
  const auto is_offered = [&](unsigned feature) {
    return (guest.channel().offered() & bit(feature)) != 0;
  };
  if (is_offered(kLifetimeFeature) && is_offered(kSecureEraseFeature))
    Probe::skip("LIFETIME and SECURE_ERASE are offered");
  if (!is_offered(kLifetimeFeature)) {
    expect_status(guest.request(kGetLifetime, 0, {}, guest.data().first(6)), kBlkSUnsupp,
                  "GET_LIFETIME, not offered");
  }
  const Segment segment{kTestSector, kBlockSectors, 0};
  if (!is_offered(kSecureEraseFeature)) {
    expect_status(guest.segments(kSecureErase, {&segment, 1}), kBlkSUnsupp,
                  "SECURE_ERASE, not offered");
  }
}

void id_is_told(Probe& probe) {
  Guest guest(probe);
  const auto data = guest.data().first(kBlkIdBytes + 12);
  std::ranges::fill(data, std::byte{0xa7});
  const Answer answer = guest.request(kBlkTGetId, 0, {}, data.first(kBlkIdBytes));
  if (answer.status == kBlkSUnsupp) Probe::skip("the backend has no GET_ID");
  expect_status(answer, kBlkSOk, "GET_ID");
  bool ended = false;
  for (std::size_t i = 0; i < kBlkIdBytes; ++i) {
    const auto c = std::to_integer<unsigned>(data[i]);
    Probe::expect(!ended || c == 0,
                  fmt::format("byte {} of the ID, behind its end, is {:#x}", i, c));
    Probe::expect(c < 0x80, fmt::format("byte {} of the ID is {:#x}", i, c));
    ended = ended || c == 0;
  }
  for (std::size_t i = kBlkIdBytes; i < data.size(); ++i)
    Probe::expect(data[i] == std::byte{0xa7}, "more than 20 bytes of ID are written");
}

void flush_is_answered(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFFlush, "FLUSH");
  guest.must_flush();
  if (probe.options().target.may_write) guest.must_write(kTestSector, kDefaultBlock);
  guest.must_flush();
  guest.must_flush();
}

void reserved_field_is_ignored(Probe& probe) {
  Guest guest(probe);
  for (const std::uint8_t value : std::to_array<std::uint8_t>({1, 0xff})) {
    guest.write_request(0, 0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
    std::memset(guest.header_of(0, 0) + 4, value, 4);
    guest.offer(0, 0);
    guest.ring().kick();
    expect_status(guest.await(0, 0), kBlkSOk, "a read whose reserved field is not 0");
  }
}

void large_requests_work(Probe& probe) {
  Guest guest(probe);
  const std::size_t bytes =
      std::min<std::uint64_t>(guest.data().size(), guest.limits().segment_bytes) / kDefaultBlock *
      kDefaultBlock;
  if (bytes == 0) Probe::skip("size_max is less than 4096");
  guest.fill(bytes, kStamp);
  guest.must_write(kTestSector, bytes);
  std::ranges::fill(guest.data(), std::byte{0});
  guest.must_read(kTestSector, bytes);
  guest.expect_data(bytes, kStamp, fmt::format("{}", bytes));
}

void empty_transfers_are_answered(Probe& probe) {
  Guest guest(probe);
  const Answer answer = guest.request(kBlkTIn, 0, {}, {});
  Probe::expect(answer.status <= kBlkSUnsupp,
                fmt::format("an empty read has status {}", answer.status));
}

// ---- Discard and write zeroes

void discard_hits_its_range(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFDiscard, "DISCARD");
  write_blocks(guest, 48);
  const Segment segment{kTestSector + 16 * kBlockSectors, 16 * kBlockSectors, 0};
  expect_status(guest.segments(kBlkTDiscard, {&segment, 1}), kBlkSOk, "a discard of 64 KiB");
  for (std::uint32_t i = 0; i < 48; ++i) {
    if (i < 16 || i >= 32) expect_block(guest, i, "after a discard");
  }
}

void unknown_flags_are_unsupported(Probe& probe, std::uint32_t type, std::uint32_t flags) {
  Guest guest(probe);
  need_feature(guest, type == kBlkTDiscard ? kBlkFDiscard : kBlkFWriteZeroes,
               type == kBlkTDiscard ? "DISCARD" : "WRITE_ZEROES");
  write_blocks(guest, 4);
  const Segment segment{kTestSector + kBlockSectors, kBlockSectors, flags};
  expect_status(guest.segments(type, {&segment, 1}), kBlkSUnsupp,
                fmt::format("flags {:#x}", flags));
  for (std::uint32_t i = 0; i < 4; ++i) expect_block(guest, i, "after a refused request");
}

void discard_unmap_is_unsupported(Probe& probe) {
  unknown_flags_are_unsupported(probe, kBlkTDiscard, 1);
}
void discard_flags_are_unsupported(Probe& probe) {
  unknown_flags_are_unsupported(probe, kBlkTDiscard, 2);
  unknown_flags_are_unsupported(probe, kBlkTDiscard, 0x8000'0000U);
}
void write_zeroes_flags_are_unsupported(Probe& probe) {
  unknown_flags_are_unsupported(probe, kBlkTWriteZeroes, 2);
  unknown_flags_are_unsupported(probe, kBlkTWriteZeroes, 0x8000'0001U);
}

void ranges_beyond_fail(Probe& probe, std::uint32_t type) {
  Guest guest(probe);
  need_feature(guest, type == kBlkTDiscard ? kBlkFDiscard : kBlkFWriteZeroes,
               type == kBlkTDiscard ? "DISCARD" : "WRITE_ZEROES");
  const std::uint64_t capacity = guest.capacity_sectors();
  guest.fill(kDefaultBlock, kStamp);
  guest.must_write(0, kDefaultBlock);
  for (const auto& [sector, bytes] : ranges_beyond(capacity)) {
    const Segment segment{sector, static_cast<std::uint32_t>(bytes / kSectorBytes), 0};
    const Answer answer = guest.segments(type, {&segment, 1});
    Probe::expect(answer.status != kBlkSOk,
                  fmt::format("{} sectors at {} have status 0", segment.sector_count, sector));
  }
  guest.must_read(0, kDefaultBlock);
  Probe::expect(!guest.differs(kDefaultBlock, kStamp),
                "a request beyond the end has changed sector 0");
}
void discard_beyond_fails(Probe& probe) { ranges_beyond_fail(probe, kBlkTDiscard); }
void write_zeroes_beyond_fails(Probe& probe) { ranges_beyond_fail(probe, kBlkTWriteZeroes); }

void write_zeroes_zeroes(Probe& probe, std::uint32_t flags) {
  Guest guest(probe);
  need_feature(guest, kBlkFWriteZeroes, "WRITE_ZEROES");
  for (const std::uint32_t count : {1U, 3U, 16U, 20U}) {
    write_blocks(guest, 24);
    const Segment segment{kTestSector + 2 * kBlockSectors, count * kBlockSectors, flags};
    expect_status(guest.segments(kBlkTWriteZeroes, {&segment, 1}), kBlkSOk,
                  fmt::format("write zeroes of {} KiB", count * 4));
    expect_zeroes(guest, segment.sector, count * kDefaultBlock);
    for (const std::uint32_t i : {0U, 1U, 2 + count, 23U})
      expect_block(guest, i, "after write zeroes");
  }
}
void write_zeroes_keeps(Probe& probe) { write_zeroes_zeroes(probe, 0); }
void write_zeroes_unmaps(Probe& probe) { write_zeroes_zeroes(probe, kBlkWriteZeroesFlagUnmap); }

void small_write_zeroes(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFWriteZeroes, "WRITE_ZEROES");
  const std::size_t block = guest.block_bytes();
  const auto sectors = static_cast<std::uint32_t>(block / kSectorBytes);
  guest.fill(8 * block, kStamp);
  guest.must_write(kTestSector, 8 * block);
  const Bytes before(guest.data().begin(), guest.data().begin() + static_cast<long>(8 * block));
  const Segment segment{kTestSector + 3 * sectors, sectors, 0};
  expect_status(guest.segments(kBlkTWriteZeroes, {&segment, 1}), kBlkSOk,
                "write zeroes of one block");
  expect_zeroes(guest, segment.sector, block);
  guest.must_read(kTestSector, 8 * block);
  const auto same = [&](std::size_t from, std::size_t to) {
    return std::equal(before.begin() + static_cast<long>(from * block),
                      before.begin() + static_cast<long>(to * block),
                      guest.data().begin() + static_cast<long>(from * block));
  };
  Probe::expect(same(0, 3) && same(4, 8), "blocks beside the one that was zeroed have changed");
}

// As many segments as are announced, every second block.
void segments_are_taken(Probe& probe, std::uint32_t type) {
  Guest guest(probe);
  const bool zeroes = type == kBlkTWriteZeroes;
  need_feature(guest, zeroes ? kBlkFWriteZeroes : kBlkFDiscard,
               zeroes ? "WRITE_ZEROES" : "DISCARD");
  const std::uint64_t most =
      guest.config_field(zeroes ? kBlkConfigMaxWriteZeroesSeg : kBlkConfigMaxDiscardSeg, 4);
  const auto count = static_cast<std::uint32_t>(std::min<std::uint64_t>(most, 32));
  if (count == 0) Probe::skip("the backend says that it takes no segments at all");
  write_blocks(guest, 2 * count + 1);
  std::vector<Segment> list;
  for (std::uint32_t i = 0; i < count; ++i)
    list.push_back({kTestSector + (2 * i + 1) * kBlockSectors, kBlockSectors, 0});
  expect_status(guest.segments(type, list), kBlkSOk,
                fmt::format("{} segments of at most {}", count, most));
  for (std::uint32_t i = 0; i <= count; ++i) {
    expect_block(guest, 2 * i, "after a request of several segments");
    if (zeroes && i < count)
      expect_zeroes(guest, kTestSector + (2 * i + 1) * kBlockSectors, kDefaultBlock);
  }
}
void discard_segments_are_taken(Probe& probe) { segments_are_taken(probe, kBlkTDiscard); }
void write_zeroes_segments_are_taken(Probe& probe) { segments_are_taken(probe, kBlkTWriteZeroes); }

void whole_disk_write_zeroes(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFWriteZeroes, "WRITE_ZEROES");
  const std::uint64_t capacity = guest.capacity_sectors();
  const auto most =
      static_cast<std::uint32_t>(std::min(guest.limits().write_zeroes_sectors, capacity));
  if (most < kBlockSectors) Probe::skip(fmt::format("max_write_zeroes_sectors is {}", most));
  write_blocks(guest, 8);
  const std::uint32_t sectors = most / kBlockSectors * kBlockSectors;
  const Segment segment{0, sectors, kBlkWriteZeroesFlagUnmap};
  expect_status(
      guest.segments(kBlkTWriteZeroes, {&segment, 1}), kBlkSOk,
      fmt::format("write zeroes of {} sectors, with max_write_zeroes_sectors above", sectors));
  if (sectors >= kTestSector + 8 * kBlockSectors)
    expect_zeroes(guest, kTestSector, 8 * kDefaultBlock);
}

void torn_segments_fail(Probe& probe) {
  Guest guest(probe);
  for (const auto& [type, feature] :
       {std::pair{kBlkTDiscard, kBlkFDiscard}, std::pair{kBlkTWriteZeroes, kBlkFWriteZeroes}}) {
    if (!guest.has(feature)) continue;
    for (const std::size_t bytes :
         {std::size_t{0}, std::size_t{1}, std::size_t{15}, std::size_t{17}}) {
      std::ranges::fill(guest.data().first(32), std::byte{0});
      const Answer answer = guest.request(type, 0, guest.data().first(bytes), {});
      Probe::expect(
          answer.status != kBlkSOk,
          fmt::format("a request of type {} with {} bytes of segments has status 0", type, bytes));
    }
  }
}

// ---- Read-only disks

void read_only_refuses(Probe& probe) {
  if (probe.has_own_backend()) probe.use_read_only();
  Guest guest(probe);
  if (!guest.has(kBlkFRo)) Probe::skip("the disk can be written");
  guest.must_read(kTestSector, kDefaultBlock);
  const Bytes before(guest.data().begin(), guest.data().begin() + kDefaultBlock);
  guest.fill(kDefaultBlock, 1);
  expect_status(guest.write(kTestSector, kDefaultBlock), kBlkSIoErr, "a write to a read-only disk");
  const Segment segment{kTestSector, kBlockSectors, 0};
  for (const std::uint32_t type : {kBlkTDiscard, kBlkTWriteZeroes}) {
    const Answer answer = guest.segments(type, {&segment, 1});
    Probe::expect(answer.status != kBlkSOk,
                  fmt::format("a request of type {} to a read-only disk has status 0", type));
  }
  guest.must_read(kTestSector, kDefaultBlock);
  Probe::expect(std::equal(before.begin(), before.end(), guest.data().begin()),
                "a read-only disk has changed");
}

void read_only_is_offered(Probe& probe) {
  if (!probe.has_own_backend()) Probe::skip("it is not known whether the disk is read-only");
  probe.use_read_only();
  Guest guest(probe);
  Probe::expect(guest.has(kBlkFRo), "VIRTIO_BLK_F_RO is not offered for a read-only disk");
}

void read_only_flushes(Probe& probe) {
  if (probe.has_own_backend()) probe.use_read_only();
  Guest guest(probe);
  if (!guest.has(kBlkFRo)) Probe::skip("the disk can be written");
  need_feature(guest, kBlkFFlush, "FLUSH");
  guest.must_flush();
}

constexpr const char* kOperation = "Block Device / Device Operation";
constexpr const char* kInit = "Block Device / Device Initialization";

constexpr std::array kTests{
    Test{"request/read-write",
         {kVirtio, kOperation, Force::kStates, "what was written is read"},
         reads_what_was_written,
         true},
    Test{"request/two-queues",
         {kVirtio, "Block Device / Virtqueues", Force::kStates,
          "what one queue has written, another reads"},
         queues_see_one_disk,
         true},
    Test{"request/sector-unit",
         {kVirtio, kInit, Force::kStates, "sector counts 512 bytes, whatever blk_size is"},
         sectors_are_512_bytes,
         true},
    Test{"request/large",
         {kVirtio, kOperation, Force::kRobust, "a request of 1 MiB, or of size_max, works"},
         large_requests_work,
         true},
    Test{"request/read-beyond-end",
         {kVirtio, kOperation, Force::kStates,
          "a read that leaves the disk has status IOERR, also where its offset overflows"},
         reads_beyond_fail},
    Test{"request/write-beyond-end",
         {kVirtio, kOperation, Force::kStates,
          "a write that leaves the disk has status IOERR and writes nothing"},
         writes_beyond_fail,
         true},
    Test{"request/odd-length",
         {kVirtio, kOperation, Force::kRobust,
          "data that is no multiple of 512 bytes is not answered as success"},
         odd_lengths_fail},
    Test{"request/empty",
         {kVirtio, kOperation, Force::kRobust, "a read without data is answered"},
         empty_transfers_are_answered},
    Test{"request/unknown-type",
         {kVirtio, kOperation, Force::kStates, "a request that is not supported has status UNSUPP"},
         unknown_types_are_unsupported,
         true},
    Test{"request/zone-types",
         {kVirtio13, kOperation, Force::kMust, "without ZONED, zone requests have status UNSUPP"},
         zone_requests_are_unsupported,
         true},
    Test{"request/erase-and-lifetime",
         {kVirtio, kOperation, Force::kStates,
          "GET_LIFETIME and SECURE_ERASE that are not offered have status UNSUPP"},
         erase_and_lifetime_are_unsupported,
         true},
    Test{"request/get-id",
         {kVirtio, kOperation, Force::kStates,
          "GET_ID brings an ASCII string of up to 20 bytes, padded with NUL"},
         id_is_told},
    Test{"request/flush",
         {kVirtio, kOperation, Force::kStates, "FLUSH that is offered is answered with OK"},
         flush_is_answered},
    Test{"request/reserved-field",
         {kVirtio, kOperation, Force::kRobust, "the header's reserved field is ignored"},
         reserved_field_is_ignored},
    Test{"request/discard",
         {kVirtio, kOperation, Force::kStates, "a discard touches its range alone"},
         discard_hits_its_range,
         true},
    Test{"request/discard-segments",
         {kVirtio, kOperation, Force::kStates, "a discard may have max_discard_seg segments"},
         discard_segments_are_taken,
         true},
    Test{"request/discard-unmap",
         {kVirtio, kOperation, Force::kMust, "a discard with the unmap flag has status UNSUPP"},
         discard_unmap_is_unsupported,
         true},
    Test{"request/discard-flags",
         {kVirtio, kOperation, Force::kMust, "a discard with an unknown flag has status UNSUPP"},
         discard_flags_are_unsupported,
         true},
    Test{"request/discard-beyond-end",
         {kVirtio, kOperation, Force::kRobust, "a discard that leaves the disk does not succeed"},
         discard_beyond_fails,
         true},
    Test{"request/write-zeroes",
         {kVirtio, kOperation, Force::kMust,
          "after write zeroes its range reads as zeroes, and nothing else has changed"},
         write_zeroes_keeps,
         true},
    Test{"request/write-zeroes-unmap",
         {kVirtio, kOperation, Force::kMust, "the same with the unmap flag"},
         write_zeroes_unmaps,
         true},
    Test{"request/write-zeroes-small",
         {kVirtio, kOperation, Force::kMust, "the same of a single logical block"},
         small_write_zeroes,
         true},
    Test{"request/write-zeroes-segments",
         {kVirtio, kOperation, Force::kStates,
          "write zeroes may have max_write_zeroes_seg segments"},
         write_zeroes_segments_are_taken,
         true},
    Test{"request/write-zeroes-large",
         {kVirtio, kOperation, Force::kStates,
          "write zeroes may be as long as max_write_zeroes_sectors"},
         whole_disk_write_zeroes,
         true},
    Test{"request/write-zeroes-flags",
         {kVirtio, kOperation, Force::kMust, "write zeroes with an unknown flag has status UNSUPP"},
         write_zeroes_flags_are_unsupported,
         true},
    Test{
        "request/write-zeroes-beyond-end",
        {kVirtio, kOperation, Force::kRobust, "write zeroes that leaves the disk does not succeed"},
        write_zeroes_beyond_fails,
        true},
    Test{"request/torn-segments",
         {kVirtio, kOperation, Force::kRobust,
          "segments that are not whole are not answered as success"},
         torn_segments_fail,
         true},
    Test{"request/read-only",
         {kVirtio, kOperation, Force::kMust,
          "with VIRTIO_BLK_F_RO a write has status IOERR, and nothing is written"},
         read_only_refuses,
         true},
    Test{"request/read-only-offered",
         {kVirtio, "Block Device / Feature bits", Force::kStates,
          "a disk that cannot be written offers VIRTIO_BLK_F_RO"},
         read_only_is_offered},
    Test{"request/read-only-flush",
         {kVirtio, kOperation, Force::kRobust, "a read-only disk that offers FLUSH takes it"},
         read_only_flushes},
};

}  // namespace

std::span<const Test> request_tests() { return kTests; }

}  // namespace vblk::conform
