// The cache of table slices, and the epochs that requests live in: by themselves.
#include "blockdev/qcow2/table_cache.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <span>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/qcow2/format.h"
#include "blockdev/qcow2/request_epochs.h"

namespace vblk::qcow2 {
namespace {

constexpr std::size_t kSliceBytes = 512;
constexpr std::size_t kWords = kSliceBytes / 8;

// A cache of one set, whose slices hold their own index in every word.
class Qcow2TableCache : public ::testing::Test {
 protected:
  TableCache::Slot* load(std::uint64_t index) {
    TableCache::Slot* const slot = cache.claim(index, index * kSliceBytes);
    if (slot == nullptr) return nullptr;
    std::array<std::byte, kSliceBytes> bytes;
    for (std::size_t i = 0; i < kWords; ++i) store_be(bytes.data() + i * 8, index);
    cache.loaded(*slot, bytes);
    return slot;
  }
  void change(TableCache::Slot& slot, std::size_t word, std::uint64_t value, std::uint64_t number,
              const WriteOrder& order = {}) {
    cache.begin_change(slot);
    cache.set_word(slot, word, value);
    cache.end_change(slot);
    cache.mark_dirty(slot, number, order);
  }
  bool read(std::uint64_t index, std::uint64_t& value) const {
    return cache.read(index, 3, std::span(&value, 1));
  }

  TableCache cache{kSliceBytes, TableCache::kWays* kSliceBytes, ~std::uint64_t{0}};
};

TEST_F(Qcow2TableCache, takes_no_more_room_than_asked_for_or_needed) {
  EXPECT_EQ(cache.slot_count(), TableCache::kWays);
  EXPECT_EQ(TableCache(kSliceBytes, 1, 1000).slot_count(), TableCache::kWays);
  EXPECT_EQ(TableCache(kSliceBytes, 1 << 20, 1000).slot_count(), 1000U);
  EXPECT_EQ(TableCache(kSliceBytes, 1 << 20, ~std::uint64_t{0}).slot_count(), 2048U);
}

TEST_F(Qcow2TableCache, reads_what_was_loaded_and_nothing_else) {
  std::uint64_t value = 0;
  EXPECT_FALSE(read(5, value));
  TableCache::Slot* const slot = cache.claim(5, 4096);
  ASSERT_NE(slot, nullptr);
  EXPECT_FALSE(read(5, value)) << "it is loading";
  EXPECT_EQ(cache.find(5), slot);
  EXPECT_TRUE(cache.is_any_in_flight(5));
  cache.load_failed(*slot);
  EXPECT_EQ(cache.find(5), nullptr);
  ASSERT_NE(load(5), nullptr);
  EXPECT_TRUE(read(5, value));
  EXPECT_EQ(value, 5U);
  EXPECT_FALSE(read(6, value));
}

TEST_F(Qcow2TableCache, lets_clean_slices_leave_and_keeps_those_in_use) {
  for (std::uint64_t i = 0; i < TableCache::kWays; ++i) ASSERT_NE(load(i), nullptr);
  std::uint64_t value = 0;
  ASSERT_NE(load(100), nullptr);  // everything was used: this takes the marks away
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(read(100, value)) << "what is used again and again stays";
    ASSERT_NE(load(200 + static_cast<std::uint64_t>(round)), nullptr);
  }
  EXPECT_TRUE(read(100, value));
}

TEST_F(Qcow2TableCache, never_drops_what_is_dirty_or_on_its_way) {
  for (std::uint64_t i = 0; i < TableCache::kWays; ++i) change(*load(i), 0, 77, i + 1);
  EXPECT_EQ(cache.claim(50, 0), nullptr);
  EXPECT_FALSE(cache.is_any_in_flight(50));
  std::array<std::byte, kSliceBytes> copy;
  TableCache::Slot& oldest = cache.start_writing(copy);
  EXPECT_EQ(oldest.index, 0U) << "the one that has been dirty for longest";
  EXPECT_EQ(load_be<std::uint64_t>(copy.data()), 77U);
  EXPECT_EQ(load_be<std::uint64_t>(copy.data() + 8), 0U);
  EXPECT_EQ(cache.claim(50, 0), nullptr);
  EXPECT_TRUE(cache.is_any_in_flight(50));
  cache.written(oldest);
  EXPECT_EQ(cache.claim(50, 0), &oldest);
}

TEST_F(Qcow2TableCache, keeps_what_changed_while_it_was_written) {
  TableCache::Slot& slot = *load(1);
  change(slot, 0, 10, 1);
  std::array<std::byte, kSliceBytes> copy;
  cache.start_writing(copy);
  EXPECT_FALSE(cache.has_dirty());
  change(slot, 0, 11, 2);
  cache.written(slot);
  EXPECT_TRUE(cache.has_dirty_before(2));
  EXPECT_FALSE(cache.has_dirty_before(1));
  EXPECT_EQ(load_be<std::uint64_t>(copy.data()), 10U);
  cache.start_writing(copy);
  EXPECT_EQ(load_be<std::uint64_t>(copy.data()), 11U);
}

TEST_F(Qcow2TableCache, has_a_failed_write_be_as_old_and_wait_for_as_much_as_before) {
  TableCache::Slot& first = *load(1);
  TableCache::Slot& second = *load(2);
  change(first, 0, 1, 1, {.refcount_change = 5, .barrier = 0});
  change(second, 0, 1, 2);
  std::array<std::byte, kSliceBytes> copy;
  cache.start_writing(copy);
  change(first, 0, 2, 3, {.refcount_change = 0, .barrier = 4});
  cache.write_failed(first, 1, {.refcount_change = 5, .barrier = 0});
  EXPECT_EQ(&cache.first_dirty(), &first);
  EXPECT_EQ(first.dirty_since, 1U);
  EXPECT_EQ(first.order.refcount_change, 5U);
  EXPECT_EQ(first.order.barrier, 4U);
  EXPECT_EQ(&cache.start_writing(copy), &first);
  EXPECT_EQ(&cache.start_writing(copy), &second);
  EXPECT_FALSE(cache.has_dirty()) << "once, though it was dirty twice";
}

TEST_F(Qcow2TableCache, never_shows_a_reader_half_a_change) {
  TableCache::Slot& slot = *load(1);
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    for (std::uint64_t value = 2; !stop.load(); ++value) {
      cache.begin_change(slot);
      for (std::size_t i = 0; i < 8; ++i) cache.set_word(slot, i, value);
      cache.end_change(slot);
    }
  });
  int seen = 0;
  std::uint64_t last = 0;
  while (seen < 20000) {
    std::array<std::uint64_t, 8> words;
    if (!cache.read(1, 0, words)) continue;
    ++seen;
    for (const std::uint64_t word : words) EXPECT_EQ(word, words[0]);
    EXPECT_GE(words[0], last);
    last = words[0];
    if (HasFailure()) break;
  }
  stop.store(true);
  writer.join();
}

