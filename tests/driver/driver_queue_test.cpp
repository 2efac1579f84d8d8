// The driver's side of a ring, with a device written out by hand on the other.
#include "blockdev/driver/driver_queue.h"

#include <algorithm>
#include <array>
#include <optional>
#include <poll.h>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/driver_memory.h"
#include "blockdev/virtio/little_endian.h"
#include "blockdev/virtio/split_ring.h"
#include "tests/support/seed.h"

namespace vblk::driver {
namespace {

using namespace virtio;

// Does what a device does, and what none should.
class HandDevice {
 public:
  explicit HandDevice(const DriverQueue& queue) : queue_(queue), size_(queue.options().size) {}

  // Heads made available since the last call.
  std::vector<std::uint16_t> take() {
    std::vector<std::uint16_t> heads;
    const auto end = load_acquire_le<std::uint16_t>(queue_.avail_ring() + kAvailIndexOffset);
    for (; next_avail_ != end; ++next_avail_) {
      heads.push_back(load_le<std::uint16_t>(queue_.avail_ring() + kAvailRingOffset +
                                             2 * (next_avail_ % size_)));
    }
    return heads;
  }
  void give_back(std::uint32_t id, std::uint32_t length_bytes = 0) {
    std::byte* const element =
        queue_.used_ring() + kUsedRingOffset + (used_index_ % size_) * kUsedElementBytes;
    store_le(element, id);
    store_le(element + 4, length_bytes);
    set_used_index(static_cast<std::uint16_t>(used_index_ + 1));
  }
  void set_used_index(std::uint16_t index) {
    used_index_ = index;
    store_release_le(queue_.used_ring() + kUsedIndexOffset, index);
  }
  void want_kick_at(std::uint16_t index) {
    store_release_le(queue_.used_ring() + used_avail_event_offset(size_), index);
  }
  void want_no_kick() { store_release_le(queue_.used_ring() + kUsedFlagsOffset, kUsedFNoNotify); }

