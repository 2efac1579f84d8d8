// Headers and their extensions: what is decoded, and each rule whose breach is refused.
#include "blockdev/qcow2/header.h"

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "blockdev/qcow2/header_rewrite.h"
#include "tests/qcow2/image_format.h"

namespace vblk::qcow2 {
namespace {

using ::testing::AllOf;
using testing::Bytes;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::put_be;

constexpr std::uint64_t kCluster = 65536;

// A valid first cluster of version 3, and changes of it.
class FirstCluster {
 public:
  FirstCluster() : bytes_(kCluster) {
    set(0, 4, 0x514649fb).set(4, 4, 3).set(20, 4, 16).set(24, 8, 1 << 20);
    set(36, 4, 1).set(40, 8, 3 * kCluster).set(48, 8, kCluster).set(56, 4, 1);
    set(96, 4, 4).set(100, 4, 104);
  }
  FirstCluster& set(std::uint64_t offset, unsigned length, std::uint64_t value) {
    put_be(bytes_, offset, length, value);
    return *this;
  }
  FirstCluster& text(std::uint64_t offset, std::string_view text) {
    for (std::size_t i = 0; i < text.size(); ++i)
      bytes_[offset + i] = static_cast<std::byte>(text[i]);
    return *this;
  }
  FirstCluster& extension(std::uint32_t type, std::string_view content) {
    set(extensions_end_, 4, type).set(extensions_end_ + 4, 4, content.size());
    text(extensions_end_ + 8, content);
    extensions_end_ += 8 + (content.size() + 7) / 8 * 8;
    return *this;
  }
  // The bitmaps extension, with the bit that vouches for it.
  FirstCluster& set_bitmaps(std::uint32_t count, std::uint32_t reserved, std::uint64_t length,
                            std::uint64_t offset) {
    Bytes content(24);
    put_be(content, 0, 4, count);
    put_be(content, 4, 4, reserved);
    put_be(content, 8, 8, length);
    put_be(content, 16, 8, offset);
    set(88, 8, kAutoclearBitmaps);
    return extension(0x23852875, {reinterpret_cast<const char*>(content.data()), content.size()});
  }
  FirstCluster& cut(std::size_t length) {
    bytes_.resize(length);
    return *this;
  }
  [[nodiscard]] Expected<Header> decode() const { return decode_header(bytes_, "an.qcow2"); }

