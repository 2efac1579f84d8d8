// Bounce buffers: how many there are, and who gets the next one.
#include "blockdev/bounce_pool.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

namespace vblk::blockdev {
namespace {

struct InLine : BouncePool::Waiter {
  explicit InLine(std::vector<InLine*>& served_in_order) : served(served_in_order) {
    ready = [](BouncePool::Waiter& waiter, std::byte* granted) {
      auto& self = static_cast<InLine&>(waiter);
      self.buffer = granted;
      self.served.push_back(&self);
    };
  }
  std::vector<InLine*>& served;
  std::byte* buffer{nullptr};
};

std::vector<std::byte*> take_all(BouncePool& pool) {
  std::vector<std::byte*> buffers;
  while (std::byte* const buffer = pool.try_acquire()) buffers.push_back(buffer);
  return buffers;
}

TEST(BouncePool, lends_a_fixed_number_of_aligned_buffers_that_do_not_overlap) {
  BouncePool pool;
  auto buffers = take_all(pool);
  ASSERT_EQ(buffers.size(), BouncePool::kBufferCount);
  for (std::byte* const buffer : buffers) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer) % BouncePool::kAlignment, 0U);
    std::memset(buffer, 0x5a, BouncePool::kBufferBytes);
  }
  auto sorted = buffers;
  std::ranges::sort(sorted);
  for (std::size_t i = 1; i < sorted.size(); ++i)
    EXPECT_GE(sorted[i] - sorted[i - 1], static_cast<std::ptrdiff_t>(BouncePool::kBufferBytes));
  for (std::byte* const buffer : buffers) pool.release(buffer);
  EXPECT_EQ(take_all(pool).size(), BouncePool::kBufferCount);
  for (std::byte* const buffer : buffers) pool.release(buffer);
}

TEST(BouncePool, serves_those_in_line_first_come_first_served) {
  BouncePool pool;
  const auto buffers = take_all(pool);
  std::vector<InLine*> served;
  InLine first(served);
  InLine second(served);
  pool.wait(first);
  pool.wait(second);
  EXPECT_TRUE(served.empty()) << "nobody is served inside wait()";
  pool.release(buffers[3]);
  EXPECT_EQ(served, std::vector<InLine*>{&first});
  EXPECT_EQ(first.buffer, buffers[3]);
  EXPECT_EQ(pool.try_acquire(), nullptr) << "nobody overtakes the line";
  pool.release(buffers[5]);
  EXPECT_EQ(served, (std::vector<InLine*>{&first, &second}));
  pool.release(buffers[7]);
  EXPECT_EQ(pool.try_acquire(), buffers[7]) << "with nobody in line a buffer is free again";
  for (std::byte* const buffer : buffers) pool.release(buffer);
}

// A request of several pieces gets in line again from inside `ready`'s I/O.
TEST(BouncePool, lets_the_served_get_in_line_again) {
  BouncePool pool;
  const auto buffers = take_all(pool);
  std::vector<InLine*> served;
  InLine only(served);
  for (int round = 0; round < 3; ++round) {
    pool.wait(only);
    pool.release(round == 0 ? buffers[0] : only.buffer);
  }
  EXPECT_EQ(served.size(), 3U);
  EXPECT_EQ(only.buffer, buffers[0]);
  for (std::byte* const buffer : buffers) pool.release(buffer);
}

}  // namespace
}  // namespace vblk::blockdev
