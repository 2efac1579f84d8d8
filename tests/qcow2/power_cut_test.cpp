// Power cuts: a guest's random work on a simulated disk, the disk as a power cut would leave it at
// every flush and at many moments between, and what must then be true (an external data file is on
// a disk of its own, which loses its power at the same moment, and not the same writes):
//
//   - the image opens;
//   - an independent checker finds no refcount that is too low, no entry that points nowhere, no
//     COPIED flag that lies; leaks are allowed;
//   - every sector holds what was flushed, or something later that the guest wrote there;
//   - a snapshot is as it was.
//
// And the death of the process alone, where the disk keeps all that was written: what the guest was
// told is done must be there then too, flushed or not, if that was asked for (outlives_process).
//
// VBLK_POWER_CUT_RUNS: how many random images, each with its random work, in each test.
// VBLK_TEST_SEED repeats one.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <sys/wait.h>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "blockdev/log.h"
#include "tests/qcow2/guest.h"
#include "tests/qcow2/guest_model.h"
#include "tests/qcow2/qcow2_rig.h"
#include "tests/support/seed.h"
#include "tests/support/temp_dir.h"

namespace vblk::qcow2 {
namespace {

using blockdev::BlockOperation;
using testing::Bytes;
using testing::check_image;
using testing::CheckedImage;
using testing::Context;
using testing::format_image;
using testing::FormattedImage;
using testing::Guest;
using testing::GuestModel;
using testing::ImageFiles;
using testing::ImageSpec;
using testing::kSectorBytes;
using testing::Rig;
using testing::RigOptions;
using testing::SimulatedDisk;
using testing::Tags;
using testing::Work;

struct Cuts {
  unsigned percent{2};  // of the steps, besides those in which a flush has ended
  unsigned by_sector{2};
  unsigned reopen_percent{30};
  unsigned faults_permille{0};  // of the disk's operations fail
};

// Notes what reaches a disk, between two looks, and has some of it fail.
struct DiskWatch {
  DiskWatch(const std::vector<SimulatedDisk*>& disks, unsigned faults_permille, std::uint64_t seed)
      : random(seed) {
    const auto look = [this, faults_permille](const aio::IoRequest& request, std::uint64_t) {
      has_worked = true;
      has_flushed = has_flushed || request.kind == aio::IoKind::kFlush;
      // A flush that fails is the last one (raw_node.h): seldom, so that there is something to see.
      const unsigned rarely = request.kind == aio::IoKind::kFlush ? 20 : 1;
      const bool fails = random() % (1000 * rarely) < faults_permille;
      return fails ? std::optional(EIO) : std::nullopt;
    };
    for (SimulatedDisk* const disk : disks) disk->set_fault_plan(look);
  }
  std::mt19937_64 random;
  bool has_worked{false};
  bool has_flushed{false};
};

class PowerCutRun {
 public:
  PowerCutRun(const ImageSpec& spec, const RigOptions& rig, const Work& work, const Cuts& cuts,
              std::uint64_t seed)
      : spec_(spec), rig_(rig), work_(work), cuts_(cuts), random_(seed) {
    formatted_ = format_image(spec, random_);
    initial_ = formatted_.disk;
    files_ = formatted_.files();
  }

  // So many lives of the image, each ended by a power cut. The first failure, or an empty string.
  std::string run(int lives) {
    std::string failure = check("as formatted", files_, GuestModel(initial_), true);
    Tags disk = initial_;
    for (int life = 0; life < lives && failure.empty(); ++life) {
      GuestModel model(disk);
      failure = live(model);
      if (!failure.empty()) return fmt::format("life {}: {}", life, failure);
      disk = check_image(files_, formatted_.backing).disk;
    }
    return failure;
  }
  [[nodiscard]] std::uint64_t cut_count() const { return cut_count_; }
  // Images that a power cut has left, for other checkers.
  std::vector<ImageFiles>& samples() { return samples_; }
  [[nodiscard]] const Tags& backing() const { return formatted_.backing; }
  bool takes_samples{false};

