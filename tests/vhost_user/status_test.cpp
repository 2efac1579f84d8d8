// SET_STATUS, GET_STATUS and RESET_DEVICE: what the field says, and what a reset leaves and ends in
// every state that a device can be in.
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/handover_node.h"
#include "blockdev/image/open_image.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/device_status.h"
#include "tests/support/temp_dir.h"
#include "tests/vhost_user/block_writes.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using driver::BlkIo;
using test::bit;
using test::BlockWrites;
using test::Bytes;
using test::eventually;
using test::HoldingDisk;
using test::kDiskBytes;
using test::kPatience;
using test::kQueueSize;
using test::payload_of;
using test::RawFrontend;
using test::Served;

constexpr std::uint64_t kAll = 15;  // ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
constexpr std::uint64_t kProtocol = bit(kProtocolFMq) | bit(kProtocolFReplyAck) |
                                    bit(kProtocolFConfig) | bit(kProtocolFInflightShmfd) |
                                    bit(kProtocolFBackendReq) | bit(kProtocolFResetDevice) |
                                    bit(kProtocolFConfigureMemSlots) | bit(kProtocolFStatus);

enum class By : std::uint8_t { kStatus, kResetDevice };
constexpr std::array kBothWays{By::kStatus, By::kResetDevice};

// The driver library needs no status, so what it has negotiated is widened here.
void add_status(driver::Frontend& frontend, std::uint64_t features = kProtocol) {
  ASSERT_TRUE(frontend.command(Request::kSetProtocolFeatures, payload_of(features)).has_value());
}
Expected<void> set_status(driver::Frontend& frontend, std::uint64_t value) {
  return frontend.command(Request::kSetStatus, payload_of(value));
}
std::optional<std::uint64_t> status_of(driver::Frontend& frontend) {
  const auto answer = frontend.call(Request::kGetStatus, {});
  return answer ? decode<std::uint64_t>(*answer) : std::nullopt;
}
Expected<void> reset(driver::Frontend& frontend, By way) {
  return way == By::kStatus ? set_status(frontend, 0) : frontend.command(Request::kResetDevice, {});
}

class Status : public ::testing::Test {
 protected:
  RawFrontend connect() {
    RawFrontend frontend(served.path());
    EXPECT_TRUE(frontend.polite().negotiate().has_value());
    add_status(frontend.polite());
    return frontend;
  }
  struct DriveOptions {
    bool inflight{false};
    bool packed{false};
  };
  std::unique_ptr<BlkDriver> drive(const DriveOptions& options) {
    driver::FrontendOptions frontend{.timeout = kPatience};
    if (options.packed) frontend.features_mask |= bit(virtio::kFRingPacked);
    auto driver = BlkDriver::connect(served.path(), {.queue_count = 2,
                                                     .queue_size = kQueueSize,
                                                     .memory_bytes = std::size_t{2} << 20,
                                                     .packed = options.packed,
                                                     .inflight = options.inflight,
                                                     .frontend = frontend})
                      .value();
    add_status(driver->frontend());
    EXPECT_TRUE(set_status(driver->frontend(), kAll).has_value());
    return driver;
  }
  std::unique_ptr<BlkDriver> drive() { return drive({}); }
  // What QEMU does when its virtual machine goes on, or its guest has set the device up anew.
  static void start_again(BlkDriver& driver, const std::array<std::uint32_t, 2>& bases) {
    driver::Frontend& frontend = driver.frontend();
    ASSERT_TRUE(
        frontend.command(Request::kSetFeatures, payload_of(frontend.features())).has_value());
    ASSERT_TRUE(set_status(frontend, virtio::kStatusFeaturesOk).has_value());
    if (driver.inflight()) {
      ASSERT_TRUE(frontend.set_inflight(*driver.inflight()).has_value());
    }
    for (std::uint16_t i = 0; i < bases.size(); ++i)
      ASSERT_TRUE(frontend.start_ring(i, driver.queue(i), bases[i]).has_value());
    ASSERT_TRUE(set_status(frontend, kAll).has_value());
  }
  static std::array<std::uint32_t, 2> bases_of(BlkDriver& driver) {
    return {driver.frontend().stop_ring(0).value(), driver.frontend().stop_ring(1).value()};
  }
  std::size_t kept() {
    std::size_t count = 0;
    if (const auto status = served.server().status()) {
      for (const auto& ring : status->rings) count += ring.kept;
    }
    return count;
  }
  std::size_t running() {
    const auto status = served.server().status();
    return !status ? 0
                   : static_cast<std::size_t>(std::ranges::count(
                         status->rings, true, [](const auto& ring) { return ring.running; }));
  }

