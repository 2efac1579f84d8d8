// Connections under load: stopping, leaving, moving memory away, and starting over.
#include <array>
#include <fstream>
#include <sys/socket.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "tests/vhost_user/block_writes.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using test::BlockWrites;
using test::eventually;
using test::HoldingDisk;
using test::kBlockBytes;
using test::kPatience;
using test::open_fds;
using test::Served;

constexpr std::size_t kBlocks = 64;
constexpr std::size_t kDiskBytes = kBlockBytes * kBlocks;

class Connections : public ::testing::Test {
 protected:
  std::unique_ptr<BlkDriver> connect(std::size_t region_count = 1) {
    return BlkDriver::connect(served->path(), {.queue_size = 64,
                                               .memory_bytes = std::size_t{1} << 20,
                                               .memory_region_count = region_count,
                                               .frontend = {.timeout = kPatience}})
        .value();
  }
  bool has(std::size_t count) {
    return eventually([this, count] { return disk.in_hand() == count; });
  }
  // Lets the disk go on while this thread waits for the server.
  std::thread release_soon() {
    return std::thread([this] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      disk.hold(false);
    });
  }

  HoldingDisk disk{kDiskBytes};
  std::unique_ptr<Served> served = std::make_unique<Served>(disk);
};

TEST_F(Connections, stop_a_ring_after_what_is_in_flight_and_go_on_at_its_base) {
  const auto driver = connect();
  disk.hold(true);
  BlockWrites first(*driver, 20, 1);
  first.submit();
  ASSERT_TRUE(has(20));
  std::thread release = release_soon();
  const auto base = driver->frontend().stop_ring(0);
  release.join();
  ASSERT_TRUE(base.has_value());
  EXPECT_EQ(*base, 20U);
  EXPECT_EQ(disk.in_hand(), 0U) << "it answered before the last request was done";
  EXPECT_EQ(driver->poll(0).value(), 20U);
  EXPECT_TRUE(first.each_done_once());
  ASSERT_TRUE(driver->frontend().start_ring(0, driver->queue(0), *base).has_value());
  BlockWrites second(*driver, 7, 1);
  second.submit();
  for (std::size_t done = 0; done < 7;) done += driver->wait(0, kPatience).value();
  EXPECT_TRUE(second.each_done_once());
  EXPECT_EQ(disk.writes(), 27U) << "lost or repeated";
  first.expect_on(disk);
}

TEST_F(Connections, remove_a_memory_region_only_when_no_request_uses_it) {
  const auto driver = connect(2);
  // The second region holds the data, the first the rings.
  const auto filler = driver->memory().allocate((std::size_t{1} << 20) - (std::size_t{1} << 18), 1);
  ASSERT_FALSE(filler.empty());
  const auto& region = driver->memory().regions()[1];
  const auto end = driver->memory().begin() + (std::size_t{1} << 20);
  while (driver->memory().allocate(kBlockBytes, kBlockBytes).data() < end) {
  }
  disk.hold(true);
  BlockWrites writes(*driver, 16, 1);
  writes.submit();
  ASSERT_TRUE(has(16));
  std::thread release = release_soon();
  ASSERT_TRUE(driver->frontend().remove_region(region).has_value());
  release.join();
  EXPECT_EQ(disk.in_hand(), 0U);
  EXPECT_EQ(driver->poll(0).value(), 16U);
  EXPECT_TRUE(writes.each_done_once());
  writes.expect_on(disk);
  EXPECT_TRUE(served->server().status()->rings[0].running) << "its own memory is still there";
}

TEST_F(Connections, drain_and_flush_when_asked_to_stop_under_load) {
  const auto driver = connect();
  disk.hold(true);
  BlockWrites writes(*driver, 32, 1);
  writes.submit();
  ASSERT_TRUE(has(32));
  std::thread release = release_soon();
  EXPECT_TRUE(served->stop().has_value());
  release.join();
  EXPECT_EQ(disk.in_hand(), 0U);
  EXPECT_EQ(disk.writes(), 32U);
  EXPECT_TRUE(disk.flushed());
  EXPECT_EQ(driver->poll(0).value(), 32U) << "the completions are in the ring";
  EXPECT_NE(::access(served->path().c_str(), F_OK), 0) << "the socket is still there";
}

TEST_F(Connections, finish_the_requests_of_a_frontend_that_vanishes) {
  disk.hold(true);
  const auto driver = connect();
  BlockWrites writes(*driver, 32, 1);
  writes.submit();
  ASSERT_TRUE(has(32));
  ::shutdown(driver->frontend().socket(), SHUT_RDWR);
  disk.hold(false);
  ASSERT_TRUE(has(0));
  writes.expect_on(disk);
  const auto next = connect();
  EXPECT_EQ(next->flush().value(), virtio::kBlkSOk);
}

TEST_F(Connections, leave_no_descriptor_thread_or_mapping_behind) {
  const auto use = [this] {
    const auto driver = connect();
    EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk);
  };
  const auto left = [this] { return eventually([this] { return !served->connected(); }); };
  const auto mappings_of_guests = [] {
    std::ifstream maps("/proc/self/maps");
    std::size_t count = 0;
    for (std::string line; std::getline(maps, line);) count += line.contains("vblk-guest-memory");
    return count;
  };
  use();
  ASSERT_TRUE(left());
  const std::size_t fds = open_fds();
  const std::size_t threads = test::threads();
  for (int i = 0; i < 200; ++i) use();
  ASSERT_TRUE(left());
  EXPECT_EQ(open_fds(), fds);
  EXPECT_LE(test::threads(), threads);
  EXPECT_EQ(mappings_of_guests(), 0U);
}

TEST_F(Connections, survive_a_frontend_that_shrinks_its_memory) {
  {
    const auto driver = connect();
    ASSERT_EQ(::ftruncate(driver->memory().regions()[0].fd, 0), 0);
    // Anything of ours in there would be the end of this process too: only the kick is left.
    const std::uint64_t one = 1;
    ASSERT_EQ(::write(driver->queue(0).kick_fd(), &one, sizeof one),
              static_cast<ssize_t>(sizeof one));
    EXPECT_TRUE(eventually([this] {
      const auto status = served->server().status();
      return status && status->rings.size() > 0 && status->rings[0].broken;
    }));
  }
  const auto next = connect();
  EXPECT_EQ(next->flush().value(), virtio::kBlkSOk);
}

TEST_F(Connections, end_the_server_with_the_frontend_of_an_inherited_socket) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
  HoldingDisk own_disk(kDiskBytes);
  Served own(own_disk, {.socket_fd = ends[0]});
  {
    auto driver = BlkDriver::adopt(UniqueFd(ends[1]), {.frontend = {.timeout = kPatience}}).value();
    BlockWrites writes(*driver, 8, 1);
    writes.submit();
    for (std::size_t done = 0; done < 8;) done += driver->wait(0, kPatience).value();
  }
  EXPECT_TRUE(own.wait().has_value());
  EXPECT_TRUE(own_disk.flushed());
}

}  // namespace
}  // namespace vblk::vhost_user
