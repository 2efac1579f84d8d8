// A disk that is handed over between servers, and the log of dirty pages as a frontend sets it up.
// What is marked is dirty_log_test.cpp's; a guest that migrates is tests/guest's.
#include <algorithm>
#include <array>
#include <cstdint>
#include <fcntl.h>
#include <limits>
#include <memory>
#include <string>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/handover_node.h"
#include "blockdev/image/open_image.h"
#include "blockdev/virtio/blk_wire.h"
#include "tests/support/temp_dir.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using test::Bytes;
using test::eventually;
using test::HoldingDisk;
using test::kPatience;
using test::payload_of;
using test::RawFrontend;
using test::Served;

constexpr std::uint64_t kImageBytes = std::uint64_t{1} << 20;
constexpr std::uint64_t kLogAll = std::uint64_t{1} << kFLogAll;
constexpr std::uint64_t kLogShmfd = std::uint64_t{1} << kProtocolFLogShmfd;

// A raw image that servers have in turn.
class HandedOverDisk : public ::testing::Test {
 protected:
  HandedOverDisk() {
    log::set_level(log::Level::kOff);
    options_.path = dir_.file("disk");
    options_.format = blockdev::ImageFormat::kRaw;
    options_.cache = blockdev::CacheMode::kWriteback;
    resize(kImageBytes);
  }
  void resize(std::uint64_t size_bytes) const {
    const int fd = ::open(options_.path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ASSERT_EQ(::ftruncate(fd, static_cast<off_t>(size_bytes)), 0);
    ::close(fd);
  }
  std::unique_ptr<blockdev::HandoverNode> node() const {
    return std::make_unique<blockdev::HandoverNode>(
        blockdev::look_at_image(options_).value(),
        [options = options_] { return blockdev::open_image(options); });
  }
  // Somebody else could have the image now.
  [[nodiscard]] bool is_free() const { return blockdev::open_image(options_).has_value(); }
  static Expected<std::unique_ptr<BlkDriver>> drive(const Served& served) {
    return BlkDriver::connect(served.path(), {.queue_count = 2,
                                              .queue_size = 64,
                                              .memory_bytes = std::size_t{2} << 20,
                                              .frontend = {.timeout = kPatience}});
  }

  test::TempDir dir_;
  blockdev::ImageOptions options_;
};

TEST_F(HandedOverDisk, is_open_only_while_a_frontend_runs_its_rings) {
  const auto disk = node();
  Served served(*disk, {.handover = disk.get()});
  EXPECT_TRUE(is_free());
  {
    const auto driver = drive(served);
    ASSERT_TRUE(driver.has_value()) << driver.error().message;
    EXPECT_FALSE(is_free());
  }
  EXPECT_TRUE(eventually([this] { return is_free(); }));
}

TEST_F(HandedOverDisk, has_in_the_next_server_what_was_written_in_the_last) {
  const auto one = node();
  const auto other = node();
  Served first(*one, {.handover = one.get()});
  Served second(*other, {.handover = other.get()});
  for (int turn = 0; turn < 6; ++turn) {
    auto driver = drive(turn % 2 == 0 ? first : second);
    ASSERT_TRUE(driver.has_value()) << driver.error().message;
    const auto data = (*driver)->memory().allocate(512, 512);
    EXPECT_EQ((*driver)->read(7, data).value(), virtio::kBlkSOk);
    EXPECT_EQ(data.front(), static_cast<std::byte>(turn));
    std::ranges::fill(data, static_cast<std::byte>(turn + 1));
    EXPECT_EQ((*driver)->write(7, data).value(), virtio::kBlkSOk);
    driver->reset();
    ASSERT_TRUE(eventually([this] { return is_free(); }));
  }
}

TEST_F(HandedOverDisk, is_refused_to_a_frontend_while_somebody_else_has_it) {
  const auto disk = node();
  Served served(*disk, {.handover = disk.get()});
  {
    const auto somebody = blockdev::open_image(options_);
    ASSERT_TRUE(somebody.has_value());
    EXPECT_FALSE(drive(served).has_value());
  }
  EXPECT_TRUE(drive(served).has_value());
}

TEST_F(HandedOverDisk, has_the_size_that_it_was_given_elsewhere) {
  const auto disk = node();
  Served served(*disk, {.handover = disk.get()});
  resize(2 * kImageBytes);
  const auto driver = drive(served);
  ASSERT_TRUE(driver.has_value()) << driver.error().message;
  EXPECT_EQ(disk->size_bytes(), 2 * kImageBytes);
}

TEST_F(HandedOverDisk, can_be_flushed_and_keeps_its_size_while_it_is_given_up) {
  const auto disk = node();
  Served served(*disk, {.handover = disk.get()});
  EXPECT_EQ(disk->size_bytes(), kImageBytes);
  EXPECT_EQ(disk->flush_statistics().begun, 0U);
  EXPECT_FALSE(disk->has_lost_writes());
  EXPECT_FALSE(disk->is_taken());
}

// ---- The log.

TEST_F(HandedOverDisk, is_served_though_nobody_reads_the_event_of_its_log) {
  const auto disk = node();
  Served served(*disk, {.handover = disk.get()});
  const auto driver = drive(served).value();
  driver::Frontend& frontend = driver->frontend();
  const std::uint64_t protocol = frontend.protocol_features() | kLogShmfd;
  ASSERT_TRUE(frontend.command(Request::kSetProtocolFeatures, payload_of(protocol)).has_value());
  const UniqueFd log(::memfd_create("log", MFD_CLOEXEC));
  // A bit for each page up to the driver's memory, which begins at 1 TiB.
  constexpr std::uint64_t kLogBytes = std::uint64_t{33} << 20;
  ASSERT_EQ(::ftruncate(log.get(), static_cast<off_t>(kLogBytes)), 0);
  ASSERT_TRUE(frontend
                  .command(Request::kSetLogBase, payload_of(LogDescription{kLogBytes, 0}),
                           std::array{log.get()})
                  .has_value());
  // Full, and whoever writes to it waits.
  const UniqueFd event(::eventfd(0, EFD_CLOEXEC));
  const std::uint64_t full = std::numeric_limits<std::uint64_t>::max() - 1;
  ASSERT_EQ(::write(event.get(), &full, sizeof full), static_cast<ssize_t>(sizeof full));
  ASSERT_TRUE(frontend.command(Request::kSetLogFd, {}, std::array{event.get()}).has_value());
  ASSERT_TRUE(frontend.command(Request::kSetFeatures, payload_of(frontend.features() | kLogAll))
                  .has_value());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(driver->flush().value(), virtio::kBlkSOk);
}

class MigratingFrontend : public HandedOverDisk {
 protected:
  MigratingFrontend()
      : disk_(node()), served_(*disk_, {.handover = disk_.get()}), frontend_(served_.path()) {
    EXPECT_TRUE(frontend_.polite().negotiate().has_value());
    const std::uint64_t wanted = frontend_.polite().protocol_features() | kLogShmfd;
    EXPECT_EQ(frontend_.acknowledged(Request::kSetProtocolFeatures, payload_of(wanted)), 0U);
  }
  static int log_file() {
    const int fd = ::memfd_create("log", MFD_CLOEXEC);
    EXPECT_EQ(::ftruncate(fd, 8192), 0);
    return fd;
  }
  [[nodiscard]] std::optional<std::uint64_t> set_log_base(std::uint64_t bytes, std::uint64_t offset,
                                                          std::vector<int> fds) {
    const auto answer =
        frontend_.call(Request::kSetLogBase, payload_of(LogDescription{bytes, offset}), fds);
    return answer ? decode<std::uint64_t>(*answer) : std::nullopt;
  }