 private:
  const DriverQueue& queue_;
  std::size_t size_;
  std::uint16_t next_avail_{0};
  std::uint16_t used_index_{0};
};

class Ring : public ::testing::Test {
 protected:
  void make(const DriverQueueOptions& options) {
    queue = DriverQueue::create(*memory, options).value();
    device.emplace(*queue);
  }
  std::optional<std::uint16_t> add(std::size_t pieces) {
    std::vector<Buffer> chain(pieces, Buffer{DriverMemory::kGuestBase, 16, false});
    chain.back().device_writable = true;
    return queue->add(chain);
  }
  std::unique_ptr<DriverMemory> memory = DriverMemory::create({std::size_t{1} << 20}).value();
  std::unique_ptr<DriverQueue> queue;
  std::optional<HandDevice> device;
};

TEST_F(Ring, links_a_chain_and_shows_it_only_when_published) {
  make({.size = 8});
  const auto head = add(3);
  ASSERT_TRUE(head.has_value());
  EXPECT_TRUE(device->take().empty());
  queue->publish();
  EXPECT_EQ(device->take(), std::vector{*head});
  std::size_t index = *head;
  for (int i = 0; i < 3; ++i) {
    const std::byte* const entry = queue->descriptor_table() + index * kDescriptorBytes;
    EXPECT_EQ(load_le<std::uint16_t>(entry + 12), i < 2 ? kDescFNext : kDescFWrite);
    index = load_le<std::uint16_t>(entry + 14);
  }
}

TEST_F(Ring, refuses_a_chain_that_does_not_fit_and_takes_it_later) {
  make({.size = 4});
  const auto head = add(3);
  ASSERT_TRUE(head.has_value());
  EXPECT_FALSE(add(2).has_value());
  ASSERT_TRUE(add(1).has_value());
  EXPECT_FALSE(add(1).has_value());
  queue->publish();
  device->give_back(*head);
  ASSERT_TRUE(queue->take_used().value().has_value());
  EXPECT_TRUE(add(3).has_value());
}

TEST_F(Ring, puts_a_long_chain_into_one_descriptor_where_it_may) {
  make({.size = 4, .indirect = true, .indirect_max = 3});
  for (int i = 0; i < 4; ++i) {
    const auto head = add(3);
    ASSERT_TRUE(head.has_value());
    const std::byte* const entry = queue->descriptor_table() + *head * kDescriptorBytes;
    EXPECT_EQ(load_le<std::uint16_t>(entry + 12), kDescFIndirect);
    EXPECT_EQ(load_le<std::uint32_t>(entry + 8), 3 * kDescriptorBytes);
  }
  EXPECT_FALSE(add(3).has_value());
}

TEST_F(Ring, loses_nothing_over_three_wraps_of_its_indices) {
  for (const bool event_idx : {false, true}) {
    for (const bool indirect : {false, true}) {
      make({.size = 16, .event_idx = event_idx, .indirect = indirect, .indirect_max = 3});
      std::mt19937_64 random(test::test_seed());
      std::vector<std::uint16_t> held;
      std::size_t completed = 0;
      while (completed < 3 * 65536) {
        while (add(1 + random() % 3)) {
        }
        queue->publish();
        for (const std::uint16_t head : device->take()) held.push_back(head);
        ASSERT_EQ(held.size(), queue->in_flight());
        std::shuffle(held.begin(), held.end(), random);
        const std::size_t count = 1 + random() % held.size();
        for (std::size_t i = 0; i < count; ++i) {
          const auto head = held.back();
          held.pop_back();
          device->give_back(head, 1);
          const auto used = queue->take_used();
          ASSERT_TRUE(used.has_value()) << used.error().message;
          ASSERT_TRUE(used->has_value());
          ASSERT_EQ((*used)->token, head);
          ++completed;
        }
      }
    }
  }
}

TEST_F(Ring, kicks_with_the_event_index_only_when_it_is_passed_also_over_the_wrap) {
  make({.size = 4, .event_idx = true});
  for (std::uint32_t i = 0; i < 70'000; ++i) {
    const auto current = static_cast<std::uint16_t>(i);
    const bool wanted = i % 3 == 0;
    device->want_kick_at(wanted ? current : static_cast<std::uint16_t>(current - 1));
    const auto head = add(1);
    ASSERT_TRUE(head.has_value());
    const std::uint64_t before = queue->kicks();
    queue->publish();
    ASSERT_EQ(queue->kicks() - before, wanted ? 1U : 0U) << "index " << i;
    device->give_back(*head);
    ASSERT_TRUE(queue->take_used().value().has_value());
  }
}

TEST_F(Ring, does_not_kick_a_device_that_polls) {
  make({.size = 4});
  ASSERT_TRUE(add(1).has_value());
  device->want_no_kick();
  queue->publish();
  EXPECT_EQ(queue->kicks(), 0U);
}

TEST_F(Ring, calls_a_buffer_that_is_not_in_flight_a_lie) {
  for (const std::uint32_t id : {1U, 4U, 0xffffffffU}) {
    make({.size = 4});
    ASSERT_EQ(add(1), 0U);
    queue->publish();
    device->give_back(id);
    const auto used = queue->take_used();
    ASSERT_FALSE(used.has_value()) << id;
    EXPECT_EQ(used.error().kind, ErrorKind::kCorrupt);
  }
}

TEST_F(Ring, calls_a_buffer_returned_twice_a_lie) {
  make({.size = 4});
  ASSERT_EQ(add(1), 0U);
  ASSERT_EQ(add(1), 1U);
  queue->publish();
  device->give_back(0);
  ASSERT_TRUE(queue->take_used().has_value());
  device->give_back(0);
  EXPECT_EQ(queue->take_used().error().kind, ErrorKind::kCorrupt);
}

TEST_F(Ring, calls_more_bytes_than_there_is_room_for_a_lie) {
  make({.size = 4});
  const auto head = add(2);
  ASSERT_TRUE(head.has_value());
  queue->publish();
  device->give_back(*head, 17);
  EXPECT_EQ(queue->take_used().error().kind, ErrorKind::kCorrupt);
}

TEST_F(Ring, calls_more_buffers_than_are_in_flight_a_lie) {
  make({.size = 4});
  ASSERT_TRUE(add(1).has_value());
  queue->publish();
  device->set_used_index(2);
  EXPECT_EQ(queue->take_used().error().kind, ErrorKind::kCorrupt);
}

TEST_F(Ring, ends_its_wait_for_a_device_that_never_answers) {
  make({.size = 4});
  EXPECT_FALSE(queue->wait(std::chrono::milliseconds(10)).by_device);
}

TEST_F(Ring, says_so_when_there_is_no_memory_for_it) {
  const auto too_large =
      DriverQueue::create(*memory, {.size = 32768, .indirect = true, .indirect_max = 3});
  ASSERT_FALSE(too_large.has_value());
  EXPECT_EQ(too_large.error().kind, ErrorKind::kExhausted);
}

TEST(Memory, aligns_and_ends) {
  const auto memory = DriverMemory::create({4096, 8192}).value();
  ASSERT_EQ(memory->allocate(1, 1).size(), 1U);
  const auto aligned = memory->allocate(4096, 4096);
  EXPECT_EQ(memory->guest_address(aligned.data()), DriverMemory::kGuestBase + 4096);
  EXPECT_TRUE(memory->allocate(4097, 1).empty());
  EXPECT_EQ(memory->allocate(4096, 1).size(), 4096U);
  EXPECT_TRUE(memory->allocate(1, 1).empty());
}

}  // namespace
}  // namespace vblk::driver
