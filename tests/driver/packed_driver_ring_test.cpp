// The driver's side of a packed ring, with a device written out by hand on the other. Positions are
// counted from the first descriptor ever.
#include <algorithm>
#include <array>
#include <optional>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/driver_memory.h"
#include "blockdev/driver/driver_queue.h"
#include "blockdev/virtio/little_endian.h"
#include "tests/support/seed.h"

namespace vblk::driver {
namespace {

using namespace virtio;

class HandDevice {
 public:
  struct Taken {
    std::uint16_t id;
    std::size_t length;
  };

  explicit HandDevice(const DriverQueue& queue) : queue_(queue), size_(queue.options().size) {}

  [[nodiscard]] std::byte* descriptor(std::uint64_t number) const {
    return queue_.descriptor_table() + number % size_ * kDescriptorBytes;
  }
  [[nodiscard]] bool wrap(std::uint64_t number) const { return number / size_ % 2 == 0; }
  [[nodiscard]] std::uint16_t event(std::uint64_t number) const {
    return static_cast<std::uint16_t>(number % size_ | (wrap(number) ? 0x8000U : 0U));
  }

  // Chains made available since the last call.
  std::vector<Taken> take() {
    std::vector<Taken> chains;
    std::size_t length = 0;
    while (is_available(next_avail_)) {
      const auto flags = load_le<std::uint16_t>(descriptor(next_avail_) + 14);
      ++length;
      if ((flags & kDescFNext) == 0) {
        chains.push_back({load_le<std::uint16_t>(descriptor(next_avail_) + 12), length});
        length = 0;
      }
      ++next_avail_;
    }
    EXPECT_EQ(length, 0U) << "a chain that is not whole";
    return chains;
  }
  void give_back(std::uint16_t id, std::size_t length, std::uint32_t length_bytes = 0) {
    std::byte* const entry = descriptor(next_used_);
    store_le<std::uint32_t>(entry + 8, length_bytes);
    store_le<std::uint16_t>(entry + 12, id);
    store_release_le<std::uint16_t>(entry + 14, wrap(next_used_) ? 0x8080 : 0);
    next_used_ += length;
  }
  void set_event(std::uint16_t flags, std::uint16_t desc = 0) {
    store_release_le<std::uint32_t>(queue_.used_ring(), std::uint32_t{flags} << 16 | desc);
  }
  [[nodiscard]] std::uint64_t next_avail() const { return next_avail_; }
  [[nodiscard]] std::uint64_t next_used() const { return next_used_; }

 private:
  [[nodiscard]] bool is_available(std::uint64_t number) const {
    const auto flags = load_acquire_le<std::uint16_t>(descriptor(number) + 14);
    return (flags & 0x8080) == (wrap(number) ? 0x0080 : 0x8000);
  }

