// The raw node on a disk that fails, shortens, reorders and forgets: what reaches the guest, and
// what is tried instead.
#include "blockdev/raw_node.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <ranges>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "tests/blockdev/disk_fixture.h"
#include "tests/support/seed.h"

namespace vblk::blockdev {
namespace {

using aio::IoKind;
using aio::SimulatedDisk;
using testing::Bytes;
using testing::Context;
using testing::TestRequest;

constexpr std::uint64_t kBlockBytes = 4096;
constexpr std::uint64_t kDiskBytes = std::uint64_t{4} << 20;

struct RigOptions {
  bool direct{true};
  bool read_only{false};
  bool discard{true};
  bool ignore_flush{false};
  bool share_flushes{true};
  std::uint64_t size_bytes{kDiskBytes};
  double short_transfer_probability{0};
  double interrupt_probability{0};
  double again_probability{0};
  std::uint64_t seed{1};
};

// A raw node on a simulated disk with blocks of 4096 bytes.
class Rig {
 public:
  explicit Rig(const RigOptions& options = {})
      : disk({.size_bytes = options.size_bytes,
              .seed = options.seed,
              .direct_alignment_bytes = kBlockBytes,
              .short_transfer_probability = options.short_transfer_probability,
              .interrupt_probability = options.interrupt_probability,
              .again_probability = options.again_probability}),
        node(ImageFile::wrap(options.direct ? SimulatedDisk::kDirectFd : SimulatedDisk::kBufferedFd,
                             SimulatedDisk::kBufferedFd, options.size_bytes, kBlockBytes,
                             options.read_only),
             {.name = "simulated",
              .discard = options.discard,
              .ignore_flush = options.ignore_flush,
              .share_flushes = options.share_flushes}),
        context(make_context(options.seed)) {}

  // Another I/O thread's context on the same disk.
  std::unique_ptr<Context> make_context(std::uint64_t seed) {
    return std::make_unique<Context>(
        std::make_unique<aio::EngineSet>(*aio::SimulatedEngine::create(disk, {.seed = seed})));
  }
  int write(std::uint64_t offset, std::uint64_t length, bool write_through = false) {
    return context->write(node, offset, Bytes(length, std::byte{0x5a}), write_through);
  }
  int write_zeroes(std::uint64_t offset, std::uint64_t length, bool may_unmap = false) {
    return context->write_zeroes(node, offset, length, may_unmap);
  }
  int write_zeroes_through(std::uint64_t offset, std::uint64_t length) {
    TestRequest request(BlockOperation::kWriteZeroes, offset, length);
    request.write_through = true;
    return context->run(node, request);
  }
  int discard(std::uint64_t offset, std::uint64_t length) {
    return context->discard(node, offset, length);
  }
  int flush() { return context->flush(node); }
  int read_error(std::uint64_t offset, std::uint64_t length) {
    TestRequest request(BlockOperation::kRead, offset, length);
    request.use_plain_memory();
    return context->run(node, request);
  }
  // Every operation of `kind` fails with `error`, until told otherwise.
  void fail(IoKind kind, int error) {
    disk.set_fault_plan([kind, error](const aio::IoRequest& request, std::uint64_t) {
      return request.kind == kind ? std::optional(error) : std::nullopt;
    });
  }
  void fail_nothing() { disk.set_fault_plan(nullptr); }
  [[nodiscard]] std::size_t count(IoKind kind) const {
    return static_cast<std::size_t>(
        std::ranges::count(disk.operations(), kind, &aio::SimulatedOperation::kind));
  }
  [[nodiscard]] bool durable(std::uint64_t offset, std::uint64_t length, std::byte value) const {
    const Bytes bytes = disk.durable();
    return std::ranges::all_of(bytes | std::views::drop(offset) | std::views::take(length),
                               [value](std::byte byte) { return byte == value; });
  }