  HoldingDisk disk{kDiskBytes};
  Served served{disk};
};

// ---- The field

TEST_F(Status, is_zero_at_first_and_what_the_driver_has_written_then) {
  RawFrontend frontend = connect();
  EXPECT_EQ(frontend.call_u64(Request::kGetStatus), 0U);
  std::uint64_t value = 0;
  for (const std::uint64_t next : {virtio::kStatusAcknowledge, virtio::kStatusDriver,
                                   virtio::kStatusFeaturesOk, virtio::kStatusDriverOk}) {
    value |= next;
    EXPECT_EQ(frontend.acknowledged(Request::kSetStatus, payload_of(value)), 0U);
    EXPECT_EQ(frontend.call_u64(Request::kGetStatus), value);
  }
  EXPECT_EQ(frontend.acknowledged(Request::kSetStatus, payload_of(value | virtio::kStatusFailed)),
            0U);
  EXPECT_EQ(served.server().status()->device_status, value | virtio::kStatusFailed);
  EXPECT_EQ(frontend.acknowledged(Request::kSetStatus, payload_of(std::uint64_t{0})), 0U);
  EXPECT_EQ(frontend.call_u64(Request::kGetStatus), 0U);
}

TEST_F(Status, refuses_bits_that_nobody_knows_and_bits_that_are_taken_back) {
  RawFrontend frontend = connect();
  EXPECT_EQ(frontend.acknowledged(Request::kSetStatus, payload_of(std::uint64_t{3})), 0U);
  for (const std::uint64_t wrong : {std::uint64_t{1}, std::uint64_t{2}, std::uint64_t{3 | 16},
                                    std::uint64_t{3 | 32}, std::uint64_t{0x103}, ~std::uint64_t{0}})
    EXPECT_EQ(frontend.acknowledged(Request::kSetStatus, payload_of(wrong)), 1U) << wrong;
  EXPECT_EQ(frontend.call_u64(Request::kGetStatus), 3U) << "nothing of them was taken";
}

TEST_F(Status, has_features_ok_only_once_the_features_are_accepted) {
  RawFrontend frontend(served.path());
  frontend.send(Request::kSetProtocolFeatures, payload_of(kProtocol));
  const Bytes wanted = payload_of(kAll);
  frontend.send(Request::kSetStatus, wanted);
  EXPECT_EQ(frontend.call_u64(Request::kGetStatus), kAll & ~std::uint64_t{8}) << "none were set";
  RawFrontend next = [&] {
    frontend.send(Request::kSetStatus, payload_of(std::uint64_t{1}));  // a bit taken back
    EXPECT_TRUE(frontend.cut_off());
    return connect();
  }();
  EXPECT_EQ(next.acknowledged(Request::kSetFeatures, payload_of(bit(63))), 1U);
  EXPECT_EQ(next.acknowledged(Request::kSetStatus, wanted), 0U);
  EXPECT_EQ(next.call_u64(Request::kGetStatus), kAll & ~std::uint64_t{8}) << "they were refused";
  EXPECT_EQ(next.acknowledged(Request::kSetFeatures, payload_of(next.polite().features())), 0U);
  EXPECT_EQ(next.acknowledged(Request::kSetStatus, wanted), 0U);
  EXPECT_EQ(next.call_u64(Request::kGetStatus), kAll);
}

