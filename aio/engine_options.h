// What can be set on an engine.
#pragma once

namespace vblk::aio {

struct EngineOptions {
  // Kernel I/Os in flight per engine; more wait inside the engine. 1 to 4096.
  unsigned queue_depth{256};
  // Most requests in one submission: larger batches raise the latency of their first request.
  unsigned max_batch{32};
  // Bound of the thread pool of the threads engine, per I/O thread.
  unsigned max_threads{64};
};

}  // namespace vblk::aio
