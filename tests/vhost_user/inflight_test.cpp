// GET_INFLIGHT_FD and SET_INFLIGHT_FD: what comes and goes, who is refused, and drivers that go on
// with another connection. What is wrong with the messages themselves is message_test.cpp's.
#include <array>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/inflight_area.h"
#include "tests/vhost_user/block_writes.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using driver::Frontend;
using driver::InflightFile;
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

// A page of memory that can be shortened and sealed.
int page_of_memory() {
  const int fd = ::memfd_create("area", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  EXPECT_EQ(::ftruncate(fd, 4096), 0);
  return fd;
}

class InflightMessages : public ::testing::Test {
 protected:
  RawFrontend connect(std::uint64_t protocol_features_mask = ~std::uint64_t{0}) {
    RawFrontend frontend(served.path(), protocol_features_mask);
    EXPECT_TRUE(frontend.polite().negotiate().has_value());
    return frontend;
  }
  static InflightFile area_of(RawFrontend& frontend, std::uint16_t queue_count = 2) {
    auto inflight = frontend.polite().get_inflight(queue_count, kQueueSize);
    EXPECT_TRUE(inflight.has_value()) << inflight.error().message;
    return std::move(*inflight);
  }
  std::unique_ptr<BlkDriver> drive() {
    return BlkDriver::connect(served.path(), {.queue_count = 2,
                                              .queue_size = kQueueSize,
                                              .memory_bytes = std::size_t{2} << 20,
                                              .inflight = true,
                                              .frontend = {.timeout = kPatience}})
        .value();
  }

  HoldingDisk disk{kDiskBytes};
  Served served{disk};
};

TEST_F(InflightMessages, gives_memory_that_nobody_can_shorten) {
  RawFrontend frontend = connect();
  const InflightFile inflight = area_of(frontend);
  EXPECT_EQ(inflight.description.queue_count, 2U);
  EXPECT_EQ(inflight.description.queue_size, kQueueSize);
  EXPECT_EQ(inflight.description.mmap_offset, 0U);
  EXPECT_EQ(inflight.description.mmap_size, virtio::InflightArea::bytes_for(2, kQueueSize));
  const int seals = ::fcntl(inflight.fd.get(), F_GET_SEALS);
  EXPECT_EQ(seals & (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL),
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  EXPECT_NE(::ftruncate(inflight.fd.get(), 0), 0);
  struct stat status{};
  ASSERT_EQ(::fstat(inflight.fd.get(), &status), 0);
  EXPECT_EQ(static_cast<std::uint64_t>(status.st_size), inflight.description.mmap_size);
  EXPECT_TRUE(frontend.polite().set_inflight(inflight).has_value());
}

TEST_F(InflightMessages, answers_with_as_many_bytes_as_it_was_asked_with) {
  RawFrontend frontend = connect();
  Bytes request = payload_of(Inflight{.queue_count = 1, .queue_size = kQueueSize});
  for (const std::size_t bytes : {sizeof(Inflight), kInflightBytesMin}) {
    request.resize(bytes);
    const auto answer = frontend.call(Request::kGetInflightFd, request);
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->size(), bytes);
  }
}

TEST_F(InflightMessages, takes_both_only_where_they_were_negotiated) {
  {
    RawFrontend frontend = connect(~bit(kProtocolFInflightShmfd));
    const std::array fds{page_of_memory()};
    EXPECT_EQ(
        frontend.acknowledged(
            Request::kSetInflightFd,
            payload_of(Inflight{.mmap_size = 1088, .queue_count = 1, .queue_size = kQueueSize}),
            fds),
        1U);
    ::close(fds[0]);
    frontend.send(Request::kGetInflightFd,
                  payload_of(Inflight{.queue_count = 1, .queue_size = kQueueSize}));
    EXPECT_TRUE(frontend.cut_off());
  }
  RawFrontend next = connect();
  EXPECT_EQ(next.call_u64(Request::kGetQueueNum), 2U) << "it cost that connection alone";
}

TEST_F(InflightMessages, refuses_what_is_no_memory_and_goes_on) {
  RawFrontend frontend = connect();
  const InflightFile area = area_of(frontend);
  std::array<int, 2> sockets{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets.data()), 0);
  const UniqueFd near(sockets[0]);
  const UniqueFd far(sockets[1]);
  const UniqueFd event(::eventfd(0, EFD_CLOEXEC));
  const UniqueFd directory(::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  const UniqueFd device(::open("/dev/zero", O_RDWR | O_CLOEXEC));
  const UniqueFd sealed(page_of_memory());
  ASSERT_EQ(::fcntl(sealed.get(), F_ADD_SEALS, F_SEAL_WRITE), 0);
  const UniqueFd read_only(
      ::open(("/proc/self/fd/" + std::to_string(area.fd.get())).c_str(), O_RDONLY | O_CLOEXEC));
  for (const UniqueFd* fd : {&near, &event, &directory, &device, &sealed, &read_only}) {
    const std::array fds{fd->get()};
    EXPECT_EQ(frontend.acknowledged(Request::kSetInflightFd, payload_of(area.description), fds), 1U)
        << fd->get();
  }
  EXPECT_TRUE(frontend.polite().set_inflight(area).has_value());
}

TEST_F(InflightMessages, refuses_regions_that_contradict_themselves) {
  RawFrontend frontend = connect();
  for (const off_t offset : {off_t{8}, off_t{10}, off_t{0}}) {
    const InflightFile area = area_of(frontend);
    const std::array<std::uint16_t, 8> regions{0, 0, 0, 0, 1, kQueueSize, 0, 0};
    ASSERT_EQ(::pwrite(area.fd.get(), regions.data(), sizeof regions, 0), 16);
    const std::uint16_t wrong = 99;
    ASSERT_EQ(::pwrite(area.fd.get(), &wrong, sizeof wrong, offset), 2);
    EXPECT_FALSE(frontend.polite().set_inflight(area).has_value()) << offset;
  }
}

TEST_F(InflightMessages, takes_no_other_area_while_a_ring_runs) {
  const auto driver = drive();
  const auto refused = driver->frontend().set_inflight(*driver->inflight());
  ASSERT_FALSE(refused.has_value());
  ASSERT_TRUE(driver->frontend().stop_ring(0).has_value());
  ASSERT_TRUE(driver->frontend().stop_ring(1).has_value());
  EXPECT_TRUE(driver->frontend().set_inflight(*driver->inflight()).has_value());
}

TEST_F(InflightMessages, leaves_nothing_in_flight_behind_an_orderly_end) {
  const auto driver = drive();
  EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk);
  ASSERT_TRUE(driver->frontend().stop_ring(0).has_value());
  std::vector<std::byte> bytes(driver->inflight()->description.mmap_size);
  ASSERT_EQ(::pread(driver->inflight()->fd.get(), bytes.data(), bytes.size(), 0),
            static_cast<ssize_t>(bytes.size()));
  for (std::size_t i = 0; i < kQueueSize; ++i) EXPECT_EQ(bytes[16 + 16 * i], std::byte{0}) << i;
  EXPECT_EQ(bytes[14], std::byte{1}) << "used_idx, after one request";
}

