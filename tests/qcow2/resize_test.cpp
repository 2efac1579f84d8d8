// Disks that become larger and smaller while a guest works on them.
//
// VBLK_RESIZE_RUNS: how many random images in each test. VBLK_TEST_SEED repeats one.
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "blockdev/log.h"
#include "tests/qcow2/guest.h"
#include "tests/qcow2/qcow2_rig.h"
#include "tests/support/run_count.h"
#include "tests/support/seed.h"

namespace vblk::qcow2 {
namespace {

using blockdev::BlockOperation;
using testing::check_image;
using testing::CheckedImage;
using testing::format_image;
using testing::FormattedImage;
using testing::ImageFiles;
using testing::ImageSpec;
using testing::kSectorBytes;
using testing::Rig;
using testing::RigOptions;
using testing::Tags;
using testing::TestRequest;

int run_count(int otherwise) { return test::run_count("VBLK_RESIZE_RUNS", otherwise); }

// A change of size under way.
struct Resize {
  Resize(Rig& rig, std::uint64_t size_bytes) {
    rig.node->resize(size_bytes, **rig.contexts.front(),
                     [this](Expected<void> result) { outcome.emplace(std::move(result)); });
  }
  std::optional<Expected<void>> outcome;
};

class ResizedDisk : public ::testing::Test {
 protected:
  void SetUp() override { log::set_level(log::Level::kOff); }

  // Opens an image; the one before is closed.
  void open(const ImageFiles& files, const Tags& backing, const RigOptions& options) {
    rig_.reset();
    backing_ = backing;
    rig_ = std::make_unique<Rig>(files, backing, options);
    ASSERT_NE(rig_->node, nullptr) << rig_->error;
  }
  void resize(std::uint64_t size_bytes) {
    Resize resize(*rig_, size_bytes);
    rig_->settle();
    ASSERT_TRUE(resize.outcome.has_value()) << "it never ends";
    ASSERT_TRUE(resize.outcome->has_value()) << resize.outcome->error().message;
    EXPECT_EQ(rig_->node->size_bytes(), size_bytes);
  }
  Error refusal(std::uint64_t size_bytes) {
    const std::uint64_t before = rig_->node->size_bytes();
    Resize resize(*rig_, size_bytes);
    rig_->settle();
    EXPECT_TRUE(resize.outcome.has_value());
    EXPECT_FALSE(resize.outcome->has_value());
    EXPECT_EQ(rig_->node->size_bytes(), before);
    return resize.outcome->has_value() ? Error{} : resize.outcome->error();
  }
  // What is new of it.
  void preallocate(std::uint64_t sector, std::uint64_t end, bool takes_space) {
    std::optional<int> error;
    testing::begin(rig_->node->allocate(**rig_->contexts.front(), sector * kSectorBytes,
                                        (end - sector) * kSectorBytes, takes_space),
                   error);
    rig_->settle();
    ASSERT_EQ(error, 0);
  }
  ImageFiles close() {
    rig_->close();
    return rig_->files();
  }
  void write(std::uint64_t sector, std::uint64_t count, std::uint64_t tag, Tags& model) {
    const Tags tags(count, tag);
    std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(sector), count, tag);
    ASSERT_EQ(
        rig_->contexts.front()->write(*rig_->node, sector * kSectorBytes, testing::bytes_of(tags)),
        0);
  }