 private:
  std::string live(GuestModel& model) {
    RigOptions options = rig_;
    options.seed = random_();
    Rig rig(files_, formatted_.backing, options);
    if (rig.node == nullptr) return rig.error;
    std::string failure;
    {
      DiskWatch watch(rig.disks(), cuts_.faults_permille, random_());
      Guest guest(*rig.node, rig.contexts, model, work_, random_, next_tag_);
      for (std::uint64_t idle_steps = 0; guest.started() < work_.operations;) {
        guest.step(true);
        idle_steps = watch.has_worked ? 0 : idle_steps + 1;
        if (::testing::Test::HasFailure()) failure = "see above";
        if (idle_steps > 100'000) failure = "nothing goes on any more";
        if (!failure.empty()) break;
        const bool is_time =
            std::exchange(watch.has_flushed, false) ||
            (std::exchange(watch.has_worked, false) && random_() % 100 < cuts_.percent);
        if (is_time) failure = cut(rig, model);
        if (!failure.empty()) break;
      }
      files_ = left_by(rig);
      // Sometimes the guest's work is finished and the image closed before it.
      if (failure.empty() && random_() % 4 == 0) {
        for (std::uint64_t steps = 0; !guest.is_idle(); ++steps) {
          guest.step(false);
          if (steps > 1'000'000) return "requests do not complete";
        }
        rig.set_fault_plan(nullptr);
        rig.close();
        if (!work_.may_fail) model.flushed(model.now());
        files_ = rig.files_after_power_cut(random_(), SimulatedDisk::Unflushed::kBySector);
        failure = check("closed", files_, model, true);
        const std::uint64_t leaks = check_image(files_, formatted_.backing).leaks;
        if (failure.empty() && leaks > leaks_before_ && !work_.may_fail)
          failure = fmt::format("closed with {} leaked clusters, {} before", leaks, leaks_before_);
      } else {
        guest.give_up();
        rig.switch_off();
        while (!guest.is_idle()) guest.step(false);
        rig.close();
      }
    }
    leaks_before_ = check_image(files_, formatted_.backing).leaks;
    return failure;
  }

  ImageFiles left_by(const Rig& rig) {
    return work_.kill_takes_nothing
               ? rig.files()
               : rig.files_after_power_cut(random_(), SimulatedDisk::Unflushed::kBySector);
  }

  std::string cut(const Rig& rig, const GuestModel& model) {
    using enum SimulatedDisk::Unflushed;
    std::vector<SimulatedDisk::Unflushed> fates{kKept};
    if (!work_.kill_takes_nothing) {
      fates.insert(fates.end(), {kLost, kByWrite});
      fates.insert(fates.end(), cuts_.by_sector, kBySector);
    }
    for (const auto fate : fates) {
      constexpr std::array kNames{"lost", "kept", "lost or kept by write",
                                  "lost or kept by sector"};
      const ImageFiles left =
          work_.kill_takes_nothing ? rig.files() : rig.files_after_power_cut(random_(), fate);
      const bool reopens = random_() % 100 < cuts_.reopen_percent;
      ++cut_count_;
      if (takes_samples && random_() % 64 == 0) samples_.push_back(left);
      const std::string failure =
          check(fmt::format("cut {}, what was not flushed is {}", cut_count_,
                            kNames[static_cast<std::size_t>(fate)]),
                left, model, reopens);
      if (!failure.empty()) return failure;
    }
    return {};
  }

  std::string check(const std::string& when, const ImageFiles& files, const GuestModel& model,
                    bool reopens) {
    const CheckedImage checked = check_image(files, formatted_.backing);
    if (!checked.errors.empty()) return when + ": " + checked.errors.front();
    for (std::uint64_t i = 0; i < checked.disk.size(); ++i) {
      if (!model.may_hold(i, checked.disk[i]))
        return fmt::format("{}: sector {} holds {:#x} instead of one of{}", when, i,
                           checked.disk[i], model.describe(i));
    }
    if (spec_.data_file_is_the_disk() && testing::tags_of(files.data_file) != checked.disk)
      return when + ": the raw data file is not what the disk is";
    if (spec_.snapshot && checked.snapshot != initial_) return when + ": the snapshot has changed";
    if (!reopens) return {};
    RigOptions options = rig_;
    options.loses_flushes = false;
    options.context_count = 1;
    Rig rig(files, formatted_.backing, options);
    if (rig.node == nullptr) return when + ": " + rig.error;
    if (testing::tags_of(rig.read_all()) != checked.disk) return when + ": vblk reads it otherwise";
    rig.close();
    const CheckedImage closed = check_image(rig.files(), formatted_.backing);
    if (!closed.errors.empty()) return when + ", opened and closed: " + closed.errors.front();
    if (closed.disk != checked.disk) return when + ", opened and closed: it reads otherwise";
    if (closed.leaks > checked.leaks) return when + ", opened and closed: it has leaks";
    return {};
  }

  const ImageSpec spec_;
  const RigOptions rig_;
  const Work work_;
  const Cuts cuts_;
  std::mt19937_64 random_;
  FormattedImage formatted_;
  Tags initial_;
  ImageFiles files_;
  std::uint32_t next_tag_{0};
  std::uint64_t cut_count_{0};
  std::uint64_t leaks_before_{0};
  std::vector<ImageFiles> samples_;
};

int run_count(int otherwise) {
  const char* const given = std::getenv("VBLK_POWER_CUT_RUNS");
  return given != nullptr ? std::stoi(given) : otherwise;
}

// An image, a guest and a disk as a seed decides.
struct Scene {
  explicit Scene(std::uint64_t scene_seed, bool many_tables = false) : seed(scene_seed) {
    std::mt19937_64 random(seed);
    spec = many_tables ? testing::spec_of_many_tables(random) : testing::random_spec(random);
    rig = testing::random_rig(random);
    work = testing::random_work(random);
  }
  [[nodiscard]] std::string to_string() const {
    return fmt::format("{}; L2 cache {}, refcount cache {}, {} threads, {}", spec.to_string(),
                       rig.l2_cache_bytes, rig.refcount_cache_bytes, rig.context_count,
                       rig.direct ? "direct" : "buffered");
  }
  std::uint64_t seed;
  ImageSpec spec;
  RigOptions rig;
  Work work;
  Cuts cuts;
};

class PowerCut : public ::testing::Test {
 protected:
  void SetUp() override { log::set_level(log::Level::kOff); }

