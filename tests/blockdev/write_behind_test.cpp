// Write-behind: which ranges are started and waited for, when writes are held, and what happens
// when that fails.
#include "blockdev/write_behind.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <gtest/gtest.h>

#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "blockdev/raw_node.h"
#include "tests/blockdev/disk_fixture.h"

namespace vblk::blockdev {
namespace {

using aio::IoKind;
using aio::SimulatedDisk;
using testing::Bytes;
using testing::Context;
using testing::TestRequest;

constexpr std::uint64_t kDiskBytes = std::uint64_t{1} << 20;
constexpr std::uint64_t kWindow = 64 << 10;

// A raw node in the page cache of a simulated disk.
class Rig {
 public:
  explicit Rig(bool direct = false)
      : node(ImageFile::wrap(direct ? SimulatedDisk::kDirectFd : SimulatedDisk::kBufferedFd,
                             SimulatedDisk::kBufferedFd, kDiskBytes, kSectorBytes, false),
             {.name = "simulated", .write_behind_bytes = kWindow}),
        context(std::make_unique<aio::EngineSet>(
            aio::SimulatedEngine::create(disk, {.delay_reaps_max = 1}).value())) {
    node.attach(*context);
  }
  int write(std::uint64_t offset, std::uint64_t length, bool write_through = false) {
    return context.write(node, offset, Bytes(length), write_through);
  }
  // The write-behind operations that the disk has seen: offset and length.
  [[nodiscard]] std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges() const {
    std::vector<std::pair<std::uint64_t, std::uint64_t>> found;
    for (const auto& operation : disk.operations()) {
      if (operation.kind == IoKind::kWriteBehind)
        found.emplace_back(operation.offset_bytes, operation.length_bytes);
    }
    return found;
  }

  SimulatedDisk disk{{.size_bytes = kDiskBytes}};
  RawNode node;
  Context context;
};

using Ranges = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

TEST(WriteBehind, starts_a_window_when_it_is_full) {
  Rig rig;
  EXPECT_EQ(rig.write(0, kWindow - 512), 0);
  EXPECT_EQ(rig.ranges(), Ranges{});
  EXPECT_EQ(rig.write(kWindow - 512, 512), 0);
  EXPECT_EQ(rig.ranges(), (Ranges{{0, kWindow}}));
}

TEST(WriteBehind, starts_the_new_window_and_waits_for_the_old) {
  Rig rig;
  for (std::uint64_t i = 0; i < 3; ++i) EXPECT_EQ(rig.write(i * kWindow, kWindow), 0);
  EXPECT_EQ(rig.ranges(), (Ranges{{0, kWindow},
                                  {kWindow, kWindow},
                                  {0, kWindow},
                                  {2 * kWindow, kWindow},
                                  {kWindow, kWindow}}));
}

TEST(WriteBehind, takes_the_range_of_scattered_writes) {
  Rig rig;
  EXPECT_EQ(rig.write(512 << 10, kWindow / 2), 0);
  EXPECT_EQ(rig.write(128 << 10, kWindow / 2), 0);
  EXPECT_EQ(rig.ranges(), (Ranges{{128 << 10, (512 - 128 + 32) << 10}}));
}

TEST(WriteBehind, leaves_out_what_is_stable_when_it_completes) {
  Rig rig;
  for (std::uint64_t i = 0; i < 3; ++i) EXPECT_EQ(rig.write(i * kWindow, kWindow, true), 0);
  EXPECT_EQ(rig.ranges(), Ranges{});
}

TEST(WriteBehind, holds_writes_while_the_disk_is_behind_and_loses_none) {
  Rig rig;
  constexpr int kWrites = 40;
  std::vector<std::unique_ptr<TestRequest>> writes;
  const auto* const windows = dynamic_cast<WriteBehind*>((*rig.context).state_of(rig.node));
  ASSERT_NE(windows, nullptr);
  for (int i = 0; i < kWrites; ++i) {
    writes.push_back(std::make_unique<TestRequest>(
        BlockOperation::kWrite, static_cast<std::uint64_t>(i) % 16 * kWindow, kWindow));
    writes.back()->use_plain_memory();
    rig.context.start(rig.node, *writes.back());
    // The windows' operations take as long as writes do: the disk gets behind.
    rig.context->poll();
  }
  rig.context.drain();
  EXPECT_TRUE(std::ranges::all_of(
      writes, [](const auto& write) { return write->completions == 1 && write->error == 0; }));
  EXPECT_GT(windows->statistics().held_writes, 0U);
  EXPECT_GT(windows->statistics().windows, 5U);
}

TEST(WriteBehind, makes_all_later_flushes_fail_when_it_fails) {
  Rig rig;
  rig.disk.set_fault_plan([](const aio::IoRequest& request, std::uint64_t) -> std::optional<int> {
    if (request.kind == IoKind::kWriteBehind) return EIO;
    return std::nullopt;
  });
  EXPECT_EQ(rig.write(0, kWindow), 0);
  EXPECT_EQ(rig.context.flush(rig.node), EIO);
  rig.disk.set_fault_plan({});
  EXPECT_EQ(rig.context.flush(rig.node), EIO);
}

TEST(WriteBehind, is_given_up_where_the_file_system_has_none) {
  Rig rig;
  rig.disk.set_fault_plan([](const aio::IoRequest& request, std::uint64_t) -> std::optional<int> {
    if (request.kind == IoKind::kWriteBehind) return ENOSYS;
    return std::nullopt;
  });
  for (std::uint64_t i = 0; i < 4; ++i) EXPECT_EQ(rig.write(i * kWindow, kWindow), 0);
  EXPECT_EQ(rig.context.flush(rig.node), 0);
  EXPECT_EQ(rig.ranges().size(), 1U);
}

TEST(WriteBehind, needs_no_attachment_to_write) {
  Rig rig;
  Context other(std::make_unique<aio::EngineSet>(aio::SimulatedEngine::create(rig.disk).value()));
  EXPECT_EQ(other.write(rig.node, 0, Bytes(2 * kWindow)), 0);
}

}  // namespace
}  // namespace vblk::blockdev