TEST_F(Status, is_for_who_has_negotiated_it_and_so_is_reset_device) {
  RawFrontend frontend = connect();
  add_status(frontend.polite(), kProtocol & ~bit(kProtocolFStatus) & ~bit(kProtocolFResetDevice));
  EXPECT_EQ(frontend.acknowledged(Request::kSetStatus, payload_of(std::uint64_t{1})), 1U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetStatus, payload_of(std::uint64_t{0})), 1U);
  EXPECT_EQ(frontend.acknowledged(Request::kResetDevice), 1U);
  frontend.send(Request::kGetStatus);
  EXPECT_TRUE(frontend.cut_off());
}

TEST_F(Status, says_that_a_broken_ring_needs_a_reset_which_repairs_it) {
  for (const By way : kBothWays) {
    const auto driver = drive();
    driver::Frontend& frontend = driver->frontend();
    std::array<int, 2> channel{};
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, channel.data()),
              0);
    const UniqueFd near(channel[0]);
    const UniqueFd far(channel[1]);
    const std::array fds{far.get()};
    ASSERT_TRUE(frontend.command(Request::kSetBackendReqFd, {}, fds).has_value());
    ASSERT_EQ(status_of(frontend), kAll);
    // More entries than the ring has.
    std::byte* const index = driver->queue(1).avail_ring() + 2;
    index[0] = std::byte{0xff};
    index[1] = std::byte{0x7f};
    const std::uint64_t one = 1;
    ASSERT_EQ(::write(driver->queue(1).kick_fd(), &one, sizeof one), 8);
    ASSERT_TRUE(eventually([&] { return status_of(frontend) == (kAll | 64); }));
    // "the device MUST send a device configuration change notification".
    Message message;
    MessageReader reader;
    ASSERT_TRUE(eventually([&] {
      const auto outcome = reader.read(near.get(), message);
      return outcome && *outcome == MessageReader::Outcome::kMessage;
    }));
    EXPECT_EQ(message.header.request, static_cast<std::uint32_t>(BackendRequest::kConfigChange));
    EXPECT_TRUE(set_status(frontend, kAll | 64).has_value()) << "as it was read";
    ASSERT_TRUE(reset(frontend, way).has_value());
    EXPECT_EQ(status_of(frontend), 0U);
    // A driver begins with new rings.
    auto ring = driver::DriverQueue::create(driver->memory(), {.size = 16}).value();
    ASSERT_TRUE(
        frontend.command(Request::kSetFeatures, payload_of(frontend.features())).has_value());
    ASSERT_TRUE(frontend.start_ring(1, *ring).has_value());
    EXPECT_EQ(served.server().status()->rings[1].broken, false);
    EXPECT_EQ(running(), 1U);
  }
}

TEST_F(Status, is_not_told_to_a_driver_that_is_not_at_work) {
  const auto driver = BlkDriver::connect(served.path(), {.queue_size = kQueueSize}).value();
  driver::Frontend& frontend = driver->frontend();
  add_status(frontend);
  std::array<int, 2> channel{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, channel.data()),
            0);
  const UniqueFd near(channel[0]);
  const UniqueFd far(channel[1]);
  const std::array fds{far.get()};
  ASSERT_TRUE(frontend.command(Request::kSetBackendReqFd, {}, fds).has_value());
  driver->queue(0).avail_ring()[3] = std::byte{0x7f};
  const std::uint64_t one = 1;
  ASSERT_EQ(::write(driver->queue(0).kick_fd(), &one, sizeof one), 8);
  ASSERT_TRUE(eventually([&] { return status_of(frontend) == 64U; }));
  ASSERT_TRUE(served.server().status().has_value());  // what was posted has run
  std::byte byte{};
  EXPECT_EQ(::recv(near.get(), &byte, 1, MSG_DONTWAIT), -1);
}

// ---- Resets

TEST_F(Status, of_a_reset_drains_what_is_in_flight_before_it_is_acknowledged) {
  for (const By way : kBothWays) {
    for (const bool packed : {false, true}) {
      const auto driver = drive({.packed = packed});
      disk.hold(true);
      BlockWrites writes(*driver, 8);
      writes.submit();
      ASSERT_TRUE(eventually([this] { return disk.in_hand() == 8; }));
      std::atomic<bool> acknowledged{false};
      std::thread frontend([&] {
        EXPECT_TRUE(reset(driver->frontend(), way).has_value());
        acknowledged = true;
        EXPECT_EQ(disk.in_hand(), 0U);
      });
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      EXPECT_FALSE(acknowledged);
      disk.hold(false);
      frontend.join();
      writes.look();
      EXPECT_EQ(writes.done(), 8U) << "answered while the driver could still look";
      EXPECT_EQ(running(), 0U);
      EXPECT_EQ(served.device().negotiated_features(), 0U);
    }
  }
}