TEST(Qcow2RequestEpochs, let_nobody_reuse_what_a_request_may_still_see) {
  RequestEpochs epochs;
  RequestEpochs::Participant one;
  RequestEpochs::Participant other;
  epochs.join(one);
  epochs.join(other);
  const unsigned before = epochs.enter(one);
  const std::uint64_t freed = epochs.current();
  epochs.advance();
  epochs.advance();
  EXPECT_FALSE(epochs.is_over(freed)) << "a request from before is in flight";
  // Those that come later do not matter for it.
  const unsigned after = epochs.enter(other);
  RequestEpochs::leave(one, before);
  epochs.advance();
  EXPECT_TRUE(epochs.is_over(freed));
  const std::uint64_t freed_later = epochs.current();
  epochs.advance();
  EXPECT_FALSE(epochs.is_over(freed_later));
  RequestEpochs::leave(other, after);
  epochs.advance();
  epochs.advance();
  EXPECT_TRUE(epochs.is_over(freed_later));
}

TEST(Qcow2RequestEpochs, are_over_at_once_where_nobody_is_in_flight) {
  RequestEpochs epochs;
  RequestEpochs::Participant one;
  epochs.join(one);
  const std::uint64_t freed = epochs.current();
  EXPECT_FALSE(epochs.is_over(freed));
  epochs.advance();
  EXPECT_TRUE(epochs.is_over(freed));
}

TEST(Qcow2RequestEpochs, do_not_wait_for_a_thread_that_has_left_for_good) {
  RequestEpochs epochs;
  RequestEpochs::Participant one;
  epochs.join(one);
  static_cast<void>(epochs.enter(one));
  const std::uint64_t freed = epochs.current();
  epochs.leave_for_good(one);
  epochs.advance();
  EXPECT_TRUE(epochs.is_over(freed));
}

}  // namespace
}  // namespace vblk::qcow2
