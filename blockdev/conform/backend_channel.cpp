#include "blockdev/conform/backend_channel.h"

#include <array>
#include <chrono>
#include <cstdint>
#include <sys/socket.h>
#include <thread>

#include <fmt/core.h>

namespace vblk::conform {

using namespace vhost_user;

BackendChannel::BackendChannel(Channel& channel) {
  need_protocol(channel, kProtocolFBackendReq, "BACKEND_REQ");
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0)
    Probe::fail("the suite itself: no socket pair");
  ours_.reset(ends[0]);
  const UniqueFd theirs(ends[1]);
  const int fds[] = {theirs.get()};
  channel.command(Request::kSetBackendReqFd, {}, fds);
}

void BackendChannel::await_config_change(const std::string& after_what) {
  Message message;
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  for (;;) {
    const auto outcome = reader_.read(ours_.get(), message);
    if (!outcome) Probe::fail("on the back-end channel: " + outcome.error().message);
    Probe::expect(*outcome != MessageReader::Outcome::kClosed, "the back-end channel is closed");
    if (*outcome == MessageReader::Outcome::kMessage) break;
    Probe::expect(std::chrono::steady_clock::now() < deadline,
                  after_what + " and no CONFIG_CHANGE_MSG comes");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  Probe::expect(
      message.header.request == static_cast<std::uint32_t>(BackendRequest::kConfigChange),
      fmt::format("message {} comes instead of CONFIG_CHANGE_MSG", message.header.request));
  if ((message.header.flags & kFlagNeedReply) == 0) return;
  const auto sent = send_message(ours_.get(), {message.header.request, kVersion | kFlagReply, 0},
                                 payload_of(std::uint64_t{0}));
  Probe::expect(sent.has_value(), "the backend does not take its acknowledgement");
}

}  // namespace vblk::conform