TEST_F(Status, of_a_reset_leaves_rings_that_are_looked_at_no_more) {
  for (const By way : kBothWays) {
    const auto driver = drive();
    ASSERT_TRUE(reset(driver->frontend(), way).has_value());
    BlkIo io{.type = virtio::kBlkTFlush};
    ASSERT_TRUE(driver->submit(0, io));
    driver->kick(0);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(driver->poll(0).value(), 0U);
    // Nor is one that gets a kick descriptor again without the rest.
    const std::array kick{driver->queue(0).kick_fd()};
    EXPECT_TRUE(driver->frontend()
                    .command(Request::kSetVringKick, payload_of(std::uint64_t{0}), kick)
                    .has_value());
    EXPECT_FALSE(driver->frontend()
                     .command(Request::kSetVringEnable, payload_of(VringState{0, 1}))
                     .has_value());
    EXPECT_EQ(running(), 0U);
    EXPECT_EQ(driver->poll(0).value(), 0U);
  }
}

// QEMU 7.2 stops a virtual machine in this order, and goes on with the bases later.
TEST_F(Status, of_a_reset_before_the_bases_are_asked_for_loses_none) {
  for (const bool inflight : {false, true}) {
    for (const bool packed : {false, true}) {
      const auto driver = drive({.inflight = inflight, .packed = packed});
      for (int round = 0; round < 5; ++round) {
        for (int i = 0; i < 7 + round; ++i) ASSERT_EQ(driver->flush().value(), virtio::kBlkSOk);
        ASSERT_TRUE(set_status(driver->frontend(), 0).has_value());
        for (std::uint32_t i = 0; i < 2; ++i) {
          ASSERT_TRUE(driver->frontend()
                          .command(Request::kSetVringEnable, payload_of(VringState{i, 0}))
                          .has_value());
        }
        const auto bases = bases_of(*driver);
        EXPECT_EQ(bases[0], driver->queue(0).resume_base()) << inflight << packed << round;
        EXPECT_EQ(bases_of(*driver), bases) << "however often it is asked";
        start_again(*driver, bases);
      }
      EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk);
    }
  }
}

TEST_F(Status, of_a_reset_has_rings_begin_at_their_beginning_unless_told_otherwise) {
  const auto driver = drive();
  for (int i = 0; i < 5; ++i) ASSERT_EQ(driver->flush().value(), virtio::kBlkSOk);
  ASSERT_TRUE(reset(driver->frontend(), By::kResetDevice).has_value());
  ASSERT_TRUE(driver->frontend()
                  .command(Request::kSetFeatures, payload_of(driver->frontend().features()))
                  .has_value());
  const auto ring = driver::DriverQueue::create(driver->memory(), {.size = 16}).value();
  driver::Frontend& frontend = driver->frontend();
  ASSERT_TRUE(frontend.command(Request::kSetVringNum, payload_of(VringState{0, 16})).has_value());
  ASSERT_TRUE(frontend.command(Request::kSetVringAddr, payload_of(ring->addresses(0))).has_value());
  const std::array kick{ring->kick_fd()};
  ASSERT_TRUE(
      frontend.command(Request::kSetVringKick, payload_of(std::uint64_t{0}), kick).has_value());
  ASSERT_TRUE(frontend.command(Request::kSetVringEnable, payload_of(VringState{0, 1})).has_value());
  EXPECT_EQ(frontend.stop_ring(0).value(), 0U) << "no SET_VRING_BASE came";
}

