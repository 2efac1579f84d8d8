// Power cuts: a guest's random work on a simulated disk, the disk as a power cut would leave it at
// every flush and at many moments between, and what must then be true (an external data file is on
// a disk of its own, which loses its power at the same moment, and not the same writes):
//
//   - the image opens;
//   - an independent checker finds no refcount that is too low, no entry that points nowhere, no
//     COPIED flag that lies; leaks are allowed;
//   - every sector holds what was flushed, or something later that the guest wrote there;
//   - a snapshot is as it was;
//   - persistent bitmaps are right, or nothing says that they are;
//   - a raw data file is what the disk is, where nothing has to be mapped for that.
//
// And the death of the process alone, where the disk keeps all that was written: what the guest was
// told is done must be there then too, flushed or not, if that was asked for (outlives_process).
//
// VBLK_POWER_CUT_RUNS: how many random images, each with its random work, in each test.
// VBLK_TEST_SEED repeats one.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "blockdev/log.h"
#include "tests/qcow2/guest.h"
#include "tests/qcow2/guest_model.h"
#include "tests/qcow2/image_check.h"
#include "tests/qcow2/power_cut_run.h"
#include "tests/qcow2/qcow2_rig.h"
#include "tests/support/run_count.h"
#include "tests/support/seed.h"
#include "tests/support/temp_dir.h"

namespace vblk::qcow2 {
namespace {

using testing::Bytes;
using testing::check_image;
using testing::Context;
using testing::DiskWatch;
using testing::Guest;
using testing::GuestModel;
using testing::kSectorBytes;
using testing::PowerCutRun;
using testing::random_spec;
using testing::Scene;
using testing::SimulatedDisk;
using testing::spec_of_large_clusters;
using testing::spec_of_many_tables;
using testing::Tags;

int run_count(int otherwise) { return test::run_count("VBLK_POWER_CUT_RUNS", otherwise); }

class PowerCut : public ::testing::Test {
 protected:
  void SetUp() override { log::set_level(log::Level::kOff); }

