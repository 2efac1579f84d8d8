// A target as it is, but watched: how long each submission takes, and time burnt on each request
// where a slower engine is to be imitated.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

#include "blockdev/bench/target.h"

namespace vblk::wash {

// Thread: written by the one thread that has the port open, read when it is gone.
struct Observation {
  std::chrono::nanoseconds longest_submission{0};
  std::chrono::nanoseconds submitting{0};
  std::uint64_t submissions{0};
};

// `settling`: what is submitted in the first so much time of a port is not observed. `observation`
// must outlive the target.
[[nodiscard]] std::unique_ptr<bench::Target> observe(std::unique_ptr<bench::Target> target,
                                                     std::chrono::nanoseconds settling,
                                                     double spin_ns, Observation& observation);

}  // namespace vblk::wash
