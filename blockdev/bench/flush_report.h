// What the flush tests say, as text and as JSON.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "blockdev/bench/flush_suite.h"

namespace vblk::bench {

inline constexpr std::array<std::string_view, 12> kFlushColumns{
    "target", "test",   "variant",  "timed",  "per s",   "p50 us",
    "p90 us", "p99 us", "p99.9 us", "max us", "samples", "notes"};
[[nodiscard]] std::array<std::string, kFlushColumns.size()> flush_cells(const FlushRow& row);
[[nodiscard]] std::string power_cut_line(const PowerCutCheck& check);

[[nodiscard]] std::string flush_text(const FlushReport& report);
[[nodiscard]] std::string flush_json(const FlushReport& report);

}  // namespace vblk::bench