TEST_F(Status, of_a_reset_fails_what_a_paused_device_keeps_where_nobody_else_will_have_it) {
  for (const By way : kBothWays) {
    const auto driver = drive();
    disk.fail(ENOSPC);
    BlockWrites writes(*driver, 8);
    writes.submit();
    ASSERT_TRUE(eventually([this] { return kept() > 0; }));
    ASSERT_TRUE(reset(driver->frontend(), way).has_value());
    writes.look();
    EXPECT_GT(writes.failed(), 0U);
    EXPECT_EQ(writes.done(), 0U);
    EXPECT_FALSE(served.device().gate().is_paused()) << "nobody keeps anything any more";
    disk.fail(0);
  }
}

TEST_F(Status, of_a_reset_leaves_what_is_kept_to_who_gives_the_area_again) {
  for (const bool packed : {false, true}) {
    const auto driver = drive({.inflight = true, .packed = packed});
    const std::size_t before = disk.writes();
    disk.fail(ENOSPC);
    BlockWrites writes(*driver, 8);
    writes.submit();
    ASSERT_TRUE(eventually([this] { return kept() > 0; }));
    ASSERT_TRUE(set_status(driver->frontend(), 0).has_value());
    writes.look();
    EXPECT_EQ(writes.failed() + writes.done(), 0U);
    disk.fail(0);
    start_again(*driver, bases_of(*driver));
    writes.wait();
    EXPECT_EQ(writes.done(), 8U);
    EXPECT_EQ(writes.failed(), 0U);
    EXPECT_EQ(disk.writes() - before, 8U) << "lost or doubled";
  }
}

TEST_F(Status, of_a_reset_has_forgotten_what_was_kept_for_who_gives_no_area) {
  for (const By way : kBothWays) {
    for (const bool packed : {false, true}) {
      const auto driver = drive({.inflight = true, .packed = packed});
      const std::size_t before = disk.writes();
      disk.fail(ENOSPC);
      BlockWrites writes(*driver, 8);
      writes.submit();
      ASSERT_TRUE(eventually([this] { return kept() > 0; }));
      ASSERT_TRUE(reset(driver->frontend(), way).has_value());
      disk.fail(0);
      driver::Frontend& frontend = driver->frontend();
      ASSERT_TRUE(
          frontend.command(Request::kSetFeatures, payload_of(frontend.features())).has_value());
      const auto ring =
          driver::DriverQueue::create(driver->memory(), {.size = kQueueSize, .packed = packed})
              .value();
      ASSERT_TRUE(frontend.start_ring(0, *ring).has_value());
      const auto head = driver->memory().allocate(virtio::kBlkRequestHeaderBytes, 16);
      std::ranges::fill(head, std::byte{0});
      head[0] = std::byte{virtio::kBlkTFlush};
      const auto status = driver->memory().allocate(1, 1);
      const std::array chain{
          driver::Buffer{driver->memory().guest_address(head.data()),
                         virtio::kBlkRequestHeaderBytes, false},
          driver::Buffer{driver->memory().guest_address(status.data()), 1, true}};
      ASSERT_TRUE(ring->add(chain).has_value());
      ring->publish();
      ASSERT_TRUE(eventually([&] { return ring->take_used().value().has_value(); }));
      EXPECT_EQ(disk.writes(), before) << "what was in flight before the reset";
      EXPECT_EQ(served.server().status()->rings[0].statistics.recovered, 0U);
    }
  }
}

// Firmware has split rings, the guest that it starts packed ones; and the other way round.
TEST_F(Status, of_a_reset_lets_the_driver_have_the_other_kind_of_rings_with_the_same_area) {
  for (const bool packed_first : {false, true}) {
    // Large enough for either kind.
    driver::InflightFile area;
    area.fd.reset(::memfd_create("area", MFD_CLOEXEC));
    constexpr std::uint64_t kAreaBytes = 16384;
    ASSERT_EQ(::ftruncate(area.fd.get(), static_cast<off_t>(kAreaBytes)), 0);
    area.description = {.mmap_size = kAreaBytes, .queue_count = 2, .queue_size = kQueueSize};
    RawFrontend frontend = connect();
    const auto memory = driver::DriverMemory::create({std::size_t{1} << 20}).value();
    ASSERT_TRUE(frontend.polite().set_memory(*memory).has_value());
    for (const bool packed : {packed_first, !packed_first}) {
      const std::uint64_t usual = frontend.polite().features();
      const std::uint64_t features = packed ? usual | bit(virtio::kFRingPacked) : usual;
      ASSERT_EQ(frontend.acknowledged(Request::kSetFeatures, payload_of(features)), 0U);
      if (packed == packed_first) {
        ASSERT_TRUE(frontend.polite().set_inflight(area).has_value());
      }
      const auto ring =
          driver::DriverQueue::create(*memory, {.size = kQueueSize, .packed = packed}).value();
      const auto started = frontend.polite().start_ring(0, *ring);
      ASSERT_TRUE(started.has_value()) << started.error().message;
      ASSERT_TRUE(reset(frontend.polite(), By::kStatus).has_value());
    }
  }
}

