// What was found, for people, as TAP, or as JUnit XML.
#pragma once

#include <array>
#include <cstddef>
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
  std::array<std::size_t, kForces> failed_by_force{};
  std::size_t skipped{0};
};

class Report {
 public:
  // `repeat`: the command line that runs a single test again, up to its name.
  Report(ReportFormat format, std::string repeat) : format_(format), repeat_(std::move(repeat)) {}

  void add(Result result);
  // Ends the report. `tests`: all that were to run, in the order of add(). `why_incomplete`: why
  // not all of them have; empty if they have. Says so in each format, which stays valid: JUnit has
  // an error then, and a skipped case for each test that did not run.
  void finish(std::span<const Test* const> tests, const std::string& why_incomplete);
  [[nodiscard]] const Totals& totals() const { return totals_; }

 private:
  void add_human(const Result& result) const;
  void add_tap(const Result& result) const;
  void add_junit(const Result& result);
  // `what_is_missing`: empty if nothing is.
  void finish_junit(std::span<const Test* const> tests, const std::string& what_is_missing);

  const ReportFormat format_;
  const std::string repeat_;
  Totals totals_;
  double seconds_{0};
  std::string junit_;
};

}  // namespace vblk::conform
