// One frontend's connection: the vhost-user messages, and the rings they describe.
//
// A message passes one gate (a table of what each may look like) and then a short handler. Whatever
// is wrong with it costs this connection at most: with REPLY_ACK the frontend is told, without it
// the connection ends.
//
// A ring is processed while it is started (its kick descriptor is known) and enabled ("Ring
// states"). The queue behind it lives on its I/O thread; here is only the description.
//
//   started  enabled   BlkQueue
//   no       any       none
//   yes      no        none
//   yes      yes       running on I/O thread (index modulo their number)
//
// A ring that breaks is not started again before its next kick descriptor, which comes with a reset
// of the device.
//
// A session is what a front-end sets up on a connection. SET_OWNER begins one. A second one, on the
// same connection, replaces all of it, unless a ring runs: then nothing happens. Protocol features
// and the back-end's channel come before SET_OWNER, and so are the connection's.
//
// A reset (RESET_DEVICE, or SET_STATUS with 0) drains and stops all rings, disables them, and
// forgets what the driver and the front-end have told about them and which features were chosen.
// What belongs to the connection stays: protocol features, memory, the log, call and error
// descriptors, the back-end's channel. Three things need care:
//   - QEMU 7.2 sends SET_STATUS 0 whenever it stops its virtual machine, and asks for the bases of
//     the rings afterwards (GET_VRING_BASE), to go on there later. They are told until a ring is
//     given another, or started.
//   - What a paused device keeps is left in the in-flight area, as by GET_VRING_BASE. It counts if
//     the front-end gives that area again (SET_INFLIGHT_FD); a front-end that starts rings without
//     having given any has the one that it gave before, cleared, and laid out for the kind of rings
//     that the driver has chosen by then. If it is too small for them they are refused.
//   - `writeback` stays as the driver has set it (BlkDevice::forget_features()).
//
// A device may be paused with requests that nobody answers before it is resumed (device_gate.h). A
// ring that stops meanwhile leaves them: in the in-flight area for whoever serves the disk next;
// where there is none, in its description here while it is certain to run again, and otherwise with
// an I/O error.
//
// With GET_VRING_BASE_INFLIGHT the in-flight area goes where the guest goes. Then GET_VRING_BASE
// suspends a ring (BlkQueue::Unfinished::kSuspend), and what is left in flight is carried out by
// who is given the area next.
//
// Thread: the server's. Stopping a queue blocks this thread until what is in flight is done: the
// memory under a request must stay, and nobody else waits for this thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/handover_node.h"
#include "blockdev/io_thread.h"
#include "blockdev/vhost_user/protocol.h"
#include "blockdev/vhost_user/socket.h"
#include "blockdev/virtio/blk_device.h"
#include "blockdev/virtio/blk_queue.h"
#include "blockdev/virtio/device_status.h"
#include "blockdev/virtio/dirty_log.h"
#include "blockdev/virtio/guest_memory.h"
#include "blockdev/virtio/inflight_area.h"

namespace vblk::vhost_user {

// What the monitor shows of a ring.
struct RingStatus {
  bool running{false};
  bool broken{false};
  std::size_t in_flight{0};
  std::size_t waiting{0};  // of those: for the device's limits
  std::size_t kept{0};     // of those: failed, to be taken again when the device is resumed
  virtio::BlkQueueStatistics statistics;
};

struct BackendOptions {
  // INFLIGHT_SHMFD: frontends may have what is in flight carried over to the next backend. The disk
  // then has to outlive this process with every change that it completes, which may cost it
  // something (BlockRequest::outlives_process).
  bool offers_recovery{true};
  // The disk, if it can be handed over to another server: it is taken before the first ring starts
  // and given up when the frontend has stopped the last one (GET_VRING_BASE), before the frontend
  // is told, or leaves. LOG_SHMFD is offered then: the frontend may migrate its guest.
  blockdev::HandoverNode* handover{nullptr};
  // Called on an I/O thread when a ring has broken: has tell_needs_reset() called on the server's.
  std::function<void()> on_broken;
};

class Backend {
 public:
  // All must outlive the backend. `socket` is the connection.
  Backend(UniqueFd socket, virtio::BlkDevice& device,
          std::span<const std::unique_ptr<blockdev::IoThread>> io_threads,
          const BackendOptions& options = {});
  // Stops the rings, waits for what is in flight, and resets the device for the next frontend.
  ~Backend();
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  [[nodiscard]] int socket() const { return socket_.get(); }

  // Handles what has arrived, up to a bound: call it again whenever the socket is readable.
  // False: the frontend has closed the connection.
  // Error: the connection is of no more use; says why.
  Expected<bool> serve();

  // Tells the frontend that the config space has changed, if it has given a channel for that.
  void notify_config_change();
  // To be called after a ring has broken: tells a driver that is at work that it has to reset the
  // device, as far as the frontend passes it on. "If DRIVER_OK is set, after it sets
  // DEVICE_NEEDS_RESET, the device MUST send a device configuration change notification".
  void tell_needs_reset();
  // "Device Status Field", as GET_STATUS tells it.
  [[nodiscard]] std::uint8_t device_status() const;

  [[nodiscard]] std::uint64_t features() const { return session_.features; }
  [[nodiscard]] std::vector<RingStatus> ring_status() const;

