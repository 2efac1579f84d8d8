// Processes that an experiment starts: itself again for one run, and servers to be driven through
// their sockets. All of them die with the thread that started them.
#pragma once

#include <memory>
#include <string>
#include <sys/types.h>
#include <vector>

#include "aio/error.h"

namespace vblk::wash {

// Runs this program with `words`, gives it `input` on its standard input (at most 64 KiB), and
// returns what it prints. Error: kIo with the last line of its standard error, or how it died.
Expected<std::string> ask_child(const std::vector<std::string>& words, const std::string& input);

// What --peer names is a command that starts a server, in which {socket} stands, or the sockets of
// servers that run already, {aio} standing for the engine of each.
[[nodiscard]] bool is_peer_command(const std::string& peer);
[[nodiscard]] std::string peer_socket(const std::string& peer, const std::string& engine);

// A vhost-user-blk server on a socket in a temporary folder of its own.
class ServerProcess {
 public:
  // `vblk serve` of the image with the engine, cache=none. Errors: kIo: it ended, or its socket
  // takes no connection for 20 s.
  static Expected<std::unique_ptr<ServerProcess>> start_vblk(const std::string& image_path,
                                                             const std::string& engine);
  // A shell command in which {image}, {aio} and {socket} stand for the image, the engine and the
  // socket.
  static Expected<std::unique_ptr<ServerProcess>> start_peer(const std::string& command,
                                                             const std::string& image_path,
                                                             const std::string& engine);
  // Ends it: SIGTERM, and SIGKILL after 10 s.
  ~ServerProcess();
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  [[nodiscard]] const std::string& socket_path() const { return socket_path_; }
  [[nodiscard]] pid_t pid() const { return pid_; }

 private:
  ServerProcess() = default;
  Expected<void> make_folder();
  Expected<void> start(const std::vector<std::string>& words);
  Expected<void> wait_until_ready();
  [[nodiscard]] std::string last_words() const;

  std::string folder_;
  std::string socket_path_;
  pid_t pid_{-1};
};

}  // namespace vblk::wash
