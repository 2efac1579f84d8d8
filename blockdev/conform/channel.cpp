#include "blockdev/conform/channel.h"

#include <array>
#include <cerrno>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/driver/frontend.h"

namespace vblk::conform {

using namespace vhost_user;

namespace {

using Clock = std::chrono::steady_clock;

// Descriptors that one message may carry here: more than any backend takes.
constexpr std::size_t kFdsMax = 32;

// Sleeps until `socket` has something to read, its end included. False: it had nothing in time.
bool wait_readable(int socket, Clock::time_point deadline) {
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd descriptor{.fd = socket, .events = POLLIN, .revents = 0};
    const int ready = ::poll(&descriptor, 1, left > 0 ? static_cast<int>(left) : 0);
    if (ready > 0) return true;
    if (ready == 0 && left <= 0) return false;
  }
}

}  // namespace

const char* to_string(Channel::Taken taken) {
  switch (taken) {
    case Channel::Taken::kOk:
      return "accepted";
    case Channel::Taken::kRefused:
      return "refused";
    case Channel::Taken::kClosed:
      return "answered by closing the connection";
    case Channel::Taken::kSilent:
      return "not answered at all";
  }
  return "";
}

void need_feature(const Channel& channel, unsigned feature, const char* name) {
  if (!channel.has(feature)) Probe::skip(fmt::format("no {} is offered", name));
}

void need_protocol(const Channel& channel, unsigned feature, const char* name) {
  if (!channel.has_protocol(feature)) Probe::skip(fmt::format("no {} is offered", name));
}

Channel::Channel(Probe& probe) {
  // The driver's frontend knows how to connect; it is not used for more, for it has manners.
  auto connected = driver::Frontend::connect(probe.socket_path(), {.timeout = kPatience});
  if (!connected && probe.ends_in_order_soon())
    connected = driver::Frontend::connect(probe.socket_path(), {.timeout = kPatience});
  const auto frontend = Probe::value(std::move(connected), "connecting");
  socket_.reset(::fcntl(frontend->socket(), F_DUPFD_CLOEXEC, 3));
}

bool Channel::send(Request request, const Bytes& payload, std::span<const int> fds,
                   std::uint32_t flags) {
  Bytes bytes = payload_of(Header{.request = static_cast<std::uint32_t>(request),
                                  .flags = flags,
                                  .payload_bytes = static_cast<std::uint32_t>(payload.size())});
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  return send_raw(bytes, fds);
}

bool Channel::send_raw(std::span<const std::byte> bytes, std::span<const int> fds) {
  fds = fds.first(std::min(fds.size(), kFdsMax));
  alignas(cmsghdr) std::byte control[CMSG_SPACE(kFdsMax * sizeof(int))]{};
  const auto deadline = Clock::now() + kPatience;
  while (!bytes.empty()) {
    iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    if (!fds.empty()) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(fds.size_bytes());
      cmsghdr* const rights = CMSG_FIRSTHDR(&message);
      rights->cmsg_level = SOL_SOCKET;
      rights->cmsg_type = SCM_RIGHTS;
      rights->cmsg_len = CMSG_LEN(fds.size_bytes());
      std::memcpy(CMSG_DATA(rights), fds.data(), fds.size_bytes());
    }
    const ssize_t sent = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EAGAIN && Clock::now() < deadline) {
      pollfd descriptor{.fd = socket_.get(), .events = POLLOUT, .revents = 0};
      ::poll(&descriptor, 1, 10);
      continue;
    }
    if (sent < 0) return false;
    bytes = bytes.subspan(static_cast<std::size_t>(sent));
    fds = {};
  }
  return true;
}

std::optional<Message> Channel::receive(std::chrono::milliseconds patience) {
  const auto deadline = Clock::now() + patience;
  for (;;) {
    Message message;
    const auto outcome = reader_.read(socket_.get(), message);
    if (!outcome) Probe::fail("on the socket: " + outcome.error().message);
    if (*outcome == MessageReader::Outcome::kMessage) return message;
    if (*outcome == MessageReader::Outcome::kClosed) return std::nullopt;
    if (!wait_readable(socket_.get(), deadline)) return std::nullopt;
  }
}

bool Channel::is_closed(std::chrono::milliseconds patience) {
  const auto deadline = Clock::now() + patience;
  std::array<std::byte, 4096> dropped{};
  while (wait_readable(socket_.get(), deadline)) {
    const ssize_t length = ::recv(socket_.get(), dropped.data(), dropped.size(), MSG_DONTWAIT);
    if (length == 0 || (length < 0 && errno != EAGAIN && errno != EINTR)) return true;
    if (Clock::now() > deadline) break;
  }
  return false;
}