TEST_F(Status, of_a_reset_refuses_packed_rings_for_which_the_area_before_is_too_small) {
  RawFrontend frontend = connect();
  const auto memory = driver::DriverMemory::create({std::size_t{1} << 20}).value();
  ASSERT_TRUE(frontend.polite().set_memory(*memory).has_value());
  const auto small = frontend.polite().get_inflight(2, kQueueSize).value();
  ASSERT_TRUE(frontend.polite().set_inflight(small).has_value());
  ASSERT_TRUE(reset(frontend.polite(), By::kStatus).has_value());
  const std::uint64_t features = frontend.polite().features() | bit(virtio::kFRingPacked);
  ASSERT_EQ(frontend.acknowledged(Request::kSetFeatures, payload_of(features)), 0U);
  const auto ring =
      driver::DriverQueue::create(*memory, {.size = kQueueSize, .packed = true}).value();
  EXPECT_FALSE(frontend.polite().start_ring(0, *ring).has_value());
  // Who gives the right one goes on.
  const auto large = frontend.polite().get_inflight(2, kQueueSize).value();
  EXPECT_GT(large.description.mmap_size, small.description.mmap_size);
  ASSERT_TRUE(frontend.polite().set_inflight(large).has_value());
  EXPECT_TRUE(frontend.polite().start_ring(0, *ring).has_value());
}

TEST_F(Status, of_a_reset_works_while_the_device_is_paused_by_command) {
  for (const By way : kBothWays) {
    const auto driver = drive();
    served.device().gate().pause();
    BlockWrites writes(*driver, 4);
    writes.submit();
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    ASSERT_TRUE(reset(driver->frontend(), way).has_value());
    writes.look();
    EXPECT_EQ(writes.done() + writes.failed(), 0U) << "it was never taken";
    start_again(*driver, bases_of(*driver));
    EXPECT_TRUE(served.device().gate().is_paused()) << "a pause is the operator's";
    served.device().gate().resume();
    writes.wait();
    EXPECT_EQ(writes.done(), 4U);
  }
}

TEST_F(Status, of_a_reset_keeps_write_through_for_drivers_that_have_chosen_it) {
  constexpr std::array kOff{std::byte{0}};
  for (const By way : kBothWays) {
    const auto driver = drive();
    driver::Frontend& frontend = driver->frontend();
    ASSERT_TRUE(frontend.write_config(virtio::kBlkConfigWriteback, kOff).has_value());
    ASSERT_TRUE(reset(frontend, way).has_value());
    EXPECT_EQ(frontend.read_config(virtio::kBlkConfigWriteback, 1)->front(), std::byte{0});
    // Firmware comes first, and knows neither FLUSH nor CONFIG_WCE.
    ASSERT_TRUE(
        frontend.command(Request::kSetFeatures, payload_of(bit(virtio::kFVersion1))).has_value());
    EXPECT_TRUE(served.device().write_through());
    ASSERT_TRUE(reset(frontend, way).has_value());
    ASSERT_TRUE(
        frontend.command(Request::kSetFeatures, payload_of(frontend.features())).has_value());
    EXPECT_TRUE(served.device().write_through());
    EXPECT_EQ(frontend.read_config(virtio::kBlkConfigWriteback, 1)->front(), std::byte{0});
  }
  EXPECT_TRUE(eventually([this] { return !served.connected(); }));
  EXPECT_EQ(drive()->config().writeback, true) << "the next frontend's device is a fresh one";
}

