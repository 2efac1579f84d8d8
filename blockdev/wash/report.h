// What a result says: for people as text and as a page, for programs as JSON and CSV.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "blockdev/wash/judge.h"
#include "blockdev/wash/store.h"

namespace vblk::wash {

// A device that is not there, and what of the preset is not measured for it.
struct SkippedDevice {
  std::string device;
  std::size_t cells{0};
  std::string why;
};

// All that a report is made of.
struct Report {
  const Analysis* analysis{nullptr};
  const Preset* preset{nullptr};
  const Experiment* experiment{nullptr};
  const std::vector<StoredRun>* runs{nullptr};
  std::vector<Cell> cells;
  Judgement judgement;
  std::vector<SkippedDevice> skipped;
  bool complete{false};  // all runs are there
  std::vector<std::string> notes;
};

// "C0 DOES NOT HOLD: In most cases it is a wash" and so on, a line for each claim.
[[nodiscard]] std::string headline(const Report& report);
[[nodiscard]] std::string text_report(const Report& report);
// Its schema is in docs/wash.md.
[[nodiscard]] std::string json_report(const Report& report);
// A line per run.
[[nodiscard]] std::string csv_of_runs(const std::vector<StoredRun>& runs);
// One page that needs nothing else, not even a network.
[[nodiscard]] std::string html_report(const Report& report);

// What several pieces of a report write alike.
// A verdict's name; where the two sides are not AIO and threads, the arm that wins.
[[nodiscard]] std::string verdict_text(const Analysis& analysis, const Comparison& comparison,
                                       Verdict verdict);
// "1.034 (0.987 to 1.083)", or "n/a".
[[nodiscard]] std::string ratio_text(const CellVerdict& cell);
// "24 of 26": blocks that a cell rests on, and those that there are.
[[nodiscard]] std::string blocks_text(const CellVerdict& cell);
[[nodiscard]] std::string counter_name(const std::string& counter);
[[nodiscard]] std::string counter_text(const std::optional<double>& value);
// What a comparison must come to by a metric: "WASH", "AIO WINS by a factor of 2", "native above
// 2".
[[nodiscard]] std::string expectation_text(const Comparison& comparison, const std::string& metric);
// What it is to its claim: "must be WASH by rate, WASH by p99", "decides", "decides nothing".
[[nodiscard]] std::string part_text(const Claim& claim, const Comparison& comparison);
[[nodiscard]] std::string metric_name(const std::string& metric);  // "requests per second"
// The label of the preset, and what qualifies it.
[[nodiscard]] std::string label_of(const Report& report);
// A line for each device that is not there: "4 cells skipped, those of ram: ...".
[[nodiscard]] std::string skipped_text(const Report& report);
// What the machine, by its facts, cannot show.
[[nodiscard]] std::vector<std::string> limits_of(const Experiment& experiment);
// The sentence about the controls.
[[nodiscard]] std::string controls_text(const ControlResult& controls, const Preset& preset);

}  // namespace vblk::wash