  std::unique_ptr<Rig> rig_;
  Tags backing_;
};

ImageSpec small_spec(std::uint64_t size_bytes) {
  ImageSpec spec;
  spec.cluster_bits = 9;
  spec.size_bytes = size_bytes;
  spec.mapped_percent = 70;
  return spec;
}

TEST_F(ResizedDisk, keeps_what_it_holds_and_shows_zeroes_where_it_is_new) {
  std::mt19937_64 seeds(test::test_seed());
  for (int run = 0; run < run_count(60) && !HasFailure(); ++run) {
    const std::uint64_t seed = seeds();
    std::mt19937_64 random(seed);
    ImageSpec spec = testing::random_spec(random);
    if (spec.version == 2) spec.snapshot = false;
    SCOPED_TRACE(fmt::format("run {}, seed {}: {}", run, seed, spec.to_string()));
    const FormattedImage formatted = format_image(spec, random);
    const RigOptions options = testing::random_rig(random);
    ASSERT_NO_FATAL_FAILURE(open(formatted.files(), formatted.backing, options));
    Tags model = formatted.disk;
    const Tags snapshot = spec.snapshot ? formatted.disk : Tags{};
    for (unsigned step = 0; step < 12; ++step) {
      const std::uint64_t largest = std::min<std::uint64_t>(
          spec.size_bytes / kSectorBytes * 4, (std::uint64_t{4} << 20) / kSectorBytes);
      const std::uint64_t sectors = 1 + random() % largest;
      ASSERT_NO_FATAL_FAILURE(resize(sectors * kSectorBytes)) << "step " << step;
      if (sectors > model.size() && random() % 2 == 0) {
        ASSERT_NO_FATAL_FAILURE(preallocate(model.size(), sectors, random() % 2 == 0));
      }
      model.resize(sectors, 0);
      for (std::uint64_t tag = 1; tag <= 3; ++tag) {
        const std::uint64_t first = random() % sectors;
        const std::uint64_t count = 1 + random() % std::min<std::uint64_t>(64, sectors - first);
        ASSERT_NO_FATAL_FAILURE(write(first, count, 0x1000 * (step + 1) + tag, model));
      }
      ASSERT_EQ(testing::tags_of(rig_->read_all()), model) << "step " << step;
      if (random() % 3 != 0) continue;
      const ImageFiles files = close();
      const CheckedImage checked = check_image(files, formatted.backing);
      ASSERT_EQ(checked.errors, std::vector<std::string>{}) << "step " << step;
      ASSERT_EQ(checked.leaks, 0U) << "step " << step;
      ASSERT_EQ(checked.disk, model) << "step " << step;
      ASSERT_EQ(checked.snapshot, snapshot) << "step " << step;
      // What is there behind the end of the disk is nobody's.
      if (spec.data_file == testing::DataFile::kRaw) {
        Tags in_file = testing::tags_of(files.data_file);
        in_file.resize(model.size());
        ASSERT_EQ(in_file, model) << "step " << step;
      }
      ASSERT_NO_FATAL_FAILURE(open(files, formatted.backing, options));
    }
  }
}

// With small clusters, an L1 table takes more of them than a refcount block counts.
TEST_F(ResizedDisk, gets_an_l1_table_that_is_larger_than_a_refcount_block_counts) {
  using enum testing::SimulatedDisk::Unflushed;
  constexpr std::uint64_t kNewBytes = std::uint64_t{160} << 20;
  std::mt19937_64 random(test::test_seed());
  ImageSpec spec = small_spec(std::uint64_t{64} << 10);
  spec.refcount_order = 6;
  const FormattedImage formatted = format_image(spec, random);
  ASSERT_NO_FATAL_FAILURE(open(formatted.files(), formatted.backing, {.l2_cache_bytes = 1}));
  Resize resize(*rig_, kNewBytes);
  int cuts = 0;
  for (std::uint64_t steps = 0; !resize.outcome && steps < 100'000; ++steps) {
    if ((*rig_->contexts.front())->poll() == 0) continue;
    const CheckedImage checked =
        check_image(rig_->files_after_power_cut(random(), kBySector), formatted.backing);
    ASSERT_EQ(checked.errors, std::vector<std::string>{});
    ++cuts;
  }
  ASSERT_TRUE(resize.outcome.has_value()) << "it never ends";
  ASSERT_TRUE(resize.outcome->has_value()) << resize.outcome->error().message;
  EXPECT_GT(cuts, 6);
  Tags model = formatted.disk;
  model.resize(kNewBytes / kSectorBytes, 0);
  write(model.size() - 9, 9, 0x55, model);
  const CheckedImage checked = check_image(close(), formatted.backing);
  EXPECT_EQ(checked.errors, std::vector<std::string>{});
  EXPECT_EQ(checked.leaks, 0U);
  EXPECT_EQ(checked.disk, model);
}

TEST_F(ResizedDisk, has_old_or_new_size_after_a_power_cut_and_no_errors) {
  using enum testing::SimulatedDisk::Unflushed;
  std::mt19937_64 seeds(test::test_seed());
  int cuts = 0;
  for (int run = 0; run < run_count(30) && !HasFailure(); ++run) {
    const std::uint64_t seed = seeds();
    std::mt19937_64 random(seed);
    ImageSpec spec = random() % 2 == 0 ? small_spec(16384 + random() % 4096 * kSectorBytes)
                                       : testing::random_spec(random);
    if (spec.version == 2) spec.snapshot = false;
    SCOPED_TRACE(fmt::format("run {}, seed {}: {}", run, seed, spec.to_string()));
    const FormattedImage formatted = format_image(spec, random);
    ASSERT_NO_FATAL_FAILURE(
        open(formatted.files(), formatted.backing, testing::random_rig(random)));
    Tags model = formatted.disk;
    // Some tables that no flush has brought to the disk yet.
    write(random() % model.size(), 1, 0x77, model);
    ASSERT_EQ(rig_->contexts.front()->flush(*rig_->node), 0);
    const std::uint64_t old_sectors = model.size();
    const std::uint64_t new_sectors = 1 + random() % (old_sectors * 3);
    Resize resize(*rig_, new_sectors * kSectorBytes);
    std::uint64_t idle_steps = 0;
    while (!resize.outcome && idle_steps < 100'000) {
      testing::Context& context = *rig_->contexts[random() % rig_->contexts.size()];
      idle_steps = context->poll() == 0 ? idle_steps + 1 : 0;
      if (random() % 3 != 0) continue;
      for (const auto fate : {kLost, kKept, kByWrite, kBySector}) {
        const CheckedImage checked =
            check_image(rig_->files_after_power_cut(random(), fate), formatted.backing);
        ASSERT_EQ(checked.errors, std::vector<std::string>{});
        const std::uint64_t sectors = checked.disk.size();
        ASSERT_TRUE(sectors == old_sectors || sectors == new_sectors) << sectors;
        Tags expected = model;
        expected.resize(sectors, 0);
        ASSERT_EQ(checked.disk, expected) << "of " << old_sectors << " becoming " << new_sectors;
        ++cuts;
      }
    }
    ASSERT_TRUE(resize.outcome.has_value()) << "it never ends";
    ASSERT_TRUE(resize.outcome->has_value()) << resize.outcome->error().message;
    // It has been promised now.
    model.resize(new_sectors, 0);
    ASSERT_EQ(check_image(rig_->files_after_power_cut(random(), kLost), formatted.backing).disk,
              model);
  }
  EXPECT_GT(cuts, 100);
}

TEST_F(ResizedDisk, that_becomes_smaller_waits_for_requests_beyond_its_end) {
  std::mt19937_64 seeds(test::test_seed());
  int written = 0;
  for (int run = 0; run < run_count(40) && !HasFailure(); ++run) {
    std::mt19937_64 random(seeds());
    const FormattedImage formatted = format_image(small_spec(std::uint64_t{1} << 19), random);
    RigOptions options = testing::random_rig(random);
    options.context_count = 3;
    ASSERT_NO_FATAL_FAILURE(open(formatted.files(), {}, options));
    const std::uint64_t sectors = formatted.disk.size();
    const std::uint64_t left = sectors / 2;
    std::vector<std::unique_ptr<TestRequest>> requests;
    for (std::uint64_t i = 0; i < 40; ++i) {
      auto request = std::make_unique<TestRequest>(BlockOperation::kWrite,
                                                   (left + i * 8) * kSectorBytes, 4 * kSectorBytes);
      request->use_plain_memory();
      request->fill(testing::bytes_of(Tags(4, 0xbad)));
      rig_->contexts[random() % 3]->start(*rig_->node, *request);
      requests.push_back(std::move(request));
    }
    for (std::uint64_t i = random() % 20; i > 0; --i) (*rig_->contexts[random() % 3])->poll();
    resize(left * kSectorBytes);
    for (const auto& request : requests) {
      ASSERT_EQ(request->completions, 1);
      ASSERT_TRUE(request->error == 0 || request->error == EINVAL) << request->error;
      written += request->error == 0 ? 1 : 0;
    }
    TestRequest late(BlockOperation::kRead, left * kSectorBytes, kSectorBytes);
    late.use_plain_memory();
    EXPECT_EQ(rig_->contexts[1]->run(*rig_->node, late), EINVAL);
    Tags model = formatted.disk;
    model.resize(left);
    ASSERT_EQ(testing::tags_of(rig_->read_all()), model);
    // What was written there is gone, and its clusters are free.
    resize(sectors * kSectorBytes);
    model.resize(sectors, 0);
    ASSERT_EQ(testing::tags_of(rig_->read_all()), model);
    const CheckedImage checked = check_image(close(), {});
    ASSERT_EQ(checked.errors, std::vector<std::string>{});
    ASSERT_EQ(checked.leaks, 0U);
    ASSERT_EQ(checked.disk, model);
  }
  EXPECT_GT(written, 0);
}

TEST_F(ResizedDisk, keeps_its_size_after_an_error_of_the_disk) {
  std::mt19937_64 seeds(test::test_seed());
  int failures = 0;
  for (int run = 0; run < run_count(60) && !HasFailure(); ++run) {
    const std::uint64_t seed = seeds();
    SCOPED_TRACE(fmt::format("run {}, seed {}", run, seed));
    std::mt19937_64 random(seed);
    const FormattedImage formatted = format_image(small_spec(40960 + random() % 999 * 512), random);
    ASSERT_NO_FATAL_FAILURE(open(formatted.files(), {}, testing::random_rig(random)));
    std::uint64_t countdown = random() % 12;
    rig_->disk.set_fault_plan([&countdown](const aio::IoRequest&, std::uint64_t) {
      return countdown-- == 0 ? std::optional(EIO) : std::nullopt;
    });
    const std::uint64_t old_sectors = formatted.disk.size();
    const std::uint64_t new_sectors = old_sectors * (2 + random() % 40);
    Resize resize(*rig_, new_sectors * kSectorBytes);
    rig_->settle();
    rig_->disk.set_fault_plan(nullptr);
    ASSERT_TRUE(resize.outcome.has_value());
    if (resize.outcome->has_value()) continue;
    ++failures;
    EXPECT_EQ(resize.outcome->error().kind, ErrorKind::kIo) << resize.outcome->error().message;
    EXPECT_EQ(rig_->node->size_bytes(), old_sectors * kSectorBytes);
    EXPECT_EQ(testing::tags_of(rig_->read_all()), formatted.disk);
    const CheckedImage checked = check_image(close(), {});
    EXPECT_EQ(checked.errors, std::vector<std::string>{});
    EXPECT_EQ(checked.disk, formatted.disk);
  }
  EXPECT_GT(failures, 5);
}

TEST_F(ResizedDisk, refuses_sizes_that_cannot_be) {
  std::mt19937_64 random(1);
  const FormattedImage formatted = format_image(small_spec(65536), random);
  ASSERT_NO_FATAL_FAILURE(open(formatted.files(), {}, {}));
  EXPECT_EQ(refusal(0).kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(refusal(65536 + 100).kind, ErrorKind::kInvalidArgument);
  // 4 Mi entries of 32 KiB.
  EXPECT_EQ(refusal((std::uint64_t{1} << 37) + 512).kind, ErrorKind::kNotSupported);
  EXPECT_EQ(testing::tags_of(rig_->read_all()), formatted.disk);

  Resize first(*rig_, 2 * 65536);
  Resize second(*rig_, 3 * 65536);
  ASSERT_TRUE(second.outcome.has_value());
  EXPECT_EQ(second.outcome->error().kind, ErrorKind::kBusy);
  rig_->settle();
  ASSERT_TRUE(first.outcome.has_value() && first.outcome->has_value());
  ASSERT_NO_FATAL_FAILURE(resize(3 * 65536));

  ASSERT_NO_FATAL_FAILURE(open(formatted.files(), {}, {.read_only = true}));
  EXPECT_EQ(refusal(2 * 65536).kind, ErrorKind::kPermission);

  ImageSpec spec = small_spec(65536);
  spec.version = 2;
  spec.snapshot = true;
  const FormattedImage version_2 = format_image(spec, random);
  ASSERT_NO_FATAL_FAILURE(open(version_2.files(), {}, {}));
  EXPECT_EQ(refusal(2 * 65536).kind, ErrorKind::kNotSupported);
}

}  // namespace
}  // namespace vblk::qcow2
