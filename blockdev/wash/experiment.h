// Conducts an experiment: which run comes when, what a noisy block costs, and where it stops.
//
// A block is one cell with all its arms, one right after the other in an order of its own: what is
// compared is compared within it. A round has one block of each cell, in an order of its own.
// Orders follow from the seed, so that an experiment that goes on does what it would have done.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/bench/machine_usage.h"
#include "blockdev/wash/analysis.h"
#include "blockdev/wash/run.h"
#include "blockdev/wash/store.h"

namespace vblk::wash {

// What stands behind the names of devices.
struct Device {
  std::string name;  // "image", "ram", "files", "none"
  std::string path;  // an image, or the folder for files
  std::uint64_t region_bytes{0};
};

struct Conduct {
  const Analysis* analysis{nullptr};
  const Preset* preset{nullptr};
  std::vector<Device> devices;
  std::string peer;  // empty: no cells of the kind "serve"
  const std::atomic<bool>* interrupted{nullptr};
  // About once a second at most: what runs now, how many runs are done of how many, seconds left.
  std::function<void(const std::string& what, std::size_t done, std::size_t planned,
                     double seconds_left)>
      show;
  // Carries out one run; a test's own, or carry_out_elsewhere().
  std::function<Expected<RunRecord>(const RunSpec& spec)> carry_out;
};

// The cells that can be run with these devices, and in which order arms come in a block.
[[nodiscard]] std::vector<Cell> cells_of(const Conduct& conduct);
[[nodiscard]] std::vector<std::size_t> order_of_cells(std::uint64_t seed, int round,
                                                      std::size_t cell_count);
[[nodiscard]] std::vector<std::string> order_of_arms(std::uint64_t seed, int round,
                                                     unsigned attempt, const Cell& cell);

// What others used of the processors between two looks at the machine. `own`: what was used of them
// for the experiment.
[[nodiscard]] double foreign_share(const bench::MachineUsage& before,
                                   const bench::MachineUsage& after,
                                   std::chrono::duration<double> own);

// After so many failures in a row an arm is left out of a cell until the experiment is gone on
// with. A failure that passes costs one block, which is run again like a noisy one.
inline constexpr unsigned kFailuresMax = 3;
// After so many of anything in a row the experiment stops: the disk has gone or is full.
inline constexpr unsigned kFailuresOfAllMax = 100;

// Runs what is not in the store yet. True: all of it is done; false: interrupted. Errors: those of
// the store; of a run, where nothing can be measured, or nothing any more.
Expected<bool> conduct_experiment(const Conduct& conduct, ResultStore& store);

}  // namespace vblk::wash