 private:
  struct Ring {
    std::uint16_t index{0};
    std::uint16_t size{0};
    std::optional<std::uint32_t> next_avail;         // as BlkQueueSetup's; none: at the beginning
    std::optional<std::uint32_t> base_before_reset;  // still told by GET_VRING_BASE
    virtio::LeftRequests left;                       // as BlkQueueSetup
    bool has_addresses{false};
    VringAddress addresses{};
    bool started{false};
    bool enabled{false};
    bool waits_for_memory{false};  // started, but its memory was taken away from under it
    UniqueFd kick;
    UniqueFd call;
    UniqueFd error;
    std::unique_ptr<virtio::BlkQueue> queue;  // to be touched on its I/O thread only
  };
  // What a front-end has set up since SET_OWNER.
  struct Session {
    explicit Session(std::size_t ring_count);

    std::uint64_t features{0};  // VHOST_USER_F_PROTOCOL_FEATURES included
    bool features_accepted{false};
    virtio::DeviceStatus status;
    std::shared_ptr<const virtio::GuestMemory> memory;
    std::shared_ptr<const virtio::InflightArea> inflight;  // none before SET_INFLIGHT_FD
    bool inflight_is_of_before_reset{false};               // what it says counts no more
    std::shared_ptr<const virtio::DirtyLog> log;           // none before SET_LOG_BASE
    UniqueFd log_event;
    std::vector<Ring> rings;
  };
  struct Rule;
  static const Rule* rule_for(Request request);

  Expected<void> handle(Message& message);
  Expected<void> check(const Rule& rule, const Message& message) const;
  [[nodiscard]] bool wants_reply(const Message& message) const;
  Expected<void> acknowledge(const Message& message, const Expected<void>& outcome);
  Expected<void> reply(const Message& message, std::span<const std::byte> payload,
                       std::span<const int> fds = {});
  Expected<void> reply_u64(const Message& message, std::uint64_t value);

  Expected<void> get_features(Message& message);
  Expected<void> set_features(Message& message);
  Expected<void> accept_silently(Message& message);
  Expected<void> set_owner(Message& message);
  Expected<void> set_mem_table(Message& message);
  Expected<void> add_mem_reg(Message& message);
  Expected<void> rem_mem_reg(Message& message);
  Expected<void> get_max_mem_slots(Message& message);
  Expected<void> set_log_base(Message& message);
  Expected<void> set_log_fd(Message& message);
  Expected<void> set_vring_num(Message& message);
  Expected<void> set_vring_addr(Message& message);
  Expected<void> set_vring_base(Message& message);
  Expected<void> get_vring_base(Message& message);
  Expected<void> set_vring_kick(Message& message);
  Expected<void> set_vring_call(Message& message);
  Expected<void> set_vring_err(Message& message);
  Expected<void> set_vring_enable(Message& message);
  Expected<void> get_protocol_features(Message& message);
  Expected<void> set_protocol_features(Message& message);
  Expected<void> get_queue_num(Message& message);
  Expected<void> set_backend_req_fd(Message& message);
  Expected<void> get_config(Message& message);
  Expected<void> set_config(Message& message);
  Expected<void> get_inflight_fd(Message& message);
  Expected<void> set_inflight_fd(Message& message);
  Expected<void> reset_device(Message& message);
  Expected<void> set_status(Message& message);
  Expected<void> get_status(Message& message);
  Expected<virtio::InflightDescription> inflight_description(const Message& message) const;
  void carry_writeback_over();

  Expected<Ring*> ring_at(std::uint64_t index);
  [[nodiscard]] blockdev::IoThread& thread_of(const Ring& ring) const;
  Expected<void> start_if_ready(Ring& ring);
  Expected<void> start(Ring& ring);
  Expected<void> renew_inflight();
  // What becomes of a ring that stops: it runs again on this connection, come what may; or the
  // connection has ended, and another one may come; or that is the frontend's to say.
  enum class Afterwards : std::uint8_t { kRunsAgain, kConnectionEnds, kUnknown };
  [[nodiscard]] virtio::BlkQueue::Unfinished unfinished_when(Afterwards afterwards) const;
  void stop(Ring& ring, Afterwards afterwards);
  void stop(Ring& ring, virtio::BlkQueue::Unfinished unfinished);
  // Runs `change` while no ring is processed; rings that ran go on afterwards.
  Expected<void> while_quiesced(std::move_only_function<Expected<void>()> change);
  Expected<void> replace_memory(std::vector<std::shared_ptr<const virtio::MemoryRegion>> regions);
  [[nodiscard]] bool negotiated_protocol(unsigned bit) const;
  [[nodiscard]] bool has_packed_rings() const;
  [[nodiscard]] bool any_ring_runs() const;
  [[nodiscard]] std::uint32_t base_of(const Ring& ring) const;
  [[nodiscard]] virtio::DirtyLogging logging_of(const Ring& ring) const;
  Expected<void> take_disk();
  void give_up_unused_disk();
  void reset();
  [[nodiscard]] std::uint64_t offered_protocol_features() const;

  UniqueFd socket_;
  UniqueFd backend_channel_;
  virtio::BlkDevice& device_;
  std::span<const std::unique_ptr<blockdev::IoThread>> io_threads_;
  const BackendOptions options_;
  MessageReader reader_;
  std::uint64_t protocol_features_{0};
  bool has_owner_{false};
  std::atomic<bool> needs_reset_{false};  // set by I/O threads
  Session session_;
};

}  // namespace vblk::vhost_user
