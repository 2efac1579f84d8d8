// Interrupts that are held back: when one is sent, and that none is ever lost. What a sleeping loop
// does is tests/vhost_user/interrupt_test.cpp's.
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <optional>
#include <sys/mman.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "blockdev/virtio/blk_queue.h"
#include "tests/virtio/packed_fixture.h"
#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

using testing::EventFd;
using testing::PackedRig;
using testing::Rig;
using Clock = std::chrono::steady_clock;

// So long that no test waits for it.
constexpr InterruptOptions kLong{.hold_max = std::chrono::seconds(1000), .batch_max = 1000};

// The two kinds of rings behind the same words.
struct Split {
  explicit Split(const InterruptOptions& options, std::uint64_t features = testing::kUsualFeatures)
      : rig({.features = features, .interrupts = options}) {}
  void put_flush(std::uint16_t number) {
    rig.queue_request(kBlkTFlush, 0, {}, 0, static_cast<std::uint16_t>(2 * number));
  }
  std::size_t used() { return rig.ring->take_used().size(); }
  void want_none() { rig.ring->set_avail_flags(1); }
  Rig rig;
};
struct Packed {
  explicit Packed(const InterruptOptions& options,
                  std::uint64_t features = testing::kPackedFeatures)
      : rig({.features = features, .interrupts = options}) {}
  void put_flush(std::uint16_t number) { rig.put_flush(number); }
  std::size_t used() { return rig.ring->take_used().size(); }
  void want_none() { rig.ring->set_driver_event(1); }
  PackedRig rig;
};

// Flushes that the disk keeps until the test completes them.
template <typename Kind>
class Interrupts : public ::testing::Test {
 protected:
  void begin(const InterruptOptions& options, std::uint16_t flushes) {
    kind.emplace(options);
    put(flushes);
  }
  void put(std::uint16_t flushes) {
    kind->rig.node.hold = true;
    for (std::uint16_t i = 0; i < flushes; ++i) kind->put_flush(number++);
    kind->rig.run();
  }
  void complete(std::size_t count, int error = 0) {
    auto& held = kind->rig.node.held;
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_FALSE(held.empty());
      kind->rig.context->complete_later(*held.front(), error);
      held.erase(held.begin());
    }
    kind->rig.run();
  }
  std::uint64_t interrupts() { return kind->rig.call.take(); }

  std::optional<Kind> kind;
  std::uint16_t number{0};
};

using Kinds = ::testing::Types<Split, Packed>;
TYPED_TEST_SUITE(Interrupts, Kinds);

TYPED_TEST(Interrupts, come_with_each_answer_where_none_is_held) {
  this->begin({}, 4);
  for (int i = 0; i < 4; ++i) {
    this->complete(1);
    EXPECT_EQ(this->interrupts(), 1U);
  }
  EXPECT_EQ(this->kind->rig.queue->statistics().interrupts_merged, 0U);
}

TYPED_TEST(Interrupts, of_one_request_at_a_time_are_not_held) {
  this->begin(kLong, 0);
  for (int i = 0; i < 3; ++i) {
    this->put(1);
    this->complete(1);
    EXPECT_EQ(this->interrupts(), 1U);
  }
}

TYPED_TEST(Interrupts, are_one_for_all_that_is_in_flight_and_the_answers_are_there_at_once) {
  this->begin(kLong, 4);
  for (int i = 0; i < 3; ++i) {
    this->complete(1);
    EXPECT_EQ(this->interrupts(), 0U);
    EXPECT_EQ(this->kind->used(), 1U) << "published all the same";
  }
  this->complete(1);
  EXPECT_EQ(this->interrupts(), 1U);
  const BlkQueueStatistics& statistics = this->kind->rig.queue->statistics();
  EXPECT_EQ(statistics.interrupts, 1U);
  EXPECT_EQ(statistics.interrupts_merged, 3U);
}

TYPED_TEST(Interrupts, come_when_enough_is_answered) {
  this->begin({.hold_max = kLong.hold_max, .batch_max = 3}, 8);
  std::array<std::uint64_t, 7> seen{};
  for (std::uint64_t& count : seen) {
    this->complete(1);
    count = this->interrupts();
  }
  EXPECT_EQ(seen, (std::array<std::uint64_t, 7>{0, 0, 1, 0, 0, 1, 0}));
  this->complete(1);
  EXPECT_EQ(this->interrupts(), 1U);
}

TYPED_TEST(Interrupts, come_when_their_time_is_up_and_not_before) {
  constexpr std::chrono::milliseconds kHold{5};
  this->begin({.hold_max = kHold, .batch_max = 1000}, 3);
  for (int i = 0; i < 2; ++i) {
    const auto begin = Clock::now();
    this->complete(1);
    std::uint64_t count = this->interrupts();
    while (count == 0 && Clock::now() - begin < std::chrono::seconds(30)) {
      this->kind->rig.cycle();
      count = this->interrupts();
    }
    EXPECT_EQ(count, 1U);
    EXPECT_GE(Clock::now() - begin, kHold);
  }
}

TYPED_TEST(Interrupts, that_nobody_wants_are_not_sent_later_either) {
  this->begin(kLong, 4);
  this->kind->want_none();
  this->complete(3);
  this->complete(1);
  EXPECT_EQ(this->interrupts(), this->kind->rig.queue->statistics().interrupts);
  // The first of a ring that was just started always comes (virtqueue.h).
  EXPECT_LE(this->kind->rig.queue->statistics().interrupts, 1U);
  this->put(4);
  this->complete(4);
  EXPECT_EQ(this->interrupts(), 0U);
}

