// Opening: what is refused beyond the header, what is repaired and cleared on the way, and images
// whose data is in a file of its own.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <vector>

#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "blockdev/image/open_image.h"
#include "blockdev/log.h"
#include "tests/qcow2/image_check.h"
#include "tests/qcow2/qcow2_rig.h"
#include "tests/support/run_count.h"
#include "tests/support/seed.h"
#include "tests/support/temp_dir.h"

namespace vblk::qcow2 {
namespace {

using testing::Bytes;
using testing::check_image;
using testing::CheckedImage;
using testing::format_image;
using testing::FormattedImage;
using testing::get_be;
using ::testing::HasSubstr;
using testing::ImageSpec;
using testing::kSectorBytes;
using testing::put_be;
using testing::Rig;
using testing::Tags;

constexpr std::uint64_t kCopied = std::uint64_t{1} << 63;
constexpr std::uint64_t kFar = std::uint64_t{1} << 40;
constexpr std::uint64_t kDirtyBit = 1;
constexpr std::uint64_t kCorruptBit = 2;
constexpr std::uint64_t kDataFileBit = 4;

ImageSpec small_spec() {
  return {.cluster_bits = 12, .size_bytes = 256 << 10, .snapshot = true, .mapped_percent = 70};
}

class Qcow2Opening : public ::testing::Test {
 protected:
  void SetUp() override { log::set_level(log::Level::kOff); }
  static FormattedImage formatted(const ImageSpec& spec) {
    std::mt19937_64 random(3);
    return format_image(spec, random);
  }
};

struct Refusal {
  const char* name;
  std::function<void(Bytes&)> damage;
  const char* message;
};
class Qcow2OpeningRefusal : public Qcow2Opening, public ::testing::WithParamInterface<Refusal> {};

TEST_P(Qcow2OpeningRefusal, says_what_is_wrong_and_changes_nothing_but_the_corrupt_bit) {
  Bytes bytes = formatted(small_spec()).bytes;
  GetParam().damage(bytes);
  Rig rig(bytes, {}, {});
  EXPECT_EQ(rig.node, nullptr);
  EXPECT_THAT(rig.error, HasSubstr(GetParam().message));
  Bytes left = rig.disk.current();
  put_be(left, 72, 8, get_be(bytes, 72, 8));
  EXPECT_EQ(left, bytes);
}

INSTANTIATE_TEST_SUITE_P(
    Rules, Qcow2OpeningRefusal,
    ::testing::Values(Refusal{"l1_table_beyond_the_end", [](Bytes& b) { put_be(b, 40, 8, kFar); },
                              "L1 table lies beyond the end"},
                      Refusal{"refcount_table_beyond_the_end",
                              [](Bytes& b) { put_be(b, 48, 8, kFar); },
                              "refcount table lies beyond the end"},
                      Refusal{"snapshot_table_beyond_the_end",
                              [](Bytes& b) { put_be(b, 64, 8, kFar); },
                              "snapshot table lies beyond the end"},
                      Refusal{"snapshot_of_endless_length",
                              [](Bytes& b) { put_be(b, get_be(b, 64, 8) + 36, 4, 0xffff'ffff); },
                              "snapshot table lies beyond the end"},
                      Refusal{"snapshot_l1_table_beyond_the_end",
                              [](Bytes& b) { put_be(b, get_be(b, 64, 8), 8, kFar); },
                              "L1 table of its snapshot 0"},
                      Refusal{"snapshot_l1_table_of_many_entries",
                              [](Bytes& b) { put_be(b, get_be(b, 64, 8) + 8, 4, 0xffff'ffff); },
                              "L1 table of its snapshot 0"},
                      Refusal{"l2_table_beyond_the_end",
                              [](Bytes& b) { put_be(b, get_be(b, 40, 8), 8, kFar | kCopied); },
                              "an L2 table lies beyond the end"},
                      Refusal{"l2_table_between_clusters",
                              [](Bytes& b) { put_be(b, get_be(b, 40, 8), 8, 512 | kCopied); },
                              "for an L2 table is not valid"},
                      Refusal{"l2_table_with_reserved_bits",
                              [](Bytes& b) {
                                const std::uint64_t at = get_be(b, 40, 8);
                                put_be(b, at, 8, get_be(b, at, 8) | 1);
                              },
                              "for an L2 table is not valid"},
                      Refusal{"l2_table_in_the_l1_table",
                              [](Bytes& b) { put_be(b, get_be(b, 40, 8), 8, get_be(b, 40, 8)); },
                              "an L2 table overlaps with other metadata"},
                      Refusal{"refcount_block_in_the_header",
                              [](Bytes& b) { put_be(b, 48, 8, 0x1000), put_be(b, 40, 8, 0x1000); },
                              "overlaps with other metadata"},
                      Refusal{"refcount_block_with_reserved_bits",
                              [](Bytes& b) { put_be(b, get_be(b, 48, 8), 8, 1); },
                              "for a refcount block is not valid"},
                      Refusal{"marked_corrupt", [](Bytes& b) { put_be(b, 72, 8, kCorruptBit); },
                              "marked corrupt"}),
    [](const auto& instance) { return std::string(instance.param.name); });

TEST_F(Qcow2Opening, of_an_image_marked_corrupt_is_allowed_for_reading) {
  const FormattedImage image = formatted(small_spec());
  Bytes bytes = image.bytes;
  put_be(bytes, 72, 8, kCorruptBit);
  Rig rig(bytes, {}, {.read_only = true});
  ASSERT_NE(rig.node, nullptr) << rig.error;
  EXPECT_EQ(testing::tags_of(rig.read_all()), image.disk);
}

TEST_F(Qcow2Opening, for_writing_clears_the_bits_that_say_what_would_not_be_kept) {
  Bytes bytes = formatted(small_spec()).bytes;
  put_be(bytes, 88, 8, 0b1001);
  {
    Rig rig(bytes, {}, {.read_only = true});
    ASSERT_NE(rig.node, nullptr) << rig.error;
    EXPECT_EQ(get_be(rig.disk.durable(), 88, 8), 0b1001U);
  }
  const Rig rig(bytes, {}, {});
  ASSERT_NE(rig.node, nullptr) << rig.error;
  EXPECT_EQ(get_be(rig.disk.durable(), 88, 8), 0U);
}

// All refcounts are lost; what counts is what is named.
TEST_F(Qcow2Opening, of_an_image_that_was_not_closed_counts_its_refcounts_anew) {
  std::mt19937_64 random(test::test_seed());
  for (int run = 0; run < test::run_count("VBLK_OPENING_RUNS", 40); ++run) {
    ImageSpec spec = small_spec();
    spec.cluster_bits = 9 + static_cast<unsigned>(random() % 6);
    spec.refcount_order = 2 + static_cast<unsigned>(random() % 5);
    spec.extended_l2 = spec.cluster_bits >= 14 && random() % 2 == 0;
    spec.snapshot = random() % 2 == 0;
    spec.lazy_refcounts = true;
    spec.compressed_percent = random() % 2 == 0 ? 0 : 40;
    SCOPED_TRACE(fmt::format("run {}: {}", run, spec.to_string()));
    const FormattedImage image = format_image(spec, random);
    Bytes bytes = image.bytes;
    put_be(bytes, 72, 8, get_be(bytes, 72, 8) | kDirtyBit);
    const std::uint64_t cluster = std::uint64_t{1} << spec.cluster_bits;
    const std::uint64_t block = get_be(bytes, get_be(bytes, 48, 8), 8);
    std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(block), cluster, std::byte{0});
    Rig rig(bytes, {}, {});
    ASSERT_NE(rig.node, nullptr) << rig.error;
    EXPECT_EQ(testing::tags_of(rig.read_all()), image.disk);
    rig.close();
    const Bytes left = rig.disk.durable();
    EXPECT_EQ(get_be(left, 72, 8) & kDirtyBit, 0U);
    const CheckedImage checked = check_image(left, {});
    EXPECT_EQ(checked.errors, std::vector<std::string>{});
    EXPECT_EQ(checked.leaks, 0U);
    EXPECT_EQ(checked.disk, image.disk);
    if (HasFailure()) break;
  }
}

TEST_F(Qcow2Opening, of_an_image_whose_last_cluster_is_cut_makes_it_whole) {
  ImageSpec spec = small_spec();
  spec.snapshot = false;
  Bytes bytes = formatted(spec).bytes;
  // What lies last are the refcounts, and of their block only the beginning is not zero.
  bytes.resize(bytes.size() - 1024);
  Rig rig(bytes, {}, {});
  ASSERT_NE(rig.node, nullptr) << rig.error;
  EXPECT_EQ(rig.disk.current().size() % 4096, 0U);
  EXPECT_EQ(rig.contexts[0]->write(*rig.node, 0, Bytes(65536, std::byte{1})), 0);
  rig.close();
  EXPECT_EQ(check_image(rig.disk.current(), {}).errors, std::vector<std::string>{});
}

// Tables that do not exist are passed over one by one, not entry by entry.
TEST_F(Qcow2Opening, of_a_huge_empty_disk_lets_it_be_discarded_as_a_whole) {
  ImageSpec spec;
  spec.size_bytes = 1 << 20;
  spec.mapped_percent = 100;
  Bytes bytes = formatted(spec).bytes;
  put_be(bytes, 36, 4, 8192);  // as many as the table's cluster holds: 4 TiB
  put_be(bytes, 24, 8, std::uint64_t{1} << 42);
  Rig rig(bytes, {}, {});
  ASSERT_NE(rig.node, nullptr) << rig.error;
  auto& context = *rig.contexts[0];
  const auto time_of = [](const auto& work) {
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_EQ(work(), 0);
    return std::chrono::steady_clock::now() - begin;
  };
  const std::uint64_t reach = std::uint64_t{1} << 29;
  const std::uint64_t half = std::uint64_t{1} << 41;
  const auto one_table = time_of([&] { return context.discard(*rig.node, 0, reach); });
  const auto discarded = time_of([&] { return context.discard(*rig.node, half, half); });
  const auto zeroed = time_of([&] { return context.write_zeroes(*rig.node, half, half, false); });
  // 8192 entries, and 4096 tables; entry by entry it would be 4096 times as long.
  EXPECT_LT(discarded, 100 * one_table);
  EXPECT_LT(zeroed, 100 * one_table);
  EXPECT_EQ(rig.disk.current().size(), bytes.size());
}

// A name in a header is whoever's who made the image.
TEST_F(Qcow2Opening, says_nothing_that_a_terminal_would_act_on) {
  ImageSpec spec;
  spec.backing_bytes = spec.size_bytes;
  for (const std::uint64_t length : {4U, 11U}) {
    Bytes bytes = formatted(spec).bytes;
    const std::uint64_t name = get_be(bytes, 8, 8);
    put_be(bytes, 16, 4, length);
    put_be(bytes, name, 4, 0x1b5b324a);  // ESC, and what clears the screen
    if (length == 11) put_be(bytes, name - 16, 8, 0x1b62636400000000);  // the format
    const test::TempDir dir;
    std::ofstream(dir.file("disk.qcow2"), std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    const auto node = blockdev::open_image(
        {.path = dir.file("disk.qcow2"), .format = blockdev::ImageFormat::kQcow2});
    ASSERT_FALSE(node);
    EXPECT_THAT(node.error().message, HasSubstr("?[2J"));
    EXPECT_EQ(node.error().message.find('\x1b'), std::string::npos);
  }
}

// Of a write into a hole, ext4 lets one at a time into a file.
TEST_F(Qcow2Opening, of_an_image_in_a_file_that_grows_gets_space_before_it_is_written) {
  ImageSpec spec;
  spec.cluster_bits = 16;
  spec.size_bytes = 1 << 24;
  const Bytes bytes = formatted(spec).bytes;
  const test::TempDir dir;
  const std::string path = dir.file("disk.qcow2");
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  auto node = blockdev::open_image({.path = path,
                                    .format = blockdev::ImageFormat::kQcow2,
                                    .cache = blockdev::CacheMode::kWriteback});
  ASSERT_TRUE(node) << node.error().message;
  testing::Context guest(*aio::EngineSet::create({}, {}));
  for (std::uint64_t at = 0; at < spec.size_bytes; at += 20 * 65536)
    ASSERT_EQ(guest.write(**node, at, Bytes(512, std::byte{1})), 0);
  struct stat status{};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  EXPECT_GE(status.st_size, 16 * 65536);
  // Less than that: the few clusters that it had before.
  EXPECT_GE(status.st_blocks * 512, status.st_size - 4 * 65536);
}

// ---- Backing files.

class Qcow2BackingChain : public Qcow2Opening {
 protected:
  // A chain of so many images, the uppermost last. Each has written a sector of its own.
  void make(std::size_t images) {
    const FormattedImage empty =
        formatted({.cluster_bits = 9, .size_bytes = kSectors * kSectorBytes});
    for (std::size_t i = 0; i < images; ++i) {
      Rig rig(empty.bytes, {}, {});
      ASSERT_NE(rig.node, nullptr) << rig.error;
      ASSERT_EQ(rig.contexts[0]->write(*rig.node, i * kSectorBytes, sector_of(i)), 0);
      rig.close();
      Bytes bytes = rig.disk.current();
      if (i > 0) name_backing(bytes, fmt::format("{}.qcow2", i - 1));
      std::ofstream(image(i), std::ios::binary)
          .write(reinterpret_cast<const char*>(bytes.data()),
                 static_cast<std::streamsize>(bytes.size()));
    }
  }
  [[nodiscard]] std::string image(std::size_t number) const {
    return dir_.file(fmt::format("{}.qcow2", number));
  }
  static Expected<std::unique_ptr<blockdev::BlockNode>> open(const std::string& path) {
    return blockdev::open_image({.path = path,
                                 .format = blockdev::ImageFormat::kQcow2,
                                 .cache = blockdev::CacheMode::kWriteback});
  }
  static Bytes sector_of(std::size_t image) {
    return Bytes(kSectorBytes, static_cast<std::byte>(image + 1));
  }
  static testing::Context context() { return testing::Context(*aio::EngineSet::create({}, {})); }

  static constexpr std::size_t kSectors = 80;

 private:
  // In a header that has no extensions yet.
  static void name_backing(Bytes& bytes, std::string_view name) {
    const auto put = [&bytes](std::uint64_t offset, std::string_view text) {
      std::ranges::copy(std::as_bytes(std::span(text)),
                        bytes.begin() + static_cast<std::ptrdiff_t>(offset));
    };
    constexpr std::string_view kFormat = "qcow2";
    put_be(bytes, 104, 4, 0xe2792aca);
    put_be(bytes, 108, 4, kFormat.size());
    put(112, kFormat);
    put(128, name);  // behind the end mark
    put_be(bytes, 8, 8, 128);
    put_be(bytes, 16, 4, name.size());
  }

  test::TempDir dir_;
};

TEST_F(Qcow2BackingChain, of_64_images_is_read_and_with_one_more_refused_in_one_short_line) {
  ASSERT_NO_FATAL_FAILURE(make(blockdev::kBackingChainMax + 1));
  {
    const auto node = open(image(blockdev::kBackingChainMax - 1));
    ASSERT_TRUE(node) << node.error().message;
    testing::Context guest = context();
    for (std::size_t i = 0; i < kSectors; ++i) {
      const Bytes expected = i < blockdev::kBackingChainMax ? sector_of(i) : Bytes(kSectorBytes);
      ASSERT_EQ(guest.read(**node, i * kSectorBytes, kSectorBytes), expected) << i;
    }
  }
  const auto node = open(image(blockdev::kBackingChainMax));
  ASSERT_FALSE(node);
  EXPECT_EQ(node.error().kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(node.error().message,
            fmt::format("the backing file of '{}': '{}' would be number 65 in a chain of backing "
                        "files; 64 are supported",
                        image(1), image(0)));
}

// ---- An external data file ("External data file name"), on a real file system.

class Qcow2DataFile : public Qcow2Opening {
 protected:
  void make(bool is_raw, bool names_it = true, std::uint64_t disk_bytes = 1 << 20) {
    ImageSpec spec;
    spec.cluster_bits = 16;
    spec.size_bytes = disk_bytes;
    Bytes bytes = formatted(spec).bytes;
    put_be(bytes, 72, 8, kDataFileBit);
    put_be(bytes, 88, 8, is_raw ? 2 : 0);
    constexpr std::string_view kName = "data.raw";
    if (names_it) {
      put_be(bytes, 104, 4, 0x44415441);
      put_be(bytes, 108, 4, kName.size());
      for (std::size_t i = 0; i < kName.size(); ++i)
        bytes[112 + i] = static_cast<std::byte>(kName[i]);
    }
    save("disk.qcow2", bytes);
    save("data.raw", Bytes(kSectorBytes));  // shorter than the disk
  }
  void save(const std::string& name, const Bytes& bytes) const {
    std::ofstream(dir_.file(name), std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }
  [[nodiscard]] Bytes load(const std::string& name) const {
    std::ifstream file(dir_.file(name), std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    const auto* const begin = reinterpret_cast<const std::byte*>(text.data());
    return {begin, begin + text.size()};
  }
  [[nodiscard]] Expected<std::unique_ptr<blockdev::BlockNode>> open() const {
    return blockdev::open_image({.path = dir_.file("disk.qcow2"),
                                 .format = blockdev::ImageFormat::kQcow2,
                                 .cache = blockdev::CacheMode::kWriteback});
  }
  static testing::Context context() { return testing::Context(*aio::EngineSet::create({}, {})); }

  test::TempDir dir_;
};

TEST_F(Qcow2DataFile, holds_the_data_at_the_guests_offsets) {
  make(false);
  const Bytes data(70000 / 512 * 512, std::byte{0x5a});
  constexpr std::uint64_t kAt = 3 * 65536 + 1024;
  {
    auto node = open();
    ASSERT_TRUE(node) << node.error().message;
    testing::Context guest = context();
    EXPECT_EQ(guest.write(**node, kAt, data), 0);
    EXPECT_EQ(guest.read(**node, kAt, data.size()), data);
    EXPECT_EQ(guest.flush(**node), 0);
  }
  const Bytes left = load("data.raw");
  ASSERT_EQ(left.size(), std::size_t{1} << 20) << "as long as the disk";
  EXPECT_TRUE(std::equal(data.begin(), data.end(), left.begin() + kAt));
  auto node = open();
  ASSERT_TRUE(node) << node.error().message;
  testing::Context guest = context();
  EXPECT_EQ(guest.read(**node, kAt, data.size()), data);
  EXPECT_EQ(guest.read(**node, 0, 65536), Bytes(65536));
}

TEST_F(Qcow2DataFile, that_is_raw_reads_as_the_disk_does_without_the_mapping) {
  make(true);
  {
    auto node = open();
    ASSERT_TRUE(node) << node.error().message;
    testing::Context guest = context();
    EXPECT_EQ(guest.write(**node, 0, Bytes(4 * 65536, std::byte{0x77})), 0);
    EXPECT_EQ(guest.write_zeroes(**node, 65536, 65536, false), 0);
    EXPECT_EQ(guest.write_zeroes(**node, 2 * 65536 + 512, 1024, true), 0);
    EXPECT_EQ(guest.read(**node, 65536, 65536), Bytes(65536));
    EXPECT_EQ(guest.read(**node, 2 * 65536 + 512, 1024), Bytes(1024));
  }
  Bytes expected(4 * 65536, std::byte{0x77});
  std::fill_n(expected.begin() + 65536, 65536, std::byte{0});
  std::fill_n(expected.begin() + 2 * 65536 + 512, 1024, std::byte{0});
  Bytes left = load("data.raw");
  left.resize(expected.size());
  EXPECT_EQ(left, expected);
}

// What a cluster has beyond the end of the disk is not written: a block device may end there.
TEST_F(Qcow2DataFile, is_no_longer_than_a_disk_that_ends_within_a_cluster) {
  constexpr std::uint64_t kDiskBytes = (1 << 20) + 3 * kSectorBytes;
  for (const bool is_raw : {false, true}) {
    make(is_raw, true, kDiskBytes);
    auto node = open();
    ASSERT_TRUE(node) << node.error().message;
    testing::Context guest = context();
    const Bytes sector(kSectorBytes, std::byte{0x5a});
    EXPECT_EQ(guest.write(**node, kDiskBytes - 2 * kSectorBytes, sector), 0);
    EXPECT_EQ(guest.read(**node, kDiskBytes - 2 * kSectorBytes, kSectorBytes), sector);
    EXPECT_EQ(guest.read(**node, kDiskBytes - kSectorBytes, kSectorBytes), Bytes(kSectorBytes));
    EXPECT_EQ(load("data.raw").size(), kDiskBytes);
  }
}

TEST_F(Qcow2DataFile, must_be_named_and_there) {
  make(false, false);
  auto node = open();
  ASSERT_FALSE(node);
  EXPECT_THAT(node.error().message, HasSubstr("does not name its external data file"));
  make(false);
  std::filesystem::remove(dir_.file("data.raw"));
  node = open();
  ASSERT_FALSE(node);
  EXPECT_EQ(node.error().kind, ErrorKind::kNotFound);
  EXPECT_THAT(node.error().message, HasSubstr("the external data file of"));
}

}  // namespace
}  // namespace vblk::qcow2
