// The path of a request in one process, for measuring: a driver's rings, the queues that serve
// them, and no socket between. What is measured is the device's side; the driver's is as cheap as
// it can be, so every request has the same header, the same data and the same status byte.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "aio/engine_set.h"
#include "blockdev/block_node.h"
#include "blockdev/driver/driver_memory.h"
#include "blockdev/driver/driver_queue.h"
#include "blockdev/io_context.h"
#include "blockdev/io_loop.h"
#include "blockdev/io_thread.h"
#include "blockdev/vhost_user/socket.h"
#include "blockdev/virtio/blk_device.h"
#include "blockdev/virtio/blk_queue.h"
#include "blockdev/virtio/guest_memory.h"
#include "blockdev/virtio/inflight_area.h"
#include "tests/support/temp_dir.h"

namespace vblk::measure {

inline constexpr std::uint16_t kQueueSize = 128;
inline constexpr std::size_t kDiskBytes = std::size_t{4} << 20;

// All at offset 0 of the disk.
enum class Shape : std::uint8_t {
  kRead4k,   // one piece of data
  kRead64k,  // sixteen of 4 KiB
  kWrite4k,
  kFlush,
};
[[nodiscard]] const char* name_of(Shape shape);

enum class RingKind : std::uint8_t { kSplit, kPacked };

// A Linux guest's side: indirect descriptors, event index. One thread.
class Driver {
 public:
  explicit Driver(std::uint16_t queue_count, RingKind ring = RingKind::kSplit);

  // Of a backend that finds the memory at the same addresses.
  [[nodiscard]] const std::shared_ptr<const virtio::GuestMemory>& guest_memory() const {
    return guest_memory_;
  }
  [[nodiscard]] virtio::BlkQueueSetup setup(std::uint16_t queue) const;
  [[nodiscard]] std::uint16_t queue_count() const {
    return static_cast<std::uint16_t>(queues_.size());
  }
  [[nodiscard]] driver::DriverQueue& queue(std::uint16_t index) { return *queues_[index]; }

  // Puts `count` requests into the ring and kicks if the device wants it. There must be room.
  void submit(std::uint16_t queue, Shape shape, unsigned count);
  // Sleeps until nothing is in flight there.
  void finish(std::uint16_t queue);
  // The same without sleeping: false if something is in flight still.
  bool take_used(std::uint16_t queue);

 private:
  void lay_out();

  std::unique_ptr<driver::DriverMemory> memory_;
  std::shared_ptr<const virtio::GuestMemory> guest_memory_;
  std::vector<std::unique_ptr<driver::DriverQueue>> queues_;
  std::array<std::vector<driver::Buffer>, 4> chains_;  // by Shape
};

// Makes the device on `node` and negotiates what Driver does.
std::unique_ptr<virtio::BlkDevice> make_device(blockdev::BlockNode& node, std::uint16_t queue_count,
                                               RingKind ring = RingKind::kSplit);

struct ServedPathOptions {
  std::uint16_t queue_count{1};
  unsigned io_thread_count{1};
  blockdev::EngineSetFactory make_engines;
};

// Queues on I/O threads as `vblk serve` spreads them, driven from the calling thread.
class ServedPath {
 public:
  ServedPath(blockdev::BlockNode& node, const ServedPathOptions& options);
  ~ServedPath();
  ServedPath(const ServedPath&) = delete;
  ServedPath& operator=(const ServedPath&) = delete;

  [[nodiscard]] Driver& driver() { return driver_; }
  // `depth` requests on each of `queue_count` queues from `first_queue` on; returns when all are
  // done.
  void round(std::uint16_t first_queue, std::uint16_t queue_count, unsigned depth, Shape shape);
  // What the I/O threads have used of the processors so far.
  [[nodiscard]] std::chrono::nanoseconds cpu_time() const;

 private:
  blockdev::IoThread& thread_of(std::uint16_t queue) { return *threads_[queue % threads_.size()]; }

  Driver driver_;
  std::unique_ptr<virtio::BlkDevice> device_;
  std::vector<std::unique_ptr<blockdev::IoThread>> threads_;
  std::vector<clockid_t> clocks_;
  std::vector<std::unique_ptr<virtio::BlkQueue>> queues_;
};

// One queue without a thread, to be taken through the cycle of its loop step by step.
class SteppedPath {
 public:
  // `inflight`: where the queue keeps what is in flight, for rings of this kind; nullptr: nowhere.
  SteppedPath(blockdev::BlockNode& node, std::unique_ptr<aio::EngineSet> engines,
              RingKind ring = RingKind::kSplit,
              std::shared_ptr<const virtio::InflightArea> inflight = nullptr);

  [[nodiscard]] Driver& driver() { return driver_; }
  // The phases of a cycle, in this order.
  void dispatch() { queue_->poll(); }
  void submit() { context_.engines().submit(); }
  void complete() {
    context_.poll();
    queue_->settle();
  }
  // Runs cycles until the driver has everything back.
  void finish();

 private:
  Driver driver_;
  std::unique_ptr<virtio::BlkDevice> device_;
  blockdev::IoLoop loop_;
  blockdev::IoContext context_;
  std::unique_ptr<virtio::BlkQueue> queue_;
};

// Does nothing, and completes it at the next reap(): what is left is the cost of everything else.
std::unique_ptr<aio::EngineSet> instant_engine();
std::unique_ptr<aio::EngineSet> engine(aio::EngineName name);

// For one queue of kQueueSize.
std::shared_ptr<const virtio::InflightArea> inflight_area(RingKind ring);

// A file of kDiskBytes with data in it, open for O_DIRECT, in a directory of its own.
class ScratchFile {
 public:
  ScratchFile();
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] std::string path() const { return directory_.file("disk"); }

 private:
  test::TempDir directory_;
  vhost_user::UniqueFd fd_;
};

std::unique_ptr<blockdev::BlockNode> null_node();
// As `vblk serve --cache none` opens it.
std::unique_ptr<blockdev::BlockNode> raw_node(const ScratchFile& file);
std::unique_ptr<blockdev::BlockNode> qcow2_node(const std::string& path);

}  // namespace vblk::measure
