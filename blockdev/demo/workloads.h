// What the engines are compared by: random accesses to 4 KiB blocks all over the image.
#pragma once

#include <array>
#include <string_view>

#include "blockdev/bench/workload.h"

namespace vblk::demo {

struct NamedWorkload {
  std::string_view name;
  bench::Workload load;
};

inline constexpr unsigned kDepthMax = 32;
// Write and flush is one operation, of two requests in sequence.
inline const std::array workloads{
    NamedWorkload{"4k random read, depth 1", {}},
    NamedWorkload{"4k random read, depth 32", {.depth = kDepthMax}},
    NamedWorkload{"4k random write, depth 1", {.read_percent = 0}},
    NamedWorkload{"4k random write, depth 32", {.read_percent = 0, .depth = kDepthMax}},
    NamedWorkload{"4k random write + flush, depth 1", {.read_percent = 0, .flush_every = 1}},
};

}  // namespace vblk::demo
