// Images that are damaged in one place, which must not get worse: the guest gets errors, the image
// is marked corrupt, the tables stay as they are.
#include <cerrno>
#include <cstdint>
#include <memory>
#include <random>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "blockdev/log.h"
#include "tests/qcow2/qcow2_rig.h"

namespace vblk::qcow2 {
namespace {

using testing::Bytes;
using testing::get_be;
using ::testing::HasSubstr;
using testing::ImageSpec;
using testing::put_be;
using testing::Rig;

constexpr std::uint64_t kCopied = std::uint64_t{1} << 63;
constexpr std::uint64_t kOffsets = 0x00ff'ffff'ffff'fe00;
constexpr std::uint64_t kCluster = 4096;

class DamagedImage : public ::testing::Test {
 protected:
  void SetUp() override { log::set_level(log::Level::kOff); }

  // A disk of 64 clusters, all mapped.
  static Bytes image(ImageSpec spec = {}) {
    spec.cluster_bits = 12;
    spec.size_bytes = 64 * kCluster;
    if (spec.mapped_percent == 0) spec.mapped_percent = 100;
    std::mt19937_64 random(1);
    return testing::format_image(spec, random).bytes;
  }
  static std::uint64_t l1_table(const Bytes& bytes) { return get_be(bytes, 40, 8); }
  static std::uint64_t l2_table(const Bytes& bytes) {
    return get_be(bytes, l1_table(bytes), 8) & kOffsets;
  }
  static std::uint64_t refcount_table(const Bytes& bytes) { return get_be(bytes, 48, 8); }
  static bool is_marked_corrupt(const Bytes& bytes) { return (get_be(bytes, 72, 8) & 2) != 0; }
  static Bytes cluster_at(const Bytes& bytes, std::uint64_t offset) {
    const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(offset);
    return {begin, begin + kCluster};
  }
  static Bytes data(std::uint64_t bytes = kCluster) { return Bytes(bytes, std::byte{0x5a}); }
};

TEST_F(DamagedImage, without_refcounts_keeps_its_header) {
  ImageSpec spec;
  spec.mapped_percent = 1;
  Bytes bytes = image(spec);
  put_be(bytes, refcount_table(bytes), 8, 0);
  Rig rig(bytes, {}, {});
  ASSERT_NE(rig.node, nullptr) << rig.error;
  EXPECT_EQ(rig.contexts[0]->write(*rig.node, 40 * kCluster, data()), EIO);
  rig.close();
  const Bytes left = rig.disk.current();
  EXPECT_EQ(get_be(left, 0, 4), 0x514649fbU);
  EXPECT_TRUE(is_marked_corrupt(left));
  using Unflushed = aio::SimulatedDisk::Unflushed;
  EXPECT_TRUE(is_marked_corrupt(rig.disk.after_power_cut(1, Unflushed::kLost))) << "for good";
}

TEST_F(DamagedImage, whose_zero_cluster_has_a_table_for_space_keeps_that_table) {
  Bytes bytes = image();
  const std::uint64_t table = l1_table(bytes);
  put_be(bytes, l2_table(bytes), 8, table | kCopied | 1);
  Rig rig(bytes, {}, {});
  ASSERT_NE(rig.node, nullptr) << rig.error;
  EXPECT_EQ(rig.contexts[0]->write(*rig.node, 0, data()), EIO);
  rig.close();
  EXPECT_EQ(cluster_at(rig.disk.current(), table), cluster_at(bytes, table));
  EXPECT_TRUE(is_marked_corrupt(rig.disk.current()));
}

TEST_F(DamagedImage, whose_zero_cluster_has_space_beyond_the_end_refuses_to_write_there) {
  Bytes bytes = image();
  put_be(bytes, l2_table(bytes), 8, (bytes.size() + 8 * kCluster) | kCopied | 1);
  Rig rig(bytes, {}, {});
  ASSERT_NE(rig.node, nullptr) << rig.error;
  EXPECT_EQ(rig.contexts[0]->write(*rig.node, 0, data()), EIO);
  EXPECT_TRUE(is_marked_corrupt(rig.disk.current()));
}

TEST_F(DamagedImage, that_maps_a_table_as_data_neither_overwrites_nor_punches_it) {
  Bytes bytes = image();
  const std::uint64_t table = l1_table(bytes);
  put_be(bytes, l2_table(bytes), 8, table | kCopied);
  {
    Rig rig(bytes, {}, {});
    ASSERT_NE(rig.node, nullptr) << rig.error;
    EXPECT_EQ(rig.contexts[0]->write(*rig.node, 0, data()), EIO);
    rig.close();
    EXPECT_EQ(cluster_at(rig.disk.current(), table), cluster_at(bytes, table));
    EXPECT_TRUE(is_marked_corrupt(rig.disk.current()));
  }
  Rig rig(bytes, {}, {});
  ASSERT_NE(rig.node, nullptr) << rig.error;
  // A discard is a hint; what it frees is looked at when the flush has made it free.
  EXPECT_EQ(rig.contexts[0]->discard(*rig.node, 0, kCluster), 0);
  EXPECT_EQ(rig.contexts[0]->flush(*rig.node), 0);
  rig.close();
  EXPECT_EQ(cluster_at(rig.disk.current(), table), cluster_at(bytes, table));
  EXPECT_TRUE(is_marked_corrupt(rig.disk.current()));
}

TEST_F(DamagedImage, with_an_entry_that_is_not_valid_frees_nothing_by_it) {
  Bytes bytes = image();
  const std::uint64_t entry = l2_table(bytes) + 8;
  // Clusters 1 to 3 are shared, so that they are copied together; 2 names an odd place.
  for (unsigned i = 0; i < 3; ++i) {
    const std::uint64_t host = get_be(bytes, entry + i * 8, 8) & ~kCopied;
    put_be(bytes, entry + i * 8, 8, i == 1 ? host + 512 : host);
  }
  Rig rig(bytes, {}, {});
  ASSERT_NE(rig.node, nullptr) << rig.error;
  EXPECT_EQ(rig.contexts[0]->write(*rig.node, kCluster, data(3 * kCluster)), EIO);
  rig.close();
  EXPECT_EQ(get_be(rig.disk.current(), entry + 8, 8), get_be(bytes, entry + 8, 8));
  EXPECT_TRUE(is_marked_corrupt(rig.disk.current()));
}

TEST_F(DamagedImage, that_was_not_closed_and_names_an_l2_table_twice_is_not_recounted_for_ever) {
  ImageSpec spec;
  spec.lazy_refcounts = true;
  Bytes bytes = image(spec);
  put_be(bytes, 72, 8, 1);  // the dirty bit
  put_be(bytes, 36, 4, 64);
  for (unsigned i = 1; i < 64; ++i)
    put_be(bytes, l1_table(bytes) + i * 8, 8, get_be(bytes, l1_table(bytes), 8));
  const Rig rig(bytes, {}, {});
  EXPECT_EQ(rig.node, nullptr);
  EXPECT_THAT(rig.error, HasSubstr("twice"));
}

TEST_F(DamagedImage, that_was_not_closed_and_has_an_l1_table_for_many_snapshots_is_not_recounted) {
  ImageSpec spec;
  spec.lazy_refcounts = true;
  spec.snapshot = true;
  Bytes bytes = image(spec);
  put_be(bytes, 72, 8, 1);
  const std::uint64_t snapshots = get_be(bytes, 64, 8);
  constexpr std::uint64_t kEntryBytes = 64;
  for (unsigned i = 1; i < 40; ++i) {
    std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(snapshots), kEntryBytes,
                bytes.begin() + static_cast<std::ptrdiff_t>(snapshots + i * kEntryBytes));
  }
  put_be(bytes, 60, 4, 40);
  const Rig rig(bytes, {}, {});
  EXPECT_EQ(rig.node, nullptr);
  EXPECT_THAT(rig.error, HasSubstr("shares a cluster"));
}

}  // namespace
}  // namespace vblk::qcow2
