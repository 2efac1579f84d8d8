// A run as it goes on, on standard error.
#pragma once

#include <chrono>
#include <string>

#include "blockdev/bench/options.h"
#include "blockdev/bench/runner.h"

namespace vblk::bench {

// On a terminal one line that is written over each second; otherwise a line each ten seconds, or
// each second if it is to be shown always.
class ProgressLine {
 public:
  explicit ProgressLine(ShowProgress when);
  // Wipes the line off a terminal.
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void show(const std::string& title, const Progress& progress);

 private:
  const bool is_terminal_;
  const bool is_on_;
  const std::chrono::seconds interval_;
  bool is_dirty_{false};
  std::chrono::steady_clock::time_point last_;
};

}  // namespace vblk::bench