  void run(int runs, bool many_tables, unsigned faults_permille = 0) {
    std::mt19937_64 seeds(test::test_seed());
    std::uint64_t cuts = 0;
    for (int i = 0; i < runs; ++i) {
      Scene scene(seeds(), many_tables);
      scene.cuts.faults_permille = faults_permille;
      scene.work.may_fail = faults_permille > 0;
      PowerCutRun run(scene.spec, scene.rig, scene.work, scene.cuts, scene.seed);
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
  run(run_count(20), false);
}

TEST_F(PowerCut, leaves_tables_that_came_and_went_through_small_caches_in_order) {
  run(run_count(4), true);
}

TEST_F(PowerCut, after_errors_of_the_disk_leaves_an_image_without_errors) {
  run(run_count(10), false, 10);
}

TEST_F(PowerCut, after_errors_of_the_disk_leaves_many_tables_without_errors) {
  run(run_count(3), true, 10);
}

// ---- The process alone.

// What a guest that knows nothing of it would go on with.
Scene scene_of_kills(std::uint64_t seed, bool many_tables) {
  Scene scene(seed, many_tables);
  scene.work.kill_takes_nothing = true;
  scene.work.outlives_process = true;
  scene.cuts.percent = 10;
  return scene;
}

TEST_F(PowerCut, of_the_process_alone_takes_nothing_that_was_to_outlive_it) {
  std::mt19937_64 seeds(test::test_seed());
  for (int i = 0; i < run_count(10); ++i) {
    const Scene scene = scene_of_kills(seeds(), i % 4 == 0);
    PowerCutRun run(scene.spec, scene.rig, scene.work, scene.cuts, scene.seed);
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
    PowerCutRun run(scene.spec, scene.rig, scene.work, scene.cuts, scene.seed);
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
    const Scene scene(seeds(), i % 4 == 0);
    PowerCutRun run(scene.spec, scene.rig, scene.work, scene.cuts, scene.seed);
    run.takes_samples = true;
    ASSERT_EQ(run.run(1), "") << scene.to_string();
    if (!run.backing().empty()) save("backing.raw", testing::bytes_of(run.backing()));
    for (std::size_t sample = 0; sample < std::min<std::size_t>(3, run.samples().size());
         ++sample) {
      save("cut.qcow2", run.samples()[sample].image);
      save("data.raw", run.samples()[sample].data_file);
      const int status =
          std::system(fmt::format("cd {} && qemu-img check -q -f qcow2 cut.qcow2 > log 2>&1 && "
                                  "qemu-img convert -f qcow2 -O raw cut.qcow2 disk.raw >> log 2>&1",
                                  dir.file("."))
                          .c_str());
      // 3: leaks.
      const bool leaks = WIFEXITED(status) && WEXITSTATUS(status) == 3;
      std::ifstream log(dir.file("log"));
      ASSERT_TRUE(status == 0 || leaks)
          << scene.to_string() << ": " << std::string(std::istreambuf_iterator<char>(log), {});
      ++checked;
      if (leaks) continue;
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
    PowerCutRun run(scene.spec, scene.rig, scene.work, scene.cuts, scene.seed);
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
    PowerCutRun run(scene.spec, scene.rig, scene.work, scene.cuts, scene.seed);
    EXPECT_NE(run.run(3), "") << scene.to_string();
  }
}

// Nothing is promised to the guest here, so that the order alone is at stake: without flushes
// between, tables reach the disk before what they name. `loses_flushes` off: the same work is well.
TEST_F(PowerCut, finds_metadata_that_is_written_out_of_order) {
  int found = 0;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    for (const bool lies : {false, true}) {
      Scene scene(seed, true);
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
      PowerCutRun run(scene.spec, scene.rig, scene.work, scene.cuts, scene.seed);
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