TEST_F(Status, of_a_cache_that_is_turned_off_has_what_was_written_before_flushed) {
  const auto driver = drive();
  BlockWrites before(*driver, 4);
  before.submit();
  before.wait();
  ASSERT_EQ(before.done(), 4U);
  EXPECT_FALSE(disk.flushed()) << "that is what a cache is";
  constexpr std::array kOff{std::byte{0}};
  ASSERT_TRUE(driver->frontend().write_config(virtio::kBlkConfigWriteback, kOff).has_value());
  EXPECT_TRUE(eventually([this] { return disk.flushed(); }));
  BlockWrites after(*driver, 4);
  after.submit();
  after.wait();
  EXPECT_EQ(after.done(), 4U) << "the rings go on";
  EXPECT_EQ(after.failed(), 0U);
}

TEST_F(Status, of_a_reset_keeps_what_belongs_to_the_connection) {
  const auto driver = drive();
  driver::Frontend& frontend = driver->frontend();
  for (const By way : kBothWays) {
    ASSERT_TRUE(reset(frontend, way).has_value());
    // Neither memory nor call and error descriptors are given again.
    ASSERT_TRUE(
        frontend.command(Request::kSetFeatures, payload_of(frontend.features())).has_value());
    for (std::uint16_t i = 0; i < 2; ++i) {
      const driver::DriverQueue& queue = driver->queue(i);
      const auto index = std::uint32_t{i};
      ASSERT_TRUE(frontend.command(Request::kSetVringNum, payload_of(VringState{index, kQueueSize}))
                      .has_value());
      ASSERT_TRUE(
          frontend
              .command(Request::kSetVringBase, payload_of(VringState{index, queue.resume_base()}))
              .has_value());
      ASSERT_TRUE(
          frontend.command(Request::kSetVringAddr, payload_of(queue.addresses(index))).has_value());
      const std::array kick{queue.kick_fd()};
      ASSERT_TRUE(frontend.command(Request::kSetVringKick, payload_of(std::uint64_t{index}), kick)
                      .has_value());
      ASSERT_TRUE(
          frontend.command(Request::kSetVringEnable, payload_of(VringState{index, 1})).has_value());
    }
    EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk) << "sleeps until the interrupt";
  }
}

TEST_F(Status, of_a_reset_works_in_every_state_of_setting_up) {
  const std::vector<std::function<void(RawFrontend&, driver::DriverMemory&, driver::DriverQueue&)>>
      steps{
          [](RawFrontend& frontend, auto&, auto&) {
            EXPECT_TRUE(frontend.polite().negotiate().has_value());
            add_status(frontend.polite());
          },
          [](RawFrontend& frontend, driver::DriverMemory& memory, auto&) {
            EXPECT_TRUE(frontend.polite().set_memory(memory).has_value());
          },
          [](RawFrontend& frontend, auto&, auto&) {
            const auto area = frontend.polite().get_inflight(2, 16).value();
            EXPECT_TRUE(frontend.polite().set_inflight(area).has_value());
          },
          [](RawFrontend& frontend, auto&, auto&) {
            frontend.acknowledged(Request::kSetVringNum, payload_of(VringState{0, 16}));
          },
          [](RawFrontend& frontend, auto&, auto&) {
            frontend.acknowledged(Request::kSetVringBase, payload_of(VringState{0, 7}));
          },
          [](RawFrontend& frontend, auto&, driver::DriverQueue& ring) {
            frontend.acknowledged(Request::kSetVringAddr, payload_of(ring.addresses(0)));
          },
          [](RawFrontend& frontend, auto&, auto&) {
            frontend.acknowledged(Request::kSetVringEnable, payload_of(VringState{0, 1}));
          },
          [](RawFrontend& frontend, auto&, driver::DriverQueue& ring) {
            const std::array kick{ring.kick_fd()};
            frontend.acknowledged(Request::kSetVringKick, payload_of(std::uint64_t{0}), kick);
          },
          [](RawFrontend& frontend, auto&, auto&) {
            frontend.acknowledged(Request::kSetVringEnable, payload_of(VringState{0, 0}));
          },
          [](RawFrontend& frontend, auto&, auto&) {
            frontend.call(Request::kGetVringBase, payload_of(VringState{0, 0}));
          },
      };
  for (std::size_t until = 1; until <= steps.size(); ++until) {
    const auto memory = driver::DriverMemory::create({std::size_t{1} << 16}).value();
    const auto ring = driver::DriverQueue::create(*memory, {.size = 16}).value();
    RawFrontend frontend(served.path());
    for (std::size_t i = 0; i < until; ++i) steps[i](frontend, *memory, *ring);
    for (const By way : kBothWays) {
      ASSERT_TRUE(reset(frontend.polite(), way).has_value()) << until;
      EXPECT_EQ(frontend.call_u64(Request::kGetStatus), 0U) << until;
      EXPECT_EQ(running(), 0U);
    }
    // From there on all can be done.
    ASSERT_EQ(
        frontend.acknowledged(Request::kSetFeatures, payload_of(frontend.polite().features())), 0U);
    if (until < 2) {
      ASSERT_TRUE(frontend.polite().set_memory(*memory).has_value());
    }
    ASSERT_TRUE(frontend.polite().start_ring(0, *ring).has_value()) << until;
    EXPECT_EQ(running(), 1U) << until;
  }
}

