// What is done to whole clusters for who fills an image that there is: stored compressed, and given
// space before anything is written. That power cuts do no harm to the first is with
// power_cut_test.cpp, whose guests write so, too; that a disk that grows keeps what it holds, with
// resize_test.cpp.
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "blockdev/log.h"
#include "tests/qcow2/qcow2_rig.h"

namespace vblk::qcow2 {
namespace {

using testing::begin;
using testing::Bytes;
using testing::check_image;
using testing::CheckedImage;
using testing::format_image;
using testing::FormattedImage;
using testing::ImageSpec;
using testing::kSectorBytes;
using testing::Rig;
using testing::RigOptions;
using testing::Tags;
using Kind = blockdev::RangeStatus::Kind;

class WholeClusters : public ::testing::Test {
 protected:
  void SetUp() override { log::set_level(log::Level::kOff); }

  void open(const ImageSpec& spec, const RigOptions& options = {}) {
    std::mt19937_64 random(1);
    formatted_ = format_image(spec, random);
    rig_ = std::make_unique<Rig>(formatted_.files(), formatted_.backing, options);
    ASSERT_NE(rig_->node, nullptr) << rig_->error;
  }
  // All units at once, or one after the other.
  void fill(const std::vector<std::uint64_t>& clusters, std::uint64_t tag, bool at_once,
            Tags& model) {
    const std::uint64_t unit = rig_->node->compressed_unit_bytes();
    std::vector<Bytes> content;
    std::vector<std::optional<int>> outcomes(clusters.size());
    for (const std::uint64_t cluster : clusters) {
      Tags tags;
      for (std::uint64_t i = 0; i < unit / kSectorBytes; ++i) {
        const std::uint64_t sector = cluster * unit / kSectorBytes + i;
        tags.push_back(sector < model.size() ? tag + sector : 0);
        if (sector < model.size()) model[sector] = tags.back();
      }
      content.push_back(testing::bytes_of(tags));
    }
    for (std::size_t i = 0; i < clusters.size(); ++i) {
      IoContext& context = **rig_->contexts[i % rig_->contexts.size()];
      begin(rig_->node->write_compressed(context, clusters[i] * unit, content[i]), outcomes[i]);
      if (!at_once) rig_->settle();
    }
    rig_->settle();
    for (const auto& outcome : outcomes) ASSERT_EQ(outcome, 0);
  }
  [[nodiscard]] blockdev::RangeStatus status(std::uint64_t offset, std::uint64_t length) {
    blockdev::RangeStatus found;
    std::optional<int> error;
    begin(rig_->node->range_status(**rig_->contexts.front(), offset, length, found), error);
    rig_->settle();
    EXPECT_EQ(error, 0);
    return found;
  }
  [[nodiscard]] std::optional<int> write(std::uint64_t offset, Bytes& unit) {
    std::optional<int> error;
    begin(rig_->node->write_compressed(**rig_->contexts.front(), offset, unit), error);
    rig_->settle();
    return error;
  }
  [[nodiscard]] std::optional<int> allocate_all(bool takes_space) {
    std::optional<int> error;
    begin(rig_->node->allocate(**rig_->contexts.front(), 0, rig_->node->size_bytes(), takes_space),
          error);
    rig_->settle();
    return error;
  }
  // Closed, without errors or leaks, and as the model has it.
  void expect_sound(const Tags& model) {
    ASSERT_EQ(testing::tags_of(rig_->read_all()), model);
    rig_->close();
    const CheckedImage checked = check_image(rig_->files(), formatted_.backing);
    EXPECT_EQ(checked.errors, std::vector<std::string>{});
    EXPECT_EQ(checked.leaks, 0U);
    EXPECT_EQ(checked.disk, model);
  }

