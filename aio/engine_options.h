// What can be set on an engine.
#pragma once

#include <string_view>

#include "aio/error.h"

namespace vblk::aio {

// What the io_uring engine may use of the kernel, to be switched off one by one for measuring.
// docs/benchmarks.md says what each is worth; docs/decisions/0004-registered-buffers-are-off.md why
// one is off.
struct IoUringFeatures {
  bool defer_taskrun{true};        // IORING_SETUP_SINGLE_ISSUER | DEFER_TASKRUN
  bool registered_files{true};     // io_uring_register_files(3): no reference taken per request
  bool registered_buffers{false};  // io_uring_register_buffers(3): all guest memory stays pinned

  // Changes what a comma-separated list of FEATURE=on|off names: defer-taskrun, registered-files,
  // registered-buffers. Error: kInvalidArgument, naming the word that is wrong and the right ones.
  static Expected<IoUringFeatures> parse(std::string_view text);
};

struct EngineOptions {
  // Kernel I/Os in flight per engine; more wait inside the engine. 1 to 4096.
  unsigned queue_depth{256};
  // Most requests in one submission: larger batches raise the latency of their first request.
  unsigned max_batch{32};
  // Bound of the thread pool of the threads engine, per I/O thread.
  unsigned max_threads{64};
  IoUringFeatures io_uring;
};

}  // namespace vblk::aio
