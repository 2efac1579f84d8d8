// Messages over a Unix socket, with the file descriptors they carry.
//
// vhost-user.rst, "Communication". Both sides use it: the server feeds MessageReader from a
// non-blocking socket, the driver library waits. Descriptors are owned from the moment they arrive:
// whatever happens to the message, none is leaked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "aio/error.h"
#include "blockdev/vhost_user/protocol.h"

namespace vblk::vhost_user {

// A file descriptor that is closed when nobody wants it.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  ~UniqueFd() { reset(); }
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) reset(other.release());
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;

  [[nodiscard]] int get() const { return fd_; }
  [[nodiscard]] explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1);

 private:
  int fd_{-1};
};

struct Message {
  Header header{};
  std::vector<std::byte> payload;
  std::vector<UniqueFd> fds;

  [[nodiscard]] Request request() const { return static_cast<Request>(header.request); }
};

// Puts messages together from whatever pieces arrive.
class MessageReader {
 public:
  enum class Outcome : std::uint8_t { kMessage, kNeedMore, kClosed };

  // Reads from the non-blocking `socket` until a message is whole, nothing more is there, or the
  // peer has closed. Errors: kCorrupt for a message no vhost-user peer sends (version, size, too
  // many descriptors); kIo. After an error or kClosed the connection is of no more use.
  Expected<Outcome> read(int socket, Message& message);

 private:
  Expected<Outcome> receive(int socket, std::span<std::byte> room, std::size_t& received);
  Expected<void> check_header() const;

  Message message_;
  std::byte header_bytes_[kHeaderBytes]{};
  std::size_t header_received_{0};
  std::size_t payload_received_{0};
};

// Sends a whole message at once. The socket's buffer holds hundreds of messages, so a peer that
// lets it run full does not read its replies. Errors: kBusy for that, kIo.
Expected<void> send_message(int socket, const Header& header, std::span<const std::byte> payload,
                            std::span<const int> fds = {});

}  // namespace vblk::vhost_user
