// Runs tests, each in a process of its own: a test that hangs, or is killed because the backend
// took memory away under it, is a failed test and nothing more.
//
//   this process    forks, waits for a verdict on a pipe up to the test's deadline, then ends
//                   whatever is left: the test, the backend that it started, and what that started
//   a test's        has a folder and a process group; starts the backend; writes its verdict
//
// Orphans come back to this process (PR_SET_CHILD_SUBREAPER), so that a backend that goes into the
// background is ended as well. Children that were there before are left alone. One thread.
#pragma once

#include <atomic>
#include <chrono>
#include <set>
#include <string>
#include <sys/types.h>

#include "blockdev/conform/probe.h"
#include "blockdev/conform/test.h"

namespace vblk::conform {

struct Result {
  const Test* test;
  Outcome outcome;
  std::string text;
  double seconds;
  bool cut_short{false};  // ended by the caller's limit: this says nothing of the backend
};

class Runner {
 public:
  explicit Runner(const ProbeOptions& options);

  // Runs one test to its end, for `limit` at most. `interrupted` is looked at while it runs.
  Result run(const Test& test, const std::atomic<bool>& interrupted,
             std::chrono::milliseconds limit);
  // Whether a backend can be had at all, and talks. Error: why not.
  Expected<void> check_backend(const std::atomic<bool>& interrupted);

 private:
  void end_leftovers() const;

  const ProbeOptions options_;
  std::set<pid_t> children_before_;
};

}  // namespace vblk::conform
