// What was found, for people, as TAP, or as JUnit XML.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <sys/types.h>

#include "blockdev/conform/runner.h"

namespace vblk::conform {

enum class ReportFormat : std::uint8_t { kHuman, kTap, kJunit };

struct Totals {
  std::size_t passed{0};
  std::size_t failed{0};
  std::array<std::size_t, kForces> failed_by_force{};
  std::size_t skipped{0};
};

// Written to the standard output. JUnit XML is one document: where the output is a file, it is
// written anew with each result, so that whatever becomes of this process, what is there is XML,
// and says that the run has not ended; elsewhere it comes at the end.
class Report {
 public:
  // `repeat`: the command line that runs a single test again, up to its name. `tests`: all that are
  // to run, in the order of add(); kept by the caller.
  Report(ReportFormat format, std::string repeat, std::span<const Test* const> tests);

  void add(Result result);
  // Ends the report. `why_incomplete`: why not all tests have run; empty if they have. Says so in
  // each format, which stays valid: JUnit has an error then, and a skipped case for each test that
  // did not run.
  void finish(const std::string& why_incomplete);
  [[nodiscard]] const Totals& totals() const { return totals_; }

 private:
  void add_human(const Result& result) const;
  void add_tap(const Result& result) const;
  [[nodiscard]] std::string junit_case(const Result& result) const;
  // The document. `missing`: what is missing; empty if nothing is.
  [[nodiscard]] std::string junit_document(const std::string& missing) const;
  void write_junit(const std::string& document) const;
  // "3 of 5 tests were not run: WHY".
  [[nodiscard]] std::string what_is_missing(const std::string& why) const;
  [[nodiscard]] std::size_t count() const {
    return totals_.passed + totals_.failed + totals_.skipped;
  }

  const ReportFormat format_;
  const std::string repeat_;
  const std::span<const Test* const> tests_;
  std::optional<off_t> file_begin_;  // where the document begins, if the output is a file
  Totals totals_;
  double seconds_{0};
  std::string junit_;  // the cases so far
};

}  // namespace vblk::conform
