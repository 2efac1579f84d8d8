// The vhost-user front-end: everything a virtual machine monitor says to a backend.
// QEMU's docs/interop/vhost-user.rst.
//
// Works with any backend. Every call that waits has a limit, so that a backend that dies or stalls
// is an Error and never a hang. One thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <sys/types.h>
#include <vector>

#include "aio/error.h"
#include "blockdev/driver/driver_memory.h"
#include "blockdev/driver/driver_queue.h"
#include "blockdev/vhost_user/protocol.h"
#include "blockdev/vhost_user/socket.h"
#include "blockdev/virtio/blk_wire.h"

namespace vblk::driver {

struct FrontendOptions {
  std::chrono::milliseconds timeout{10'000};  // of each message that waits for an answer
  // What is accepted of what the backend offers. Packed rings are for those who make them, and
  // LOG_ALL for those who migrate.
  std::uint64_t features_mask{
      ~(virtio::feature_bit(virtio::kFRingPacked) | virtio::feature_bit(vhost_user::kFLogAll))};
  // Rings that stop with requests in flight are for those who have them started again.
  std::uint64_t protocol_features_mask{
      ~(std::uint64_t{1} << vhost_user::kProtocolFGetVringBaseInflight)};
};

// Where a backend keeps what it has in flight, so that its successor can go on (vhost-user.rst,
// "Inflight I/O tracking"). Its owner hands it to each backend that serves the same rings.
struct InflightFile {
  vhost_user::UniqueFd fd;
  vhost_user::Inflight description{};
};

class Frontend {
 public:
  // Connects to `path`. Errors: kNotFound, kPermission, kBusy (its backlog stays full), or what
  // else connect(2) says.
  static Expected<std::unique_ptr<Frontend>> connect(const std::string& path,
                                                     const FrontendOptions& options = {});
  // Speaks on a socket that is connected already, and makes it non-blocking.
  static std::unique_ptr<Frontend> adopt(vhost_user::UniqueFd socket,
                                         const FrontendOptions& options = {});
  Frontend(const Frontend&) = delete;
  Frontend& operator=(const Frontend&) = delete;

  // GET_FEATURES up to SET_FEATURES. Errors of this and of all below: kBusy (no answer in time),
  // kIo (the backend has gone), kCorrupt (an answer that makes no sense), kNotSupported (the
  // backend refused).
  Expected<void> negotiate();
  [[nodiscard]] std::uint64_t features() const { return features_; }
  [[nodiscard]] std::uint64_t offered_features() const { return offered_features_; }
  [[nodiscard]] std::uint64_t protocol_features() const { return protocol_features_; }

  // Config space. The answer has as many bytes as were asked for.
  Expected<std::vector<std::byte>> read_config(std::uint32_t offset, std::uint32_t size_bytes);
  Expected<void> write_config(std::uint32_t offset, std::span<const std::byte> bytes);
  Expected<std::uint64_t> queue_count();

  // Shares `memory` by SET_MEM_TABLE, or region by region by ADD_MEM_REG if CONFIGURE_MEM_SLOTS was
  // negotiated. The table has room for eight regions.
  Expected<void> set_memory(const DriverMemory& memory);
  Expected<void> add_region(const DriverMemory::Region& region);
  Expected<void> remove_region(const DriverMemory::Region& region);

  // Has the backend make an in-flight area for so many queues of so many entries
  // (GET_INFLIGHT_FD), and gives one to a backend, before any ring is started (SET_INFLIGHT_FD).
  // Error: also kNotSupported without INFLIGHT_SHMFD.
  Expected<InflightFile> get_inflight(std::uint16_t queue_count, std::uint16_t queue_size);
  Expected<void> set_inflight(const InflightFile& inflight);

  // Hands the rings of `queue` to the backend and enables them. `base` is where the backend goes on
  // (DriverQueue::resume_base()); nothing: at the beginning.
  Expected<void> start_ring(std::uint16_t index, const DriverQueue& queue,
                            std::optional<std::uint32_t> base = std::nullopt);
  // GET_VRING_BASE: waits until nothing is in flight any more, or with GET_VRING_BASE_INFLIGHT
  // until what is left of it is in the in-flight area; returns the base: of split rings the next
  // available index, of packed ones virtio::packed_base().
  Expected<std::uint32_t> stop_ring(std::uint16_t index);

  // Any message at all, for tests. `call` waits for a reply and returns its payload.
  Expected<void> send(vhost_user::Request request, std::span<const std::byte> payload,
                      std::span<const int> fds = {}, std::uint32_t flags = vhost_user::kVersion);
  Expected<std::vector<std::byte>> call(vhost_user::Request request,
                                        std::span<const std::byte> payload,
                                        std::span<const int> fds = {},
                                        std::uint32_t flags = vhost_user::kVersion);
  // Sends and, if REPLY_ACK was negotiated, waits for the acknowledgement.
  Expected<void> command(vhost_user::Request request, std::span<const std::byte> payload,
                         std::span<const int> fds = {});
  [[nodiscard]] int socket() const { return socket_.get(); }
  // The process that listened on the socket, as unix(7) tells it (SO_PEERCRED). 0: not known.
  [[nodiscard]] pid_t backend_process() const;
  // Whether the backend has closed its end.
  [[nodiscard]] bool is_hung_up() const;

 private:
  Frontend(vhost_user::UniqueFd socket, const FrontendOptions& options);
  Expected<vhost_user::Message> receive(vhost_user::Request expected);
  // Sends and waits for the reply, descriptors included.
  Expected<vhost_user::Message> exchange(vhost_user::Request request,
                                         std::span<const std::byte> payload,
                                         std::span<const int> fds = {},
                                         std::uint32_t flags = vhost_user::kVersion);
  [[nodiscard]] Expected<void> check_inflight() const;
  Expected<std::uint64_t> call_u64(vhost_user::Request request);

  vhost_user::UniqueFd socket_;
  const FrontendOptions options_;
  vhost_user::MessageReader reader_;
  std::uint64_t offered_features_{0};
  std::uint64_t features_{0};
  std::uint64_t protocol_features_{0};
};

}  // namespace vblk::driver
