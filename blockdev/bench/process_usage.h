// What another process has cost so far, read from the kernel.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <sys/types.h>

namespace vblk::bench {

struct ContextSwitches {
  std::uint64_t voluntary{0};    // it went to sleep; each ends in a wake-up
  std::uint64_t involuntary{0};  // another got the processor
  [[nodiscard]] std::uint64_t sum() const { return voluntary + involuntary; }
};

// What a process has used since it started: its own threads, those that have ended, and the
// kernel's workers that belong to it (io-wq). Not what the kernel does in threads of its own.
struct ProcessUsage {
  bool exists{false};
  std::chrono::nanoseconds cpu_time{0};
  // The same in the kernel's ticks, told apart; coarse.
  std::uint64_t user_ticks{0};
  std::uint64_t system_ticks{0};
  std::map<pid_t, ContextSwitches> context_switches;  // by thread, of those that are alive
};

// Zero and empty for a process that does not exist or belongs to somebody else.
[[nodiscard]] ProcessUsage usage_of(pid_t process);

[[nodiscard]] bool process_exists(pid_t process);

// Context switches from one usage to a later one. A thread that ended in between is left out.
[[nodiscard]] ContextSwitches context_switches_between(const ProcessUsage& before,
                                                       const ProcessUsage& after);

}  // namespace vblk::bench
