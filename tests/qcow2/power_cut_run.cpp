#include "tests/qcow2/power_cut_run.h"

#include <array>
#include <cerrno>
#include <optional>
#include <utility>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "tests/qcow2/image_check.h"

namespace vblk::qcow2::testing {

Scene::Scene(std::uint64_t scene_seed, MakeSpec make_spec) : seed(scene_seed) {
  std::mt19937_64 random(seed);
  spec = make_spec(random);
  rig = random_rig(random);
  work = random_work(random);
}

std::string Scene::to_string() const {
  return fmt::format("{}; L2 cache {}, refcount cache {}, {} threads, {}", spec.to_string(),
                     rig.l2_cache_bytes, rig.refcount_cache_bytes, rig.context_count,
                     rig.direct ? "direct" : "buffered");
}

DiskWatch::DiskWatch(const std::vector<SimulatedDisk*>& disks, unsigned faults_permille,
                     std::uint64_t seed)
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

PowerCutRun::PowerCutRun(const Scene& scene)
    : scene_(scene),
      random_(scene.seed),
      formatted_(format_image(scene.spec, random_)),
      initial_(formatted_.disk),
      files_(formatted_.files()) {}

std::string PowerCutRun::run(int lives) {
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

std::string PowerCutRun::live(GuestModel& model) {
  RigOptions options = scene_.rig;
  options.seed = random_();
  Rig rig(files_, formatted_.backing, options);
  if (rig.node == nullptr) return rig.error;
  std::string failure;
  {
    DiskWatch watch(rig.disks(), scene_.cuts.faults_permille, random_());
    Guest guest(*rig.node, rig.contexts, model, scene_.work, random_, next_tag_);
    for (std::uint64_t idle_steps = 0; guest.started() < scene_.work.operations;) {
      guest.step(true);
      idle_steps = watch.has_worked ? 0 : idle_steps + 1;
      if (::testing::Test::HasFailure()) failure = "see above";
      if (idle_steps > 100'000) failure = "nothing goes on any more";
      if (!failure.empty()) break;
      const bool is_time =
          std::exchange(watch.has_flushed, false) ||
          (std::exchange(watch.has_worked, false) && random_() % 100 < scene_.cuts.percent);
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
      if (!scene_.work.may_fail) model.flushed(model.now());
      files_ = rig.files_after_power_cut(random_(), SimulatedDisk::Unflushed::kBySector);
      failure = check("closed", files_, model, true);
      const std::uint64_t leaks = check_image(files_, formatted_.backing).leaks;
      if (failure.empty() && leaks > leaks_before_ && !scene_.work.may_fail)
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

ImageFiles PowerCutRun::left_by(const Rig& rig) {
  return scene_.work.kill_takes_nothing
             ? rig.files()
             : rig.files_after_power_cut(random_(), SimulatedDisk::Unflushed::kBySector);
}

std::string PowerCutRun::cut(const Rig& rig, const GuestModel& model) {
  using enum SimulatedDisk::Unflushed;
  std::vector<SimulatedDisk::Unflushed> fates{kKept};
  if (!scene_.work.kill_takes_nothing) {
    fates.insert(fates.end(), {kLost, kByWrite});
    fates.insert(fates.end(), scene_.cuts.by_sector, kBySector);
  }
  for (const auto fate : fates) {
    constexpr std::array kNames{"lost", "kept", "lost or kept by write", "lost or kept by sector"};
    const ImageFiles left =
        scene_.work.kill_takes_nothing ? rig.files() : rig.files_after_power_cut(random_(), fate);
    const bool reopens = random_() % 100 < scene_.cuts.reopen_percent;
    ++cut_count_;
    if (takes_samples && random_() % 64 == 0) samples_.push_back(left);
    const std::string failure = check(fmt::format("cut {}, what was not flushed is {}", cut_count_,
                                                  kNames[static_cast<std::size_t>(fate)]),
                                      left, model, reopens);
    if (!failure.empty()) return failure;
  }
  return {};
}

std::string PowerCutRun::check(const std::string& when, const ImageFiles& files,
                               const GuestModel& model, bool reopens) {
  const CheckedImage checked = check_image(files, formatted_.backing);
  if (!checked.errors.empty()) return when + ": " + checked.errors.front();
  for (std::uint64_t i = 0; i < checked.disk.size(); ++i) {
    if (!model.may_hold(i, checked.disk[i]))
      return fmt::format("{}: sector {} holds {:#x} instead of one of{}", when, i, checked.disk[i],
                         model.describe(i));
  }
  if (checked.vouches_for_bitmaps && checked.disk != initial_)
    return when + ": a bitmap is said to be right, and is not";
  if (scene_.spec.data_file_is_the_disk() && tags_of(files.data_file) != checked.disk)
    return when + ": the raw data file is not what the disk is";
  if (scene_.spec.snapshot && checked.snapshot != initial_)
    return when + ": the snapshot has changed";
  if (!reopens) return {};
  RigOptions options = scene_.rig;
  options.loses_flushes = options.data_file_loses_flushes = false;
  options.context_count = 1;
  Rig rig(files, formatted_.backing, options);
  if (rig.node == nullptr) return when + ": " + rig.error;
  if (tags_of(rig.read_all()) != checked.disk) return when + ": vblk reads it otherwise";
  rig.close();
  const CheckedImage closed = check_image(rig.files(), formatted_.backing);
  if (!closed.errors.empty()) return when + ", opened and closed: " + closed.errors.front();
  if (closed.disk != checked.disk) return when + ", opened and closed: it reads otherwise";
  if (closed.leaks > checked.leaks) return when + ", opened and closed: it has leaks";
  return {};
}

}  // namespace vblk::qcow2::testing
