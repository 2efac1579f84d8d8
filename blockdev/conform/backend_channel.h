// The frontend's end of the channel on which a backend speaks first. vhost-user.rst, "Back-end
// communication" and "Back-end message types".
#pragma once

#include <string>

#include "blockdev/conform/channel.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::conform {

class BackendChannel {
 public:
  // Hands the other end to the backend. Skips the test where BACKEND_REQ was not negotiated.
  explicit BackendChannel(Channel& channel);
  BackendChannel(const BackendChannel&) = delete;
  BackendChannel& operator=(const BackendChannel&) = delete;

  // Waits for CONFIG_CHANGE_MSG, and acknowledges it where that is asked for. `after_what`: how the
  // failure begins to say when none has come.
  void await_config_change(const std::string& after_what);

 private:
  vhost_user::UniqueFd ours_;
  vhost_user::MessageReader reader_;
};

}  // namespace vblk::conform
