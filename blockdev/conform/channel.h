// A vhost-user frontend without manners: says anything, in any order and of any size, and tells
// apart how a backend takes it. vhost-user.rst, "Communication".
//
// Every wait has a limit. What a backend must not do on its socket, a reply without its flag or of
// another message, fails the test. One thread.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "blockdev/conform/probe.h"
#include "blockdev/vhost_user/protocol.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::conform {

using vhost_user::Request;
using Bytes = std::vector<std::byte>;

template <typename... Parts>
Bytes payload_of(const Parts&... parts) {
  Bytes bytes((std::size_t{0} + ... + sizeof(Parts)));
  std::byte* at = bytes.data();
  ((std::memcpy(at, &parts, sizeof(Parts)), at += sizeof(Parts)), ...);
  return bytes;
}

constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }

class Channel {
 public:
  // Connects to the probe's socket.
  explicit Channel(Probe& probe);
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // How a message was taken. Without REPLY_ACK, kOk says only that the backend went on.
  enum class Taken : std::uint8_t { kOk, kRefused, kClosed, kSilent };

  // Sends one message; whether the backend still took it.
  bool send(Request request, const Bytes& payload = {}, std::span<const int> fds = {},
            std::uint32_t flags = vhost_user::kVersion);
  // The same with a header that says what it likes.
  bool send_raw(std::span<const std::byte> bytes, std::span<const int> fds = {});
  // The next message from the backend; nothing: it closed, or is silent for so long.
  std::optional<vhost_user::Message> receive(std::chrono::milliseconds patience = kPatience);
  // Sends and returns the reply, which has to come.
  vhost_user::Message call(Request request, const Bytes& payload = {},
                           std::span<const int> fds = {});
  std::uint64_t call_u64(Request request, const Bytes& payload = {});
  // Sends and finds out how it was taken: by REPLY_ACK, or by asking for the features behind it.
  Taken try_command(Request request, const Bytes& payload = {}, std::span<const int> fds = {});
  // A message that a backend has to take.
  void command(Request request, const Bytes& payload = {}, std::span<const int> fds = {});
  // Whether the backend ends the connection within so long. What it says before is dropped.
  bool is_closed(std::chrono::milliseconds patience);

  // GET_FEATURES up to SET_FEATURES, with these of what is offered.
  void negotiate(std::uint64_t features_wanted, std::uint64_t protocol_features_wanted);
  [[nodiscard]] std::uint64_t offered() const { return offered_; }
  [[nodiscard]] std::uint64_t features() const { return features_; }
  [[nodiscard]] std::uint64_t offered_protocol() const { return offered_protocol_; }
  [[nodiscard]] bool has(unsigned feature) const { return (features_ & bit(feature)) != 0; }
  [[nodiscard]] bool has_protocol(unsigned feature) const {
    return (protocol_features_ & bit(feature)) != 0;
  }

  // GET_CONFIG; nothing if the backend refuses. Fails the test if the reply's size is neither.
  std::optional<Bytes> read_config(std::uint32_t offset, std::uint32_t size_bytes);
  Taken write_config(std::uint32_t offset, const Bytes& bytes, std::uint32_t flags = 0);

  [[nodiscard]] int socket() const { return socket_.get(); }
  void close() { socket_.reset(); }

 private:
  vhost_user::UniqueFd socket_;
  vhost_user::MessageReader reader_;
  std::uint64_t offered_{0};
  std::uint64_t features_{0};
  std::uint64_t offered_protocol_{0};
  std::uint64_t protocol_features_{0};
};

[[nodiscard]] const char* to_string(Channel::Taken taken);

// Skip the test where a feature, or a protocol feature, was not negotiated: "no NAME is offered".
void need_feature(const Channel& channel, unsigned feature, const char* name);
void need_protocol(const Channel& channel, unsigned feature, const char* name);

}  // namespace vblk::conform
