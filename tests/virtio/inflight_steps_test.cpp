// SIGKILL between any two stores. The device's side of a ring is compiled so that each of its
// stores into shared memory is seen (little_endian.h), and behind each one the test does two
// things:
//
//   - takes a copy of the memory, as a process that was killed here would leave it, and recovers
//     from the copy: what is in flight must be what was popped and is not in the used ring, in the
//     order in which it was popped;
//   - now and then really stops there, and goes on with a new device on the same memory.
//
// A driver that knows nothing of all this checks that each of its buffers comes back exactly once.
// VBLK_TEST_SEED repeats a run.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "blockdev/virtio/guest_memory.h"
#include "blockdev/virtio/inflight_region.h"
#include "blockdev/virtio/little_endian.h"
#include "blockdev/virtio/split_ring.h"
#include "blockdev/virtio/virtqueue.h"
#include "tests/support/seed.h"
#include "tests/virtio/observed_stores.h"

namespace vblk::virtio {

namespace {

using testing::Killed;
using testing::Memory;
using testing::Watching;

constexpr std::uint64_t kGuestBase = 0x10000;
constexpr std::uint64_t kUserBase = 0x7000'0000'0000;
constexpr std::size_t kAlignment = 64;

struct Options {
  std::uint16_t ring_size{8};
  std::uint16_t desc_num{8};  // what the region is for
  std::uint16_t start_index{0};
  int buffers{60};
  unsigned kill_permille{10};        // of the stores
  bool overlooks_last_batch{false};  // canary: the copy says that it is complete
};

class World {
 public:
  World(const Options& options, std::uint64_t seed)
      : options_(options),
        random_(seed),
        ring_(layout_bytes() + kAlignment),
        inflight_(InflightRegion::region_bytes(options.desc_num)),
        copy_(inflight_.size()),
        again_(inflight_.size()) {
    guest_ =
        GuestMemory::create({MemoryRegion::wrap(ring_.data(), kGuestBase, ring_.size(), kUserBase)})
            .value();
    store_le<std::uint16_t>(avail() + kAvailIndexOffset, options_.start_index);
    store_le<std::uint16_t>(used() + kUsedIndexOffset, options_.start_index);
    driver_used_ = options_.start_index;
    owner_.resize(options_.ring_size);
  }

  // Sends all buffers and has all of them back. The first thing that is wrong, or an empty string.
  std::string run() {
    start();
    while (failure_.empty() && returned_ < options_.buffers) {
      driver_step();
      device_step();
    }
    if (failure_.empty() && !in_hand_.empty()) failure_ = "the device has more than it was given";
    return failure_;
  }
  [[nodiscard]] std::uint64_t kills() const { return kills_; }
  [[nodiscard]] std::uint64_t checks() const { return checks_; }

 private:
  // ---- The memory: one page of nothing to point at, descriptors, avail ring, used ring.
  [[nodiscard]] std::size_t avail_offset() const {
    return kAlignment + descriptor_table_bytes(options_.ring_size);
  }
  [[nodiscard]] std::size_t used_offset() const {
    return (avail_offset() + avail_ring_bytes(options_.ring_size) + 3) & ~std::size_t{3};
  }
  [[nodiscard]] std::size_t layout_bytes() const {
    return used_offset() + used_ring_bytes(options_.ring_size);
  }
  [[nodiscard]] std::byte* descriptors() { return ring_.data() + kAlignment; }
  [[nodiscard]] std::byte* avail() { return ring_.data() + avail_offset(); }
  [[nodiscard]] std::byte* used() { return ring_.data() + used_offset(); }
  [[nodiscard]] std::uint16_t used_index() {
    return load_le<std::uint16_t>(used() + kUsedIndexOffset);
  }

