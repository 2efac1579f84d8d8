// How often another process has passed a tracepoint of the kernel (perf_event_open(2),
// PERF_TYPE_TRACEPOINT). Costs the process nothing but an increment.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <sys/types.h>
#include <vector>

namespace vblk::bench {

// The event of every system call.
inline constexpr std::string_view kSystemCalls = "raw_syscalls/sys_enter";

class TracepointCounter {
 public:
  // Counts from now on, in every thread that `process` has and in those that they start.
  // `event`: as tracefs names it, such as "io_uring/io_uring_queue_async_work".
  TracepointCounter(pid_t process, std::string_view event);
  ~TracepointCounter();
  TracepointCounter(const TracepointCounter&) = delete;
  TracepointCounter& operator=(const TracepointCounter&) = delete;

  // Nothing where the kernel does not let us count: that takes root (or CAP_PERFMON), tracefs on
  // /sys/kernel/tracing, and a kernel with that tracepoint.
  [[nodiscard]] std::optional<std::uint64_t> count() const;

 private:
  std::vector<int> events_;  // one per thread; empty: not possible
};

}  // namespace vblk::bench
