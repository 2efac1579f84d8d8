// Cutting requests into pieces that O_DIRECT takes, and walking their iovecs.
#include "blockdev/alignment.h"

#include <cstdint>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/seed.h"

namespace vblk::blockdev {
namespace {

constexpr AlignmentRules kBlocks{.offset_bytes = 4096, .memory_bytes = 512, .direct_end = 40960};

void* at(std::uintptr_t address) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): only the address counts, nothing is there
  return reinterpret_cast<void*>(address);
}

TEST(Alignment, a_transfer_fits_the_file_if_offset_and_length_are_whole_blocks_before_its_end) {
  EXPECT_TRUE(fits_file(kBlocks, 0, 4096));
  EXPECT_TRUE(fits_file(kBlocks, 36864, 4096));
  EXPECT_FALSE(fits_file(kBlocks, 512, 4096));
  EXPECT_FALSE(fits_file(kBlocks, 0, 4608));
  EXPECT_FALSE(fits_file(kBlocks, 36864, 8192)) << "the last block is partial";
  EXPECT_TRUE(fits_file({.direct_end = 10}, 3, 7)) << "without rules everything fits";
}

TEST(Alignment, memory_fits_if_every_address_and_every_length_does) {
  const auto fits = [](std::vector<iovec> iov) { return fits_memory(kBlocks, iov); };
  EXPECT_TRUE(fits({}));
  EXPECT_TRUE(fits({{at(0x1000), 512}, {at(0x8200), 1024}}));
  EXPECT_FALSE(fits({{at(0x1000), 512}, {at(0x8201), 1024}}));
  EXPECT_FALSE(fits({{at(0x1000), 511}, {at(0x8200), 1024}}));
  EXPECT_TRUE(fits_memory({}, std::vector<iovec>{{at(0x1001), 3}}));
}

TEST(Alignment, cuts_head_body_and_tail) {
  const auto piece = [](std::uint64_t offset, std::uint64_t end) {
    const Piece next = next_piece(kBlocks, offset, end);
    return std::pair(next.route, next.length_bytes);
  };
  constexpr auto kEdge = PieceRoute::kEdge;
  constexpr auto kDirect = PieceRoute::kDirect;
  EXPECT_EQ(piece(0, 8192), std::pair(kDirect, std::uint64_t{8192}));
  EXPECT_EQ(piece(1, 8192), std::pair(kEdge, std::uint64_t{4095}));
  EXPECT_EQ(piece(1, 3), std::pair(kEdge, std::uint64_t{2}));
  EXPECT_EQ(piece(4096, 12289), std::pair(kDirect, std::uint64_t{8192}));
  EXPECT_EQ(piece(12288, 12289), std::pair(kEdge, std::uint64_t{1}));
  EXPECT_EQ(piece(36864, 49152), std::pair(kDirect, std::uint64_t{4096})) << "up to direct_end";
  EXPECT_EQ(piece(40960, 49152), std::pair(kEdge, std::uint64_t{8192})) << "from direct_end";
}

TEST(Alignment, blocks_enclose_a_range_up_to_the_last_whole_one) {
  const auto blocks = [](std::uint64_t offset, std::uint64_t end) {
    const BlockRange range = enclosing_blocks(kBlocks, offset, end, 16384);
    return std::pair(range.offset_bytes, range.length_bytes);
  };
  using Range = std::pair<std::uint64_t, std::uint64_t>;
  EXPECT_EQ(blocks(0, 4096), Range(0, 4096));
  EXPECT_EQ(blocks(1, 3), Range(0, 4096));
  EXPECT_EQ(blocks(4095, 4097), Range(0, 8192));
  EXPECT_EQ(blocks(4096, 40000), Range(4096, 16384)) << "no more than asked for";
  EXPECT_EQ(blocks(40000, 50000), Range(36864, 4096)) << "nothing from direct_end on";
}

// The pieces of any request are not empty, follow one another without a gap, end where the request
// ends, and the direct ones fit the file.
TEST(Alignment, pieces_cover_any_request_exactly) {
  std::mt19937_64 random(test::test_seed());
  for (int i = 0; i < 50000; ++i) {
    const std::uint32_t block = 1U << random() % 13;
    const AlignmentRules rules{
        .offset_bytes = block, .memory_bytes = 1, .direct_end = random() % 20000 / block * block};
    const std::uint64_t begin = random() % 20000;
    const std::uint64_t end = begin + 1 + random() % 20000;
    int count = 0;
    for (std::uint64_t offset = begin; offset < end; ++count) {
      const Piece piece = next_piece(rules, offset, end);
      ASSERT_GT(piece.length_bytes, 0U);
      ASSERT_LE(piece.length_bytes, end - offset);
      if (piece.route == PieceRoute::kDirect) {
        ASSERT_TRUE(fits_file(rules, offset, piece.length_bytes));
      }
      offset += piece.length_bytes;
    }
    EXPECT_LE(count, 3) << "head, body and tail at most";
  }
}

TEST(Alignment, gather_and_scatter_skip_empty_elements) {
  std::byte a[3]{std::byte{1}, std::byte{2}, std::byte{3}};
  std::byte b[2]{std::byte{4}, std::byte{5}};
  const std::vector<iovec> iov{{nullptr, 0}, {a, 3}, {nullptr, 0}, {b, 2}, {nullptr, 0}};
  std::byte flat[5]{};
  gather(iov, flat);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(flat[i], std::byte(i + 1));
  for (std::byte& byte : flat) byte ^= std::byte{0xf0};
  scatter(flat, iov);
  EXPECT_EQ(a[0], std::byte{0xf1});
  EXPECT_EQ(a[2], std::byte{0xf3});
  EXPECT_EQ(b[1], std::byte{0xf5});
}

// Whatever the cuts, the pieces taken one after another are the request's bytes in order, and an
// engine that used up the elements of a piece (as for short transfers) does no harm to the next.
TEST(Alignment, iovecs_are_taken_piece_by_piece_without_a_gap) {
  std::mt19937_64 random(test::test_seed());
  for (int i = 0; i < 5000; ++i) {
    std::vector<std::byte> memory(1 + random() % 300);
    for (std::size_t j = 0; j < memory.size(); ++j) memory[j] = std::byte(j);
    std::vector<iovec> iov;
    for (std::size_t start = 0; start < memory.size();) {
      const std::size_t length = random() % std::min<std::size_t>(memory.size() - start + 1, 40);
      iov.push_back({memory.data() + start, length});
      start += length;
    }
    BlockRequest request;
    request.length_bytes = memory.size();
    request.iov = iov.data();
    request.iov_count = static_cast<std::uint32_t>(iov.size());
    std::size_t done = 0;
    while (done < memory.size()) {
      const std::size_t length = 1 + random() % (memory.size() - done);
      const auto taken = take_iov(request, length);
      std::size_t taken_bytes = 0;
      for (const iovec& element : taken) taken_bytes += element.iov_len;
      ASSERT_EQ(taken_bytes, length);
      std::vector<std::byte> flat(length);
      gather(taken, flat.data());
      for (std::size_t j = 0; j < length; ++j) ASSERT_EQ(flat[j], std::byte(done + j));
      if (random() % 2 == 0) {
        for (iovec& element : taken) element = {nullptr, 0};
      }
      finish_iov(request, taken);
      done += length;
    }
  }
}

}  // namespace
}  // namespace vblk::blockdev
