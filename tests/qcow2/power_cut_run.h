// A guest's random work on a simulated disk, and power cuts all along: what power_cut_test.cpp
// tells must be true after each, looked at.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "tests/qcow2/guest.h"
#include "tests/qcow2/guest_model.h"
#include "tests/qcow2/image_format.h"
#include "tests/qcow2/qcow2_rig.h"

namespace vblk::qcow2::testing {

struct Cuts {
  unsigned percent{2};  // of the steps, besides those in which a flush has ended
  unsigned by_sector{2};
  unsigned reopen_percent{30};
  unsigned faults_permille{0};  // of the disk's operations fail
};

// An image, a guest and a disk as a seed decides.
struct Scene {
  using MakeSpec = ImageSpec (*)(std::mt19937_64& random);
  explicit Scene(std::uint64_t scene_seed, MakeSpec make_spec = random_spec);
  [[nodiscard]] std::string to_string() const;

  std::uint64_t seed;
  ImageSpec spec;
  RigOptions rig;
  Work work;
  Cuts cuts;
};

// Notes what reaches the disks, between two looks, and has some of it fail.
struct DiskWatch {
  DiskWatch(const std::vector<SimulatedDisk*>& disks, unsigned faults_permille, std::uint64_t seed);
  std::mt19937_64 random;
  bool has_worked{false};
  bool has_flushed{false};
};

class PowerCutRun {
 public:
  explicit PowerCutRun(const Scene& scene);

  // So many lives of the image, each ended by a power cut. The first failure, or an empty string.
  std::string run(int lives);
  [[nodiscard]] std::uint64_t cut_count() const { return cut_count_; }
  // Images that a power cut has left, for other checkers.
  std::vector<ImageFiles>& samples() { return samples_; }
  [[nodiscard]] const Tags& backing() const { return formatted_.backing; }
  bool takes_samples{false};

 private:
  std::string live(GuestModel& model);
  ImageFiles left_by(const Rig& rig);
  std::string cut(const Rig& rig, const GuestModel& model);
  std::string check(const std::string& when, const ImageFiles& files, const GuestModel& model,
                    bool reopens);

  const Scene scene_;
  std::mt19937_64 random_;
  FormattedImage formatted_;
  Tags initial_;
  ImageFiles files_;
  std::uint32_t next_tag_{0};
  std::uint64_t cut_count_{0};
  std::uint64_t leaks_before_{0};
  std::vector<ImageFiles> samples_;
};

}  // namespace vblk::qcow2::testing
