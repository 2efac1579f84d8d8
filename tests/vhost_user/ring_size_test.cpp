// Rings of the smallest and the largest sizes, of both kinds, and as many queues as there can be:
// every one is filled to the last descriptor, more than once around.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/null_node.h"
#include "blockdev/virtio/blk_wire.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using driver::BlkIo;
using test::HoldingDisk;
using test::kPatience;
using test::Served;

struct Shape {
  std::uint16_t queue_size;
  std::uint16_t queue_count;
  bool packed;
  bool inflight;
  std::string name() const {
    return std::to_string(queue_count) + " of " + std::to_string(queue_size) +
           (packed ? ", packed" : ", split") + (inflight ? ", in-flight area" : "");
  }
};

std::unique_ptr<BlkDriver> drive(const Served& served, const Shape& shape) {
  driver::FrontendOptions frontend{.timeout = kPatience};
  if (shape.packed) frontend.features_mask |= virtio::feature_bit(virtio::kFRingPacked);
  auto driver = BlkDriver::connect(
      served.path(),
      {.queue_count = shape.queue_count,
       .queue_size = shape.queue_size,
       // Rings, indirect tables, heads and statuses: some 90 bytes for each entry.
       .memory_bytes =
           (std::size_t{4} << 20) +
           (std::size_t{128} * shape.queue_size * shape.queue_count + 4095) / 4096 * 4096,
       .packed = shape.packed,
       .inflight = shape.inflight,
       .frontend = frontend});
  EXPECT_TRUE(driver.has_value()) << shape.name() << ": " << driver.error().message;
  return driver ? std::move(*driver) : nullptr;
}

// Every queue full at once, `laps` times; each answer is counted once.
void fill(BlkDriver& driver, const Shape& shape, int laps) {
  std::vector<BlkIo> ios(std::size_t{shape.queue_size} * shape.queue_count);
  std::size_t answered = 0;
  for (int lap = 0; lap < laps; ++lap) {
    for (std::size_t i = 0; i < ios.size(); ++i) {
      ios[i] = {.type = virtio::kBlkTFlush,
                .complete =
                    [](BlkIo& io) {
                      if (io.status == virtio::kBlkSOk) ++*static_cast<std::size_t*>(io.context);
                    },
                .context = &answered};
      ASSERT_TRUE(driver.submit(static_cast<std::uint16_t>(i % shape.queue_count), ios[i]))
          << shape.name() << ": " << i;
    }
    for (std::uint16_t queue = 0; queue < shape.queue_count; ++queue) {
      BlkIo more{.type = virtio::kBlkTFlush};
      ASSERT_FALSE(driver.submit(queue, more)) << shape.name() << ": it is full";
      driver.kick(queue);
    }
    for (std::uint16_t queue = 0; queue < shape.queue_count; ++queue) {
      while (driver.queue(queue).in_flight() > 0)
        ASSERT_TRUE(driver.wait(queue, kPatience).has_value()) << shape.name();
    }
  }
  EXPECT_EQ(answered, ios.size() * static_cast<std::size_t>(laps)) << shape.name();
}

TEST(RingSizes, work_when_full_from_2_to_32768) {
  const auto disk = blockdev::NullNode::create(std::uint64_t{1} << 30, false).value();
  for (const std::uint16_t size : std::to_array<std::uint16_t>({2, 4, 1024, 2048, 32768})) {
    for (const bool packed : {false, true}) {
      for (const bool inflight : {false, true}) {
        const Shape shape{size, 1, packed, inflight};
        Served served(*disk, {.queue_size_max = size});
        const auto driver = drive(served, shape);
        ASSERT_NE(driver, nullptr);
        EXPECT_EQ(driver->config().seg_max,
                  static_cast<std::uint32_t>(std::clamp<int>(size - 2, 1, 1022)));
        // The largest around 65536, where 16-bit indices wrap.
        fill(*driver, shape, size > 1024 ? 3 : 40);
      }
    }
  }
}

TEST(RingSizes, that_are_no_power_of_two_work_on_packed_rings) {
  const auto disk = blockdev::NullNode::create(std::uint64_t{1} << 30, false).value();
  Served served(*disk, {.queue_size_max = 32768});
  for (const std::uint16_t size : std::to_array<std::uint16_t>({1, 3, 32767})) {
    const Shape shape{size, 1, true, true};
    const auto driver = drive(served, shape);
    ASSERT_NE(driver, nullptr);
    fill(*driver, shape, 5);
  }
}

TEST(RingSizes, work_on_64_queues) {
  const auto disk = blockdev::NullNode::create(std::uint64_t{1} << 30, false).value();
  for (const std::uint16_t size : std::to_array<std::uint16_t>({2, 1024})) {
    for (const bool packed : {false, true}) {
      const Shape shape{size, 64, packed, true};
      Served served(*disk, {.queue_count = 64, .io_thread_count = 4, .queue_size_max = 32768});
      const auto driver = drive(served, shape);
      ASSERT_NE(driver, nullptr);
      EXPECT_EQ(driver->config().queue_count, 64U);
      fill(*driver, shape, 2);
    }
  }
}

// A request of as many segments as seg_max says, and one of one more.
TEST(RingSizes, hold_requests_of_seg_max_segments) {
  HoldingDisk disk(std::size_t{1} << 20);
  for (const bool packed : {false, true}) {
    Served served(disk, {.queue_size_max = 32768});
    const Shape shape{32768, 1, packed, false};
    const auto driver = drive(served, shape);
    ASSERT_NE(driver, nullptr);
    const std::uint32_t segments = driver->config().seg_max;
    ASSERT_EQ(segments, 1022U);
    const auto send = [&](std::uint32_t count) {
      driver::DriverMemory& memory = driver->memory();
      const auto head = memory.allocate(virtio::kBlkRequestHeaderBytes, 16);
      std::ranges::fill(head, std::byte{0});
      head[0] = std::byte{virtio::kBlkTOut};
      const auto data = memory.allocate(std::size_t{512} * count, 512);
      for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i / 512 + 1);
      const auto status = memory.allocate(1, 1);
      status[0] = std::byte{0xff};
      std::vector<driver::Buffer> chain{
          {memory.guest_address(head.data()), virtio::kBlkRequestHeaderBytes, false}};
      for (std::uint32_t i = 0; i < count; ++i)
        chain.push_back({memory.guest_address(data.data() + std::size_t{512} * i), 512, false});
      chain.push_back({memory.guest_address(status.data()), 1, true});
      driver::DriverQueue& ring = driver->queue(0);
      EXPECT_TRUE(ring.add(chain).has_value());
      ring.publish();
      EXPECT_TRUE(test::eventually([&ring] { return ring.take_used().value().has_value(); }));
      return std::to_integer<std::uint8_t>(status[0]);
    };
    EXPECT_EQ(send(segments), virtio::kBlkSOk);
    for (std::size_t i = 0; i < segments; ++i)
      ASSERT_EQ(disk.at(512 * i), static_cast<std::byte>(i + 1)) << i;
    // A driver that does not keep to it is told so, and the ring goes on.
    EXPECT_EQ(send(1025), virtio::kBlkSIoErr);
    EXPECT_EQ(send(3000), virtio::kBlkSIoErr);
    EXPECT_EQ(send(1), virtio::kBlkSOk);
  }
}

}  // namespace
}  // namespace vblk::vhost_user
