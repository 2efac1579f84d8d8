// What is asked of a disk: which operations, where, how many at once, and when.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace vblk::bench {

enum class Operation : std::uint8_t { kRead, kWrite, kFlush, kDiscard, kWriteZeroes };
inline constexpr std::size_t kOperationCount = 5;
// "read", "write", "flush", "discard", "write-zeroes".
[[nodiscard]] std::string_view to_string(Operation operation);

enum class Distribution : std::uint8_t { kSequential, kUniform, kZipf };

// When requests come. Closed: the next one when one completes, so that a slow disk is asked less
// often, and latencies are service times. Open: at times of their own, whatever the disk does;
// latencies count from the time that was intended, so that a stall shows in every request that it
// delayed (no coordinated omission).
enum class Arrival : std::uint8_t { kClosed, kFixed, kPoisson };

struct Workload {
  std::string name{"job"};  // for reports
  // Of 100 operations so many are reads; the others are `other`.
  unsigned read_percent{100};
  Operation other{Operation::kWrite};
  Distribution distribution{Distribution::kUniform};
  double zipf_theta{1.2};  // of kZipf; greater than 0
  std::size_t block_bytes{4096};
  unsigned depth{1};        // most requests in flight on each queue
  unsigned queue_count{1};  // each with a thread of its own
  // The part of the disk that is used; 0: up to its end.
  std::uint64_t offset_bytes{0};
  std::uint64_t size_bytes{0};
  // A flush follows every so many writes of each of the `depth` lanes. 0: never.
  unsigned flush_every{0};
  // Each write is stable when it completes.
  bool write_through{false};
  Arrival arrival{Arrival::kClosed};
  double rate_per_second{0};  // of all queues together; unless kClosed
  // Whichever comes first ends the run; 0: that does not.
  std::chrono::nanoseconds run_time{0};
  std::uint64_t amount_bytes{0};          // of all queues together
  std::chrono::nanoseconds ramp_time{0};  // before that, not counted
  std::chrono::nanoseconds idle_time{0};  // before all that, with the queues open
  bool verify{false};                     // blocks hold what pattern.h says
  std::uint64_t seed{0};

  [[nodiscard]] bool reads() const { return read_percent > 0; }
  // Whether something else is on the disk afterwards.
  [[nodiscard]] bool changes_disk() const {
    return read_percent < 100 && other != Operation::kFlush;
  }
  [[nodiscard]] bool writes() const { return read_percent < 100 && other == Operation::kWrite; }
};

}  // namespace vblk::bench
