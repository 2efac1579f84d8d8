// BACKEND_REQ: what the backend says of its own accord.
#include <array>
#include <memory>
#include <sys/socket.h>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/vhost_user/backend.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using test::Bytes;
using test::payload_of;

std::pair<UniqueFd, UniqueFd> socket_pair() {
  std::array<int, 2> fds{-1, -1};
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds.data()), 0);
  return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

// A backend without a server: the test is the frontend, and calls it when it has said something.
class BackendChannel : public ::testing::Test {
 protected:
  BackendChannel() {
    log::set_level(log::Level::kOff);
    std::tie(frontend, far_end) = socket_pair();
    std::tie(ours, theirs) = socket_pair();
    threads.push_back(
        blockdev::IoThread::start("io", {}, [] { return aio::EngineSet::create({}, {}); }).value());
    backend = std::make_unique<Backend>(std::move(far_end), *device, threads);
  }
  // Whether the connection goes on.
  bool say(Request request, const Bytes& payload, std::span<const int> fds = {}) {
    const Header header{static_cast<std::uint32_t>(request), kVersion, 0};
    EXPECT_TRUE(send_message(frontend.get(), header, payload, fds).has_value());
    const auto served = backend->serve();
    return served.has_value() && *served;
  }
  bool give_channel() {
    const std::array fds{theirs.get()};
    return say(Request::kSetProtocolFeatures,
               payload_of(std::uint64_t{1} << kProtocolFBackendReq)) &&
           say(Request::kSetBackendReqFd, {}, fds);
  }
  // The request numbers that have come by now.
  std::vector<std::uint32_t> said() {
    std::vector<std::uint32_t> requests;
    MessageReader reader;
    for (Message message;;) {
      const auto outcome = reader.read(ours.get(), message);
      if (!outcome || *outcome != MessageReader::Outcome::kMessage) return requests;
      EXPECT_EQ(message.header.flags, kVersion) << "no reply is asked for";
      EXPECT_TRUE(message.payload.empty());
      requests.push_back(message.header.request);
    }
  }

  test::HoldingDisk disk{std::size_t{1} << 20};
  std::unique_ptr<virtio::BlkDevice> device = virtio::BlkDevice::create(disk, {}).value();
  std::vector<std::unique_ptr<blockdev::IoThread>> threads;
  UniqueFd frontend;
  UniqueFd far_end;
  UniqueFd ours;
  UniqueFd theirs;
  std::unique_ptr<Backend> backend;
};

TEST_F(BackendChannel, tells_the_frontend_that_the_configuration_has_changed) {
  ASSERT_TRUE(give_channel());
  EXPECT_TRUE(said().empty());
  backend->notify_config_change();
  EXPECT_EQ(said(), std::vector{static_cast<std::uint32_t>(BackendRequest::kConfigChange)});
}

TEST_F(BackendChannel, says_nothing_to_a_frontend_that_gave_no_channel) {
  backend->notify_config_change();
  EXPECT_TRUE(say(Request::kSetOwner, {}));
}

TEST_F(BackendChannel, is_refused_unless_it_was_negotiated) {
  const std::array fds{theirs.get()};
  EXPECT_FALSE(say(Request::kSetBackendReqFd, {}, fds));
}

// A frontend that does not read its channel must not hold up the control plane.
TEST_F(BackendChannel, waits_for_no_frontend_that_does_not_listen_and_survives_one_that_has_gone) {
  ASSERT_TRUE(give_channel());
  for (int i = 0; i < 100'000; ++i) backend->notify_config_change();
  ours.reset();
  backend->notify_config_change();
  EXPECT_TRUE(say(Request::kSetOwner, {}));
}

}  // namespace
}  // namespace vblk::vhost_user
