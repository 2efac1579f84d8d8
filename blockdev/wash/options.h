// The words of `vblk wash`, checked.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "aio/error.h"
#include "blockdev/bench/options.h"

namespace vblk::wash {

struct WashOptions {
  std::vector<std::string> image_paths;  // one or more; empty: `report` alone
  std::string output_path;
  std::string preset{"quick"};
  std::optional<std::uint64_t> seed;
  std::uint64_t size_bytes{0};  // of an image that is to be made; 0: it must be there
  std::string peer;             // empty: none
  bool force{false};
  bool report_only{false};  // the reports of what is there already
  bool ram{true};
  bench::ShowProgress show_progress{bench::ShowProgress::kAuto};
};

// Error: kInvalidArgument, in one line.
Expected<std::variant<WashOptions, bench::HelpText>> parse_options(std::span<char*> arguments);

}  // namespace vblk::wash
