// SIGKILL between any two stores, on packed rings: what inflight_steps_test.cpp is for split ones.
// Behind each store of the device's side the test recovers from copies of the ring and of the
// in-flight region, and now and then really stops there and goes on with a new device.
//
// The driver counts descriptors from the first one ever and knows nothing of recovery; it checks
// that each of its buffers comes back exactly once. VBLK_TEST_SEED repeats a run.
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
#include "blockdev/virtio/little_endian.h"
#include "blockdev/virtio/packed_inflight_region.h"
#include "blockdev/virtio/packed_virtqueue.h"
#include "tests/support/seed.h"
#include "tests/virtio/observed_stores.h"

namespace vblk::virtio {

namespace {

using testing::Killed;
using testing::Memory;
using testing::Watching;

constexpr std::uint64_t kGuestBase = 0x10000;
constexpr std::uint64_t kUserBase = 0x7000'0000'0000;
// Addresses in descriptors: nobody looks at the memory, but each says which buffer it belongs to.
constexpr std::uint64_t kBufferBase = 0x1000'0000;
constexpr std::size_t kChainMax = 4;

struct Options {
  std::uint16_t ring_size{8};
  std::uint16_t desc_num{8};  // what the region is for
  std::uint64_t start{0};     // descriptors used before
  int buffers{60};
  unsigned kill_permille{10};        // of the stores
  bool overlooks_last_batch{false};  // canary: the copy says that it is complete
};

class World {
 public:
  World(const Options& options, std::uint64_t seed)
      : options_(options),
        random_(seed),
        ring_(ring_bytes()),
        inflight_(PackedInflightRegion::region_bytes(options.desc_num)),
        next_avail_(options.start),
        next_used_(options.start),
        owner_(options.ring_size) {
    guest_ =
        GuestMemory::create({MemoryRegion::wrap(ring_.data(), kGuestBase, ring_.size(), kUserBase)})
            .value();
    for (std::uint64_t number = options.start; number < options.start + options.ring_size; ++number)
      if (number >= options.ring_size)
        store_le<std::uint16_t>(flags_at(ring_, number), used_flags(number - options.ring_size));
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
  // Kills that left used descriptors behind one that is not used.
  [[nodiscard]] std::uint64_t stale_flags_seen() const { return stale_flags_seen_; }

 private:
  struct Buffer {
    std::uint16_t id;
    std::size_t length;
    std::uint64_t first;  // descriptor
  };

  // ---- The memory: descriptors, then both event suppression structures.
  [[nodiscard]] std::size_t ring_bytes() const {
    return options_.ring_size * kDescriptorBytes + 2 * kPackedEventBytes;
  }
  [[nodiscard]] std::byte* at(Memory& ring, std::uint64_t number) const {
    return ring.data() + number % options_.ring_size * kDescriptorBytes;
  }
  [[nodiscard]] std::byte* flags_at(Memory& ring, std::uint64_t number) const {
    return at(ring, number) + 14;
  }
  [[nodiscard]] bool wrap_of(std::uint64_t number) const {
    return number / options_.ring_size % 2 == 0;
  }
  [[nodiscard]] std::uint16_t used_flags(std::uint64_t number) const {
    return wrap_of(number) ? 0x8080 : 0;
  }
  [[nodiscard]] bool is_used(Memory& ring, std::uint64_t number) const {
    return (load_le<std::uint16_t>(flags_at(ring, number)) & 0x8080) == used_flags(number);
  }
  [[nodiscard]] PackedPosition position_of(std::uint64_t number) const {
    return {static_cast<std::uint16_t>(number % options_.ring_size), wrap_of(number)};
  }

  // ---- The driver. Buffer number n is the n-th made available.
  void driver_step() {
    take_used();
    for (auto wanted = random_() % 3; wanted > 0; --wanted) {
      if (std::cmp_greater_equal(sent_.size(), options_.buffers)) return;
      std::vector<std::uint16_t> free;
      for (std::uint16_t id = 0; id < options_.ring_size; ++id) {
        if (!owner_[id]) free.push_back(id);
      }
      const std::size_t length = 1 + random_() % kChainMax;
      const std::size_t room = options_.ring_size - (next_avail_ - next_used_);
      if (free.empty() || room < length) return;
      make_available(free[random_() % free.size()], length);
    }
  }
  void make_available(std::uint16_t id, std::size_t length) {
    const Buffer buffer{.id = id, .length = length, .first = next_avail_};
    for (std::size_t i = length; i > 0; --i) {  // the first is made available last
      const std::uint64_t number = buffer.first + i - 1;
      std::byte* const descriptor = at(ring_, number);
      store_le<std::uint64_t>(descriptor, address_of(sent_.size(), i - 1));
      store_le<std::uint32_t>(descriptor + 8, 1);
      store_le<std::uint16_t>(descriptor + 12, i == length ? id : 0xdead);
      const unsigned chained = i == length ? 0 : kDescFNext;
      store_le<std::uint16_t>(descriptor + 14,
                              static_cast<std::uint16_t>((wrap_of(number) ? 0x0080U : 0x8000U) |
                                                         chained | kDescFWrite));
    }
    next_avail_ += length;
    owner_[id] = sent_.size();
    sent_.push_back(buffer);
  }
  static std::uint64_t address_of(std::size_t buffer, std::size_t piece) {
    return kBufferBase + buffer * 64 + piece;
  }
  void take_used() {
    while (next_used_ < next_avail_ && is_used(ring_, next_used_)) {
      const auto id = load_le<std::uint16_t>(at(ring_, next_used_) + 12);
      if (id >= options_.ring_size || !owner_[id]) {
        fail(fmt::format("buffer {} comes back and was not sent, or twice", id));
        return;
      }
      next_used_ += sent_[*owner_[id]].length;
      owner_[id].reset();
      ++returned_;
    }
  }

  // ---- The device, which may be killed in every call.
  void start() {
    for (;;) {
      try {
        PackedInflightRegion region(inflight_.data(), options_.desc_num);
        PackedInflightRecovery recovery;
        {
          const Watching watching([this] { stored(); });
          auto recovered =
              region.recover(ring_.data(), options_.ring_size, position_of(options_.start));
          if (!recovered) return fail(recovered.error().message);
          recovery = std::move(*recovered);
        }
        go_on(std::move(region), std::move(recovery));
        return;
      } catch (const Killed&) {
        ++kills_;
      }
    }
  }
  void go_on(PackedInflightRegion region, PackedInflightRecovery recovery) {
    check_recovery(recovery, ring_, "a new device");
    is_popping_ = false;
    in_hand_.clear();
    for (const auto& buffer : recovery.in_flight) {
      const std::uint16_t id = buffer.chain.back().id;
      if (!owner_[id]) return fail("a buffer that the driver does not miss is in flight");
      in_hand_.push_back(*owner_[id]);
    }
    pushed_.resize(published());
    popped_ = pushed_.size() + in_hand_.size();
    if (recovery.is_fresh) recovery.next_avail = recovery.next_used = position_of(options_.start);
    std::byte* const events = ring_.data() + options_.ring_size * kDescriptorBytes;
    const auto in_flight = recovery.in_flight;
    queue_.emplace(PackedVirtqueue::Layout{.descriptor_ring = ring_.data(),
                                           .driver_event = events,
                                           .device_event = events + kPackedEventBytes,
                                           .size = options_.ring_size,
                                           .next_avail = recovery.next_avail,
                                           .next_used = recovery.next_used,
                                           .event_idx = false,
                                           .indirect = false,
                                           .inflight = std::move(region),
                                           .in_flight = std::move(recovery.in_flight)},
                   *guest_);
    for (const auto& buffer : in_flight) {
      Chain chain;
      const std::uint16_t id = buffer.chain.back().id;
      if (queue_->take_again(id, room_, chain) != PackedVirtqueue::Pop::kChain || chain.head != id)
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
        if (queue_->pop(room_, chain) != PackedVirtqueue::Pop::kChain)
          return fail("the ring is broken");
        if (chain.head != sent_[in_hand_.back()].id) return fail("another buffer is popped");
        is_popping_ = false;
      }
      if (queue_->broken_reason() != nullptr) return fail(queue_->broken_reason());
      for (auto wanted = random_() % 4; wanted > 0 && !in_hand_.empty(); --wanted) {
        const auto which = random_() % in_hand_.size();
        const std::size_t number = in_hand_[which];
        in_hand_.erase(in_hand_.begin() + static_cast<std::ptrdiff_t>(which));
        pushed_.push_back(number);
        queue_->push_used(sent_[number].id, 1);
      }
      if (random_() % 2 == 0 && queue_->has_unpublished()) static_cast<void>(queue_->publish());
    } catch (const Killed&) {
      ++kills_;
      queue_.reset();
      start();
    }
  }