  FormattedImage formatted_;
  std::unique_ptr<Rig> rig_;
};

std::vector<std::uint64_t> all_clusters(const ImageSpec& spec) {
  std::vector<std::uint64_t> clusters;
  for (std::uint64_t at = 0; at < spec.size_bytes; at += std::uint64_t{1} << spec.cluster_bits)
    clusters.push_back(at >> spec.cluster_bits);
  return clusters;
}

TEST_F(WholeClusters, are_stored_compressed_as_many_in_a_cluster_as_can_be_counted) {
  for (unsigned order = 0; order <= 6; ++order) {
    for (const bool extended : {false, true}) {
      ImageSpec spec;
      spec.cluster_bits = extended ? 14 : 12;
      spec.refcount_order = order;
      spec.extended_l2 = extended;
      spec.zstd = extended;
      spec.size_bytes = (std::uint64_t{64} << spec.cluster_bits) - 3 * kSectorBytes;
      SCOPED_TRACE(spec.to_string());
      ASSERT_NO_FATAL_FAILURE(open(spec, {.context_count = 2}));
      const std::uint64_t before = rig_->files().image.size();
      Tags model = formatted_.disk;
      const auto clusters = all_clusters(spec);
      ASSERT_NO_FATAL_FAILURE(fill(clusters, 0x1000, true, model));
      for (const std::uint64_t cluster : {std::uint64_t{0}, std::uint64_t{31}, std::uint64_t{63}}) {
        const auto found = status(cluster << spec.cluster_bits, kSectorBytes);
        EXPECT_EQ(found.kind, Kind::kData);
        EXPECT_FALSE(found.file_offset.has_value()) << "it is not compressed";
      }
      ASSERT_NO_FATAL_FAILURE(expect_sound(model));
      // Where a refcount has one bit, each has its own cluster.
      const std::uint64_t used = (rig_->files().image.size() - before) >> spec.cluster_bits;
      if (order == 0) {
        EXPECT_GE(used, clusters.size());
      } else if (order >= 2) {
        EXPECT_LT(used, clusters.size() * 3 / 4);
      }
    }
  }
}

TEST_F(WholeClusters, that_are_written_again_give_back_what_they_had) {
  for (const unsigned bits : {9U, 12U, 16U}) {
    ImageSpec spec;
    spec.cluster_bits = bits;
    spec.size_bytes = std::uint64_t{48} << bits;
    spec.mapped_percent = 60;
    spec.compressed_percent = 50;
    spec.snapshot = true;
    SCOPED_TRACE(spec.to_string());
    ASSERT_NO_FATAL_FAILURE(open(spec));
    Tags model = formatted_.disk;
    const auto clusters = all_clusters(spec);
    for (std::uint64_t round = 1; round <= 5; ++round) {
      ASSERT_NO_FATAL_FAILURE(fill(clusters, round << 32, round % 2 == 0, model));
      ASSERT_EQ(rig_->contexts.front()->flush(*rig_->node), 0);
      rig_->settle();
      // In between, as guests write.
      const Tags tags(3, round);
      std::ranges::copy(tags, model.begin() + 20);
      ASSERT_EQ(
          rig_->contexts.front()->write(*rig_->node, 20 * kSectorBytes, testing::bytes_of(tags)),
          0);
    }
    ASSERT_NO_FATAL_FAILURE(expect_sound(model));
  }
}

TEST_F(WholeClusters, that_compressing_does_not_make_smaller_are_stored_as_they_are) {
  ImageSpec spec;
  ASSERT_NO_FATAL_FAILURE(open(spec));
  std::mt19937_64 random(7);
  Bytes noise(rig_->node->compressed_unit_bytes());
  std::ranges::generate(noise, [&random] { return static_cast<std::byte>(random()); });
  ASSERT_EQ(write(noise.size(), noise), 0);
  EXPECT_TRUE(status(noise.size(), noise.size()).file_offset.has_value());
  EXPECT_EQ(rig_->contexts.front()->read(*rig_->node, noise.size(), noise.size()), noise);
}

TEST_F(WholeClusters, beside_their_places_or_in_a_data_file_are_refused) {
  ImageSpec spec;
  ASSERT_NO_FATAL_FAILURE(open(spec));
  Bytes unit(rig_->node->compressed_unit_bytes());
  for (const std::uint64_t offset : {std::uint64_t{512}, spec.size_bytes})
    EXPECT_EQ(write(offset, unit), EINVAL) << offset;
  spec.data_file = testing::DataFile::kMapped;
  ASSERT_NO_FATAL_FAILURE(open(spec));
  EXPECT_EQ(rig_->node->compressed_unit_bytes(), 0U);
}

TEST_F(WholeClusters, get_their_space_and_read_as_zeroes) {
  for (const auto data_file :
       {testing::DataFile::kNone, testing::DataFile::kMapped, testing::DataFile::kRaw}) {
    for (const bool extended : {false, true}) {
      ImageSpec spec;
      spec.cluster_bits = extended ? 14 : 12;
      spec.extended_l2 = extended;
      spec.data_file = data_file;
      spec.size_bytes = (std::uint64_t{40} << spec.cluster_bits) - kSectorBytes;
      SCOPED_TRACE(spec.to_string());
      for (const bool takes_space : {false, true}) {
        ASSERT_NO_FATAL_FAILURE(open(spec));
        Tags model = formatted_.disk;
        model.assign(model.size(), 0);
        ASSERT_EQ(allocate_all(takes_space), 0);
        const auto found = status(0, spec.size_bytes);
        EXPECT_EQ(found.kind, Kind::kData);
        EXPECT_TRUE(found.file_offset.has_value());
        ASSERT_NO_FATAL_FAILURE(expect_sound(model));
      }
    }
  }
}

// What has been something else before is written.
TEST_F(WholeClusters, that_are_used_again_read_as_zeroes) {
  ImageSpec spec;
  spec.cluster_bits = 12;
  spec.size_bytes = std::uint64_t{64} << 12;
  spec.mapped_percent = 100;
  ASSERT_NO_FATAL_FAILURE(open(spec));
  Tags model(formatted_.disk.size(), 0);
  ASSERT_EQ(rig_->contexts.front()->discard(*rig_->node, 0, spec.size_bytes), 0);
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(rig_->contexts.front()->flush(*rig_->node), 0);
    rig_->settle();
  }
  ASSERT_EQ(allocate_all(false), 0);
  ASSERT_NO_FATAL_FAILURE(expect_sound(model));
}

}  // namespace
}  // namespace vblk::qcow2