TYPED_TEST(Interrupts, that_were_wanted_come_although_the_driver_wants_no_more) {
  this->begin(kLong, 4);
  this->complete(2);
  EXPECT_EQ(this->interrupts(), 0U);
  this->kind->want_none();
  this->complete(2);
  EXPECT_EQ(this->interrupts(), 1U);
}

TYPED_TEST(Interrupts, that_are_held_go_to_the_descriptor_of_their_time) {
  this->begin(kLong, 4);
  this->complete(2);
  const EventFd other;
  this->kind->rig.queue->set_call_fd(other.fd());
  EXPECT_EQ(this->interrupts(), 1U);
  EXPECT_EQ(other.take(), 0U);
  this->complete(2);
  EXPECT_EQ(this->interrupts(), 0U);
  EXPECT_EQ(other.take(), 1U);
  this->put(2);
  this->complete(1);
  this->kind->rig.queue->set_call_fd(-1);
  EXPECT_EQ(other.take(), 1U);
  this->complete(1);
}

TYPED_TEST(Interrupts, come_before_a_queue_has_stopped) {
  this->begin(kLong, 3);
  this->complete(1);
  bool stopped = false;
  this->kind->rig.queue->stop(BlkQueue::Unfinished::kFail, [&stopped] { stopped = true; });
  this->kind->rig.run();
  EXPECT_EQ(this->interrupts(), 1U) << "as soon as it is to stop";
  this->complete(2);
  EXPECT_GE(this->interrupts(), 1U);
  EXPECT_FALSE(stopped) << "runs from the loop, which does not run here";
}

TYPED_TEST(Interrupts, come_when_the_device_pauses) {
  this->begin(kLong, 3);
  this->complete(1);
  EXPECT_EQ(this->interrupts(), 0U);
  this->kind->rig.device->gate().pause();
  this->kind->rig.run();
  EXPECT_EQ(this->interrupts(), 1U);
  this->complete(1);
  EXPECT_EQ(this->interrupts(), 1U) << "none is held while it is paused";
  this->kind->rig.device->gate().resume();
  this->complete(1);
}

TYPED_TEST(Interrupts, come_when_the_ring_breaks) {
  this->begin(kLong, 3);
  this->complete(1);
  EXPECT_EQ(this->interrupts(), 0U);
  // What cannot be waited on breaks a ring.
  const int file = ::memfd_create("no eventfd", MFD_CLOEXEC);
  this->kind->rig.queue->set_kick_fd(file);
  EXPECT_TRUE(this->kind->rig.queue->broken());
  this->kind->rig.run();
  EXPECT_EQ(this->interrupts(), 1U);
  this->complete(2);
  ::close(file);
}

// A driver that asks for one at a certain place, in the middle of what is held.
TEST(InterruptsWithEventIndex, come_once_for_the_place_that_was_asked_for) {
  Split split(kLong, testing::kUsualFeatures | feature_bit(kFEventIdx));
  Rig& rig = split.rig;
  const auto complete = [&rig](std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      rig.context->complete_later(*rig.node.held.front(), 0);
      rig.node.held.erase(rig.node.held.begin());
    }
    rig.run();
  };
  const auto put = [&](std::uint16_t count) {
    rig.node.hold = true;
    for (std::uint16_t i = 0; i < count; ++i) split.put_flush(i);
    rig.run();
  };
  put(1);
  complete(1);  // the first of a ring always interrupts
  EXPECT_EQ(rig.call.take(), 1U);
  rig.ring->set_used_event(3);  // behind the fourth, that is, at the third of the next
  put(8);
  complete(2);
  EXPECT_EQ(rig.queue->statistics().interrupts_merged, 0U);
  complete(1);  // crosses it
  complete(4);
  EXPECT_EQ(rig.call.take(), 0U) << "held";
  complete(1);
  EXPECT_EQ(rig.call.take(), 1U);
  // Nothing is asked for: the event lies behind.
  put(4);
  complete(4);
  EXPECT_EQ(rig.call.take(), 0U);
}

// One of a predecessor that was killed while it held one: tests/vhost_user has that.

TEST(InterruptsOfKeptRequests, come_though_one_is_kept_for_long) {
  Rig rig({.on_error = {.read = ErrorChoice::kReport, .write = ErrorChoice::kStop},
           .interrupts = kLong});
  rig.node.hold = true;
  for (std::uint16_t i = 0; i < 2; ++i)
    rig.queue_request(kBlkTFlush, 0, {}, 0, static_cast<std::uint16_t>(2 * i));
  rig.run();
  ASSERT_EQ(rig.node.held.size(), 2U);
  rig.context->complete_later(*rig.node.held[0], 0);
  rig.run();
  EXPECT_EQ(rig.call.take(), 0U);
  rig.context->complete_later(*rig.node.held[1], EIO);
  rig.node.held.clear();
  rig.run();
  EXPECT_EQ(rig.queue->kept(), 1U);
  EXPECT_EQ(rig.call.take(), 1U) << "nobody knows when the other is answered";
  rig.node.hold = false;
  rig.device->gate().resume();
  rig.run();
  EXPECT_EQ(rig.call.take(), 1U);
}

}  // namespace
}  // namespace vblk::virtio
