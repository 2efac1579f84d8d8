// The workloads, and what one measurement of one of them says.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "aio/error.h"
#include "blockdev/demo/backend_process.h"
#include "blockdev/demo/latency_histogram.h"
#include "blockdev/driver/blk_driver.h"

namespace vblk::demo {

enum class Operation : std::uint8_t { kRead, kWrite, kWriteAndFlush };

// Closed loop: `depth` operations in flight, each on a random 4 KiB block of the image; the next
// one starts when one completes. Write and flush is one operation, of two requests in sequence.
struct Workload {
  std::string_view name;
  Operation operation;
  unsigned depth;
};
inline constexpr unsigned kDepthMax = 32;
inline constexpr std::array kWorkloads{
    Workload{"4k random read, depth 1", Operation::kRead, 1},
    Workload{"4k random read, depth 32", Operation::kRead, kDepthMax},
    Workload{"4k random write, depth 1", Operation::kWrite, 1},
    Workload{"4k random write, depth 32", Operation::kWrite, kDepthMax},
    Workload{"4k random write + flush, depth 1", Operation::kWriteAndFlush, 1},
};

struct Measurement {
  double operations_per_second{0};
  double cpu_us_per_operation{0};  // of the server
  double context_switches_per_operation{0};
  LatencyHistogram latencies;
};

// Drives one server through queue 0 of one driver, on the calling thread, which sleeps when nothing
// has completed, as a guest does.
class LoadGenerator {
 public:
  // `driver` and `server` must outlive it. `block_count` blocks may be written to.
  // Error: kExhausted: the driver's memory has no room for the buffers.
  static Expected<LoadGenerator> create(driver::BlkDriver& driver, const BackendProcess& server,
                                        std::uint64_t block_count);
  // Runs `workload` for `time`, after a tenth of that to warm up.
  // Errors: those of the driver; kIo if a request fails; kCorrupt if a block that was read is not
  // the block that was asked for.
  Expected<Measurement> run(const Workload& workload, std::chrono::nanoseconds time,
                            std::uint64_t seed);

 private:
  LoadGenerator(driver::BlkDriver& driver, const BackendProcess& server, std::uint64_t block_count)
      : driver_(driver), server_(server), block_count_(block_count) {}

  driver::BlkDriver& driver_;
  const BackendProcess& server_;
  std::uint64_t block_count_;
  std::array<std::span<std::byte>, kDepthMax> buffers_;
};

}  // namespace vblk::demo