  std::unique_ptr<blockdev::HandoverNode> disk_;
  Served served_;
  RawFrontend frontend_;
};

TEST_F(MigratingFrontend, is_offered_the_log_and_told_when_it_is_set) {
  EXPECT_NE(frontend_.polite().offered_features() & kLogAll, 0U);
  EXPECT_NE(*frontend_.call_u64(Request::kGetProtocolFeatures) & kLogShmfd, 0U);
  EXPECT_EQ(frontend_.polite().features() & kLogAll, 0U) << "nobody migrates yet";
  const UniqueFd log(log_file());
  EXPECT_EQ(set_log_base(4096, 4096, {log.get()}), 0U);
  EXPECT_EQ(frontend_.acknowledged(Request::kSetLogBase, payload_of(LogDescription{4096, 0}),
                                   std::array{log.get()}),
            0U)
      << "one answer is enough";
  EXPECT_EQ(frontend_.acknowledged(Request::kSetLogFd, {}, std::array{log.get()}), 0U);
  EXPECT_EQ(frontend_.acknowledged(Request::kSetFeatures,
                                   payload_of(frontend_.polite().features() | kLogAll)),
            0U);
}

TEST_F(MigratingFrontend, is_cut_off_for_a_log_that_is_no_memory) {
  const UniqueFd log(log_file());
  EXPECT_EQ(set_log_base(4096, 8192, {log.get()}), std::nullopt);
  EXPECT_TRUE(frontend_.cut_off());
}

TEST_F(MigratingFrontend, is_cut_off_for_a_log_without_a_descriptor) {
  EXPECT_EQ(set_log_base(4096, 0, {}), std::nullopt);
  EXPECT_TRUE(frontend_.cut_off());
}

TEST_F(MigratingFrontend, is_told_that_a_log_event_needs_a_descriptor) {
  EXPECT_NE(frontend_.acknowledged(Request::kSetLogFd), 0U);
}

TEST(Migration, is_not_offered_for_a_disk_that_cannot_be_handed_over) {
  HoldingDisk disk(kImageBytes);
  Served served(disk);
  RawFrontend frontend(served.path());
  ASSERT_TRUE(frontend.polite().negotiate().has_value());
  EXPECT_EQ(frontend.polite().offered_features() & kLogAll, 0U);
  EXPECT_EQ(*frontend.call_u64(Request::kGetProtocolFeatures) & kLogShmfd, 0U);
  EXPECT_NE(frontend.acknowledged(Request::kSetFeatures,
                                  payload_of(frontend.polite().features() | kLogAll)),
            0U);
  EXPECT_NE(frontend.acknowledged(Request::kSetLogFd), 0U);
}

}  // namespace
}  // namespace vblk::vhost_user
