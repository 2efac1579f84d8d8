#include "blockdev/vhost_user/socket.h"

#include <cerrno>
#include <cstring>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::vhost_user {

namespace {

// Room for the most descriptors a message may carry, and some, so that a surplus is seen and
// closed.
constexpr std::size_t kFdsRoom = 2 * kMemoryTableRegionsMax;

void collect_fds(const msghdr& header, std::vector<UniqueFd>& fds) {
  for (const cmsghdr* control = CMSG_FIRSTHDR(&header); control != nullptr;
       control = CMSG_NXTHDR(const_cast<msghdr*>(&header), const_cast<cmsghdr*>(control))) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(control) + i * sizeof(int), sizeof fd);
      fds.emplace_back(fd);
    }
  }
}

}  // namespace

void UniqueFd::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

Expected<MessageReader::Outcome> MessageReader::receive(int socket, std::span<std::byte> room,
                                                        std::size_t& received) {
  while (received < room.size()) {
    iovec piece{room.data() + received, room.size() - received};
    alignas(cmsghdr) std::byte control[CMSG_SPACE(kFdsRoom * sizeof(int))];
    msghdr header{};
    header.msg_iov = &piece;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    const ssize_t bytes = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (bytes < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) return Outcome::kNeedMore;
      if (errno == ECONNRESET) return Outcome::kClosed;
      const int error = errno;
      return make_error(kind_of_errno(error),
                        fmt::format("cannot read a message: {}", describe_errno(error)), error);
    }
    collect_fds(header, message_.fds);
    if (bytes == 0) return Outcome::kClosed;
    if ((header.msg_flags & MSG_CTRUNC) != 0 || message_.fds.size() > kMemoryTableRegionsMax) {
      return make_error(ErrorKind::kCorrupt,
                        fmt::format("a message carries more than {} descriptors, or the limit of "
                                    "open files is reached ('ulimit -n')",
                                    kMemoryTableRegionsMax));
    }
    received += static_cast<std::size_t>(bytes);
  }
  return Outcome::kMessage;
}

Expected<void> MessageReader::check_header() const {
  if ((message_.header.flags & kVersionMask) != kVersion) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("a message has version {}, not {}",
                                  message_.header.flags & kVersionMask, kVersion));
  }
  if (message_.header.payload_bytes > kPayloadBytesMax) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("{} ({}) has a payload of {} bytes, more than any has ({})",
                                  name_of(message_.request()), message_.header.request,
                                  message_.header.payload_bytes, kPayloadBytesMax));
  }
  return {};
}

Expected<MessageReader::Outcome> MessageReader::read(int socket, Message& message) {
  if (header_received_ < kHeaderBytes) {
    auto outcome = receive(socket, header_bytes_, header_received_);
    if (!outcome || *outcome != Outcome::kMessage) return outcome;
    message_.header = *decode<Header>(header_bytes_);
    if (auto checked = check_header(); !checked) return std::unexpected(std::move(checked.error()));
    message_.payload.resize(message_.header.payload_bytes);
  }
  auto outcome = receive(socket, message_.payload, payload_received_);
  if (!outcome || *outcome != Outcome::kMessage) return outcome;
  message = std::exchange(message_, Message{});
  header_received_ = 0;
  payload_received_ = 0;
  return Outcome::kMessage;
}

Expected<void> send_message(int socket, const Header& header, std::span<const std::byte> payload,
                            std::span<const int> fds) {
  Header head = header;
  head.payload_bytes = static_cast<std::uint32_t>(payload.size());
  iovec pieces[2] = {{&head, kHeaderBytes},
                     {const_cast<std::byte*>(payload.data()), payload.size()}};
  alignas(cmsghdr) std::byte control[CMSG_SPACE(kMemoryTableRegionsMax * sizeof(int))]{};
  msghdr message{};
  message.msg_iov = pieces;
  message.msg_iovlen = payload.empty() ? 1 : 2;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* const rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size_bytes());
  }
  const auto total = static_cast<ssize_t>(kHeaderBytes + payload.size());
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  if (sent == total) return {};
  if (sent >= 0 || errno == EAGAIN) {
    return make_error(ErrorKind::kBusy,
                      "cannot send a message: the peer does not read what it is sent");
  }
  const int error = errno;
  return make_error(kind_of_errno(error),
                    fmt::format("cannot send a message: {}", describe_errno(error)), error);
}

}  // namespace vblk::vhost_user