  SimulatedDisk disk;
  RawNode node;
  std::unique_ptr<Context> context;
};

// ---- The gate.

TEST(RawNodeGate, refuses_what_is_not_on_the_disk) {
  Rig rig;
  constexpr std::uint64_t kHuge = std::numeric_limits<std::uint64_t>::max() - 511;
  EXPECT_EQ(rig.write(kDiskBytes - 512, 1024), EINVAL);
  EXPECT_EQ(rig.write(kDiskBytes, 512), EINVAL);
  EXPECT_EQ(rig.write(kHuge, 1024), EINVAL) << "the end wraps around";
  EXPECT_EQ(rig.read_error(kDiskBytes - 1, 2), EINVAL);
  EXPECT_EQ(rig.discard(1024, kHuge), EINVAL);
  EXPECT_EQ(rig.write_zeroes(kHuge, kHuge), EINVAL);
  EXPECT_TRUE(rig.disk.operations().empty());
}

TEST(RawNodeGate, takes_the_last_sector_and_nothing_at_the_end) {
  Rig rig;
  EXPECT_EQ(rig.write(kDiskBytes - 512, 512), 0);
  EXPECT_EQ(rig.write(kDiskBytes, 0), 0);
  EXPECT_EQ(rig.read_error(0, 0), 0);
  EXPECT_EQ(rig.discard(kDiskBytes, 0), 0);
}

TEST(RawNodeGate, refuses_changes_that_are_not_whole_sectors) {
  Rig rig;
  EXPECT_EQ(rig.write(1, 512), EINVAL);
  EXPECT_EQ(rig.write(512, 511), EINVAL);
  EXPECT_EQ(rig.write_zeroes(256, 512), EINVAL);
  EXPECT_EQ(rig.discard(512, 513), EINVAL);
  EXPECT_EQ(rig.read_error(7, 11), 0);
}

TEST(RawNodeGate, refuses_iovecs_that_do_not_add_up_to_the_length) {
  Rig rig;
  for (const std::uint64_t length : {std::uint64_t{512}, std::uint64_t{4096}}) {
    TestRequest request(BlockOperation::kWrite, 0, 1024);
    request.use_plain_memory();
    request.length_bytes = length;
    EXPECT_EQ(rig.context->run(rig.node, request), EINVAL);
  }
  TestRequest wraps(BlockOperation::kRead, 0, 512);
  std::vector<iovec> elements{{nullptr, std::numeric_limits<std::size_t>::max()}, {nullptr, 513}};
  wraps.iov = elements.data();
  wraps.iov_count = 2;
  EXPECT_EQ(rig.context->run(rig.node, wraps), EINVAL);
  EXPECT_TRUE(rig.disk.operations().empty());
}

TEST(RawNodeGate, refuses_every_change_of_a_read_only_disk) {
  Rig rig({.read_only = true});
  EXPECT_TRUE(rig.node.limits().read_only);
  EXPECT_EQ(rig.write(0, 4096), EROFS);
  EXPECT_EQ(rig.write_zeroes(0, 4096), EROFS);
  EXPECT_EQ(rig.discard(0, 4096), EROFS);
  EXPECT_EQ(rig.read_error(0, 4096), 0);
  EXPECT_EQ(rig.flush(), 0) << "there is nothing to flush, and nothing wrong with asking";
}

TEST(RawNodeGate, offers_no_discard_where_the_user_wants_none) {
  Rig rig({.discard = false});
  EXPECT_FALSE(rig.node.limits().can_discard);
  EXPECT_FALSE(rig.node.limits().write_zeroes_may_unmap);
  EXPECT_EQ(rig.discard(0, 4096), EOPNOTSUPP);
  rig.disk.set_fault_plan([](const aio::IoRequest& request, std::uint64_t) {
    EXPECT_FALSE(request.may_unmap);
    return std::nullopt;
  });
  EXPECT_EQ(rig.write_zeroes(0, 4096, true), 0);
}

// ---- Errors.

class RawNodeErrors : public ::testing::TestWithParam<bool> {
 protected:
  Rig rig_{{.direct = GetParam()}};
};

TEST_P(RawNodeErrors, reach_the_request_and_no_other) {
  for (const int error : {EIO, ENOSPC, EDQUOT}) {
    for (const auto& [offset, length] :
         {std::pair<std::uint64_t, std::uint64_t>{8192, 4096}, {512, 512}, {512, 12288}}) {
      rig_.fail(IoKind::kWrite, error);
      EXPECT_EQ(rig_.write(offset, length), error);
      rig_.fail_nothing();
      EXPECT_EQ(rig_.write(offset, length), 0);
      rig_.fail(IoKind::kRead, error);
      EXPECT_EQ(rig_.read_error(offset, length), error);
      rig_.fail_nothing();
      EXPECT_EQ(rig_.read_error(offset, length), 0);
    }
  }
  EXPECT_EQ(rig_.flush(), 0) << "a write that failed for all to see is no reason to fail a flush";
}

// Whichever of a request's pieces fails, the request does; and nothing after it is tried.
TEST_P(RawNodeErrors, of_any_piece_fail_the_request) {
  std::mt19937_64 random(1);
  for (std::uint64_t failing = 0; failing < 3; ++failing) {
    TestRequest request(BlockOperation::kWrite, 512, 12288);
    request.use_scattered_memory(random);
    const std::uint64_t before = rig_.disk.operations().size();
    rig_.disk.set_fault_plan([&](const aio::IoRequest&, std::uint64_t index) {
      return index == before + failing ? std::optional(EIO) : std::nullopt;
    });
    const std::uint64_t pieces = GetParam() ? 3 : 1;
    const int error = rig_.context->run(rig_.node, request);
    EXPECT_EQ(error, failing < pieces ? EIO : 0);
    EXPECT_EQ(rig_.disk.operations().size() - before, std::min(failing + 1, pieces));
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, RawNodeErrors, ::testing::Bool(),
                         [](const auto& variant) { return variant.param ? "direct" : "buffered"; });

// ---- Flushes.

// The kernel tells of lost writes once. Whoever asks later must not be told that all is well.
TEST(RawNodeFlush, fails_for_ever_once_it_has_failed) {
  Rig rig;
  EXPECT_EQ(rig.flush(), 0);
  EXPECT_EQ(rig.write(0, 4096), 0);
  rig.fail(IoKind::kFlush, EIO);
  EXPECT_EQ(rig.flush(), EIO);
  rig.fail_nothing();
  const std::size_t asked = rig.count(IoKind::kFlush);
  EXPECT_EQ(rig.flush(), EIO);
  EXPECT_EQ(rig.flush(), EIO);
  EXPECT_EQ(rig.count(IoKind::kFlush), asked);
  EXPECT_EQ(rig.write(0, 4096), 0) << "reads and writes go on";
  EXPECT_EQ(rig.write_zeroes(0, 4096), 0);
  EXPECT_EQ(rig.write_zeroes_through(0, 4096), EIO) << "it ends in a flush";
}

TEST(RawNodeFlush, keeps_the_first_error) {
  Rig rig;
  rig.fail(IoKind::kFlush, ENOSPC);
  EXPECT_EQ(rig.flush(), ENOSPC);
  rig.fail(IoKind::kFlush, EIO);
  EXPECT_EQ(rig.flush(), ENOSPC);
}

// Each a call of its own: the second succeeds, because the first has taken the kernel's report.
// Shared: there is one call.
class RawNodeFlushes : public ::testing::TestWithParam<bool> {};

TEST_P(RawNodeFlushes, fail_with_another_one_that_is_in_flight) {
  Rig rig({.share_flushes = GetParam()});
  bool failed = false;
  rig.disk.set_fault_plan([&](const aio::IoRequest& request, std::uint64_t) {
    return request.kind == IoKind::kFlush && !std::exchange(failed, true) ? std::optional(EIO)
                                                                          : std::nullopt;
  });
  const auto other_context = rig.make_context(2);
  TestRequest first(BlockOperation::kFlush, 0, 0);
  TestRequest second(BlockOperation::kFlush, 0, 0);
  rig.context->start(rig.node, first);
  other_context->start(rig.node, second);
  rig.context->drain();
  other_context->drain();
  EXPECT_EQ(first.error, EIO);
  EXPECT_EQ(second.error, EIO);
  EXPECT_EQ(rig.count(IoKind::kFlush), GetParam() ? 1U : 2U);
}

INSTANTIATE_TEST_SUITE_P(Shared, RawNodeFlushes, ::testing::Bool());

// Each kind of change makes the next flush a real one; what is stable when it completes does not.
TEST(RawNodeFlush, reaches_the_disk_after_any_change_and_only_then) {
  Rig rig;
  EXPECT_EQ(rig.flush(), 0);
  const auto reaches_the_disk = [&rig] {
    const std::size_t before = rig.count(IoKind::kFlush);
    EXPECT_EQ(rig.flush(), 0);
    return rig.count(IoKind::kFlush) > before;
  };
  EXPECT_FALSE(reaches_the_disk());
  EXPECT_EQ(rig.write(0, 4096), 0);
  EXPECT_TRUE(reaches_the_disk());
  EXPECT_EQ(rig.write(512, 512), 0) << "by pieces";
  EXPECT_TRUE(reaches_the_disk());
  EXPECT_EQ(rig.write_zeroes(0, 4096), 0);
  EXPECT_TRUE(reaches_the_disk());
  EXPECT_EQ(rig.discard(0, 4096), 0);
  EXPECT_TRUE(reaches_the_disk());
  EXPECT_EQ(rig.read_error(0, 4096), 0);
  EXPECT_EQ(rig.write(0, 4096, true), 0) << "through";
  EXPECT_EQ(rig.write(512, 512, true), 0) << "through, by pieces";
  EXPECT_FALSE(reaches_the_disk());
  rig.fail(IoKind::kWrite, EIO);
  EXPECT_EQ(rig.write(0, 4096, true), EIO);
  rig.fail_nothing();
  EXPECT_TRUE(reaches_the_disk()) << "after a write-through write that failed";
}

TEST(RawNodeFlush, fails_when_a_write_through_write_took_the_report_of_the_page_cache) {
  Rig buffered({.direct = false});
  buffered.fail(IoKind::kWrite, EIO);
  EXPECT_EQ(buffered.write(0, 4096, true), EIO);
  buffered.fail_nothing();
  EXPECT_EQ(buffered.flush(), EIO);

  Rig direct;
  direct.fail(IoKind::kWrite, EIO);
  EXPECT_EQ(direct.write(0, 4096, true), EIO);
  direct.fail_nothing();
  EXPECT_EQ(direct.flush(), 0) << "a direct write has no page that could be lost later";
}

TEST(RawNodeFlush, of_an_unsafe_disk_does_not_reach_the_disk) {
  Rig rig({.direct = false, .ignore_flush = true});
  EXPECT_EQ(rig.write(0, 4096, true), 0);
  EXPECT_EQ(rig.flush(), 0);
  EXPECT_EQ(rig.write_zeroes_through(0, 4096), 0);
  EXPECT_EQ(rig.count(IoKind::kFlush), 0U);
  EXPECT_FALSE(rig.disk.operations().front().write_through);
}

// ---- What has been promised to last.

class RawNodeDurability : public ::testing::TestWithParam<bool> {
 protected:
  Rig rig_{{.direct = GetParam()}};
};

TEST_P(RawNodeDurability, of_all_that_was_written_before_a_flush) {
  EXPECT_EQ(rig_.write(0, 65536), 0);
  EXPECT_EQ(rig_.write(65536 + 512, 10240), 0);  // edges and a body
  EXPECT_EQ(rig_.write_zeroes(16384, 4096), 0);
  EXPECT_EQ(rig_.flush(), 0);
  rig_.disk.power_cut(1);
  EXPECT_TRUE(rig_.durable(0, 16384, std::byte{0x5a}));
  EXPECT_TRUE(rig_.durable(16384, 4096, std::byte{0}));
  EXPECT_TRUE(rig_.durable(65536 + 512, 10240, std::byte{0x5a}));
}

TEST_P(RawNodeDurability, of_what_was_written_through_without_a_flush) {
  EXPECT_EQ(rig_.write(0, 65536, true), 0);
  EXPECT_EQ(rig_.write(65536 + 512, 10240, true), 0);
  EXPECT_EQ(rig_.write_zeroes_through(512, 8192), 0);
  EXPECT_TRUE(rig_.durable(0, 512, std::byte{0x5a}));
  EXPECT_TRUE(rig_.durable(512, 8192, std::byte{0}));
  EXPECT_TRUE(rig_.durable(65536 + 512, 10240, std::byte{0x5a}));
}

TEST_P(RawNodeDurability, of_zeroes_written_through_where_the_kernel_cannot_zero) {
  EXPECT_EQ(rig_.write(0, 65536, true), 0);
  rig_.fail(IoKind::kWriteZeroes, EOPNOTSUPP);
  EXPECT_EQ(rig_.write_zeroes_through(512, 8192), 0);
  EXPECT_TRUE(rig_.durable(0, 512, std::byte{0x5a}));
  EXPECT_TRUE(rig_.durable(512, 8192, std::byte{0}));
}

INSTANTIATE_TEST_SUITE_P(Modes, RawNodeDurability, ::testing::Bool(),
                         [](const auto& variant) { return variant.param ? "direct" : "buffered"; });

TEST(RawNodeZeroes, fail_when_their_flush_does) {
  Rig rig;
  rig.fail(IoKind::kFlush, EIO);
  EXPECT_EQ(rig.write_zeroes_through(0, 4096), EIO);
  rig.fail_nothing();
  EXPECT_EQ(rig.flush(), EIO);
}

// ---- What the storage below cannot do.

TEST(RawNodeFallback, zeroes_without_unmapping_then_by_writing) {
  Rig rig;
  std::vector<std::pair<IoKind, bool>> tried;
  rig.disk.set_fault_plan([&](const aio::IoRequest& request, std::uint64_t) -> std::optional<int> {
    const bool is_zeroes = request.kind == IoKind::kWriteZeroes;
    tried.emplace_back(request.kind, is_zeroes && request.may_unmap);
    return is_zeroes ? std::optional(EOPNOTSUPP) : std::nullopt;
  });
  const Bytes data(65536, std::byte{0x5a});
  EXPECT_EQ(rig.context->write(rig.node, 0, data), 0);
  tried.clear();
  EXPECT_EQ(rig.write_zeroes(4096, 8192, true), 0);
  using Tried = std::vector<std::pair<IoKind, bool>>;
  EXPECT_EQ(tried, (Tried{{IoKind::kWriteZeroes, true},
                          {IoKind::kWriteZeroes, false},
                          {IoKind::kWrite, false}}));
  tried.clear();
  EXPECT_EQ(rig.write_zeroes(32768, 4096, true), 0);
  EXPECT_EQ(tried, (Tried{{IoKind::kWrite, false}})) << "what does not work is tried once";
  Bytes expected = data;
  std::fill_n(expected.begin() + 4096, 8192, std::byte{0});
  std::fill_n(expected.begin() + 32768, 4096, std::byte{0});
  EXPECT_EQ(rig.context->read(rig.node, 0, data.size()), expected);
}

TEST(RawNodeFallback, keeps_zeroing_by_the_kernel_where_only_unmapping_is_missing) {
  Rig rig;
  rig.disk.set_fault_plan([](const aio::IoRequest& request, std::uint64_t) {
    return request.kind == IoKind::kWriteZeroes && request.may_unmap ? std::optional(EOPNOTSUPP)
                                                                     : std::nullopt;
  });
  EXPECT_EQ(rig.write_zeroes(0, kDiskBytes, true), 0);
  EXPECT_EQ(rig.write_zeroes(0, kDiskBytes, true), 0);
  EXPECT_EQ(rig.count(IoKind::kWriteZeroes), 3U);
  EXPECT_EQ(rig.count(IoKind::kWrite), 0U);
}

TEST(RawNodeFallback, writes_zeroes_of_any_length_with_edges) {
  for (const bool direct : {false, true}) {
    Rig rig({.direct = direct});
    Bytes expected(kDiskBytes, std::byte{0x5a});
    EXPECT_EQ(rig.context->write(rig.node, 0, expected), 0);
    rig.fail(IoKind::kWriteZeroes, ENOSYS);
    EXPECT_EQ(rig.write_zeroes(512, 3500032), 0);
    std::fill_n(expected.begin() + 512, 3500032, std::byte{0});
    EXPECT_TRUE(rig.disk.current() == expected);
  }
}

TEST(RawNodeFallback, reports_other_errors_of_zeroing_and_tries_again_next_time) {
  Rig rig;
  rig.fail(IoKind::kWriteZeroes, EIO);
  EXPECT_EQ(rig.write_zeroes(0, 4096), EIO);
  EXPECT_EQ(rig.count(IoKind::kWrite), 0U);
  rig.fail_nothing();
  EXPECT_EQ(rig.write_zeroes(0, 4096), 0);
  EXPECT_EQ(rig.count(IoKind::kWriteZeroes), 2U);
}

TEST(RawNodeFallback, reports_errors_of_the_writes_that_replace_zeroing) {
  Rig rig;
  rig.disk.set_fault_plan([](const aio::IoRequest& request, std::uint64_t) {
    return request.kind == IoKind::kWrite ? std::optional(ENOSPC) : std::optional(EOPNOTSUPP);
  });
  EXPECT_EQ(rig.write_zeroes(0, 4096), ENOSPC);
}

TEST(RawNodeFallback, accepts_discards_that_cannot_be_done_and_stops_asking) {
  Rig rig;
  EXPECT_EQ(rig.write(0, 4096), 0);
  rig.fail(IoKind::kDiscard, EOPNOTSUPP);
  EXPECT_EQ(rig.discard(0, 4096), 0);
  EXPECT_EQ(rig.discard(0, 4096), 0);
  EXPECT_EQ(rig.count(IoKind::kDiscard), 1U);
  EXPECT_EQ(rig.context->read(rig.node, 0, 4096), Bytes(4096, std::byte{0x5a}));
}

TEST(RawNodeFallback, reports_discards_that_failed) {
  Rig rig;
  rig.fail(IoKind::kDiscard, EIO);
  EXPECT_EQ(rig.discard(0, 4096), EIO);
  rig.fail_nothing();
  EXPECT_EQ(rig.discard(0, 4096), 0);
  EXPECT_EQ(rig.count(IoKind::kDiscard), 2U);
}

// ---- The model, on a disk that interrupts, shortens and reorders.

TEST(RawNodeModel, agrees_with_a_flat_array_on_an_unreliable_disk) {
  const std::uint64_t seed = test::test_seed();
  for (const bool direct : {false, true}) {
    for (const bool can_zero : {false, true}) {
      Rig rig({.direct = direct,
               .size_bytes = std::uint64_t{1} << 20,
               .short_transfer_probability = 0.3,
               .interrupt_probability = 0.1,
               .again_probability = 0.05,
               .seed = seed});
      if (!can_zero) rig.fail(IoKind::kWriteZeroes, EOPNOTSUPP);
      const Bytes expected =
          testing::run_random_operations(rig.node, *rig.context, rig.disk.current(),
                                         {.count = 2000, .reads_any_byte = true}, seed);
      EXPECT_TRUE(rig.disk.current() == expected);
    }
  }
}

// ---- Bounce buffers.

class RawNodeBounce : public ::testing::Test {
 protected:
  // Starts as many transfers as there are bounce buffers, four times over, none of which O_DIRECT
  // would take from its memory.
  void start_all(BlockOperation operation) {
    constexpr std::uint64_t kCount = 4 * BouncePool::kBufferCount;
    constexpr std::uint64_t kLength = kDiskBytes / kCount;
    requests_.clear();
    for (std::uint64_t i = 0; i < kCount; ++i) {
      requests_.push_back(std::make_unique<TestRequest>(operation, i * kLength, kLength));
      requests_.back()->use_scattered_memory(random_);
      requests_.back()->fill(Bytes(kLength, std::byte(i + 1)));
      rig_.context->start(rig_.node, *requests_.back());
    }
  }
  void expect_all_buffers_free() {
    std::vector<std::byte*> buffers;
    BouncePool& pool = (*rig_.context)->bounce_pool();
    while (std::byte* const buffer = pool.try_acquire()) buffers.push_back(buffer);
    EXPECT_EQ(buffers.size(), BouncePool::kBufferCount);
    for (std::byte* const buffer : buffers) pool.release(buffer);
  }

  std::mt19937_64 random_{1};
  Rig rig_;
  std::vector<std::unique_ptr<TestRequest>> requests_;
};

TEST_F(RawNodeBounce, makes_requests_wait_when_all_buffers_are_taken_and_loses_none) {
  start_all(BlockOperation::kWrite);
  EXPECT_EQ((*rig_.context)->engines().in_flight(), BouncePool::kBufferCount)
      << "the others wait in line";
  rig_.context->drain();
  for (const auto& request : requests_) {
    EXPECT_EQ(request->completions, 1);
    EXPECT_EQ(request->error, 0);
  }
  start_all(BlockOperation::kRead);
  rig_.context->drain();
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    EXPECT_EQ(requests_[i]->error, 0);
    EXPECT_TRUE(requests_[i]->left_its_neighbours_alone());
    EXPECT_TRUE(std::ranges::all_of(requests_[i]->bytes(),
                                    [i](std::byte byte) { return byte == std::byte(i + 1); }));
  }
  expect_all_buffers_free();
}

TEST_F(RawNodeBounce, gives_the_buffers_of_failed_requests_back) {
  rig_.disk.set_fault_plan([](const aio::IoRequest&, std::uint64_t index) {
    return index % 3 == 0 ? std::optional(EIO) : std::nullopt;
  });
  start_all(BlockOperation::kWrite);
  rig_.context->drain();
  EXPECT_EQ(std::ranges::count(requests_, 1, &TestRequest::completions),
            static_cast<std::ptrdiff_t>(requests_.size()));
  EXPECT_GT(std::ranges::count(requests_, EIO, &TestRequest::error), 0);
  expect_all_buffers_free();
}

TEST_F(RawNodeBounce, carries_requests_larger_than_a_buffer) {
  const Bytes data = testing::random_bytes(random_, 3 * BouncePool::kBufferBytes + 1536);
  TestRequest write(BlockOperation::kWrite, 512, data.size());
  write.use_scattered_memory(random_);
  write.fill(data);
  EXPECT_EQ(rig_.context->run(rig_.node, write), 0);
  TestRequest read(BlockOperation::kRead, 512, data.size());
  read.use_scattered_memory(random_);
  EXPECT_EQ(rig_.context->run(rig_.node, read), 0);
  EXPECT_TRUE(read.bytes() == data);
}

// ---- The end.

TEST(RawNodeDrain, completes_everything_before_the_context_goes) {
  Rig rig;
  std::mt19937_64 random(1);
  std::vector<std::unique_ptr<TestRequest>> requests;
  for (std::uint64_t i = 0; i < 100; ++i) {
    const auto kind = static_cast<BlockOperation>(i % 5);
    static_assert(BlockOperation{5} == BlockOperation::kWriteBehind, "the only one no guest has");
    const std::uint64_t length = kind == BlockOperation::kFlush ? 0 : 16384;
    requests.push_back(std::make_unique<TestRequest>(kind, i * 16384 + 512, length));
    if (kind == BlockOperation::kRead || kind == BlockOperation::kWrite)
      requests.back()->use_scattered_memory(random);
    rig.context->start(rig.node, *requests.back());
  }
  rig.context.reset();
  for (const auto& request : requests) {
    EXPECT_EQ(request->completions, 1);
    EXPECT_EQ(request->error, 0);
  }
}

}  // namespace
}  // namespace vblk::blockdev
