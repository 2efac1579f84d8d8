// What is measured: a disk, and the ways to it.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <sys/types.h>

#include "aio/error.h"
#include "blockdev/bench/workload.h"
#include "blockdev/driver/blk_driver.h"

namespace vblk::bench {

// Counters of what lies between the ports and the disk, where there is a way to know.
struct TargetStatistics {
  std::uint64_t kicks{0};           // of the device by the driver
  std::uint64_t wake_ups{0};        // of the driver by the device
  std::uint64_t submit_calls{0};    // of the engines to the kernel (or their pool)
  std::uint64_t submitted{0};       // kernel I/Os in these
  std::uint64_t flushes{0};         // asked for
  std::uint64_t flushes_issued{0};  // of the kernel

  TargetStatistics& operator+=(const TargetStatistics& other) {
    kicks += other.kicks;
    wake_ups += other.wake_ups;
    submit_calls += other.submit_calls;
    submitted += other.submitted;
    flushes += other.flushes;
    flushes_issued += other.flushes_issued;
    return *this;
  }
  [[nodiscard]] TargetStatistics since(const TargetStatistics& earlier) const {
    return {.kicks = kicks - earlier.kicks,
            .wake_ups = wake_ups - earlier.wake_ups,
            .submit_calls = submit_calls - earlier.submit_calls,
            .submitted = submitted - earlier.submitted,
            .flushes = flushes - earlier.flushes,
            .flushes_issued = flushes_issued - earlier.flushes_issued};
  }
};

// One request. Made by a port, and its until the port goes; in between of whoever asked for it.
struct Io {
  using Completion = void (*)(Io& io);

  Operation operation{Operation::kRead};
  std::uint64_t offset_bytes{0};
  std::size_t length_bytes{0};  // at most buffer.size() for reads and writes
  std::span<std::byte> buffer;  // aligned for any disk
  Completion complete{nullptr};
  void* context{nullptr};  // the caller's
  int error{0};            // the outcome, valid in `complete`: an errno value
};

// One queue of a disk, used by the thread that opened it.
class Port {
 public:
  Port() = default;
  // Nothing may be in flight, unless the disk has died.
  virtual ~Port() = default;
  Port(const Port&) = delete;
  Port& operator=(const Port&) = delete;

  // Error: kExhausted.
  virtual Expected<Io*> make_io(std::size_t buffer_bytes) = 0;
  // Takes `io`; the disk may see it only after kick(). Allowed in a completion. False: full.
  [[nodiscard]] virtual bool submit(Io& io) = 0;
  virtual void kick() = 0;
  // Completes what is done; how many. Errors: kCorrupt (the backend lies), kIo (it has gone).
  virtual Expected<std::size_t> poll() = 0;
  // Sleeps until poll() may have something to do, at most `timeout`.
  virtual Expected<void> sleep(std::chrono::nanoseconds timeout) = 0;
  // What this port has counted so far; of the flushes nothing.
  [[nodiscard]] virtual TargetStatistics statistics() const { return {}; }
};

class Target {
 public:
  Target() = default;
  virtual ~Target() = default;
  Target(const Target&) = delete;
  Target& operator=(const Target&) = delete;

  // For reports: "/tmp/disk.sock", "disk.img (io_uring, none)".
  [[nodiscard]] virtual std::string name() const = 0;
  [[nodiscard]] virtual std::uint64_t size_bytes() const = 0;
  [[nodiscard]] virtual std::size_t transfer_bytes_max() const = 0;
  [[nodiscard]] virtual bool can(Operation operation) const = 0;
  [[nodiscard]] virtual bool is_read_only() const = 0;
  // The process that does the work; 0: unknown.
  [[nodiscard]] virtual pid_t process() const = 0;
  // Whether that process is this one, so that what the load costs is in its figures too.
  [[nodiscard]] virtual bool is_in_process() const = 0;
  // Each write is stable when it completes, or not. Before any port is open.
  // Error: kNotSupported.
  virtual Expected<void> set_write_through(bool write_through) = 0;
  // Opens queue `index`, on the thread that will use it; several threads may at once.
  virtual Expected<std::unique_ptr<Port>> open_port(unsigned index) = 0;
  // The flushes, of all ports. Any thread; a moment old. 0 where they cannot be known.
  [[nodiscard]] virtual TargetStatistics statistics() const { return {}; }
};

struct SocketTargetOptions {
  std::string socket_path;
  unsigned queue_count{1};
  unsigned depth_max{1};  // of each queue
  std::size_t block_bytes_max{4096};
  pid_t process{0};  // 0: who listens on the socket, if that can be known and is another process
  unsigned runs{1};  // that ports are opened for, one after the other
  bool packed_rings{false};
};
// A vhost-user-blk backend, ours or another. Errors: as BlkDriver::connect; kCorrupt for a config
// space that makes no sense.
Expected<std::unique_ptr<Target>> open_socket_target(const SocketTargetOptions& options);
// The same on a connection that somebody else has made. Only `socket_path` (for messages),
// `queue_count` and `process` of the options are used.
Expected<std::unique_ptr<Target>> adopt_driver(std::unique_ptr<driver::BlkDriver> driver,
                                               const SocketTargetOptions& options);

}  // namespace vblk::bench
