// What a user says to `vblk conform`.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "aio/error.h"
#include "blockdev/conform/probe.h"
#include "blockdev/conform/report.h"
#include "blockdev/conform/test.h"

namespace vblk::conform {

struct ConformOptions {
  ProbeOptions probe;
  ReportFormat format{ReportFormat::kHuman};
  std::vector<const Test*> tests;
  // The words that start such a run again, for one test.
  std::string repeat;
};

struct Text {
  std::string text;
};

// Error: kInvalidArgument.
Expected<std::variant<Text, ConformOptions>> parse_options(std::span<char*> arguments);

}  // namespace vblk::conform
