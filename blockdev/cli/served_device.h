// One served disk with all that belongs to it, put together in the order in which the parts can
// fail without leaving anything behind:
//
//   image -> device -> I/O threads (engines) -> socket -> monitor
//
// Devices of one process share nothing but the process: each has its own image, engines, threads
// and sockets, and what happens to one leaves the others alone.
//
// Threads: run() makes the calling thread the device's server; each I/O thread owns its queues and
// engines; the monitor has its own.
#pragma once

#include <memory>
#include <vector>

#include <boost/json/object.hpp>
#include <boost/json/value.hpp>

#include "aio/error.h"
#include "blockdev/block_node.h"
#include "blockdev/cli/monitor.h"
#include "blockdev/cli/options.h"
#include "blockdev/engine_switch.h"
#include "blockdev/handover_node.h"
#include "blockdev/io_thread.h"
#include "blockdev/vhost_user/server.h"
#include "blockdev/virtio/blk_device.h"

namespace vblk::cli {

class ServedDevice {
 public:
  // From here on frontends and `vblk ctl` can connect. Errors: those of the parts.
  static Expected<std::unique_ptr<ServedDevice>> create(const ServeOptions& options);
  // Requests are done by then: run() has returned, or nobody has been served.
  ~ServedDevice() = default;
  ServedDevice(const ServedDevice&) = delete;
  ServedDevice& operator=(const ServedDevice&) = delete;

  // Serves until request_stop(); as vhost_user::Server::run().
  Expected<void> run();
  // Any thread, at any time, more than once.
  void request_stop() { server_->request_stop(); }
  // Which engine does what, once at the start.
  void log_routes();
  [[nodiscard]] const ServeOptions& options() const { return options_; }

 private:
  explicit ServedDevice(const ServeOptions& options) : options_(options) {}
  using Answer = Expected<boost::json::value>;
  using Arguments = boost::json::object;

  Expected<void> open_disk();
  Expected<void> start_io_threads();
  MonitorHandlers handlers();

  // The monitor's commands, on its thread.
  Answer query_aio();
  Answer query_status();
  Answer set_aio(const Arguments& arguments);
  Answer resize(const Arguments& arguments);
  Answer set_limits(const Arguments& arguments);
  Answer pause();
  Answer resume();

  const ServeOptions options_;
  std::unique_ptr<blockdev::BlockNode> node_;
  blockdev::HandoverNode* handover_{nullptr};  // what node_ is, if it can be handed over
  std::unique_ptr<virtio::BlkDevice> device_;
  std::unique_ptr<blockdev::EngineSwitch> engine_switch_;
  std::vector<std::unique_ptr<blockdev::IoThread>> threads_;
  std::unique_ptr<vhost_user::Server> server_;
  std::unique_ptr<Monitor> monitor_;
};

}  // namespace vblk::cli
