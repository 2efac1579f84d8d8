// The raw node on block devices: loop devices with sectors of 512 and of 4096 bytes, on every
// engine, with and without O_DIRECT. Needs root and the loop driver.
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <linux/loop.h>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <tuple>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/image.h"
#include "blockdev/image/open_image.h"
#include "tests/blockdev/disk_fixture.h"
#include "tests/support/seed.h"
#include "tests/support/temp_dir.h"

namespace vblk::blockdev {
namespace {

using testing::Bytes;
using testing::Context;

constexpr std::uint64_t kDiskBytes = std::uint64_t{1} << 20;

// A loop device over a file. The kernel takes it down when its last descriptor is closed, however
// this process ends.
class LoopDevice {
 public:
  struct Options {
    std::uint32_t sector_bytes{512};
    bool read_only{false};
  };

  // nullptr where there is no loop driver or no right to use it; `why_not` says which.
  static std::unique_ptr<LoopDevice> attach(const std::string& backing_path, const Options& options,
                                            std::string& why_not) {
    std::unique_ptr<LoopDevice> device(new LoopDevice);
    const int control = ::open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    if (control < 0) {
      why_not = "/dev/loop-control: " + describe_errno(errno);
      return nullptr;
    }
    const int backing =
        ::open(backing_path.c_str(), (options.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    // Between asking for a free device and taking it, somebody else may take it.
    for (int attempt = 0; attempt < 100 && !device->attached_; ++attempt)
      device->attach_once(control, backing, options);
    if (!device->attached_) why_not = "no loop device: " + describe_errno(errno);
    ::close(backing);
    ::close(control);
    return device->attached_ ? std::move(device) : nullptr;
  }
  ~LoopDevice() {
    if (fd_ >= 0) ::close(fd_);
  }
  LoopDevice(const LoopDevice&) = delete;
  LoopDevice& operator=(const LoopDevice&) = delete;

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  LoopDevice() = default;
  void attach_once(int control, int backing, const Options& options) {
    const int number = ::ioctl(control, LOOP_CTL_GET_FREE);
    if (number < 0) return;
    path_ = "/dev/loop" + std::to_string(number);
    fd_ = ::open(path_.c_str(), (options.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (fd_ < 0) return;
    loop_config config{};
    config.fd = static_cast<std::uint32_t>(backing);
    config.block_size = options.sector_bytes;
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
    if (options.read_only) config.info.lo_flags |= LO_FLAGS_READ_ONLY;
    attached_ = ::ioctl(fd_, LOOP_CONFIGURE, &config) == 0;
    if (attached_) return;
    const int error = errno;
    ::close(fd_);
    fd_ = -1;
    errno = error;
  }

  std::string path_;
  int fd_{-1};
  bool attached_{false};
};

struct Variant {
  aio::EngineName engine;
  CacheMode cache;
  std::uint32_t sector_bytes;
};

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const aio::EngineName engine : aio::kAllEngineNames) {
    for (const CacheMode cache : {CacheMode::kNone, CacheMode::kWriteback}) {
      for (const std::uint32_t sector_bytes : {512U, 4096U})
        all.push_back({engine, cache, sector_bytes});
    }
  }
  return all;
}

class RawDevice : public ::testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    random_.seed(test::test_seed());
    written_ = testing::random_bytes(random_, kDiskBytes);
    std::ofstream file(backing_path(), std::ios::binary);
    file.write(reinterpret_cast<const char*>(written_.data()), kDiskBytes);
    file.close();
    std::string why_not;
    device_ =
        LoopDevice::attach(backing_path(), {.sector_bytes = GetParam().sector_bytes}, why_not);
    if (device_ == nullptr) GTEST_SKIP() << why_not;
    auto engines = make_engines();
    if (!engines && engines.error().kind == ErrorKind::kPermission)
      GTEST_SKIP() << engines.error().message;
    ASSERT_TRUE(engines) << engines.error().message;
    context_ = std::make_unique<Context>(std::move(*engines));
    auto node = open_image({.path = device_->path(), .cache = GetParam().cache});
    ASSERT_TRUE(node) << node.error().message;
    node_ = std::move(*node);
  }

