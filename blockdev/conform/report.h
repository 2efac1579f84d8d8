// What was found, for people, as TAP, or as JUnit XML.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>

#include "blockdev/conform/runner.h"

namespace vblk::conform {

enum class ReportFormat : std::uint8_t { kHuman, kTap, kJunit };

struct Totals {
  std::size_t passed{0};
  std::size_t failed{0};
  std::size_t failed_must{0};
  std::size_t skipped{0};
};

class Report {
 public:
  // `repeat`: the command line that runs a single test again, up to its name.
  Report(ReportFormat format, std::string repeat) : format_(format), repeat_(std::move(repeat)) {}

  void add(Result result);
  // Ends the report. `why_incomplete`: why not all of `test_count` have run; empty if they have.
  void finish(std::size_t test_count, const std::string& why_incomplete);
  [[nodiscard]] const Totals& totals() const { return totals_; }

 private:
  void add_human(const Result& result) const;
  void add_tap(const Result& result) const;
  void add_junit(const Result& result);

  const ReportFormat format_;
  const std::string repeat_;
  Totals totals_;
  double seconds_{0};
  std::string junit_;
};

}  // namespace vblk::conform
