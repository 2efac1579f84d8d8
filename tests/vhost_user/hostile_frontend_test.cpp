// Frontends that try to keep the server from everybody else.
#include <algorithm>
#include <array>
#include <cstdint>
#include <fcntl.h>
#include <limits>
#include <memory>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <vector>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/log.h"
#include "blockdev/vhost_user/backend.h"
#include "blockdev/virtio/guest_memory.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using test::kDiskBytes;
using test::kPatience;

// O_NONBLOCK belongs to the open file, which both sides share; and a full eventfd blocks its
// writers.
void make_writers_wait(int event_fd) {
  ASSERT_EQ(::fcntl(event_fd, F_SETFL, 0), 0);
  const std::uint64_t full = std::numeric_limits<std::uint64_t>::max() - 1;
  ASSERT_EQ(::write(event_fd, &full, sizeof full), static_cast<ssize_t>(sizeof full));
}

TEST(HostileFrontend, that_blocks_an_io_thread_in_its_call_descriptor_costs_itself_alone) {
  test::HoldingDisk disk(kDiskBytes);
  test::Served served(disk);
  auto hostile = BlkDriver::connect(served.path(), {.queue_size = 64}).value();
  make_writers_wait(hostile->queue(0).call_fd());
  driver::BlkIo flush{.type = virtio::kBlkTFlush};
  flush.complete = [](driver::BlkIo& /*io*/) {};
  ASSERT_TRUE(hostile->submit(0, flush));
  hostile->kick(0);
  // The used index is published before the interrupt is sent.
  ASSERT_TRUE(test::eventually([&] { return hostile->poll(0).value() == 1; }));
  hostile.reset();
  const auto next =
      BlkDriver::connect(served.path(), {.queue_size = 64, .frontend = {.timeout = kPatience}});
  ASSERT_TRUE(next.has_value()) << next.error().message;
  EXPECT_EQ((*next)->flush().value(), virtio::kBlkSOk);
}

TEST(HostileFrontend, that_sends_without_end_is_served_in_turns) {
  test::HoldingDisk disk(kDiskBytes);
  const auto device = virtio::BlkDevice::create(disk, {}).value();
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()), 0);
  const UniqueFd frontend(ends[1]);
  Backend backend(UniqueFd{ends[0]}, *device, {});
  constexpr int kMessages = 100;
  const Header set_owner{static_cast<std::uint32_t>(Request::kSetOwner), kVersion, 0};
  for (int i = 0; i < kMessages; ++i)
    ASSERT_TRUE(send_message(frontend.get(), set_owner, {}).has_value());
  EXPECT_TRUE(backend.serve().value());
  std::byte byte{};
  EXPECT_EQ(::recv(backend.socket(), &byte, 1, MSG_PEEK | MSG_DONTWAIT), 1)
      << "all were handled at once";
  EXPECT_TRUE(backend.serve().value());
  EXPECT_EQ(::recv(backend.socket(), &byte, 1, MSG_PEEK | MSG_DONTWAIT), -1);
}

TEST(HostileFrontend, that_is_wrong_all_the_time_does_not_fill_the_log) {
  test::HoldingDisk disk(kDiskBytes);
  test::Served served(disk);
  test::RawFrontend hostile(served.path());
  ASSERT_TRUE(hostile.polite().negotiate().has_value());
  ::testing::internal::CaptureStderr();
  log::set_level(log::Level::kInfo);
  for (int i = 0; i < 300; ++i)
    EXPECT_EQ(hostile.acknowledged(Request::kSetVringEnable,
                                   test::payload_of(VringState{.index = 0, .value = 2})),
              1U);
  log::set_level(log::Level::kOff);
  const std::string lines = ::testing::internal::GetCapturedStderr();
  EXPECT_LE(std::ranges::count(lines, '\n'), log::kPeerLinesMax + 1);
}

TEST(HostileFrontend, takes_no_lines_of_the_log_from_other_devices) {
  log::set_level(log::Level::kOff);
  log::set_thread_subject("a noisy device");
  const auto allowed = [] {
    unsigned count = 0;
    while (count <= log::kPeerLinesMax && log::peer_line_allowed()) ++count;
    return count;
  };
  EXPECT_LE(allowed(), log::kPeerLinesMax);
  EXPECT_FALSE(log::peer_line_allowed());
  log::set_thread_subject("a quiet device");
  EXPECT_EQ(allowed(), log::kPeerLinesMax);
  log::set_thread_subject({});
}

// As many as five frontends may have at once.
TEST(HostileFrontend, with_all_the_memory_regions_that_it_may_have_leaves_room_for_other_devices) {
  constexpr std::size_t kDevices = 5;
  constexpr std::uint64_t kRegionBytes = 4096;
  const UniqueFd memory(::memfd_create("memory", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(memory.get(), kRegionBytes), 0);
  const std::array fds{memory.get()};
  test::HoldingDisk disk(kDiskBytes);
  std::vector<std::unique_ptr<test::Served>> devices;
  std::vector<std::unique_ptr<test::RawFrontend>> frontends;
  for (std::size_t device = 0; device < kDevices; ++device) {
    devices.push_back(std::make_unique<test::Served>(disk));
    frontends.push_back(std::make_unique<test::RawFrontend>(devices.back()->path()));
    ASSERT_TRUE(frontends.back()->polite().negotiate().has_value());
    for (std::uint64_t i = 0; i < virtio::GuestMemory::kMaxRegions; ++i) {
      const SingleMemoryRegion region{.padding = 0,
                                      .region = {.guest_address = i * kRegionBytes,
                                                 .size_bytes = kRegionBytes,
                                                 .user_address = i * kRegionBytes,
                                                 .mmap_offset = 0}};
      ASSERT_EQ(frontends.back()->acknowledged(Request::kAddMemReg, test::payload_of(region), fds),
                0U)
          << "device " << device << ", region " << i;
    }
  }
}

}  // namespace
}  // namespace vblk::vhost_user
