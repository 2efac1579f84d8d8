// What can be set on an engine.
#pragma once

#include <string_view>

#include "aio/error.h"
#include "threadpool/pool.h"

namespace vblk::aio {

// What the io_uring engine may use of the kernel, to be switched off one by one for measuring.
// docs/benchmarks.md says what each is worth; docs/decisions/0004-registered-buffers-are-off.md why
// one is off.
struct IoUringFeatures {
  bool defer_taskrun{true};        // IORING_SETUP_SINGLE_ISSUER | DEFER_TASKRUN
  bool registered_files{true};     // io_uring_register_files(3): no reference taken per request
  bool registered_buffers{false};  // io_uring_register_buffers(3): all guest memory stays pinned
  // IOSQE_ASYNC: everything goes to the kernel's workers (io-wq) at once. To be measured.
  bool force_async{false};
  // Bound of those workers, io_uring_register_iowq_max_workers(3); 0: the kernel's own.
  unsigned kernel_workers{0};

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
  // Started with the engine instead of when they are needed.
  unsigned min_threads{0};
  // Which pool that is. All but the first are there to be measured.
  threadpool::PoolKind pool{threadpool::PoolKind::kAdaptive};
  IoUringFeatures io_uring;
};

}  // namespace vblk::aio
