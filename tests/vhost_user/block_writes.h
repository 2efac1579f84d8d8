// Writes that a test has in flight while something happens to the server.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::test {

inline constexpr std::size_t kBlockBytes = 4096;

// Writes of a block each, one queue after the other in turn; the n-th goes to block n, filled with
// n + 1.
class BlockWrites {
 public:
  BlockWrites(driver::BlkDriver& driver, std::size_t count, std::uint16_t queue_count = 2)
      : driver_(driver), queue_count_(queue_count), slots_(count) {
    for (std::size_t i = 0; i < count; ++i) {
      const auto data = driver.memory().allocate(kBlockBytes, kBlockBytes);
      std::ranges::fill(data, byte_of(i));
      slots_[i].io = {.type = virtio::kBlkTOut,
                      .sector = i * (kBlockBytes / virtio::kSectorBytes),
                      .data = data,
                      .complete =
                          [](driver::BlkIo& io) {
                            auto& slot = *static_cast<Slot*>(io.context);
                            ++(io.status == virtio::kBlkSOk ? slot.done : slot.failed);
                          },
                      .context = &slots_[i]};
    }
  }
  BlockWrites(const BlockWrites&) = delete;
  BlockWrites& operator=(const BlockWrites&) = delete;

  // Puts all of them into the rings; the device sees them when they are kicked.
  void enqueue() {
    for (std::size_t i = 0; i < slots_.size(); ++i)
      EXPECT_TRUE(driver_.submit(static_cast<std::uint16_t>(i % queue_count_), slots_[i].io));
  }
  // The same, kicked. Any number of times, one after the other.
  void submit() {
    enqueue();
    for (std::uint16_t queue = 0; queue < queue_count_; ++queue) driver_.kick(queue);
  }
  // Takes what has been answered already.
  void look() const {
    for (std::uint16_t queue = 0; queue < queue_count_; ++queue)
      ASSERT_TRUE(driver_.poll(queue).has_value());
  }
  // Waits until all have been answered.
  void wait() const {
    for (std::uint16_t queue = 0; queue < queue_count_; ++queue) {
      while (driver_.queue(queue).in_flight() > 0)
        ASSERT_TRUE(driver_.wait(queue, kPatience).has_value());
    }
  }

  // Answers so far: with OK, and with another status.
  [[nodiscard]] std::size_t done() const { return sum(&Slot::done); }
  [[nodiscard]] std::size_t failed() const { return sum(&Slot::failed); }
  [[nodiscard]] bool each_done_once() const {
    return std::ranges::all_of(slots_,
                               [](const Slot& slot) { return slot.done == 1 && slot.failed == 0; });
  }
  // Whether each of them is on the disk.
  void expect_on(HoldingDisk& disk) const {
    for (std::size_t i = 0; i < slots_.size(); ++i)
      EXPECT_EQ(disk.at(i * kBlockBytes + 100), byte_of(i)) << i;
  }

 private:
  struct Slot {
    driver::BlkIo io;
    std::size_t done{0};
    std::size_t failed{0};
  };
  static std::byte byte_of(std::size_t index) { return static_cast<std::byte>(index + 1); }
  [[nodiscard]] std::size_t sum(std::size_t Slot::* count) const {
    std::size_t total = 0;
    for (const Slot& slot : slots_) total += slot.*count;
    return total;
  }

  driver::BlkDriver& driver_;
  const std::uint16_t queue_count_;
  std::vector<Slot> slots_;
};

}  // namespace vblk::test
