// The words of `vblk bench`, checked. Names are fio's where fio has one.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <sys/types.h>
#include <variant>

#include "aio/error.h"
#include "blockdev/bench/closed_loop.h"

namespace vblk::bench {

struct BenchOptions {
  std::string socket_path;
  std::string workload_name;  // as typed: randread and so on
  Workload workload;
  std::uint64_t size_bytes{0};  // 0: all of the disk
  std::chrono::nanoseconds run_time{0};
  std::chrono::nanoseconds ramp_time{0};
  pid_t server{0};  // 0: not measured
  std::uint64_t seed{0};
  bool json{false};
};

// An answer to --help instead of options.
struct HelpText {
  std::string text;
};

// Error: kInvalidArgument.
Expected<std::variant<BenchOptions, HelpText>> parse_options(std::span<char*> arguments);

}  // namespace vblk::bench
