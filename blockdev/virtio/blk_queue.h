// One virtqueue of the device on its I/O thread: pop, parse, dispatch to the node, push used,
// interrupt.
//
// Everything a request needs lies in a slot that is made when the queue starts, one per ring entry,
// found by the chain's head index, or on a packed ring by the buffer's id. poll() pops every
// available chain; completions push used entries; settle() publishes them at once and interrupts if
// the driver asked.
//
// A queue whose in-flight area says that a predecessor has died takes that one's requests again,
// before anything from the avail ring, and one after another, in the order in which they were
// popped: the next is submitted when the one before has completed. Engines run requests side by
// side, and of two writes to the same place the last one popped would then not be the last one
// done; nor can the queue see which requests touch each other, for a format may map them to the
// same cluster. It costs the time of a queue's worth of requests, once. New requests that the
// driver sends meanwhile wait, as requests do at a disk that is slow for a moment.
//
// A queue that is suspended leaves in flight, for whoever runs the ring next, what has not been
// given to the disk: what waits for the device's limits, failed requests that are kept, and what a
// predecessor had left. What is at the disk is waited for: kernels take no request back.
//
// A request that failed and that the error policy keeps (error_policy.h) waits in its slot,
// unanswered and in flight for all others; the device is paused then (device_gate.h). When it is
// resumed, the queue takes what it has kept again, in the same way and the same order.
//
// Interrupts may be held back for a while, to be one for several answers (interrupt_hold.h).
//
// Threads: all calls on the I/O thread that owns the queue, except where noted. The kick eventfd
// only ends a sleep; while the loop is awake the avail ring is looked at directly and kicks are
// suppressed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "aio/error.h"
#include "blockdev/io_context.h"
#include "blockdev/io_loop.h"
#include "blockdev/virtio/blk_device.h"
#include "blockdev/virtio/dirty_log.h"
#include "blockdev/virtio/guest_memory.h"
#include "blockdev/virtio/inflight_area.h"
#include "blockdev/virtio/packed_inflight_region.h"

namespace vblk::virtio {

// What a queue was stopped with, in the order in which it was popped.
struct LeftRequests {
  std::vector<std::uint16_t> heads;  // packed: ids
  // Packed: their descriptors, which the ring may not have any more.
  std::vector<PackedInflightRecovery::Buffer> buffers;
};

// What is to be marked of what a queue writes to guest memory.
struct DirtyLogging {
  std::shared_ptr<const DirtyLog> log;  // nullptr: nothing
  int event_fd{-1};                     // signalled when something was marked; stays the caller's
  // Whether what is written to the used ring is marked, packed: to the device's event suppression
  // structure; and where it begins in the log, which need not be where it is in guest memory.
  bool marks_ring{false};
  std::uint64_t ring_address{0};
};

// How a ring is to be run, as the frontend described it.
struct BlkQueueSetup {
  std::uint16_t index{0};
  std::uint16_t size{0};  // entries: 1 to BlkDeviceOptions::queue_size_max, split: a power of two
  std::uint32_t next_avail{0};  // SET_VRING_BASE; packed: as packed_base()
  // Frontend virtual addresses (SET_VRING_ADDR). Packed: the descriptor ring, and the driver's and
  // the device's event suppression structures.
  std::uint64_t descriptor_address{0};
  std::uint64_t avail_address{0};
  std::uint64_t used_address{0};
  int kick_fd{-1};   // -1: polled only, the loop never sleeps; stays the caller's
  int call_fd{-1};   // -1: no interrupts; stays the caller's
  int error_fd{-1};  // signalled when the ring is broken; stays the caller's
  // Where what is in flight is kept for a successor (SET_INFLIGHT_FD); nullptr: nowhere.
  std::shared_ptr<const InflightArea> inflight;
  // Without such an area: what the queue before this one has left (BlkQueue::left()).
  LeftRequests left;
  DirtyLogging logging;
  std::function<void()> on_broken;  // called on the I/O thread when the ring breaks; or nothing
};

// Counters since the queue started; read on the I/O thread.
struct BlkQueueStatistics {
  std::uint64_t requests{0};
  std::uint64_t recovered{0};    // of those: a predecessor had them in flight
  std::uint64_t retried{0};      // of those: taken again after they had failed
  std::uint64_t errors{0};       // completed with IOERR
  std::uint64_t unsupported{0};  // completed with UNSUPP
  std::uint64_t interrupts{0};
  std::uint64_t interrupts_merged{0};  // wanted, and one with another that was held back
  std::uint64_t kicks{0};
};

class BlkQueue final : public blockdev::Poller {
 public:
  // Checks the ring's addresses against `memory`, prepares the slots and registers with
  // `context.loop()`. `device` and `context` must outlive the queue.
  // The ring is split or packed as negotiated then.
  // Error: kInvalidArgument naming the address that is wrong, or what is wrong with its base or its
  // part of the in-flight area; kExhausted.
  static Expected<std::unique_ptr<BlkQueue>> start(BlkDevice& device, blockdev::IoContext& context,
                                                   std::shared_ptr<const GuestMemory> memory,
                                                   const BlkQueueSetup& setup);
  // Requires in_flight() == 0 (asserted): stop() first.
  ~BlkQueue() override;

  // What becomes of kept requests, and of a predecessor's that are not taken again yet, when a
  // queue stops while the device is paused and nobody knows for how long.
  enum class Unfinished : std::uint8_t {
    kLeave,    // they stay in flight: in the in-flight area, and in left()
    kFail,     // they are answered with an I/O error: nobody comes who would take them
    kSuspend,  // they stay in flight, paused or not, and so does what waits for the device's limits
  };
  // Stops popping; `stopped` runs from the loop once nothing is in flight, a predecessor's requests
  // included, but for what `unfinished` leaves, and all used entries are published. What waits for
  // the device's limits goes on at once, or is left. next_avail() is then final, and guest memory
  // is not touched any more. Once (asserted).
  void stop(Unfinished unfinished, std::move_only_function<void()> stopped);
  // After that: the requests that it left.
  [[nodiscard]] const LeftRequests& left() const;

  // SET_VRING_CALL, SET_VRING_ERR and SET_VRING_KICK on a running ring. -1 turns the signal off.
  void set_call_fd(int fd);
  void set_error_fd(int fd);
  void set_kick_fd(int fd);

  // The ring is broken (a malformed avail ring or chain without reachable status): it pops no more.
  [[nodiscard]] bool broken() const;
  // A predecessor's requests included, which wait for their turn, and those that are kept.
  [[nodiscard]] std::size_t in_flight() const;
  // Of those: at the device's limits; and to be taken again, now or when the device is resumed.
  [[nodiscard]] std::size_t waiting() const;
  [[nodiscard]] std::size_t kept() const;
  [[nodiscard]] std::uint32_t next_avail() const;  // as BlkQueueSetup::next_avail
  [[nodiscard]] const BlkQueueStatistics& statistics() const;

  std::size_t poll() override;
  void settle() override;
  [[nodiscard]] bool prepare_to_sleep() override;
  void wake_up() override;

 private:
  struct Slot;
  struct State;
  explicit BlkQueue(std::unique_ptr<State> state);
  static Expected<std::unique_ptr<BlkQueue>> start_with_memory(
      BlkDevice& device, blockdev::IoContext& context, std::shared_ptr<const GuestMemory> memory,
      const BlkQueueSetup& setup);
  std::unique_ptr<State> state_;
};

}  // namespace vblk::virtio