TEST_F(InflightMessages, survives_a_frontend_that_takes_the_area_away) {
  const UniqueFd file(page_of_memory());
  {
    auto frontend = Frontend::connect(served.path(), {.timeout = kPatience}).value();
    const auto memory = driver::DriverMemory::create({std::size_t{1} << 20}).value();
    const auto ring = driver::DriverQueue::create(*memory, {.size = kQueueSize}).value();
    InflightFile area;
    area.fd.reset(::dup(file.get()));
    area.description = {
        .mmap_size = 4096, .mmap_offset = 0, .queue_count = 1, .queue_size = kQueueSize};
    ASSERT_TRUE(frontend->negotiate().has_value());
    ASSERT_TRUE(frontend->set_inflight(area).has_value());
    ASSERT_TRUE(frontend->set_memory(*memory).has_value());
    ASSERT_TRUE(frontend->start_ring(0, *ring).has_value());
    ASSERT_EQ(::ftruncate(file.get(), 0), 0);
    const auto head = memory->allocate(virtio::kBlkRequestHeaderBytes, 16);
    head[0] = std::byte{virtio::kBlkTFlush};
    const auto status = memory->allocate(1, 1);
    const std::array chain{
        driver::Buffer{memory->guest_address(head.data()), virtio::kBlkRequestHeaderBytes, false},
        driver::Buffer{memory->guest_address(status.data()), 1, true}};
    ASSERT_TRUE(ring->add(chain).has_value());
    ring->publish();
    EXPECT_TRUE(eventually([this] {
      const auto state = served.server().status();
      return state && !state->rings.empty() && state->rings[0].broken;
    }));
  }
  const auto next = drive();
  EXPECT_EQ(next->flush().value(), virtio::kBlkSOk);
}

TEST_F(InflightMessages, carry_writeback_over_to_the_next_connection) {
  constexpr std::array kOff{std::byte{0}};
  RawFrontend first = connect();
  const InflightFile area = area_of(first);
  ASSERT_TRUE(first.polite().set_inflight(area).has_value());
  ASSERT_TRUE(first.polite().write_config(virtio::kBlkConfigWriteback, kOff).has_value());
  ::shutdown(first.polite().socket(), SHUT_RDWR);
  RawFrontend second = connect();
  EXPECT_EQ(second.polite().read_config(virtio::kBlkConfigWriteback, 1)->front(), std::byte{1});
  ASSERT_TRUE(second.polite().set_inflight(area).has_value());
  EXPECT_EQ(second.polite().read_config(virtio::kBlkConfigWriteback, 1)->front(), std::byte{0});
  EXPECT_TRUE(served.device().write_through());
}

// ---- Drivers that go on.

TEST_F(InflightMessages, let_a_driver_go_on_with_its_rings_on_another_connection) {
  const auto driver = drive();
  BlockWrites writes(*driver, 24);
  disk.hold(true);
  writes.enqueue();
  // One queue has been kicked, the other's requests wait in its avail ring.
  driver->kick(0);
  ASSERT_TRUE(eventually([this] { return disk.in_hand() == 12; }));
  ::shutdown(driver->frontend().socket(), SHUT_RDWR);
  std::thread release([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    disk.hold(false);
  });
  driver->kick(1);
  const auto reconnected = driver->reconnect(served.path());
  release.join();
  ASSERT_TRUE(reconnected.has_value()) << reconnected.error().message;
  writes.wait();
  EXPECT_TRUE(writes.each_done_once());
  EXPECT_EQ(disk.writes(), 24U) << "lost or repeated";
  writes.expect_on(disk);
  EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk);
}

TEST_F(InflightMessages, are_missed_by_a_driver_that_asked_for_them) {
  Served without(disk, {.offers_recovery = false});
  const auto driver =
      BlkDriver::connect(without.path(), {.inflight = true, .frontend = {.timeout = kPatience}});
  ASSERT_FALSE(driver.has_value());
  EXPECT_EQ(driver.error().kind, ErrorKind::kNotSupported);
}

}  // namespace
}  // namespace vblk::vhost_user
