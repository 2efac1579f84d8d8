// Runs tests, each in a process of its own: a test that hangs, or is killed because the backend
// took memory away under it, is a failed test and nothing more.
//
//   this process    forks, waits for a verdict on a pipe up to the test's deadline, then ends
//                   whatever is left: the test, the backend that it started, and what that started
//   a test's        has a folder and a process group; starts the backend; writes its verdict
//
// Orphans come back to this process (PR_SET_CHILD_SUBREAPER), so that a backend that goes into the
// background is ended as well. Children that were there before are left alone. One thread, and
// signal handlers.
#pragma once

#include <atomic>
#include <chrono>
#include <set>
#include <string>
#include <sys/types.h>

#include "blockdev/conform/probe.h"
#include "blockdev/conform/test.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::conform {

// Whether the user wants the run to end. A flag alone would be missed by who is about to sleep: the
// signal may come between the look at it and the sleep.
class Interruption {
 public:
  Interruption();

  // Async-signal-safe.
  void ask();
  [[nodiscard]] bool is_asked() const { return is_asked_; }
  // Readable from then on.
  [[nodiscard]] int fd() const { return event_.get(); }

 private:
  std::atomic<bool> is_asked_{false};
  vhost_user::UniqueFd event_;
};

struct Result {
  const Test* test;
  Outcome outcome;
  std::string text;
  double seconds;
  bool cut_short{false};  // by the caller's limit, or by the user: this says nothing of the backend
};

class Runner {
 public:
  // `interruption` is used by run() while that lasts.
  Runner(const ProbeOptions& options, const Interruption& interruption);

  // Runs one test to its end, for `limit` at most.
  Result run(const Test& test, std::chrono::milliseconds limit);
  // Whether a backend can be had at all, and whether it outlives a frontend: to be called first.
  // Error: there is none.
  Expected<void> check_backend();

 private:
  void end_leftovers() const;

  ProbeOptions options_;
  const Interruption& interruption_;
  std::set<pid_t> children_before_;
};

}  // namespace vblk::conform