  void run(int runs, Scene::MakeSpec make_spec, unsigned faults_permille = 0) {
    std::mt19937_64 seeds(test::test_seed());
    std::uint64_t cuts = 0;
    for (int i = 0; i < runs; ++i) {
      Scene scene(seeds(), make_spec);
      scene.cuts.faults_permille = faults_permille;
      scene.work.may_fail = faults_permille > 0;
      PowerCutRun run(scene);
      const std::string failure = run.run(3);
      cuts += run.cut_count();
      ASSERT_TRUE(failure.empty() && !HasFailure())
          << "run " << i << " (" << scene.to_string() << "): " << failure;
    }
    std::cout << cuts << " cuts in " << runs << " runs\n";
    EXPECT_GT(cuts, static_cast<std::uint64_t>(runs) * 10);
  }
};

TEST_F(PowerCut, leaves_an_image_without_errors_that_holds_what_was_flushed) {
  run(run_count(18), random_spec);
}

TEST_F(PowerCut, leaves_tables_that_came_and_went_through_small_caches_in_order) {
  run(run_count(4), spec_of_many_tables);
}

TEST_F(PowerCut, leaves_large_clusters_in_order) {
  std::mt19937_64 seeds(test::test_seed());
  for (int i = 0; i < run_count(2); ++i) {
    Scene scene(seeds(), spec_of_large_clusters);
    // Each look at it takes its time.
    scene.work.operations = 40;
    scene.work.length_sectors_max = 512;
    scene.cuts.percent = 1;
    scene.cuts.by_sector = 1;
    scene.cuts.reopen_percent = 10;
    PowerCutRun run(scene);
    const std::string failure = run.run(1);
    ASSERT_TRUE(failure.empty() && !HasFailure())
        << "run " << i << " (" << scene.to_string() << "): " << failure;
  }
}

TEST_F(PowerCut, after_errors_of_the_disk_leaves_an_image_without_errors) {
  run(run_count(10), random_spec, 10);
}

TEST_F(PowerCut, after_errors_of_the_disk_leaves_many_tables_without_errors) {
  run(run_count(3), spec_of_many_tables, 10);
}

// ---- The process alone.

// What a guest that knows nothing of it would go on with.
Scene scene_of_kills(std::uint64_t seed, bool many_tables) {
  Scene scene(seed, many_tables ? spec_of_many_tables : random_spec);
  scene.work.kill_takes_nothing = true;
  scene.work.outlives_process = true;
  scene.work.compressed_percent = 0;  // no guest's
  scene.cuts.percent = 10;
  return scene;
}

TEST_F(PowerCut, of_the_process_alone_takes_nothing_that_was_to_outlive_it) {
  std::mt19937_64 seeds(test::test_seed());
  for (int i = 0; i < run_count(10); ++i) {
    const Scene scene = scene_of_kills(seeds(), i % 4 == 0);
    PowerCutRun run(scene);
    const std::string failure = run.run(3);
    ASSERT_TRUE(failure.empty() && !HasFailure())
        << "run " << i << " (" << scene.to_string() << "): " << failure;
  }
}

TEST_F(PowerCut, finds_what_dies_with_the_process) {
  int found = 0;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    Scene scene = scene_of_kills(seed, true);
    scene.work.outlives_process = false;
    scene.work.flush_percent = 0;
    scene.work.through_percent = 0;
    PowerCutRun run(scene);
    found += run.run(1).empty() ? 0 : 1;
  }
  EXPECT_EQ(found, 6);
}

// ---- Another opinion.

TEST_F(PowerCut, leaves_images_in_which_qemu_img_finds_no_error) {
  if (std::system("qemu-img --version > /dev/null 2>&1") != 0) GTEST_SKIP() << "no qemu-img here";
  std::mt19937_64 seeds(test::test_seed());
  const test::TempDir dir;
  const auto save = [&dir](const std::string& name, const Bytes& bytes) {
    std::ofstream(dir.file(name), std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  };
  int checked = 0;
  for (int i = 0; checked < 3 * run_count(6); ++i) {
    const Scene scene(seeds(), i % 4 == 0 ? spec_of_many_tables : random_spec);
    PowerCutRun run(scene);
    run.takes_samples = true;
    ASSERT_EQ(run.run(1), "") << scene.to_string();
    if (!run.backing().empty()) save("backing.raw", testing::bytes_of(run.backing()));
    for (std::size_t sample = 0; sample < std::min<std::size_t>(3, run.samples().size());
         ++sample) {
      save("cut.qcow2", run.samples()[sample].image);
      save("data.raw", run.samples()[sample].data_file);
      // 3: leaks, which nearly all have.
      const int status = std::system(
          fmt::format("cd {} && (qemu-img check -q -f qcow2 cut.qcow2 || [ $? = 3 ]) > log 2>&1 && "
                      "qemu-img convert -f qcow2 -O raw cut.qcow2 disk.raw >> log 2>&1",
                      dir.file("."))
              .c_str());
      std::ifstream log(dir.file("log"));
      ASSERT_EQ(status, 0) << scene.to_string() << ": "
                           << std::string(std::istreambuf_iterator<char>(log), {});
      ++checked;
      std::ifstream file(dir.file("disk.raw"), std::ios::binary);
      const std::string text{std::istreambuf_iterator<char>(file), {}};
      const auto* const bytes = reinterpret_cast<const std::byte*>(text.data());
      ASSERT_EQ(testing::tags_of({bytes, text.size()}),
                check_image(run.samples()[sample], run.backing()).disk)
          << scene.to_string();
    }
  }
}

// ---- Canaries: what must be found.

TEST_F(PowerCut, finds_a_flush_that_is_none) {
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    Scene scene(seed);
    scene.rig.loses_flushes = true;
    scene.work.flush_percent = 20;
    scene.work.through_percent = 0;
    PowerCutRun run(scene);
    EXPECT_NE(run.run(3), "") << scene.to_string();
  }
}

TEST_F(PowerCut, finds_a_flush_of_a_data_file_that_is_none) {
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    Scene scene(seed);
    scene.spec.version = 3;
    scene.spec.snapshot = false;
    scene.spec.compressed_percent = 0;
    scene.spec.data_file = testing::DataFile::kMapped;
    scene.rig.data_file_loses_flushes = true;
    scene.work.flush_percent = 20;
    scene.work.through_percent = 0;
    PowerCutRun run(scene);
    EXPECT_NE(run.run(3), "") << scene.to_string();
  }
}