 private:
  Bytes bytes_;
  std::uint64_t extensions_end_{104};
};

// ---- Writing one.

Header a_header() {
  Header header;
  header.geometry = {.cluster_bits = 12, .refcount_order = 5, .extended_l2 = false};
  header.size_bytes = 5 << 20;
  header.l1_entries = 3;
  header.l1_table_offset = 4096;
  header.refcount_table_offset = 8192;
  header.refcount_table_clusters = 1;
  header.incompatible_features = kIncompatDataFile | kIncompatCompression;
  header.compatible_features = kCompatLazyRefcounts;
  header.compression = Compression::kZstd;
  header.data_file = "the data";
  return header;
}

TEST(Qcow2HeaderWriting, is_undone_by_decoding) {
  const Header header = a_header();
  Bytes cluster(4096, std::byte{0xaa});
  ASSERT_TRUE(encode_header(header, cluster));
  const auto decoded = decode_header(cluster, "a.qcow2");
  ASSERT_TRUE(decoded) << decoded.error().message;
  EXPECT_EQ(decoded->version, 3U);
  EXPECT_EQ(decoded->geometry.cluster_bits, 12U);
  EXPECT_EQ(decoded->geometry.refcount_order, 5U);
  EXPECT_EQ(decoded->size_bytes, header.size_bytes);
  EXPECT_EQ(decoded->l1_entries, 3U);
  EXPECT_EQ(decoded->l1_table_offset, 4096U);
  EXPECT_EQ(decoded->refcount_table_offset, 8192U);
  EXPECT_EQ(decoded->refcount_table_clusters, 1U);
  EXPECT_EQ(decoded->incompatible_features, header.incompatible_features);
  EXPECT_EQ(decoded->compatible_features, header.compatible_features);
  EXPECT_EQ(decoded->compression, Compression::kZstd);
  EXPECT_EQ(decoded->data_file, "the data");
  EXPECT_EQ(decoded->feature_names.at({0U, 4U}), "extended L2 entries");
}

// The names of features make way for what is needed; what is needed must fit.
TEST(Qcow2HeaderWriting, fits_names_into_the_smallest_cluster_or_refuses_them) {
  Header header;
  header.geometry.cluster_bits = 9;
  header.size_bytes = 512;
  header.l1_entries = 1;
  header.l1_table_offset = 512;
  header.refcount_table_offset = 1024;
  header.refcount_table_clusters = 1;
  header.backing_format = "qcow2";
  // Header, extension of the format, end mark.
  constexpr std::size_t kRoom = 512 - 112 - 16 - 8;
  for (const std::size_t length : {std::size_t{1}, std::size_t{8}, kRoom}) {
    header.backing_file = std::string(length, 'b');
    Bytes cluster(512);
    ASSERT_TRUE(encode_header(header, cluster)) << length;
    const auto decoded = decode_header(cluster, "a.qcow2");
    ASSERT_TRUE(decoded) << decoded.error().message;
    EXPECT_EQ(decoded->backing_file, header.backing_file);
    EXPECT_EQ(decoded->backing_format, "qcow2");
  }
  header.backing_file = std::string(kRoom + 1, 'b');
  Bytes cluster(512);
  EXPECT_FALSE(encode_header(header, cluster));
}

// What nobody here knows is somebody's all the same.
TEST(Qcow2HeaderWriting, gives_an_image_another_backing_file_and_leaves_the_rest) {
  for (const std::size_t room : {std::size_t{4096}, std::size_t{512}}) {
    Header header;
    header.geometry.cluster_bits = room == 512 ? 9 : 12;
    header.size_bytes = 512;
    header.l1_entries = 1;
    header.l1_table_offset = room;
    header.refcount_table_offset = 2 * room;
    header.refcount_table_clusters = 1;
    header.backing_format = "raw";
    header.backing_file = "old";
    Bytes cluster(room);
    ASSERT_TRUE(encode_header(header, cluster));
    // An extension of unknown kind in place of the names of features, or of the end.
    const std::size_t at = 112 + 16;
    put_be(cluster, 8, 8, 0);
    put_be(cluster, at, 4, 0x12345678);
    put_be(cluster, at + 4, 4, 5);
    put_be(cluster, at + 8, 8, 0x6162636465000000);
    put_be(cluster, at + 16, 8, 0);
    const auto rename = [&cluster](const std::string& file, const std::string& format) {
      Header renamed = *decode_header(cluster, "a.qcow2");
      renamed.backing_file = file;
      renamed.backing_format = format;
      return rewrite_header(cluster, renamed, true).has_value();
    };
    ASSERT_TRUE(rename("a new one", "qcow2"));
    const auto decoded = decode_header(cluster, "a.qcow2");
    ASSERT_TRUE(decoded) << decoded.error().message;
    EXPECT_EQ(decoded->backing_file, "a new one");
    EXPECT_EQ(decoded->backing_format, "qcow2");
    const std::string text(reinterpret_cast<const char*>(cluster.data()), cluster.size());
    EXPECT_NE(text.find("abcde"), std::string::npos);
    EXPECT_EQ(text.find("old"), std::string::npos);
    ASSERT_TRUE(rename("", ""));
    EXPECT_EQ(decode_header(cluster, "a.qcow2")->backing_file, "");
    EXPECT_EQ(decode_header(cluster, "a.qcow2")->backing_format, "");
    const Bytes before = cluster;
    EXPECT_FALSE(rename(std::string(1024, 'x'), "raw"));
    if (room == 512) {
      EXPECT_FALSE(rename(std::string(400, 'x'), "raw"));
    }
    EXPECT_EQ(cluster, before);
  }
}

// ---- Reading one.

TEST(Qcow2Header, is_decoded_field_by_field) {
  FirstCluster cluster;
  cluster.set(60, 4, 2).set(64, 8, 5 * kCluster).set(80, 8, 1).set(88, 8, 1);
  const auto header = cluster.decode();
  ASSERT_TRUE(header.has_value()) << header.error().message;
  EXPECT_EQ(header->version, 3U);
  EXPECT_EQ(header->geometry.cluster_bits, 16U);
  EXPECT_EQ(header->geometry.refcount_order, 4U);
  EXPECT_EQ(header->size_bytes, std::uint64_t{1} << 20);
  EXPECT_EQ(header->l1_entries, 1U);
  EXPECT_EQ(header->l1_table_offset, 3 * kCluster);
  EXPECT_EQ(header->refcount_table_offset, kCluster);
  EXPECT_EQ(header->refcount_table_clusters, 1U);
  EXPECT_EQ(header->snapshot_count, 2U);
  EXPECT_EQ(header->snapshots_offset, 5 * kCluster);
  EXPECT_EQ(header->compatible_features, kCompatLazyRefcounts);
  EXPECT_EQ(header->autoclear_features, kAutoclearBitmaps);
  EXPECT_EQ(header->backing_file, "");
}

TEST(Qcow2Header, of_version_2_has_16_bit_refcounts_whatever_follows) {
  FirstCluster cluster;
  cluster.set(4, 4, 2).set(72, 8, 0).set(96, 4, 0).set(100, 4, 0);
  const auto header = cluster.decode();
  ASSERT_TRUE(header.has_value()) << header.error().message;
  EXPECT_EQ(header->geometry.refcount_order, 4U);
  EXPECT_EQ(header->incompatible_features, 0U);
}

TEST(Qcow2Header, has_extensions_that_are_decoded) {
  FirstCluster cluster;
  std::string bitmaps(24, '\0');
  bitmaps[3] = 1;   // one of them
  bitmaps[14] = 1;  // size 256
  bitmaps[21] = 2;  // offset 2 * 65536
  cluster.extension(0x12345678, "not known, and that is fine")
      .extension(0xe2792aca, "raw")
      .extension(0x23852875, bitmaps)
      .set(72, 8, kIncompatDataFile)
      .set(88, 8, kAutoclearBitmaps)
      .extension(0x44415441, "data.raw");
  const auto header = cluster.decode();
  ASSERT_TRUE(header.has_value()) << header.error().message;
  EXPECT_EQ(header->backing_format, "raw");
  EXPECT_EQ(header->data_file, "data.raw");
  ASSERT_TRUE(header->bitmap_directory.has_value());
  EXPECT_EQ(header->bitmap_directory->offset, 2 * kCluster);
  EXPECT_EQ(header->bitmap_directory->length, 256U);
}

// Whoever cleared the bit may have given the directory's clusters to others.
TEST(Qcow2Header, has_no_bitmap_directory_without_its_autoclear_bit) {
  FirstCluster cluster;
  const auto header = cluster.set(88, 8, 0).extension(0x23852875, "anything at all").decode();
  ASSERT_TRUE(header.has_value()) << header.error().message;
  EXPECT_FALSE(header->bitmap_directory.has_value());
}

TEST(Qcow2Header, names_the_backing_file) {
  FirstCluster cluster;
  cluster.set(8, 8, 512).set(16, 4, 8).text(512, "base.img");
  const auto header = cluster.decode();
  ASSERT_TRUE(header.has_value()) << header.error().message;
  EXPECT_EQ(header->backing_file, "base.img");
}

TEST(Qcow2Header, names_an_unknown_feature_without_what_a_terminal_would_act_on) {
  FirstCluster cluster;
  std::string entry(48, '\0');
  entry[1] = 9;
  entry.replace(2, 9, "fancy\x1b[2J");
  const auto header = cluster.set(72, 8, 1 << 9).extension(0x6803f857, entry).decode();
  ASSERT_FALSE(header.has_value());
  EXPECT_EQ(header.error().kind, ErrorKind::kNotSupported);
  EXPECT_THAT(header.error().message, AllOf(HasSubstr("fancy?[2J"), Not(HasSubstr("\x1b"))));
}

TEST(Qcow2Header, takes_compression_by_zstd_where_the_feature_says_so) {
  FirstCluster cluster;
  const auto header =
      cluster.set(72, 8, kIncompatCompression).set(100, 4, 112).set(104, 1, 1).decode();
  ASSERT_TRUE(header.has_value()) << header.error().message;
  EXPECT_EQ(header->compression, Compression::kZstd);
}

TEST(Qcow2Header, changes_only_the_fields_that_can) {
  FirstCluster cluster;
  auto header = cluster.decode();
  ASSERT_TRUE(header.has_value());
  header->refcount_table_offset = 9 * kCluster;
  header->refcount_table_clusters = 2;
  header->snapshot_count = 3;
  header->snapshots_offset = 7 * kCluster;
  header->incompatible_features = kIncompatCorrupt;
  std::array<std::byte, kHeaderSectorBytes> sector{};
  sector.fill(std::byte{0xab});
  encode_header_fields(*header, std::span(sector));
  EXPECT_EQ(testing::get_be(sector, 48, 8), 9 * kCluster);
  EXPECT_EQ(testing::get_be(sector, 56, 4), 2U);
  EXPECT_EQ(testing::get_be(sector, 60, 4), 3U);
  EXPECT_EQ(testing::get_be(sector, 64, 8), 7 * kCluster);
  EXPECT_EQ(testing::get_be(sector, 72, 8), kIncompatCorrupt);
  EXPECT_EQ(testing::get_be(sector, 0, 4), 0xababababU);
  EXPECT_EQ(testing::get_be(sector, 32, 4), 0xababababU);
  EXPECT_EQ(testing::get_be(sector, 96, 8), 0xababababababababU);
}

struct Refusal {
  const char* name;
  std::function<void(FirstCluster&)> change;
  ErrorKind kind;
  const char* message;
};

class Qcow2HeaderRefusal : public ::testing::TestWithParam<Refusal> {};

TEST_P(Qcow2HeaderRefusal, says_what_is_wrong) {
  FirstCluster cluster;
  ASSERT_TRUE(cluster.decode().has_value());
  GetParam().change(cluster);
  const auto header = cluster.decode();
  ASSERT_FALSE(header.has_value());
  EXPECT_EQ(header.error().kind, GetParam().kind);
  EXPECT_THAT(header.error().message, AllOf(HasSubstr(GetParam().message), HasSubstr("an.qcow2")));
}

using enum ErrorKind;
const std::vector<Refusal> refusals{
    {"magic", [](auto& c) { c.set(0, 4, 0x514649fc); }, kInvalidArgument, "not a qcow2 image"},
    {"too_short", [](auto& c) { c.cut(71); }, kInvalidArgument, "not a qcow2 image"},
    {"version_1", [](auto& c) { c.set(4, 4, 1); }, kNotSupported, "version 1"},
    {"version_4", [](auto& c) { c.set(4, 4, 4); }, kNotSupported, "version 4"},
    {"cut_in_its_header", [](auto& c) { c.cut(100); }, kCorrupt, "ends within its header"},
    {"clusters_of_256", [](auto& c) { c.set(20, 4, 8); }, kCorrupt, "2^8"},
    {"clusters_of_4_mib", [](auto& c) { c.set(20, 4, 22); }, kCorrupt, "2^22"},
    {"header_length_short", [](auto& c) { c.set(100, 4, 96); }, kCorrupt, "header_length is 96"},
    {"header_length_long", [](auto& c) { c.set(100, 4, 1 << 20); }, kCorrupt, "header_length"},
    {"feature", [](auto& c) { c.set(72, 8, 1 << 5); }, kNotSupported, "incompatible feature 5"},
    {"aes", [](auto& c) { c.set(32, 4, 1); }, kNotSupported, "AES"},
    {"luks", [](auto& c) { c.set(32, 4, 2); }, kNotSupported, "LUKS"},
    {"encryption", [](auto& c) { c.set(32, 4, 3); }, kNotSupported, "encryption method 3"},
    {"refcount_order", [](auto& c) { c.set(96, 4, 7); }, kCorrupt, "refcount_order is 7"},
    {"small_extended",
     [](auto& c) { c.set(72, 8, kIncompatExtendedL2).set(20, 4, 13).set(36, 4, 64); }, kCorrupt,
     "less than 16 KiB"},
    {"size", [](auto& c) { c.set(24, 8, (std::uint64_t{1} << 61) + 1); }, kCorrupt, "size is"},
    {"large_l1", [](auto& c) { c.set(36, 4, (32U << 17) + 1); }, kCorrupt, "L1 table has 4194305"},
    {"small_l1", [](auto& c) { c.set(24, 8, (std::uint64_t{1} << 29) + 1); }, kCorrupt,
     "1 entries instead of 2"},
    {"l1_offset", [](auto& c) { c.set(40, 8, 3 * kCluster + 512); }, kCorrupt, "L1 table does not"},
    {"l1_offset_huge", [](auto& c) { c.set(40, 8, std::uint64_t{1} << 60); }, kCorrupt, "L1 table"},
    {"no_refcounts", [](auto& c) { c.set(48, 8, 0); }, kCorrupt, "no refcount table"},
    {"no_refcount_clusters", [](auto& c) { c.set(56, 4, 0); }, kCorrupt, "no refcount table"},
    {"large_refcount_table", [](auto& c) { c.set(56, 4, 129); }, kCorrupt, "129 clusters"},
    {"refcount_table_offset", [](auto& c) { c.set(48, 8, 1); }, kCorrupt,
     "refcount table does not"},
    {"snapshots", [](auto& c) { c.set(60, 4, 65537); }, kCorrupt, "65537 snapshots"},
    {"snapshots_offset", [](auto& c) { c.set(60, 4, 1).set(64, 8, 7); }, kCorrupt,
     "snapshot table"},
    {"compression_without_feature", [](auto& c) { c.set(100, 4, 112).set(104, 1, 1); }, kCorrupt,
     "compression type contradicts"},
    {"feature_without_compression", [](auto& c) { c.set(72, 8, kIncompatCompression); }, kCorrupt,
     "compression type contradicts"},
    {"compression_type",
     [](auto& c) { c.set(72, 8, kIncompatCompression).set(100, 4, 112).set(104, 1, 2); },
     kNotSupported, "compression type 2"},
    {"raw_without_data_file", [](auto& c) { c.set(88, 8, kAutoclearRawDataFile); }, kCorrupt,
     "says that its data file is raw"},
    {"data_file_and_snapshots",
     [](auto& c) { c.set(72, 8, kIncompatDataFile).set(60, 4, 1).set(64, 8, kCluster); }, kCorrupt,
     "external data file and internal snapshots"},
    {"raw_data_file_and_backing",
     [](auto& c) {
       c.set(72, 8, kIncompatDataFile).set(88, 8, kAutoclearRawDataFile);
       c.set(8, 8, 512).set(16, 4, 4).text(512, "base");
     },
     kCorrupt, "raw external data file and a backing file"},
    {"backing_name_long", [](auto& c) { c.set(8, 8, 512).set(16, 4, 1024); }, kCorrupt,
     "name of its backing file leaves"},
    {"backing_name_outside", [](auto& c) { c.set(8, 8, kCluster - 4).set(16, 4, 5); }, kCorrupt,
     "name of its backing file leaves"},
    {"backing_name_zero", [](auto& c) { c.set(8, 8, 512).set(16, 4, 3).text(512, "a"); }, kCorrupt,
     "contains a zero byte"},
    {"data_file_name_zero", [](auto& c) { c.extension(0x44415441, std::string_view("a\0b", 3)); },
     kCorrupt, "name of its external data file"},
    {"data_file_name_long", [](auto& c) { c.extension(0x44415441, std::string(4096, 'a')); },
     kCorrupt, "name of its external data file"},
    {"extension_outside", [](auto& c) { c.set(104, 4, 0x11).set(108, 4, kCluster); }, kCorrupt,
     "extension leaves the first cluster"},
    {"encryption_short", [](auto& c) { c.extension(0x0537be77, "short"); }, kCorrupt,
     "encryption header pointer is too short"},
    {"bitmaps_short",
     [](auto& c) { c.set(88, 8, kAutoclearBitmaps).extension(0x23852875, "short"); }, kCorrupt,
     "bitmaps extension has another length"},
    {"bitmaps_reserved", [](auto& c) { c.set_bitmaps(1, 1, 64, kCluster); }, kCorrupt,
     "reserved bits"},
    {"bitmaps_none", [](auto& c) { c.set_bitmaps(0, 0, 64, kCluster); }, kCorrupt,
     "names no bitmaps"},
    {"bitmaps_directory_empty", [](auto& c) { c.set_bitmaps(1, 0, 0, kCluster); }, kCorrupt,
     "names no bitmaps"},
    {"bitmaps_offset", [](auto& c) { c.set_bitmaps(1, 0, 64, 1); }, kCorrupt,
     "bitmap directory does not begin"},
};

INSTANTIATE_TEST_SUITE_P(Rules, Qcow2HeaderRefusal, ::testing::ValuesIn(refusals),
                         [](const auto& instance) { return std::string(instance.param.name); });

}  // namespace
}  // namespace vblk::qcow2
