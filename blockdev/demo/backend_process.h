// A `vblk serve` of our own as a child process.
//
// It gets one end of a socket pair and the image as descriptors, so that there is no path to
// collide with and nothing left behind; it dies with this process, and ends by itself when its
// connection does.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <sys/types.h>

#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/demo/scratch_image.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::demo {

class BackendProcess {
 public:
  // Serves `image` by `engine` with cache=none, and waits until it is ready.
  // Errors: kIo, with what the child said last on its standard error.
  static Expected<std::unique_ptr<BackendProcess>> start(const ScratchImage& image,
                                                         aio::EngineName engine);
  // Kills the child if finish() has not been called.
  ~BackendProcess();
  BackendProcess(const BackendProcess&) = delete;
  BackendProcess& operator=(const BackendProcess&) = delete;

  // Our end of its connection; can be taken once.
  [[nodiscard]] vhost_user::UniqueFd take_socket() { return std::move(socket_); }
  [[nodiscard]] pid_t pid() const { return pid_; }
  // Waits for the child to end, which it does after its frontend has gone. Error: kIo if it does
  // not, or fails.
  Expected<void> finish();

 private:
  BackendProcess() = default;
  Expected<std::string> read_output(std::chrono::milliseconds timeout);
  Expected<void> wait_until_ready();
  [[nodiscard]] std::string last_words() const;

  pid_t pid_{-1};
  vhost_user::UniqueFd socket_;
  vhost_user::UniqueFd standard_output_;  // its end is the end of the child
  vhost_user::UniqueFd standard_error_;
};

}  // namespace vblk::demo