Message Channel::call(Request request, const Bytes& payload, std::span<const int> fds) {
  send(request, payload, fds);
  auto answer = receive();
  const std::string name(name_of(request));
  if (!answer) Probe::fail(name + " is not answered");
  Probe::expect(answer->request() == request,
                fmt::format("{} is answered by message {}", name, answer->header.request));
  Probe::expect((answer->header.flags & kFlagReply) != 0,
                fmt::format("the reply to {} has flags {:#x}, without the reply flag", name,
                            answer->header.flags));
  return std::move(*answer);
}

std::uint64_t Channel::call_u64(Request request, const Bytes& payload) {
  const Message answer = call(request, payload);
  Probe::expect(answer.payload.size() == sizeof(std::uint64_t),
                fmt::format("{} is answered with {} bytes instead of 8", name_of(request),
                            answer.payload.size()));
  return *decode<std::uint64_t>(answer.payload);
}

Channel::Taken Channel::try_command(Request request, const Bytes& payload,
                                    std::span<const int> fds) {
  const bool by_ack = has_protocol(kProtocolFReplyAck);
  const Request asked = by_ack ? request : Request::kGetFeatures;
  bool sent = send(request, payload, fds, by_ack ? kVersion | kFlagNeedReply : kVersion);
  if (!by_ack) sent = sent && send(Request::kGetFeatures);
  if (!sent) return Taken::kClosed;
  auto answer = receive();
  if (!answer) return is_closed(std::chrono::milliseconds(0)) ? Taken::kClosed : Taken::kSilent;
  Probe::expect(answer->request() == asked, fmt::format("{} is answered by message {}",
                                                        name_of(asked), answer->header.request));
  if (!by_ack) return Taken::kOk;
  const auto status = decode<std::uint64_t>(answer->payload);
  Probe::expect(status.has_value() && answer->payload.size() == sizeof(std::uint64_t),
                fmt::format("{} is acknowledged with {} bytes instead of 8", name_of(request),
                            answer->payload.size()));
  return *status == 0 ? Taken::kOk : Taken::kRefused;
}

void Channel::command(Request request, const Bytes& payload, std::span<const int> fds) {
  const Taken taken = try_command(request, payload, fds);
  Probe::expect(taken == Taken::kOk, fmt::format("{} is {}", name_of(request), to_string(taken)));
}

void Channel::negotiate(std::uint64_t features_wanted, std::uint64_t protocol_features_wanted) {
  offered_ = call_u64(Request::kGetFeatures);
  features_ = offered_ & features_wanted;
  send(Request::kSetOwner);
  if ((features_ & bit(kFProtocolFeatures)) != 0) {
    offered_protocol_ = call_u64(Request::kGetProtocolFeatures);
    const std::uint64_t chosen = offered_protocol_ & protocol_features_wanted;
    send(Request::kSetProtocolFeatures, payload_of(chosen));
    protocol_features_ = chosen;
  }
  command(Request::kSetFeatures, payload_of(features_));
}

std::optional<Bytes> Channel::read_config(std::uint32_t offset, std::uint32_t size_bytes) {
  Bytes payload = payload_of(ConfigHead{.offset = offset, .size_bytes = size_bytes, .flags = 0});
  payload.resize(payload.size() + size_bytes);
  const Message answer = call(Request::kGetConfig, payload);
  if (answer.payload.empty()) return std::nullopt;
  // Some say their refusal by the header alone.
  const auto head = decode<ConfigHead>(answer.payload);
  if (head && answer.payload.size() == sizeof(ConfigHead) && head->size_bytes == 0)
    return std::nullopt;
  Probe::expect(answer.payload.size() == sizeof(ConfigHead) + size_bytes,
                fmt::format("GET_CONFIG of {} bytes at {} is answered with a payload of {} bytes",
                            size_bytes, offset, answer.payload.size()));
  return Bytes(answer.payload.begin() + sizeof(ConfigHead), answer.payload.end());
}

Channel::Taken Channel::write_config(std::uint32_t offset, const Bytes& bytes,
                                     std::uint32_t flags) {
  Bytes payload = payload_of(ConfigHead{
      .offset = offset, .size_bytes = static_cast<std::uint32_t>(bytes.size()), .flags = flags});
  payload.insert(payload.end(), bytes.begin(), bytes.end());
  return try_command(Request::kSetConfig, payload);
}

}  // namespace vblk::conform
