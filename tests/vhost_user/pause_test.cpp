// A served device that pauses: what its frontends see, and what becomes of kept requests when rings
// stop, start and change hands. What a queue does by itself is device_gate_test.cpp's.
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <memory>
#include <sys/socket.h>
#include <thread>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/io_limits.h"
#include "blockdev/virtio/blk_wire.h"
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
using test::payload_of;
using test::Served;

class PausedServer : public ::testing::Test {
 protected:
  std::unique_ptr<BlkDriver> drive(bool inflight = false) {
    return BlkDriver::connect(served.path(), {.queue_count = 2,
                                              .queue_size = 64,
                                              .memory_bytes = std::size_t{2} << 20,
                                              .inflight = inflight,
                                              .frontend = {.timeout = kPatience}})
        .value();
  }
  std::size_t kept() {
    std::size_t count = 0;
    if (const auto status = served.server().status()) {
      for (const auto& ring : status->rings) count += ring.kept;
    }
    return count;
  }

  HoldingDisk disk{std::size_t{1} << 20};
  Served served{disk};
};

TEST_F(PausedServer, takes_kept_requests_again_after_a_change_that_stops_its_rings) {
  const auto driver = drive();
  disk.fail(ENOSPC);
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] { return kept() > 0; }));
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(driver->frontend()
                    .command(Request::kSetFeatures, payload_of(driver->frontend().features()))
                    .has_value());
  }
  disk.fail(0);
  writes.wait();
  EXPECT_EQ(writes.done(), 8U) << "none may be lost or failed";
  for (std::size_t i = 0; i < 8; ++i)
    EXPECT_EQ(disk.at(i * kBlockBytes), static_cast<std::byte>(i + 1));
}

TEST_F(PausedServer, answers_kept_requests_with_an_error_when_nobody_comes_after_their_ring) {
  const auto driver = drive();
  disk.fail(ENOSPC);
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] { return kept() > 0; }));
  std::uint16_t taken = 0;
  for (const std::uint16_t queue : {std::uint16_t{0}, std::uint16_t{1}}) {
    const auto next = driver->frontend().stop_ring(queue);
    ASSERT_TRUE(next.has_value());
    taken = static_cast<std::uint16_t>(taken + *next);
    ASSERT_TRUE(driver->poll(queue).has_value());
  }
  EXPECT_GT(taken, 0U);
  EXPECT_EQ(writes.failed(), taken) << "what it took is answered, the rest is still in the rings";
  EXPECT_EQ(writes.done(), 0U);
  EXPECT_FALSE(served.device().gate().is_paused());
  disk.fail(0);
}

TEST_F(PausedServer, leaves_kept_requests_to_the_next_connection) {
  const auto driver = drive(true);
  disk.fail(ENOSPC);
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] { return kept() > 0; }));
  ::shutdown(driver->frontend().socket(), SHUT_RDWR);
  ASSERT_TRUE(driver->reconnect(served.path()).has_value());
  ASSERT_TRUE(eventually([this] { return kept() > 0; })) << "it has failed again";
  disk.fail(0);
  writes.wait();
  EXPECT_EQ(writes.done(), 8U);
}

TEST_F(PausedServer, ends_while_it_keeps_requests) {
  const auto driver = drive();
  disk.fail(ENOSPC);
  BlockWrites writes(*driver, 8);
  writes.submit();
  ASSERT_TRUE(eventually([this] { return kept() > 0; }));
  disk.fail(0);  // for the last flush
  EXPECT_TRUE(served.stop().has_value());
  for (const std::uint16_t queue : {std::uint16_t{0}, std::uint16_t{1}})
    ASSERT_TRUE(driver->poll(queue).has_value());
  EXPECT_GT(writes.failed() + writes.done(), 0U);
}

TEST_F(PausedServer, loses_nothing_to_pauses_and_limits_that_come_and_go_on_another_thread) {
  const auto driver = drive();
  std::atomic<bool> stopping{false};
  std::thread changes([this, &stopping] {
    const std::array limits{
        blockdev::IoLimits{}, blockdev::IoLimits::parse("iops-total=20000", "", {}).value(),
        blockdev::IoLimits::parse("bps-write=100M,iops-write=5000", "", {}).value()};
    for (std::size_t i = 0; !stopping; ++i) {
      served.device().gate().set_limits(limits[i % limits.size()]);
      if (i % 3 == 0) served.device().gate().pause();
      // As a full disk does.
      if (i % 7 == 0) disk.fail(ENOSPC);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      disk.fail(0);
      served.device().gate().resume();
    }
    served.device().gate().set_limits({});
    served.device().gate().resume();
  });
  BlockWrites writes(*driver, 64);
  writes.submit();
  writes.wait();
  for (int round = 1; round < 40; ++round) {
    writes.submit();
    writes.wait();
  }
  EXPECT_EQ(writes.done(), 40U * 64);
  EXPECT_EQ(writes.failed(), 0U);
  stopping = true;
  changes.join();
}

}  // namespace
}  // namespace vblk::vhost_user
