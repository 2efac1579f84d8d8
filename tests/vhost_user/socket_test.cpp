// Messages over a socket: whole, in pieces, with descriptors, and what is none.
#include "blockdev/vhost_user/socket.h"

#include <array>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/vhost_user/protocol.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using Outcome = MessageReader::Outcome;
using test::Bytes;
using test::open_fds;
using test::payload_of;

class Socket : public ::testing::Test {
 protected:
  Socket() {
    std::array<int, 2> ends{};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
    near.reset(ends[0]);
    far.reset(ends[1]);
  }
  void send_bytes(std::span<const std::byte> bytes) {
    EXPECT_EQ(::send(far.get(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  }
  // As no function of ours would: any number of descriptors.
  void send_with_fds(std::span<const std::byte> bytes, std::size_t count) {
    const UniqueFd passed(::eventfd(0, EFD_CLOEXEC));
    const std::vector<int> fds(count, passed.get());
    iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
    std::vector<std::byte> control(CMSG_SPACE(count * sizeof(int)));
    msghdr header{};
    header.msg_iov = &piece;
    header.msg_iovlen = 1;
    header.msg_control = control.data();
    header.msg_controllen = control.size();
    cmsghdr* const rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(count * sizeof(int));
    std::memcpy(CMSG_DATA(rights), fds.data(), count * sizeof(int));
    EXPECT_EQ(::sendmsg(far.get(), &header, 0), static_cast<ssize_t>(bytes.size()));
  }

  UniqueFd near;
  UniqueFd far;
  MessageReader reader;
  Message message;
};

TEST_F(Socket, carries_a_message_with_its_payload_and_descriptors) {
  const UniqueFd passed(::eventfd(0, EFD_CLOEXEC));
  const std::array fds{passed.get(), passed.get()};
  const Bytes payload = payload_of(std::uint64_t{0x0102030405060708});
  ASSERT_TRUE(send_message(far.get(), {12, kVersion | kFlagNeedReply, 0}, payload, fds));
  ASSERT_EQ(reader.read(near.get(), message).value(), Outcome::kMessage);
  EXPECT_EQ(message.request(), Request::kSetVringKick);
  EXPECT_EQ(message.header.flags, kVersion | kFlagNeedReply);
  EXPECT_EQ(message.header.payload_bytes, 8U);
  EXPECT_EQ(message.payload, payload);
  EXPECT_EQ(message.fds.size(), 2U);
}

TEST_F(Socket, puts_a_message_together_from_single_bytes) {
  const Bytes bytes = payload_of(Header{2, kVersion, 8}, std::uint64_t{77});
  for (std::size_t i = 0; i + 1 < bytes.size(); ++i) {
    send_bytes(std::span(bytes).subspan(i, 1));
    ASSERT_EQ(reader.read(near.get(), message).value(), Outcome::kNeedMore) << "after byte " << i;
  }
  send_bytes(std::span(bytes).last(1));
  ASSERT_EQ(reader.read(near.get(), message).value(), Outcome::kMessage);
  EXPECT_EQ(decode<std::uint64_t>(message.payload), 77U);
}

TEST_F(Socket, keeps_descriptors_that_come_with_a_later_piece) {
  const Bytes bytes = payload_of(Header{12, kVersion, 8}, std::uint64_t{0});
  send_bytes(std::span(bytes).first(12));
  ASSERT_EQ(reader.read(near.get(), message).value(), Outcome::kNeedMore);
  send_with_fds(std::span(bytes).subspan(12), 1);
  ASSERT_EQ(reader.read(near.get(), message).value(), Outcome::kMessage);
  EXPECT_EQ(message.fds.size(), 1U);
}

TEST_F(Socket, separates_messages_that_arrive_together) {
  const Bytes bytes = payload_of(Header{1, kVersion, 0}, Header{3, kVersion, 0});
  send_bytes(bytes);
  ASSERT_EQ(reader.read(near.get(), message).value(), Outcome::kMessage);
  EXPECT_EQ(message.request(), Request::kGetFeatures);
  ASSERT_EQ(reader.read(near.get(), message).value(), Outcome::kMessage);
  EXPECT_EQ(message.request(), Request::kSetOwner);
  EXPECT_EQ(reader.read(near.get(), message).value(), Outcome::kNeedMore);
}

TEST_F(Socket, says_closed_when_the_peer_leaves_in_the_middle_of_a_message) {
  const Bytes bytes = payload_of(Header{2, kVersion, 8});
  send_bytes(bytes);
  ASSERT_EQ(reader.read(near.get(), message).value(), Outcome::kNeedMore);
  far.reset();
  EXPECT_EQ(reader.read(near.get(), message).value(), Outcome::kClosed);
}

TEST_F(Socket, refuses_another_version) {
  send_bytes(payload_of(Header{1, 2, 0}));
  const auto outcome = reader.read(near.get(), message);
  ASSERT_FALSE(outcome.has_value());
  EXPECT_EQ(outcome.error().kind, ErrorKind::kCorrupt);
}

TEST_F(Socket, takes_the_longest_payload_and_refuses_a_longer_one) {
  send_bytes(payload_of(Header{2, kVersion, kPayloadBytesMax}));
  send_bytes(Bytes(kPayloadBytesMax));
  ASSERT_EQ(reader.read(near.get(), message).value(), Outcome::kMessage);
  send_bytes(payload_of(Header{2, kVersion, kPayloadBytesMax + 1}));
  EXPECT_EQ(reader.read(near.get(), message).error().kind, ErrorKind::kCorrupt);
}

TEST_F(Socket, closes_every_descriptor_of_a_message_with_too_many) {
  for (const std::size_t count : {std::size_t{9}, std::size_t{17}, std::size_t{200}}) {
    const std::size_t before = open_fds();
    {
      MessageReader fresh;
      send_with_fds(payload_of(Header{5, kVersion, 0}), count);
      Message refused;
      const auto outcome = fresh.read(near.get(), refused);
      ASSERT_FALSE(outcome.has_value());
      EXPECT_EQ(outcome.error().kind, ErrorKind::kCorrupt);
    }
    EXPECT_EQ(open_fds(), before) << count;
    std::array<std::byte, 64> rest{};
    while (::recv(near.get(), rest.data(), rest.size(), MSG_DONTWAIT) > 0) {
    }
  }
}

TEST_F(Socket, closes_the_descriptors_of_a_message_that_never_becomes_whole) {
  const std::size_t before = open_fds();
  {
    MessageReader fresh;
    send_with_fds(payload_of(Header{5, kVersion, 8}), 8);
    ASSERT_EQ(fresh.read(near.get(), message).value(), Outcome::kNeedMore);
    EXPECT_EQ(open_fds(), before + 8);
  }
  EXPECT_EQ(open_fds(), before);
}

TEST_F(Socket, does_not_wait_for_a_peer_that_reads_nothing) {
  const Bytes payload(256);
  Expected<void> sent;
  for (int i = 0; i < 100'000 && sent; ++i)
    sent = send_message(far.get(), {1, kVersion, 0}, payload);
  ASSERT_FALSE(sent.has_value());
  EXPECT_EQ(sent.error().kind, ErrorKind::kBusy);
}

TEST_F(Socket, reports_a_peer_that_has_gone_without_a_signal) {
  near.reset();
  EXPECT_FALSE(send_message(far.get(), {1, kVersion, 0}, {}).has_value());
}

TEST(Protocol, decodes_nothing_from_too_few_bytes) {
  EXPECT_FALSE(decode<std::uint64_t>(Bytes(7)).has_value());
  EXPECT_TRUE(decode<std::uint64_t>(Bytes(8)).has_value());
}

TEST(Protocol, names_messages) {
  EXPECT_EQ(name_of(Request::kSetMemTable), "SET_MEM_TABLE");
  EXPECT_EQ(name_of(static_cast<Request>(77)), "an unknown message");
}

TEST(UniqueFd, closes_what_it_loses) {
  const std::size_t before = open_fds();
  UniqueFd first(::eventfd(0, EFD_CLOEXEC));
  UniqueFd second(::eventfd(0, EFD_CLOEXEC));
  first = std::move(second);
  EXPECT_EQ(open_fds(), before + 1);
  const int released = first.release();
  EXPECT_FALSE(static_cast<bool>(first));
  first.reset(released);
  first.reset();
  EXPECT_EQ(open_fds(), before);
}

}  // namespace
}  // namespace vblk::vhost_user
