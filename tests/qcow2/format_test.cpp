// The format's numbers: entries, refcounts, extents, and compressed data.
#include "blockdev/qcow2/format.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <vector>
#include <zlib.h>
#include <zstd.h>

#include <gtest/gtest.h>

#include "blockdev/qcow2/compression.h"
#include "tests/qcow2/image_format.h"
#include "tests/support/seed.h"

namespace vblk::qcow2 {
namespace {

using testing::Bytes;

constexpr Geometry kGeometry{.cluster_bits = 16};
constexpr Geometry kExtended{.cluster_bits = 16, .refcount_order = 4, .extended_l2 = true};

TEST(Qcow2Format, names_the_sectors_that_compressed_data_touches) {
  for (const unsigned cluster_bits : {9U, 16U, 21U}) {
    const Geometry geometry{.cluster_bits = cluster_bits};
    for (const std::uint64_t offset :
         {std::uint64_t{512}, std::uint64_t{1023}, std::uint64_t{77777}}) {
      for (const std::uint64_t length :
           {std::uint64_t{1}, std::uint64_t{511}, geometry.cluster_bytes() - 1}) {
        const std::uint64_t descriptor = compressed_descriptor(geometry, offset, length);
        EXPECT_NE(descriptor & kFlagCompressed, 0U);
        EXPECT_EQ(descriptor & kFlagCopied, 0U);
        const CompressedExtent extent = compressed_extent(geometry, descriptor);
        EXPECT_EQ(extent.offset, offset);
        // To the end of the sector that has the last byte.
        EXPECT_EQ(extent.offset + extent.length, (offset + length + 511) / 512 * 512);
      }
    }
  }
}

TEST(Qcow2Format, decompresses_what_it_has_compressed) {
  std::mt19937_64 random(test::test_seed());
  for (const Compression compression : {Compression::kZlib, Compression::kZstd}) {
    for (const std::size_t size : {std::size_t{512}, std::size_t{65536}, std::size_t{2} << 20}) {
      std::vector<std::byte> cluster(size);
      for (std::size_t i = 0; i < size; ++i)
        cluster[i] = static_cast<std::byte>(i % 64 == 0 ? random() : i / 64);
      std::vector<std::byte> compressed(size - 1);
      const std::size_t length = compress(compression, cluster, compressed);
      ASSERT_GT(length, 0U);
      ASSERT_LT(length, size);
      std::vector<std::byte> back(size);
      // What follows in the last sector is somebody else's.
      compressed.resize(length + 511, std::byte{0xa5});
      EXPECT_TRUE(decompress(compression, compressed, back));
      EXPECT_EQ(back, cluster);
      // What ends too early leaves nothing behind for the next.
      EXPECT_FALSE(decompress(compression, std::span(compressed).first(length / 2), back));
      EXPECT_TRUE(decompress(compression, compressed, back));
      EXPECT_EQ(back, cluster);
      for (std::byte& byte : cluster) byte = static_cast<std::byte>(random());
      EXPECT_EQ(compress(compression, cluster, std::span(compressed).first(length)), 0U);
    }
  }
}

TEST(Qcow2Format, splits_a_guest_offset_as_the_specification_does) {
  // 64 KiB clusters: 8192 entries in an L2 table, 512 in a slice of 4 KiB.
  const std::uint64_t offset = (std::uint64_t{5} << 29) + (std::uint64_t{1025} << 16) + 77;
  EXPECT_EQ(kGeometry.l1_index(offset), 5U);
  EXPECT_EQ(kGeometry.l2_slice(offset), 5U * 16 + 2);
  EXPECT_EQ(kGeometry.index_in_slice(offset), 1U);
  EXPECT_EQ(kGeometry.l2_table_reach(), std::uint64_t{1} << 29);
  // Extended entries are twice as large.
  EXPECT_EQ(kExtended.l1_index(offset), 10U);
  EXPECT_EQ(kExtended.l2_slice(offset), 10U * 16 + 4);
  EXPECT_EQ(kExtended.subcluster_bytes(), 2048U);
  EXPECT_EQ((Geometry{.cluster_bits = 9}.slice_bytes()), 512U);
  EXPECT_EQ((Geometry{.cluster_bits = 21}.l2_table_reach()), std::uint64_t{1} << 39);
}

TEST(Qcow2Format, finds_refcounts_of_every_width_where_the_specification_has_them) {
  std::mt19937_64 random(test::test_seed());
  for (unsigned order = 0; order <= 6; ++order) {
    Bytes block(512);
    const std::uint64_t count = 4096 >> order;
    std::vector<std::uint64_t> counts(count);
    for (std::uint64_t i = 0; i < count; ++i) {
      counts[i] = random() & Geometry{.refcount_order = order}.refcount_max();
      testing::put_refcount(block, order, i, counts[i]);
    }
    for (std::uint64_t i = 0; i < count; ++i) {
      const RefcountPlace place = refcount_place(order, i);
      const auto word = load_be<std::uint64_t>(block.data() + place.word * 8);
      ASSERT_EQ((word >> place.shift) & place.mask, counts[i]) << "order " << order << ", " << i;
    }
  }
}

TEST(Qcow2Format, tells_what_a_standard_entry_is) {
  const auto mapping = [](std::uint64_t descriptor,
                          std::optional<std::uint64_t> place = std::nullopt) {
    return mapping_of(kGeometry, {descriptor, 0}, 0, place);
  };
  EXPECT_EQ(mapping(0), Mapping::kUnallocated);
  EXPECT_EQ(mapping(1), Mapping::kZero);
  EXPECT_EQ(mapping(0x50000), Mapping::kNormal);
  EXPECT_EQ(mapping(0x50000 | kFlagCopied), Mapping::kNormal);
  EXPECT_EQ(mapping(0x50000 | kFlagCopied | 1), Mapping::kZeroWithSpace);
  EXPECT_EQ(mapping(kFlagCompressed | 0x50123), Mapping::kCompressed);
  EXPECT_EQ(mapping(kFlagCompressed | kFlagCopied | 0x50000), Mapping::kInvalid);
  EXPECT_EQ(mapping(0x50200), Mapping::kInvalid) << "not a cluster's beginning";
  EXPECT_EQ(mapping(0x50002), Mapping::kInvalid) << "a reserved bit";
  EXPECT_EQ(mapping(0x50000 | std::uint64_t{1} << 56), Mapping::kInvalid) << "a reserved bit";
  EXPECT_EQ(mapping(kFlagCopied), Mapping::kInvalid) << "COPIED of nothing";
  EXPECT_EQ(mapping(kFlagCopied, 0), Mapping::kNormal) << "offset 0 of an external data file";
  EXPECT_EQ(mapping(kFlagCompressed | 0x50123, 0x50000), Mapping::kInvalid);
}

TEST(Qcow2Format, has_a_cluster_of_a_data_file_at_its_guest_offset_alone) {
  const auto mapping = [](std::uint64_t descriptor, std::uint64_t place) {
    return mapping_of(kGeometry, {descriptor, 0}, 0, place);
  };
  EXPECT_EQ(mapping(0x50000 | kFlagCopied, 0x50000), Mapping::kNormal);
  EXPECT_EQ(mapping(kFlagCopied | kFlagZero, 0), Mapping::kZeroWithSpace);
  EXPECT_EQ(mapping(0x50000 | kFlagCopied, 0x60000), Mapping::kInvalid);
  EXPECT_EQ(mapping(0x50000 | kFlagCopied | kFlagZero, 0x60000), Mapping::kInvalid);
  EXPECT_EQ(mapping(kFlagCopied, 0x60000), Mapping::kInvalid);
  EXPECT_EQ(mapping(0, 0x60000), Mapping::kUnallocated);
  EXPECT_EQ(mapping(kFlagZero, 0x60000), Mapping::kZero);
}

TEST(Qcow2Format, tells_what_each_subcluster_is) {
  const auto mapping = [](std::uint64_t descriptor, std::uint64_t bitmap, unsigned subcluster) {
    return mapping_of(kExtended, {descriptor, bitmap}, subcluster, std::nullopt);
  };
  const std::uint64_t bitmap = 0b01U | std::uint64_t{0b10} << 32;
  EXPECT_EQ(mapping(0x50000, bitmap, 0), Mapping::kNormal);
  EXPECT_EQ(mapping(0x50000, bitmap, 1), Mapping::kZeroWithSpace);
  EXPECT_EQ(mapping(0x50000, bitmap, 2), Mapping::kUnallocatedWithSpace);
  EXPECT_EQ(mapping(0, bitmap, 1), Mapping::kZero);
  EXPECT_EQ(mapping(0, bitmap, 31), Mapping::kUnallocated);
  EXPECT_EQ(mapping(0, bitmap, 0), Mapping::kInvalid) << "allocated without space";
  EXPECT_EQ(mapping(0x50000, 1 | std::uint64_t{1} << 32, 0), Mapping::kInvalid) << "both";
  EXPECT_EQ(mapping(0x50001, 0, 0), Mapping::kInvalid) << "the zero flag is not for these";
}

TEST(Qcow2Format, knows_how_far_compressed_data_may_reach) {
  // 64 KiB clusters: 54 bits of offset, then the number of further sectors.
  const CompressedExtent one = compressed_extent(kGeometry, kFlagCompressed | 0x12345);
  EXPECT_EQ(one.offset, 0x12345U);
  EXPECT_EQ(one.length, 512U - 0x145);
  const CompressedExtent more =
      compressed_extent(kGeometry, kFlagCompressed | std::uint64_t{3} << 54 | 0x12200);
  EXPECT_EQ(more.offset, 0x12200U);
  EXPECT_EQ(more.length, 4U * 512);
}

Bytes deflated(std::span<const std::byte> bytes) {
  Bytes out(bytes.size() + 1000);
  z_stream stream{};
  EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
  stream.next_in = const_cast<Bytef*>(  // NOLINT: zlib's type
      reinterpret_cast<const Bytef*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

Bytes zstd_compressed(std::span<const std::byte> bytes) {
  Bytes out(ZSTD_compressBound(bytes.size()));
  out.resize(ZSTD_compress(out.data(), out.size(), bytes.data(), bytes.size(), 3));
  return out;
}

class Qcow2Compression : public ::testing::TestWithParam<Compression> {
 protected:
  static Bytes compressed(std::span<const std::byte> bytes) {
    return GetParam() == Compression::kZlib ? deflated(bytes) : zstd_compressed(bytes);
  }
  // Half noise, half zeroes.
  static Bytes cluster() {
    std::mt19937_64 random(7);
    Bytes bytes(65536);
    for (std::size_t i = 0; i < bytes.size() / 2; ++i) bytes[i] = static_cast<std::byte>(random());
    return bytes;
  }
};

TEST_P(Qcow2Compression, gives_back_the_cluster_whatever_follows_in_the_last_sector) {
  const Bytes original = cluster();
  Bytes data = compressed(original);
  data.resize((data.size() + 511) / 512 * 512, std::byte{0xee});
  Bytes out(original.size());
  EXPECT_TRUE(decompress(GetParam(), data, out));
  EXPECT_EQ(out, original);
}

TEST_P(Qcow2Compression, refuses_data_that_is_cut_damaged_or_of_less_than_a_cluster) {
  const Bytes original = cluster();
  const Bytes data = compressed(original);
  Bytes out(original.size());
  EXPECT_FALSE(decompress(GetParam(), std::span(data).first(data.size() / 2), out));
  EXPECT_FALSE(decompress(GetParam(), {}, out));
  EXPECT_FALSE(decompress(GetParam(), Bytes(4096, std::byte{0xff}), out));
  EXPECT_FALSE(decompress(GetParam(), compressed(std::span(original).first(4096)), out));
}

TEST_P(Qcow2Compression, survives_noise) {
  std::mt19937_64 random(test::test_seed());
  const Bytes data = compressed(cluster());
  Bytes out(65536);
  for (int run = 0; run < 200; ++run) {
    Bytes damaged = data;
    for (int i = 0; i < 3; ++i)
      damaged[random() % std::min<std::size_t>(damaged.size(), 200)] =
          static_cast<std::byte>(random());
    static_cast<void>(decompress(GetParam(), damaged, out));
  }
}

INSTANTIATE_TEST_SUITE_P(Methods, Qcow2Compression,
                         ::testing::Values(Compression::kZlib, Compression::kZstd),
                         [](const auto& instance) {
                           return instance.param == Compression::kZlib ? "zlib" : "zstd";
                         });

}  // namespace
}  // namespace vblk::qcow2