  // ---- The driver. Buffer number n is the n-th made available.
  void driver_step() {
    take_used();
    for (auto wanted = random_() % 3; wanted > 0; --wanted) {
      if (std::cmp_greater_equal(sent_.size(), options_.buffers)) return;
      std::vector<std::uint16_t> free;
      for (std::uint16_t head = 0; head < options_.ring_size; ++head) {
        if (!owner_[head]) free.push_back(head);
      }
      if (free.empty()) return;
      make_available(free[random_() % free.size()]);
    }
  }
  void make_available(std::uint16_t head) {
    std::byte* const descriptor = descriptors() + head * kDescriptorBytes;
    store_le<std::uint64_t>(descriptor, kGuestBase);
    store_le<std::uint32_t>(descriptor + 8, 1);
    store_le<std::uint16_t>(descriptor + 12, kDescFWrite);
    const auto index = static_cast<std::uint16_t>(options_.start_index + sent_.size());
    store_le<std::uint16_t>(
        avail() + kAvailRingOffset + std::size_t{2} * (index & (options_.ring_size - 1U)), head);
    store_le<std::uint16_t>(avail() + kAvailIndexOffset, static_cast<std::uint16_t>(index + 1));
    owner_[head] = sent_.size();
    sent_.push_back(head);
  }
  void take_used() {
    for (; driver_used_ != used_index(); ++driver_used_) {
      const std::byte* const element =
          used() + kUsedRingOffset + (driver_used_ & (options_.ring_size - 1U)) * kUsedElementBytes;
      const auto head = load_le<std::uint32_t>(element);
      if (head >= options_.ring_size || !owner_[head]) {
        fail(fmt::format("buffer {} comes back and was not sent, or twice", head));
        return;
      }
      owner_[head].reset();
      ++returned_;
    }
  }

  // ---- The device, which may be killed in every call.
  void start() {
    for (;;) {
      try {
        InflightRegion region(inflight_.data(), options_.desc_num);
        InflightRecovery recovery;
        {
          const Watching watching([this] { stored(); });
          auto recovered = region.recover(used_index(), options_.ring_size);
          if (!recovered) return fail(recovered.error().message);
          recovery = std::move(*recovered);
        }
        go_on(region, recovery);
        return;
      } catch (const Killed&) {
        ++kills_;
      }
    }
  }
  void go_on(const InflightRegion& region, const InflightRecovery& recovery) {
    check_recovery(recovery, "a new device");
    is_popping_ = false;
    in_hand_.clear();
    for (const std::uint16_t head : recovery.heads) {
      if (!owner_[head]) return fail("a buffer that the driver does not miss is in flight");
      in_hand_.push_back(*owner_[head]);
    }
    pushed_.resize(published());
    popped_ = pushed_.size() + in_hand_.size();
    queue_.emplace(Virtqueue::Layout{.descriptor_table = descriptors(),
                                     .avail_ring = avail(),
                                     .used_ring = used(),
                                     .size = options_.ring_size,
                                     .next_avail = recovery.is_fresh ? options_.start_index
                                                                     : recovery.next_avail,
                                     .event_idx = false,
                                     .indirect = false,
                                     .inflight = region},
                   *guest_);
    for (const std::uint16_t head : recovery.heads) {
      Chain chain;
      if (queue_->take_again(head, room_, chain) != Virtqueue::Pop::kChain || chain.head != head)
        return fail("a buffer cannot be taken again");
    }
  }
  void device_step() {
    try {
      const Watching watching([this] { stored(); });
      for (auto wanted = random_() % 4; wanted > 0 && queue_->peek_head(); --wanted) {
        is_popping_ = true;
        in_hand_.push_back(popped_++);
        Chain chain;
        if (queue_->pop(room_, chain) != Virtqueue::Pop::kChain) return fail("the ring is broken");
        if (chain.head != sent_[in_hand_.back()]) return fail("another buffer is popped");
        is_popping_ = false;
      }
      for (auto wanted = random_() % 4; wanted > 0 && !in_hand_.empty(); --wanted) {
        const auto which = random_() % in_hand_.size();
        const std::size_t number = in_hand_[which];
        in_hand_.erase(in_hand_.begin() + static_cast<std::ptrdiff_t>(which));
        pushed_.push_back(number);
        queue_->push_used(sent_[number], 1);
      }
      if (random_() % 2 == 0 && queue_->has_unpublished()) static_cast<void>(queue_->publish());
    } catch (const Killed&) {
      ++kills_;
      queue_.reset();
      start();
    }
  }

