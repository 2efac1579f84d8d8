// Every message that there is, put wrong in every way that needs no knowledge of what it means: of
// another length, with too many descriptors, cut off; and right, but while requests are in flight.
// What is wrong inside of messages is message_test.cpp's.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <set>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using test::bit;
using test::Bytes;
using test::eventually;
using test::HoldingDisk;
using test::kPatience;
using test::open_fds;
using test::payload_of;
using test::RawFrontend;
using test::Served;

constexpr std::size_t kFdsOfAMessageMax = kMemoryTableRegionsMax;

// What the specification says a message looks like ("Front-end message types"); on purpose not the
// server's own table.
struct Shape {
  Request request;
  std::set<std::size_t> lengths;
  std::size_t fds_max;
  bool has_answer;  // of its own, so that wrong ones end the connection
};

std::set<std::size_t> from_to(std::size_t first, std::size_t last) {
  std::set<std::size_t> lengths;
  for (std::size_t length = first; length <= last; ++length) lengths.insert(length);
  return lengths;
}

std::vector<Shape> shapes() {
  using enum Request;
  std::set<std::size_t> tables;
  for (std::size_t regions = 0; regions <= kMemoryTableRegionsMax; ++regions)
    tables.insert(8 + 32 * regions);
  return {
      {kGetFeatures, {0}, 0, true},
      {kSetFeatures, {8}, 0, false},
      {kSetOwner, {0}, 0, false},
      {kResetOwner, {0}, 0, false},
      {kSetMemTable, tables, 8, false},
      {kSetLogBase, {16}, 1, false},
      {kSetLogFd, from_to(0, 8), 1, false},
      {kSetVringNum, {8}, 0, false},
      {kSetVringAddr, {40}, 0, false},
      {kSetVringBase, {8}, 0, false},
      {kGetVringBase, {8}, 0, true},
      {kSetVringKick, {8}, 1, false},
      {kSetVringCall, {8}, 1, false},
      {kSetVringErr, {8}, 1, false},
      {kGetProtocolFeatures, {0}, 0, true},
      {kSetProtocolFeatures, {8}, 0, false},
      {kGetQueueNum, {0}, 0, true},
      {kSetVringEnable, {8}, 0, false},
      {kSetBackendReqFd, from_to(0, 8), 1, false},
      {kGetConfig, from_to(12, 268), 0, true},
      {kSetConfig, from_to(12, 268), 0, false},
      {kGetInflightFd, from_to(20, 24), 0, true},
      {kSetInflightFd, from_to(20, 24), 1, false},
      {kResetDevice, {0}, 0, false},
      {kGetMaxMemSlots, {0}, 0, true},
      {kAddMemReg, {40}, 1, false},
      {kRemMemReg, {40}, 1, false},
      {kSetStatus, {8}, 0, false},
      {kGetStatus, {0}, 0, true},
  };
}

class WrongMessages : public ::testing::Test {
 protected:
  RawFrontend connect() {
    RawFrontend frontend(served.path());
    EXPECT_TRUE(frontend.polite().negotiate().has_value());
    constexpr std::uint64_t kAll = bit(kProtocolFMq) | bit(kProtocolFReplyAck) |
                                   bit(kProtocolFBackendReq) | bit(kProtocolFConfig) |
                                   bit(kProtocolFInflightShmfd) | bit(kProtocolFResetDevice) |
                                   bit(kProtocolFConfigureMemSlots) | bit(kProtocolFStatus);
    EXPECT_TRUE(
        frontend.polite().command(Request::kSetProtocolFeatures, payload_of(kAll)).has_value());
    return frontend;
  }
  // Whether it is refused, and no more than that: by its acknowledgement, or, where that is not
  // what answers it, by the end of the connection.
  bool is_refused(const Shape& shape, const Bytes& payload, std::size_t fd_count) {
    const std::vector<int> fds(fd_count, event.get());
    if (shape.has_answer) {
      RawFrontend frontend = connect();
      frontend.send(shape.request, payload, fds);
      return frontend.cut_off();
    }
    if (!patient) patient = std::make_unique<RawFrontend>(connect());
    return patient->acknowledged(shape.request, payload, fds) == 1U &&
           patient->call_u64(Request::kGetQueueNum) == 2U;
  }
  bool settles_at(std::size_t fds) {
    return eventually([this, fds] { return !served.connected() && open_fds() == fds; });
  }

