// What the engines are compared by: random accesses to 4 KiB blocks all over the image.
#pragma once

#include <array>
#include <string_view>

#include "blockdev/bench/closed_loop.h"

namespace vblk::demo {

struct NamedWorkload {
  std::string_view name;
  bench::Workload load;
};

inline constexpr unsigned kDepthMax = 32;
// Write and flush is one operation, of two requests in sequence.
inline constexpr std::array kWorkloads{
    NamedWorkload{"4k random read, depth 1", {.operation = bench::Operation::kRead}},
    NamedWorkload{"4k random read, depth 32",
                  {.operation = bench::Operation::kRead, .depth = kDepthMax}},
    NamedWorkload{"4k random write, depth 1", {.operation = bench::Operation::kWrite}},
    NamedWorkload{"4k random write, depth 32",
                  {.operation = bench::Operation::kWrite, .depth = kDepthMax}},
    NamedWorkload{"4k random write + flush, depth 1",
                  {.operation = bench::Operation::kWrite, .flush_every = 1}},
};

}  // namespace vblk::demo