// ---- With migration on

TEST(StatusAndMigration, a_reset_gives_the_disk_up_and_the_next_start_takes_it) {
  log::set_level(log::Level::kOff);
  const test::TempDir dir;
  blockdev::ImageOptions options;
  options.path = dir.file("disk");
  options.format = blockdev::ImageFormat::kRaw;
  options.cache = blockdev::CacheMode::kWriteback;
  {
    const int fd = ::open(options.path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ASSERT_EQ(::ftruncate(fd, static_cast<off_t>(kDiskBytes)), 0);
    ::close(fd);
  }
  blockdev::HandoverNode node(blockdev::look_at_image(options).value(),
                              [&options] { return blockdev::open_image(options); });
  Served served(node, {.handover = &node});
  const auto driver = BlkDriver::connect(served.path(), {.queue_count = 2,
                                                         .queue_size = kQueueSize,
                                                         .memory_bytes = std::size_t{2} << 20,
                                                         .frontend = {.timeout = kPatience}})
                          .value();
  driver::Frontend& frontend = driver->frontend();
  add_status(frontend, kProtocol | bit(kProtocolFLogShmfd));
  // A log in which everything is marked.
  const UniqueFd log(::memfd_create("log", MFD_CLOEXEC));
  // A bit for each page up to the driver's memory, which begins at 1 TiB.
  constexpr std::uint64_t kLogBytes = std::uint64_t{33} << 20;
  ASSERT_EQ(::ftruncate(log.get(), static_cast<off_t>(kLogBytes)), 0);
  const std::array fds{log.get()};
  ASSERT_TRUE(frontend
                  .command(Request::kSetLogBase,
                           payload_of(LogDescription{.size_bytes = kLogBytes, .mmap_offset = 0}),
                           fds)
                  .has_value());
  const std::uint64_t logging = frontend.features() | bit(kFLogAll);
  const auto is_free = [&options] { return blockdev::open_image(options).has_value(); };
  for (const By way : kBothWays) {
    ASSERT_TRUE(frontend.command(Request::kSetFeatures, payload_of(logging)).has_value());
    ASSERT_EQ(driver->flush().value(), virtio::kBlkSOk);
    EXPECT_FALSE(is_free());
    ASSERT_TRUE(reset(frontend, way).has_value());
    EXPECT_TRUE(is_free()) << "before the frontend is told";
    EXPECT_FALSE(node.is_taken());
    ASSERT_TRUE(
        frontend.command(Request::kSetFeatures, payload_of(frontend.features())).has_value());
    for (std::uint16_t i = 0; i < 2; ++i) {
      ASSERT_TRUE(
          frontend.start_ring(i, driver->queue(i), frontend.stop_ring(i).value()).has_value());
    }
    EXPECT_TRUE(node.is_taken());
    EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk);
  }
}

}  // namespace
}  // namespace vblk::vhost_user