  // ---- What must be true behind every store.
  [[nodiscard]] std::size_t published() {
    return static_cast<std::uint16_t>(used_index() - options_.start_index);
  }
  void stored() {
    const Watching nothing;
    ++checks_;
    std::copy_n(inflight_.data(), inflight_.size(), copy_.data());
    if (options_.overlooks_last_batch)
      store_le<std::uint16_t>(copy_.data() + kInflightUsedIndexOffset, used_index());
    if (random_() % 32 == 0) {
      // Killed once more, at each store of the recovery.
      const Watching watching([this] {
        const Watching nothing_more;
        std::copy_n(copy_.data(), copy_.size(), again_.data());
        recover_from(again_, "killed in a recovery");
      });
      recover_from(copy_, "killed");
    } else {
      recover_from(copy_, "killed");
    }
    if (random_() % 1000 < options_.kill_permille) throw Killed{};
  }
  void recover_from(Memory& memory, const char* when) {
    InflightRegion region(memory.data(), options_.desc_num);
    const auto recovery = region.recover(used_index(), options_.ring_size);
    if (!recovery) return fail(fmt::format("{}: {}", when, recovery.error().message));
    check_recovery(*recovery, when);
  }
  // What is in flight: the buffers popped and not published, in the order in which they were
  // popped. The one that is being popped may be among them or not.
  void check_recovery(const InflightRecovery& recovery, const char* when) {
    if (recovery.is_fresh) {
      if (popped_ > 0) fail(fmt::format("{}: a used region is taken for a fresh one", when));
      return;
    }
    const std::size_t done = published();
    if (done > pushed_.size()) return fail(fmt::format("{}: too much is published", when));
    if (recovery.next_avail !=
        static_cast<std::uint16_t>(options_.start_index + done + recovery.heads.size()))
      fail(fmt::format("{}: the avail ring goes on elsewhere", when));
    std::vector<std::size_t> expected = in_hand_;
    expected.insert(expected.end(), pushed_.begin() + static_cast<std::ptrdiff_t>(done),
                    pushed_.end());
    std::ranges::sort(expected);
    const auto is_expected = [&] {
      return std::ranges::equal(recovery.heads, expected, {}, {},
                                [this](std::size_t number) { return sent_[number]; });
    };
    if (is_expected()) return;
    if (is_popping_ && !expected.empty()) {
      expected.pop_back();
      if (is_expected()) return;
    }
    fail(fmt::format("{}: {} buffers are in flight and {} are found, or in another order", when,
                     expected.size(), recovery.heads.size()));
  }
  void fail(std::string why) {
    if (failure_.empty()) failure_ = std::move(why);
  }

  const Options options_;
  std::mt19937_64 random_;
  Memory ring_;
  Memory inflight_;
  Memory copy_;
  Memory again_;
  std::shared_ptr<const GuestMemory> guest_;
  std::optional<Virtqueue> queue_;
  std::array<iovec, 16> room_{};

  std::vector<std::uint16_t> sent_;                // head by buffer number
  std::vector<std::optional<std::size_t>> owner_;  // by head: the buffer that the device has
  std::uint16_t driver_used_{0};
  int returned_{0};
  std::vector<std::size_t> in_hand_;  // buffers popped and not pushed
  std::vector<std::size_t> pushed_;   // in the order of the used ring
  std::size_t popped_{0};
  bool is_popping_{false};
  std::uint64_t kills_{0};
  std::uint64_t checks_{0};
  std::string failure_;
};

Options random_options(std::mt19937_64& random) {
  const auto bits = random() % 5;
  Options options;
  options.ring_size = static_cast<std::uint16_t>(1U << bits);
  // A driver may use less of a queue than the frontend has announced.
  options.desc_num = static_cast<std::uint16_t>(options.ring_size << random() % 2);
  options.start_index = static_cast<std::uint16_t>(random());
  options.buffers = static_cast<int>(10 + random() % 60);
  options.kill_permille = static_cast<unsigned>(random() % 40);
  return options;
}

TEST(InflightSteps, a_kill_behind_any_store_loses_nothing_and_repeats_nothing_in_the_used_ring) {
  std::mt19937_64 seeds(test::test_seed());
  constexpr int kRuns = 2000;
  std::uint64_t kills = 0;
  std::uint64_t checks = 0;
  for (int i = 0; i < kRuns; ++i) {
    const Options options = random_options(seeds);
    World world(options, seeds());
    const std::string failure = world.run();
    kills += world.kills();
    checks += world.checks();
    ASSERT_EQ(failure, "") << "run " << i << ", ring of " << options.ring_size << ", region of "
                           << options.desc_num << ", from " << options.start_index;
  }
  std::cout << checks << " stores looked behind, " << kills << " kills in " << kRuns << " runs\n";
  EXPECT_GT(kills, std::uint64_t{kRuns});
}

TEST(InflightSteps, a_recovery_that_overlooks_the_last_batch_is_found) {
  int found = 0;
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    World world({.kill_permille = 0, .overlooks_last_batch = true}, seed);
    found += world.run().empty() ? 0 : 1;
  }
  EXPECT_EQ(found, 10);
}

}  // namespace
}  // namespace vblk::virtio
