// The vhost-user server of one device: listens, serves one frontend after another, stops in good
// order.
//
// One frontend at a time: a virtio device has one driver. A second one may connect meanwhile and
// waits until the first has left. Every frontend finds a fresh device.
//
// Thread: run() makes the calling thread the server's; the I/O threads do the work.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/io_thread.h"
#include "blockdev/vhost_user/backend.h"
#include "blockdev/virtio/blk_device.h"

namespace vblk::vhost_user {

struct ServerOptions {
  std::string socket_path;         // listen here; or
  int socket_fd{-1};               // an inherited socket, listening or connected; taken over
  bool socket_must_listen{false};  // a connected one is refused
  BackendOptions backend;
};

struct ServerStatus {
  bool connected{false};
  std::uint64_t features{0};
  std::uint8_t device_status{0};  // as Backend::device_status()
  std::vector<RingStatus> rings;
};

class Server {
 public:
  // `device` and `io_threads` (at least one) must outlive the server. From here on frontends can
  // connect. Errors: as UnixListener::listen(); kInvalidArgument for an inherited descriptor that
  // is no Unix stream socket.
  static Expected<std::unique_ptr<Server>> create(
      const ServerOptions& options, virtio::BlkDevice& device,
      const std::vector<std::unique_ptr<blockdev::IoThread>>& io_threads);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Serves until request_stop(), or until the frontend of a connected inherited socket has left.
  // Then waits for what is in flight, flushes the disk and removes the socket. Error: the last
  // flush failed, or the listening socket did.
  Expected<void> run();
  // Any thread, at any time, more than once.
  void request_stop();
  // Asks the server's thread, from any other. Nothing if it does not answer within two seconds: it
  // is waiting for requests in flight, or run() has ended.
  [[nodiscard]] std::optional<ServerStatus> status();
  // Has the frontend told, if there is one that listens, that the disk's size has changed. Any
  // thread; returns at once.
  void notify_config_change();

 private:
  struct State;
  explicit Server(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace vblk::vhost_user
