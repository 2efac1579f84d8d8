// A `vblk serve` of our own as a child process, and what it costs.
//
// It gets one end of a socket pair and the image as descriptors, so that there is no path to
// collide with and nothing left behind; it dies with this process, and ends by itself when its
// connection does.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <sys/types.h>

#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/demo/scratch_image.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::demo {

// What a process has used since it started: its own threads, those that have ended, and the
// kernel's workers that belong to it (io-wq). Not what the kernel does in threads of its own.
struct ProcessUsage {
  std::chrono::nanoseconds cpu_time{0};
  std::map<pid_t, std::uint64_t> context_switches;  // by thread, of those that are alive
};

// Context switches from one usage to a later one. A thread that ended in between is left out.
[[nodiscard]] std::uint64_t context_switches_between(const ProcessUsage& before,
                                                     const ProcessUsage& after);

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
  [[nodiscard]] ProcessUsage usage() const;
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
