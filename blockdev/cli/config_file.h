// `vblk serve --config FILE`: the devices of one process, described in TOML
// (docs/decisions/0011-devices-in-toml.md).
//
//   [[device]]
//   name = "root"
//   image = "/images/root.qcow2"
//   socket-path = "/run/vblk/root.sock"
//   queues = 4
//   limits = { iops-total = 1000, bps-write = "20M" }
//
// Keys are the options of `vblk serve`, and each device is checked as if it were served by a
// command line of its own; beyond that, what several devices may not share.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "aio/error.h"
#include "blockdev/cli/options.h"

namespace vblk::cli {

// Every error names the file, line and column: kInvalidArgument for whatever is wrong with it; and
// those of reading it.
Expected<std::vector<ServeOptions>> read_config(const std::string& path);

// The same of text; `path` is for messages.
Expected<std::vector<ServeOptions>> parse_config(std::string_view text, const std::string& path);

}  // namespace vblk::cli