  UniqueFd event{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  HoldingDisk disk{std::size_t{1} << 20};
  Served served{disk};
  std::unique_ptr<RawFrontend> patient;
};

TEST_F(WrongMessages, of_another_length_are_refused) {
  const std::size_t before = open_fds();
  for (const Shape& shape : shapes()) {
    std::set<std::size_t> wrong{kPayloadBytesMax};
    for (const std::size_t length : shape.lengths) {
      for (const std::size_t near : {length - 1, length + 1, length / 2, length + 8, 2 * length})
        if (near < kPayloadBytesMax && !shape.lengths.contains(near)) wrong.insert(near);
    }
    if (shape.has_answer) {
      // Each costs a connection.
      while (wrong.size() > 3) wrong.erase(std::next(wrong.begin()));
    }
    for (const std::size_t length : wrong)
      ASSERT_TRUE(is_refused(shape, Bytes(length), 0)) << name_of(shape.request) << ": " << length;
    if (!shape.has_answer) patient.reset();
    ASSERT_TRUE(settles_at(before)) << name_of(shape.request);
  }
}

TEST_F(WrongMessages, with_too_many_descriptors_are_refused_and_keep_none) {
  const std::size_t before = open_fds();
  for (const Shape& shape : shapes()) {
    for (std::size_t count = shape.fds_max + 1; count <= kFdsOfAMessageMax; ++count) {
      if (shape.has_answer && count > 2 && count < kFdsOfAMessageMax) continue;
      const Bytes payload(*shape.lengths.rbegin());
      ASSERT_TRUE(is_refused(shape, payload, count)) << name_of(shape.request) << ": " << count;
    }
    patient.reset();
    ASSERT_TRUE(settles_at(before)) << name_of(shape.request);
  }
}

TEST_F(WrongMessages, that_nobody_knows_are_refused_with_what_they_bring) {
  const std::size_t before = open_fds();
  std::set<std::uint32_t> known;
  for (const Shape& shape : shapes()) known.insert(static_cast<std::uint32_t>(shape.request));
  {
    RawFrontend frontend = connect();
    std::vector<std::uint32_t> numbers{100, 0x80000000, 0xffffffff};
    for (std::uint32_t number = 0; number < 64; ++number) numbers.push_back(number);
    for (const std::uint32_t number : numbers) {
      if (known.contains(number)) continue;
      const std::vector<int> fds(number % (kFdsOfAMessageMax + 1), event.get());
      EXPECT_EQ(frontend.acknowledged(static_cast<Request>(number), Bytes(number % 400), fds), 1U)
          << number;
    }
    EXPECT_EQ(frontend.call_u64(Request::kGetQueueNum), 2U);
  }
  EXPECT_TRUE(settles_at(before));
}

// At every place, with all the descriptors that had come.
TEST_F(WrongMessages, that_are_cut_off_by_the_end_of_the_connection_leave_nothing) {
  const std::size_t before = open_fds();
  for (const Shape& shape : shapes()) {
    const std::size_t length = *shape.lengths.rbegin();
    Bytes message =
        payload_of(Header{static_cast<std::uint32_t>(shape.request), kVersion | kFlagNeedReply,
                          static_cast<std::uint32_t>(length)});
    message.resize(kHeaderBytes + length);
    for (const std::size_t sent : {std::size_t{1}, kHeaderBytes - 1, kHeaderBytes,
                                   kHeaderBytes + length / 2, kHeaderBytes + length - 1}) {
      if (sent >= message.size()) continue;
      RawFrontend frontend = connect();
      const std::vector<int> fds(std::max<std::size_t>(shape.fds_max, 1), event.get());
      iovec piece{message.data(), sent};
      alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(kFdsOfAMessageMax * sizeof(int))> control{};
      msghdr header{};
      header.msg_iov = &piece;
      header.msg_iovlen = 1;
      header.msg_control = control.data();
      header.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
      cmsghdr* const rights = CMSG_FIRSTHDR(&header);
      rights->cmsg_level = SOL_SOCKET;
      rights->cmsg_type = SCM_RIGHTS;
      rights->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
      std::memcpy(CMSG_DATA(rights), fds.data(), fds.size() * sizeof(int));
      ASSERT_EQ(::sendmsg(frontend.polite().socket(), &header, MSG_NOSIGNAL),
                static_cast<ssize_t>(sent));
    }
    ASSERT_TRUE(settles_at(before)) << name_of(shape.request);
  }
}

// A message that never ends holds nobody up but its sender.
TEST_F(WrongMessages, that_are_never_finished_do_not_keep_the_server_from_its_end) {
  RawFrontend frontend = connect();
  Bytes message =
      payload_of(Header{static_cast<std::uint32_t>(Request::kSetFeatures), kVersion, 8});
  message.resize(kHeaderBytes + 3);
  frontend.send_bytes(message);
  EXPECT_TRUE(served.server().status().has_value());
  EXPECT_TRUE(served.stop().has_value());
}

// ---- Right, and at the wrong time

// Each while requests are in flight on both rings, which all are answered once, and then again on
// rings that rest. Those that stop rings have tests of their own.
TEST_F(WrongMessages, are_right_ones_that_come_while_rings_run_and_lose_no_request) {
  const auto driver = BlkDriver::connect(served.path(), {.queue_count = 2,
                                                         .queue_size = 64,
                                                         .memory_bytes = std::size_t{2} << 20,
                                                         .inflight = true,
                                                         .frontend = {.timeout = kPatience}})
                          .value();
  driver::Frontend& frontend = driver->frontend();
  const auto& known = driver->memory().regions()[0];
  SingleMemoryRegion more{.padding = 0, .region = known.description};
  more.region.guest_address += known.description.size_bytes;
  more.region.user_address += known.description.size_bytes;
  const auto u64 = [](std::uint64_t value) { return payload_of(value); };
  const auto state = [](std::uint32_t value) { return payload_of(VringState{0, value}); };
  const auto& area = *driver->inflight();
  struct Late {
    Request request;
    Bytes payload;
    std::vector<int> fds;
    bool is_taken;
  };
  using enum Request;
  const std::uint64_t protocol = frontend.protocol_features() | bit(kProtocolFStatus) |
                                 bit(kProtocolFResetDevice) | bit(kProtocolFBackendReq);
  const std::vector<Late> late{
      {kSetOwner, {}, {}, true},
      {kResetOwner, {}, {}, true},
      {kSetFeatures, u64(frontend.features()), {}, true},
      {kSetFeatures, u64(bit(63)), {}, false},
      {kSetProtocolFeatures, u64(protocol), {}, true},
      {kSetProtocolFeatures, u64(bit(63)), {}, false},
      {kAddMemReg, payload_of(more), {known.fd}, true},
      {kAddMemReg, payload_of(more), {known.fd}, false},
      {kRemMemReg, payload_of(more), {}, true},
      {kRemMemReg, payload_of(more), {}, false},
      {kSetMemTable, payload_of(MemoryTableHead{1, 0}, known.description), {known.fd}, true},
      {kSetMemTable,
       payload_of(MemoryTableHead{2, 0}, known.description, known.description),
       {known.fd, known.fd},
       false},
      {kSetVringNum, state(64), {}, false},
      {kSetVringBase, state(0), {}, false},
      {kSetVringAddr, payload_of(driver->queue(0).addresses(0)), {}, true},
      {kSetVringKick, u64(0), {driver->queue(0).kick_fd()}, true},
      {kSetVringCall, u64(0), {driver->queue(0).call_fd()}, true},
      {kSetVringErr, u64(0), {driver->queue(0).error_fd()}, true},
      {kSetVringEnable, state(1), {}, true},
      {kSetVringEnable, state(2), {}, false},
      {kSetInflightFd, payload_of(area.description), {area.fd.get()}, false},
      {kSetLogBase, payload_of(LogDescription{4096, 0}), {area.fd.get()}, false},
      {kSetConfig,
       payload_of(ConfigHead{virtio::kBlkConfigWriteback, 1, 0}, std::uint8_t{0}),
       {},
       true},
      {kSetConfig, payload_of(ConfigHead{0, 1, 0}, std::uint8_t{0}), {}, false},
      {kSetStatus, u64(15), {}, true},
      {kSetStatus, u64(1), {}, false},
      {static_cast<Request>(77), {}, {}, false},
  };
  constexpr std::size_t kRequests = 8;
  for (const bool is_busy : {true, false}) {
    for (const Late& each : late) {
      std::size_t answered = 0;
      std::vector<driver::BlkIo> ios(is_busy ? kRequests : 0);
      disk.hold(is_busy);
      for (std::size_t i = 0; i < ios.size(); ++i) {
        ios[i] = {.type = virtio::kBlkTFlush,
                  .complete =
                      [](driver::BlkIo& io) {
                        if (io.status == virtio::kBlkSOk) ++*static_cast<std::size_t*>(io.context);
                      },
                  .context = &answered};
        ASSERT_TRUE(driver->submit(static_cast<std::uint16_t>(i % 2), ios[i]));
      }
      driver->kick(0);
      driver->kick(1);
      ASSERT_TRUE(eventually([&] { return disk.in_hand() == ios.size(); }));
      // What stops a ring for a moment waits for what is in flight.
      std::thread release([this] {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        disk.hold(false);
      });
      const auto answer =
          frontend.call(each.request, each.payload, each.fds, kVersion | kFlagNeedReply);
      release.join();
      ASSERT_TRUE(answer.has_value()) << name_of(each.request) << ": " << answer.error().message;
      EXPECT_EQ(decode<std::uint64_t>(*answer), each.is_taken ? 0U : 1U) << name_of(each.request);
      for (const std::uint16_t queue : {std::uint16_t{0}, std::uint16_t{1}}) {
        while (driver->queue(queue).in_flight() > 0)
          ASSERT_TRUE(driver->wait(queue, kPatience).has_value()) << name_of(each.request);
      }
      EXPECT_EQ(answered, ios.size()) << name_of(each.request);
      ASSERT_EQ(driver->flush().value(), virtio::kBlkSOk) << name_of(each.request);
    }
  }
}

}  // namespace
}  // namespace vblk::vhost_user
