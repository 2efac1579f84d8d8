// The listening socket that a service manager passes to a program it starts, and keeps when that
// ends: frontends that connect meanwhile wait instead of being refused. sd_listen_fds(3), whose
// protocol is three environment variables; LISTEN_FDNAMES is not needed for one socket.
#pragma once

#include <optional>

#include "aio/error.h"

namespace vblk::cli {

// The descriptor, or nothing if none is passed to this process. Errors: kInvalidArgument if there
// are several, or their number makes no sense.
Expected<std::optional<int>> activated_socket();

}  // namespace vblk::cli
