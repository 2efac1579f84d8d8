// A closed loop: a fixed number of operations in flight, the next one starts when one completes.
//
// Drives queue 0 of a driver on the calling thread, which sleeps when nothing has completed, as a
// guest does. What it says of latency holds for this load only: a slow backend is asked less often
// (coordinated omission), as a guest with so many requests in flight asks it less often.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <sys/types.h>
#include <vector>

#include "aio/error.h"
#include "blockdev/bench/latency_histogram.h"
#include "blockdev/driver/blk_driver.h"

namespace vblk::bench {

enum class Operation : std::uint8_t { kRead, kWrite };

struct Workload {
  Operation operation{Operation::kRead};
  bool random{true};  // uniform over all blocks; otherwise in order, from the start again
  unsigned depth{1};
  std::size_t block_bytes{4096};
  // A flush follows every so many writes of each of the `depth` lanes, and counts with the write
  // before it as one operation. 0: never.
  unsigned flush_every{0};
};

// What is in the blocks, for those who want to know whether they get what they asked for.
class BlockContent {
 public:
  BlockContent() = default;
  virtual ~BlockContent() = default;
  BlockContent(const BlockContent&) = delete;
  BlockContent& operator=(const BlockContent&) = delete;

  virtual void before_write(std::uint64_t block, std::span<std::byte> data) = 0;
  virtual void before_read(std::uint64_t block, std::span<std::byte> data) = 0;
  [[nodiscard]] virtual bool is_right(std::uint64_t block, std::span<const std::byte> data) = 0;
};

struct Measurement {
  std::chrono::nanoseconds elapsed{0};
  double operations_per_second{0};
  double cpu_us_per_operation{0};  // of the server
  double context_switches_per_operation{0};
  // What io_uring handed to kernel workers (io-wq) because it would have blocked. Nothing where the
  // kernel does not let us count (tracepoint_counter.h).
  std::optional<double> punts_per_operation;
  LatencyHistogram latencies;
};

class LoadGenerator {
 public:
  // For workloads of up to `depth_max` requests of `block_bytes_max`. `driver` and `content` (none:
  // nothing is checked, noise is written) must outlive it. `server`: the process whose CPU time and
  // context switches are reported, 0 for none. `size_bytes` bytes of the disk are used.
  // Error: kExhausted: the driver's memory has no room for the buffers.
  static Expected<LoadGenerator> create(driver::BlkDriver& driver, pid_t server,
                                        std::uint64_t size_bytes, unsigned depth_max,
                                        std::size_t block_bytes_max,
                                        BlockContent* content = nullptr);
  // Runs `workload` for `warm_up`, uncounted, then for `time`.
  // Errors: those of the driver; kIo if a request fails; kCorrupt if a block that was read is not
  // the block that was asked for.
  Expected<Measurement> run(const Workload& workload, std::chrono::nanoseconds warm_up,
                            std::chrono::nanoseconds time, std::uint64_t seed);

 private:
  LoadGenerator(driver::BlkDriver& driver, pid_t server, std::uint64_t size_bytes,
                BlockContent* content)
      : driver_(driver), server_(server), size_bytes_(size_bytes), content_(content) {}

  driver::BlkDriver& driver_;
  pid_t server_;
  std::uint64_t size_bytes_;
  BlockContent* content_;
  std::vector<std::span<std::byte>> buffers_;
};

}  // namespace vblk::bench