  // ---- What must be true behind every store.

  // Buffers that the driver has back, or would have if it looked now.
  [[nodiscard]] std::size_t published() { return published(ring_); }
  [[nodiscard]] std::size_t published(Memory& ring) {
    std::size_t count = static_cast<std::size_t>(returned_);
    std::uint64_t number = next_used_;
    while (number < next_avail_ && is_used(ring, number)) {
      const auto id = load_le<std::uint16_t>(at(ring, number) + 12);
      if (id >= options_.ring_size || !owner_[id]) break;
      number += sent_[*owner_[id]].length;
      ++count;
    }
    return count;
  }
  void stored() {
    const Watching nothing;
    ++checks_;
    Memory inflight = inflight_;
    Memory ring = ring_;
    if (options_.overlooks_last_batch) {
      const auto used = load_le<std::uint16_t>(inflight.data() + 16);
      store_le<std::uint16_t>(inflight.data() + 18, used);
      inflight.data()[21] = inflight.data()[20];
      store_le<std::uint16_t>(
          inflight.data() + kPackedInflightOldFreeHeadOffset,
          load_le<std::uint16_t>(inflight.data() + kPackedInflightFreeHeadOffset));
    }
    if (random_() % 32 == 0) {
      // Killed once more, at each store of the recovery.
      const Watching watching([&] {
        const Watching nothing_more;
        Memory inflight_again = inflight;
        Memory ring_again = ring;
        recover_from(inflight_again, ring_again, "killed in a recovery");
      });
      recover_from(inflight, ring, "killed");
    } else {
      recover_from(inflight, ring, "killed");
    }
    if (random_() % 1000 < options_.kill_permille) throw Killed{};
  }
  void recover_from(Memory& inflight, Memory& ring, const char* when) {
    PackedInflightRegion region(inflight.data(), options_.desc_num);
    const auto recovery =
        region.recover(ring.data(), options_.ring_size, position_of(options_.start));
    if (!recovery) return fail(fmt::format("{}: {}", when, recovery.error().message));
    check_recovery(*recovery, ring, when);
  }
  // What is in flight: the buffers popped and not published, in the order in which they were
  // popped. The one that is being popped may be among them or not.
  void check_recovery(const PackedInflightRecovery& recovery, Memory& ring, const char* when) {
    if (recovery.is_fresh) {
      if (popped_ > 0) fail(fmt::format("{}: a used region is taken for a fresh one", when));
      return;
    }
    const std::size_t done = published(ring);
    if (done > pushed_.size()) return fail(fmt::format("{}: too much is published", when));
    std::vector<std::size_t> expected = in_hand_;
    expected.insert(expected.end(), pushed_.begin() + static_cast<std::ptrdiff_t>(done),
                    pushed_.end());
    std::ranges::sort(expected);
    const bool one_less =
        is_popping_ && !expected.empty() && recovery.in_flight.size() + 1 == expected.size();
    if (one_less) expected.pop_back();
    if (!std::ranges::equal(recovery.in_flight, expected,
                            [this](const auto& found, std::size_t number) {
                              return is_buffer(found.chain, number);
                            })) {
      return fail(fmt::format("{}: {} buffers are in flight and {} are found, or in another order",
                              when, expected.size(), recovery.in_flight.size()));
    }
    check_positions(recovery, ring, done, when);
  }
  [[nodiscard]] bool is_buffer(const std::vector<PackedDescriptor>& chain,
                               std::size_t number) const {
    if (chain.size() != sent_[number].length || chain.back().id != sent_[number].id) return false;
    for (std::size_t i = 0; i < chain.size(); ++i) {
      const bool is_last = i + 1 == chain.size();
      if (chain[i].guest_address != address_of(number, i) || chain[i].length_bytes != 1)
        return false;
      if (((chain[i].flags & kDescFNext) == 0) != is_last) return false;
    }
    return true;
  }
  void check_positions(const PackedInflightRecovery& recovery, Memory& ring, std::size_t done,
                       const char* when) {
    std::uint64_t used = options_.start;
    for (std::size_t i = 0; i < done; ++i) used += sent_[pushed_[i]].length;
    std::uint64_t avail = used;
    for (const auto& buffer : recovery.in_flight) avail += buffer.chain.size();
    if (recovery.next_used != position_of(used) || recovery.next_avail != position_of(avail))
      return fail(fmt::format("{}: the ring goes on elsewhere", when));
    // The driver will look at each of these in time, and must not take one for used before it is.
    for (std::uint64_t number = used; number < avail; ++number) {
      if (is_used(ring, number))
        return fail(fmt::format("{}: a descriptor in flight is left as used", when));
      if (&ring != &ring_ && is_used(ring_, number)) ++stale_flags_seen_;
    }
  }
  void fail(std::string why) {
    if (failure_.empty()) failure_ = std::move(why);
  }

