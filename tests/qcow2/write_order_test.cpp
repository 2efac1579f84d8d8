// Canaries inside vblk: copies of the code that keeps the order of writes, each with a defect
// (mutants.py), under the same power cuts as the code itself. A defect that no cut brings to light
// is a hole in the test of power cuts.
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "blockdev/log.h"
#include "tests/qcow2/mutant.h"
#include "tests/qcow2/power_cut_run.h"

namespace vblk::qcow2 {
namespace {

using testing::DataFile;
using testing::kSectorBytes;
using testing::PowerCutRun;
using testing::Scene;

// Of the scenes that a defect needs, one in four shows it, or more.
constexpr std::uint64_t kScenesMax = 100;

// What there is much of.
enum class Kind : std::uint8_t {
  kManyTables,
  kSharedTables,
  kFreedClusters,
  kFullRefcountTable,
  kDataFile,
  kBitmaps,
  kCompressedWrites
};

Scene scene_of(Kind kind, std::uint64_t seed) {
  const bool many_tables =
      kind != Kind::kDataFile && kind != Kind::kBitmaps && kind != Kind::kCompressedWrites;
  Scene scene(seed, many_tables ? testing::spec_of_many_tables : testing::random_spec);
  testing::ImageSpec& spec = scene.spec;
  testing::Work& work = scene.work;
  spec.version = 3;
  spec.snapshot = many_tables && kind != Kind::kManyTables;
  spec.data_file = DataFile::kNone;
  spec.bitmap = kind == Kind::kBitmaps;
  scene.rig.context_count = 2;
  work.operations = 120;
  work.flush_percent = 5;
  work.through_percent = 0;
  work.hot_sectors = 0;
  work.compressed_percent = 0;
  scene.cuts.percent = 5;
  scene.cuts.reopen_percent = 0;
  switch (kind) {
    case Kind::kManyTables:
      break;
    case Kind::kSharedTables:
      // Data that is copied would have the tables wait as well.
      work.zero_percent = 50;
      work.discard_percent = 30;
      break;
    case Kind::kFreedClusters:
      // Only a moment shows it: many cuts, and so a small disk. What a snapshot shares is freed
      // when it is written.
      spec.size_bytes = std::uint64_t{128} << 10;
      spec.mapped_percent = 100;
      spec.compressed_percent = 20;
      scene.rig.l2_cache_bytes = 0;
      scene.rig.refcount_cache_bytes = 1;
      scene.cuts.percent = 100;
      scene.cuts.by_sector = 1;
      work.in_flight_max = 6;
      work.flush_percent = 25;
      work.discard_percent = 40;
      work.zero_percent = 0;
      work.length_sectors_max = 16;
      break;
    case Kind::kFullRefcountTable:
      // The table has one cluster and counts 64 x 64. The disk, its snapshot and their tables are
      // not many less.
      spec.refcount_order = 6;
      spec.size_bytes = 3840 * kSectorBytes;
      spec.mapped_percent = 100;
      spec.compressed_percent = 0;
      scene.cuts.percent = 100;
      scene.cuts.by_sector = 1;
      work.flush_percent = 0;
      work.operations = 40;
      work.length_sectors_max = 64;
      work.discard_percent = work.zero_percent = 0;
      break;
    case Kind::kDataFile:
      spec.data_file = DataFile::kMapped;
      spec.size_bytes = std::min(spec.size_bytes, std::uint64_t{256} << 10);
      spec.mapped_percent = 20;
      spec.compressed_percent = 0;
      scene.cuts.percent = 20;
      work.flush_percent = 15;
      break;
    case Kind::kBitmaps:
      // They stand at the beginning, until the first flush of anything.
      work.operations = 20;
      work.flush_percent = 0;
      scene.cuts.percent = 50;
      break;
    case Kind::kCompressedWrites:
      // Several fit into a cluster, and nothing else waits for data.
      spec.cluster_bits = 12;
      spec.extended_l2 = false;
      spec.size_bytes = std::uint64_t{512} << 10;
      spec.backing_bytes = 0;
      spec.snapshot = false;
      spec.mapped_percent = 0;
      work.compressed_percent = 70;
      work.discard_percent = work.zero_percent = 0;
      scene.cuts.percent = 20;
      break;
  }
  return scene;
}

struct Mutant {
  const char* name;
  Kind kind;
  std::uint64_t first_seed{1};
};

class BrokenWriteOrder : public ::testing::TestWithParam<Mutant> {
 protected:
  void SetUp() override { log::set_level(log::Level::kOff); }
};

// Without the defect nothing is found in the same scenes.
TEST_P(BrokenWriteOrder, is_found) {
  const Mutant& mutant = GetParam();
  bool is_found = false;
  for (std::uint64_t i = 0; i < kScenesMax && !is_found && !HasFailure(); ++i) {
    const std::uint64_t seed = mutant.first_seed + i;
    const Scene scene = scene_of(mutant.kind, seed);
    awake_mutant = mutant.name;
    is_found = !PowerCutRun(scene).run(1).empty();
    awake_mutant = {};
    EXPECT_EQ(PowerCutRun(scene).run(1), "") << "seed " << seed << ": " << scene.to_string();
  }
  EXPECT_TRUE(is_found);
}

INSTANTIATE_TEST_SUITE_P(
    Mutants, BrokenWriteOrder,
    ::testing::Values(Mutant{"mapping-does-not-wait-for-refcounts", Kind::kManyTables},
                      Mutant{"mapping-does-not-wait-for-data", Kind::kManyTables},
                      Mutant{"mapping-does-not-wait-for-data", Kind::kDataFile},
                      Mutant{"mapping-is-written-first", Kind::kManyTables},
                      Mutant{"refcount-table-does-not-wait-for-blocks", Kind::kManyTables},
                      Mutant{"data-file-is-not-flushed", Kind::kDataFile},
                      Mutant{"flush-leaves-out-the-last-barrier", Kind::kManyTables},
                      Mutant{"flush-leaves-out-the-last-barrier", Kind::kDataFile},
                      Mutant{"freed-meanwhile-is-free-at-once", Kind::kFreedClusters},
                      Mutant{"replaced-cluster-is-free-at-once", Kind::kFreedClusters},
                      Mutant{"copied-data-may-come-later", Kind::kManyTables},
                      Mutant{"copied-data-may-come-later", Kind::kDataFile},
                      Mutant{"copied-table-may-come-later", Kind::kSharedTables},
                      Mutant{"larger-refcount-table-may-come-later", Kind::kFullRefcountTable, 5},
                      Mutant{"bitmaps-are-given-up-later", Kind::kBitmaps},
                      Mutant{"compressed-data-may-come-later", Kind::kCompressedWrites},
                      Mutant{"compressed-data-is-not-counted", Kind::kCompressedWrites},
                      Mutant{"compressed-count-may-come-later", Kind::kCompressedWrites}),
    [](const auto& instance) {
      std::string name = fmt::format("{}_{}", instance.param.name, instance.index);
      std::ranges::replace(name, '-', '_');
      return name;
    });

// A defect whose text is not in the source any more would be no defect.
TEST(WriteOrderMutants, are_all_in_the_code) {
  std::size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(VBLK_MUTANTS)) {
    if (entry.path().extension() != ".missing") continue;
    std::ifstream file(entry.path());
    EXPECT_EQ(std::string(std::istreambuf_iterator<char>(file), {}), "")
        << "change tests/qcow2/mutants.py along with the source";
    ++count;
  }
  EXPECT_GT(count, 0U);
}

}  // namespace
}  // namespace vblk::qcow2