// Nothing is promised to the guest here, so that the order alone is at stake: without flushes
// between, tables reach the disk before what they name. `loses_flushes` off: the same work is well.
TEST_F(PowerCut, finds_metadata_that_is_written_out_of_order) {
  int found = 0;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    for (const bool lies : {false, true}) {
      Scene scene(seed, spec_of_many_tables);
      // With data elsewhere there is little that must be in order.
      scene.spec.data_file = testing::DataFile::kNone;
      scene.rig.loses_flushes = lies;
      scene.rig.l2_cache_bytes = 1;
      scene.rig.refcount_cache_bytes = 1;
      scene.work.operations = 300;
      scene.work.flush_percent = 0;
      scene.work.through_percent = 0;
      scene.work.hot_sectors = 0;
      scene.cuts.reopen_percent = 0;
      PowerCutRun run(scene);
      const std::string failure = run.run(1);
      EXPECT_TRUE(lies || failure.empty()) << scene.to_string() << ": " << failure;
      if (lies && !failure.empty()) ++found;
    }
  }
  EXPECT_EQ(found, 6);
}

// ---- The same for raw images.

std::string cut_raw_disk(bool loses_flushes, bool direct, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  constexpr std::uint64_t kSectors = 512;
  SimulatedDisk disk(
      {.size_bytes = kSectors * kSectorBytes, .seed = seed, .loses_flushes = loses_flushes});
  blockdev::RawNode node(
      blockdev::ImageFile::wrap(direct ? SimulatedDisk::kDirectFd : SimulatedDisk::kBufferedFd,
                                SimulatedDisk::kBufferedFd, kSectors * kSectorBytes, kSectorBytes,
                                false),
      {.name = "simulated"});
  std::vector<std::unique_ptr<Context>> contexts;
  for (std::uint64_t i = 0; i < 3; ++i)
    contexts.push_back(std::make_unique<Context>(
        std::make_unique<aio::EngineSet>(*aio::SimulatedEngine::create(disk, {.seed = seed + i}))));
  GuestModel model(Tags(kSectors, 0));
  std::uint32_t next_tag = 0;
  DiskWatch watch({&disk}, 0, seed);
  Guest guest(node, contexts, model, {.operations = 300}, random, next_tag);
  std::string failure;
  while (failure.empty() && guest.started() < 300) {
    guest.step(true);
    if (!std::exchange(watch.has_worked, false)) continue;
    const Tags tags = testing::tags_of(disk.after_power_cut(random()));
    for (std::uint64_t i = 0; i < kSectors && failure.empty(); ++i) {
      if (!model.may_hold(i, tags[i]))
        failure =
            fmt::format("sector {} holds {:#x} instead of one of{}", i, tags[i], model.describe(i));
    }
  }
  while (!guest.is_idle()) guest.step(false);
  return failure;
}

TEST_F(PowerCut, leaves_a_raw_disk_that_holds_what_was_flushed) {
  const std::uint64_t seed = test::test_seed();
  for (const bool direct : {false, true}) EXPECT_EQ(cut_raw_disk(false, direct, seed), "");
}

TEST_F(PowerCut, finds_a_flush_of_a_raw_disk_that_is_none) {
  for (const bool direct : {false, true}) EXPECT_NE(cut_raw_disk(true, direct, 1), "");
}

}  // namespace
}  // namespace vblk::qcow2
