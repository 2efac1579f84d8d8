// The command line of `vblk demo`.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "aio/engine_set.h"
#include "aio/error.h"

namespace vblk::demo {

struct DemoOptions {
  std::string image_path;  // empty: a nameless file in `directory`
  std::string directory;
  bool overwrite{false};  // whether an `image_path` that exists may lose its content
  std::uint64_t image_bytes{0};
  std::chrono::milliseconds cell_time{
      0};  // of one measurement: one workload, one engine, one round
  unsigned round_count{0};
  std::uint64_t seed{0};
  std::vector<aio::EngineName> engines;
};

// `argv` from the word "demo" on. A text is the answer to --help.
// Error: kInvalidArgument, one line naming the option.
Expected<std::variant<DemoOptions, std::string>> parse_options(int argc, char** argv);

}  // namespace vblk::demo