  const Options options_;
  std::mt19937_64 random_;
  Memory ring_;
  Memory inflight_;
  std::shared_ptr<const GuestMemory> guest_;
  std::optional<PackedVirtqueue> queue_;
  std::array<iovec, 16> room_{};

  std::uint64_t next_avail_;  // of the driver, as next_used_
  std::uint64_t next_used_;
  std::vector<Buffer> sent_;                       // by buffer number
  std::vector<std::optional<std::size_t>> owner_;  // by id: the buffer that the device has
  int returned_{0};
  std::vector<std::size_t> in_hand_;  // buffers popped and not pushed
  std::vector<std::size_t> pushed_;   // in the order of used descriptors
  std::size_t popped_{0};
  bool is_popping_{false};
  std::uint64_t kills_{0};
  std::uint64_t checks_{0};
  std::uint64_t stale_flags_seen_{0};
  std::string failure_;
};

Options random_options(std::mt19937_64& random) {
  Options options;
  options.ring_size = static_cast<std::uint16_t>(kChainMax + random() % 16);
  // A driver may use less of a queue than the frontend has announced.
  options.desc_num = static_cast<std::uint16_t>(options.ring_size + random() % 2 * 5);
  options.start = random() % (std::uint64_t{4} * options.ring_size);
  options.buffers = static_cast<int>(8 + random() % 36);
  options.kill_permille = static_cast<unsigned>(random() % 40);
  return options;
}

TEST(PackedInflightSteps, a_kill_behind_any_store_loses_nothing_and_repeats_nothing_in_the_ring) {
  std::mt19937_64 seeds(test::test_seed());
  constexpr int kRuns = 2000;
  std::uint64_t kills = 0;
  std::uint64_t checks = 0;
  std::uint64_t stale_flags = 0;
  for (int i = 0; i < kRuns; ++i) {
    const Options options = random_options(seeds);
    World world(options, seeds());
    const std::string failure = world.run();
    kills += world.kills();
    checks += world.checks();
    stale_flags += world.stale_flags_seen();
    ASSERT_EQ(failure, "") << "run " << i << ", ring of " << options.ring_size << ", region of "
                           << options.desc_num << ", from " << options.start;
  }
  std::cout << checks << " stores looked behind, " << kills << " kills in " << kRuns << " runs, "
            << stale_flags << " descriptors were left as used\n";
  EXPECT_GT(kills, std::uint64_t{kRuns});
  EXPECT_GT(stale_flags, std::uint64_t{kRuns}) << "what recover() repairs never came up";
}

TEST(PackedInflightSteps, a_recovery_that_overlooks_the_last_batch_is_found) {
  int found = 0;
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    World world({.kill_permille = 0, .overlooks_last_batch = true}, seed);
    found += world.run().empty() ? 0 : 1;
  }
  EXPECT_EQ(found, 10);
}

}  // namespace
}  // namespace vblk::virtio
