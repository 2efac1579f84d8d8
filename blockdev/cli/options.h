// The command line of `vblk serve` and `vblk ctl`, parsed and checked as far as that needs no
// system.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/cpu_list.h"
#include "blockdev/image.h"
#include "blockdev/io_loop.h"
#include "blockdev/log.h"
#include "blockdev/virtio/blk_device.h"

namespace vblk::cli {

// Most queues of one device: a thread each is plenty for the machines of today, and each queue
// costs a kick and a call descriptor of the default limit of 1024.
inline constexpr unsigned kMaxQueues = 64;

// One served device.
struct ServeOptions {
  std::string name;  // for the log, where there are several; otherwise empty
  blockdev::ImageOptions image;
  virtio::BlkDeviceOptions device;
  aio::AioSelection aio;
  aio::EngineOptions engine;
  unsigned iothread_count{1};
  std::vector<blockdev::CpuList> iothread_cpus;  // of thread i: i modulo their number; empty: any
  blockdev::IoLoopOptions loop;
  std::string socket_path;          // empty with socket_fd
  int socket_fd{-1};                // -1 with socket_path
  bool recovery{true};              // frontends may have requests in flight carried over
  bool migration{false};            // the disk is handed over, for guests that are migrated
  bool socket_is_activated{false};  // socket_fd comes from a service manager, which keeps it
  std::string monitor_path;         // empty: no monitor
  std::string config_path;          // name devices there, and nothing else here; empty: this is one
  log::Level log_level{log::Level::kInfo};
};

struct CtlOptions {
  std::string monitor_path;
  std::string command;
  // Name and text, for the command's "arguments"; only some have one.
  std::optional<std::pair<std::string, std::string>> argument;
};

// What a command line asks for besides the command itself: the text to print on standard output,
// after which the program exits with 0 (--help, --print-capabilities).
struct Answer {
  std::string text;
};

template <typename Options>
using Parsed = std::variant<Options, Answer>;

// `arguments` are those after the command's name, `activated_fd` is activated_socket()'s. Error:
// kInvalidArgument, one line naming the option.
Expected<Parsed<ServeOptions>> parse_serve_options(std::span<const std::string> arguments,
                                                   std::optional<int> activated_fd);
// Whether there is an option of that name for one device, and whether it takes no value.
struct DeviceOption {
  bool exists{false};
  bool is_switch{false};
};
[[nodiscard]] DeviceOption find_device_option(std::string_view name);
Expected<Parsed<CtlOptions>> parse_ctl_options(std::span<const std::string> arguments);

}  // namespace vblk::cli
