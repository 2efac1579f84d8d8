// The command line of `vblk serve` and `vblk ctl`, parsed and checked as far as that needs no
// system.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>

#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/image.h"
#include "blockdev/io_loop.h"
#include "blockdev/log.h"
#include "blockdev/virtio/blk_device.h"

namespace vblk::cli {

// Most queues of one device: a thread each is plenty for the machines of today, and each queue
// costs a kick and a call descriptor of the default limit of 1024.
inline constexpr unsigned kMaxQueues = 64;

struct ServeOptions {
  blockdev::ImageOptions image;
  virtio::BlkDeviceOptions device;
  aio::AioSelection aio;
  aio::EngineOptions engine;
  unsigned iothread_count{1};
  blockdev::IoLoopOptions loop;
  std::string socket_path;          // empty with socket_fd
  int socket_fd{-1};                // -1 with socket_path
  bool recovery{true};              // frontends may have requests in flight carried over
  bool socket_is_activated{false};  // socket_fd comes from a service manager, which keeps it
  std::string monitor_path;         // empty: no monitor
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
Expected<Parsed<CtlOptions>> parse_ctl_options(std::span<const std::string> arguments);

}  // namespace vblk::cli