  static Expected<std::unique_ptr<aio::EngineSet>> make_engines() {
    aio::AioSelection selection;
    selection.engine_of_kind.fill(GetParam().engine);
    return aio::EngineSet::create(selection, {});
  }
  [[nodiscard]] std::string backing_path() const { return dir_.file("backing"); }
  // What is allocated under the device once everything has reached it.
  [[nodiscard]] std::uint64_t allocated_bytes() {
    EXPECT_EQ(context_->flush(*node_), 0);
    const int fd = ::open(backing_path().c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw std::runtime_error("cannot open " + backing_path());
    EXPECT_EQ(::fsync(fd), 0);
    struct stat status{};
    EXPECT_EQ(::fstat(fd, &status), 0);
    ::close(fd);
    return static_cast<std::uint64_t>(status.st_blocks) * 512;
  }

  test::TempDir dir_;
  std::mt19937_64 random_;
  Bytes written_;
  std::unique_ptr<LoopDevice> device_;
  std::unique_ptr<BlockNode> node_;
  std::unique_ptr<Context> context_;
};

TEST_P(RawDevice, has_the_size_and_the_blocks_of_the_device) {
  EXPECT_EQ(node_->size_bytes(), kDiskBytes);
  EXPECT_EQ(node_->limits().optimal_alignment_bytes, GetParam().sector_bytes);
  EXPECT_EQ(node_->name(), device_->path());
}

TEST_P(RawDevice, agrees_with_a_flat_array) {
  const Bytes expected = testing::run_random_operations(
      *node_, *context_, written_, {.reads_any_byte = true, .discard_zeroes = false}, random_());
  EXPECT_TRUE(context_->read(*node_, 0, kDiskBytes) == expected);
}

// Many small ones in few pages, so that parts of a device's block are written side by side.
TEST_P(RawDevice, loses_no_neighbours_bytes) {
  const Bytes expected = testing::run_random_operations(*node_, *context_, written_,
                                                        {.count = 1500,
                                                         .reads_any_byte = true,
                                                         .length_bytes_max = 2048,
                                                         .batch_max = 24,
                                                         .place_bytes_max = 32768,
                                                         .discard_zeroes = false},
                                                        random_());
  EXPECT_TRUE(context_->read(*node_, 0, kDiskBytes) == expected);
}

TEST_P(RawDevice, keeps_the_bytes_of_every_thread) {
  Bytes expected(written_.begin(), written_.begin() + 16384);
  expected = testing::run_neighbouring_threads(
      *node_, std::move(expected), [] { return *make_engines(); }, random_());
  EXPECT_TRUE(context_->read(*node_, 0, expected.size()) == expected);
}

TEST_P(RawDevice, takes_discards_and_zeroes_that_are_not_whole_blocks_of_the_device) {
  EXPECT_EQ(context_->write_zeroes(*node_, 512, 8192, false), 0);
  EXPECT_EQ(context_->write_zeroes(*node_, 20480 + 1024, 512, true), 0);
  EXPECT_EQ(context_->discard(*node_, 40960 + 512, 1024), 0);
  EXPECT_EQ(context_->discard(*node_, 65536 + 512, 16384), 0);
  EXPECT_EQ(context_->read(*node_, 512, 8192), Bytes(8192));
  EXPECT_EQ(context_->read(*node_, 20480 + 1024, 512), Bytes(512));
}

TEST_P(RawDevice, frees_space_below_when_discarded) {
  const std::uint64_t before = allocated_bytes();
  EXPECT_EQ(context_->discard(*node_, 0, kDiskBytes / 2), 0);
  EXPECT_LE(allocated_bytes(), before - kDiskBytes / 4);
}

INSTANTIATE_TEST_SUITE_P(Loop, RawDevice, ::testing::ValuesIn(variants()), [](const auto& variant) {
  return std::string(aio::to_string(variant.param.engine)) + "_" +
         std::string(to_string(variant.param.cache)) + "_" +
         std::to_string(variant.param.sector_bytes);
});

TEST(ReadOnlyDevice, is_refused_for_writing_and_opened_for_reading) {
  const test::TempDir dir;
  std::ofstream(dir.file("backing")) << std::string(65536, 'x');
  std::string why_not;
  const auto device = LoopDevice::attach(dir.file("backing"), {.read_only = true}, why_not);
  if (device == nullptr) GTEST_SKIP() << why_not;
  const auto writable = open_image({.path = device->path(), .cache = CacheMode::kNone});
  ASSERT_FALSE(writable);
  EXPECT_EQ(writable.error().kind, ErrorKind::kPermission);
  EXPECT_NE(writable.error().message.find(device->path()), std::string::npos);
  EXPECT_NE(writable.error().message.find("--read-only"), std::string::npos)
      << writable.error().message;
  const auto readable =
      open_image({.path = device->path(), .cache = CacheMode::kNone, .read_only = true});
  ASSERT_TRUE(readable) << readable.error().message;
  EXPECT_TRUE((*readable)->limits().read_only);
}

}  // namespace
}  // namespace vblk::blockdev