  const DriverQueue& queue_;
  std::size_t size_;
  std::uint64_t next_avail_{0};
  std::uint64_t next_used_{0};
};

class PackedRing : public ::testing::Test {
 protected:
  void make(std::uint16_t size, bool event_idx = false, bool indirect = false) {
    queue = DriverQueue::create(*memory, {.size = size,
                                          .packed = true,
                                          .event_idx = event_idx,
                                          .indirect = indirect,
                                          .indirect_max = 3})
                .value();
    device.emplace(*queue);
  }
  std::optional<std::uint16_t> add(std::size_t pieces) {
    std::vector<Buffer> chain(pieces, Buffer{DriverMemory::kGuestBase, 16, false});
    chain.back().device_writable = true;
    return queue->add(chain);
  }
  std::unique_ptr<DriverMemory> memory = DriverMemory::create({std::size_t{4} << 20}).value();
  std::unique_ptr<DriverQueue> queue;
  std::optional<HandDevice> device;
};

TEST_F(PackedRing, shows_chains_only_when_published_and_then_all_of_them) {
  make(8);
  for (const std::size_t length : {3U, 1U, 2U}) ASSERT_TRUE(add(length).has_value());
  EXPECT_TRUE(device->take().empty());
  queue->publish();
  const auto taken = device->take();
  ASSERT_EQ(taken.size(), 3U);
  EXPECT_EQ(taken[0].length, 3U);
  EXPECT_EQ(taken[1].length, 1U);
  EXPECT_EQ(taken[2].length, 2U);
}

TEST_F(PackedRing, refuses_a_chain_that_does_not_fit_and_takes_it_later) {
  make(5);
  const auto first = add(3);
  ASSERT_TRUE(first.has_value());
  EXPECT_FALSE(add(3).has_value());
  ASSERT_TRUE(add(2).has_value());
  EXPECT_FALSE(add(1).has_value());
  EXPECT_FALSE(add(6).has_value());
  queue->publish();
  EXPECT_EQ(device->take().size(), 2U);
  device->give_back(*first, 3);
  ASSERT_TRUE(queue->take_used().value().has_value());
  EXPECT_TRUE(add(3).has_value());
}

TEST_F(PackedRing, puts_a_long_chain_into_one_descriptor_where_it_may) {
  make(5, false, true);
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(add(3).has_value());
  EXPECT_FALSE(add(3).has_value());
  queue->publish();
  EXPECT_EQ(device->take().size(), 5U);
  const std::byte* const entry = device->descriptor(0);
  EXPECT_EQ(load_le<std::uint16_t>(entry + 14), 0x0080 | kDescFIndirect);
  ASSERT_EQ(load_le<std::uint32_t>(entry + 8), 3 * kDescriptorBytes);
  const std::byte* const table =
      memory->begin() + (load_le<std::uint64_t>(entry) - DriverMemory::kGuestBase);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(load_le<std::uint16_t>(table + 16 * i + 14), i == 2 ? kDescFWrite : 0)
        << "\"MUST NOT set any flags except DESC_F_WRITE within an indirect descriptor\"";
  }
}

TEST_F(PackedRing, loses_nothing_over_many_laps_of_any_size) {
  std::mt19937_64 random(test::test_seed());
  for (const std::uint16_t size : std::to_array<std::uint16_t>({3, 5, 8, 16, 61, 256})) {
    for (const bool indirect : {false, true}) {
      make(size, true, indirect);
      std::vector<HandDevice::Taken> held;
      std::size_t completed = 0;
      while (completed < 20'000) {
        while (add(1 + random() % 3)) {
        }
        queue->publish();
        for (const auto& taken : device->take()) held.push_back(taken);
        ASSERT_EQ(held.size(), queue->in_flight());
        std::shuffle(held.begin(), held.end(), random);
        for (auto count = 1 + random() % held.size(); count > 0; --count) {
          const auto [id, length] = held.back();
          held.pop_back();
          device->give_back(id, length, 1);
          const std::uint32_t half = device->event(device->next_used());
          ASSERT_EQ(queue->resume_base(), half << 16 | half) << "what is not taken yet counts";
          const auto used = queue->take_used();
          ASSERT_TRUE(used.has_value()) << used.error().message;
          ASSERT_TRUE(used->has_value());
          ASSERT_EQ((*used)->token, id);
          ++completed;
        }
        ASSERT_FALSE(queue->take_used().value().has_value());
      }
    }
  }
}

TEST_F(PackedRing, kicks_with_the_event_index_only_when_its_descriptor_is_passed) {
  for (const std::uint16_t size : std::to_array<std::uint16_t>({3, 4, 7})) {
    make(size, true);
    for (int i = 0; i < 1000; ++i) {
      const bool wanted = i % 3 == 0;
      // The one that comes next, or the one before it.
      device->set_event(2, device->event(device->next_avail() + size * 2U - (wanted ? 0 : 1)));
      const auto id = add(1);
      ASSERT_TRUE(id.has_value());
      const std::uint64_t before = queue->kicks();
      queue->publish();
      ASSERT_EQ(queue->kicks() - before, wanted ? 1U : 0U) << "ring of " << size << ", " << i;
      ASSERT_EQ(device->take().size(), 1U);
      device->give_back(*id, 1);
      ASSERT_TRUE(queue->take_used().value().has_value());
    }
  }
}

TEST_F(PackedRing, kicks_as_the_flags_say) {
  make(4);
  ASSERT_TRUE(add(1).has_value());
  device->set_event(1);
  queue->publish();
  EXPECT_EQ(queue->kicks(), 0U);
  ASSERT_TRUE(add(1).has_value());
  device->set_event(0);
  queue->publish();
  EXPECT_EQ(queue->kicks(), 1U);
  queue->publish();
  EXPECT_EQ(queue->kicks(), 1U) << "nothing new";
}

TEST_F(PackedRing, asks_for_an_interrupt_at_the_next_used_descriptor) {
  make(5, true);
  for (int i = 0; i < 20; ++i) {
    const auto id = add(2);
    queue->publish();
    EXPECT_FALSE(queue->wait(std::chrono::nanoseconds(1)).by_device);
    const std::uint32_t event = load_le<std::uint32_t>(queue->avail_ring());
    EXPECT_EQ(event, 2U << 16 | device->event(device->next_used()));
    static_cast<void>(device->take());
    device->give_back(*id, 2, 16);
    EXPECT_TRUE(queue->wait(std::chrono::seconds(1)).by_device);
    ASSERT_TRUE(queue->take_used().value().has_value());
  }
}

TEST_F(PackedRing, calls_a_buffer_that_is_not_in_flight_a_lie) {
  for (const std::uint16_t id : std::to_array<std::uint16_t>({1, 4, 0xffff})) {
    make(4);
    ASSERT_EQ(add(1), 0U);
    queue->publish();
    device->give_back(id, 1);
    const std::uint32_t base = queue->resume_base();
    EXPECT_EQ(base, kPackedBaseInitial);
    const auto used = queue->take_used();
    ASSERT_FALSE(used.has_value()) << id;
    EXPECT_EQ(used.error().kind, ErrorKind::kCorrupt);
  }
}

TEST_F(PackedRing, calls_a_buffer_returned_twice_a_lie) {
  make(4);
  ASSERT_EQ(add(1), 0U);
  ASSERT_EQ(add(1), 1U);
  queue->publish();
  device->give_back(0, 1);
  ASSERT_TRUE(queue->take_used().has_value());
  device->give_back(0, 1);
  EXPECT_EQ(queue->take_used().error().kind, ErrorKind::kCorrupt);
}

TEST_F(PackedRing, calls_more_bytes_than_there_is_room_for_a_lie) {
  make(4);
  const auto id = add(2);
  ASSERT_TRUE(id.has_value());
  queue->publish();
  device->give_back(*id, 2, 17);
  EXPECT_EQ(queue->take_used().error().kind, ErrorKind::kCorrupt);
}

}  // namespace
}  // namespace vblk::driver
