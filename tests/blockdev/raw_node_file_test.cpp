// The raw node on real files: every engine, every cache mode, images of odd sizes, requests of odd
// offsets and lengths, and several threads at once.
#include <array>
#include <cstdint>
#include <fcntl.h>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <sys/stat.h>
#include <thread>
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

constexpr std::uint64_t kSectorBytes = 512;
constexpr std::uint64_t kDiskBytes = std::uint64_t{1} << 20;

constexpr std::array kAllCacheModes{CacheMode::kNone, CacheMode::kWriteback,
                                    CacheMode::kWritethrough, CacheMode::kDirectsync,
                                    CacheMode::kUnsafe};

std::uint64_t whole_sectors(std::uint64_t bytes) {
  return (bytes + kSectorBytes - 1) / kSectorBytes * kSectorBytes;
}

Bytes contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const auto* const begin = reinterpret_cast<const std::byte*>(text.data());
  return {begin, begin + text.size()};
}

class RawFile : public ::testing::TestWithParam<std::tuple<aio::EngineName, CacheMode>> {
 protected:
  void SetUp() override {
    random_.seed(test::test_seed());
    auto engines = make_engines();
    if (!engines) {
      if (engines.error().kind == ErrorKind::kPermission) GTEST_SKIP() << engines.error().message;
      FAIL() << engines.error().message;
    }
    context_ = std::make_unique<Context>(std::move(*engines));
  }

  static Expected<std::unique_ptr<aio::EngineSet>> make_engines() {
    aio::AioSelection selection;
    selection.engine_of_kind.fill(std::get<aio::EngineName>(GetParam()));
    return aio::EngineSet::create(selection, {});
  }
  // Makes a file of random bytes and opens it. Skips the test where there is no O_DIRECT.
  void open(std::uint64_t size_bytes, bool read_only = false) {
    written_ = testing::random_bytes(random_, size_bytes);
    std::ofstream file(path(), std::ios::binary);
    file.write(reinterpret_cast<const char*>(written_.data()),
               static_cast<std::streamsize>(size_bytes));
    file.close();
    auto node = open_image(
        {.path = path(), .cache = std::get<CacheMode>(GetParam()), .read_only = read_only});
    if (!node && node.error().kind == ErrorKind::kNotSupported)
      GTEST_SKIP() << node.error().message;
    ASSERT_TRUE(node) << node.error().message;
    node_ = std::move(*node);
  }
  [[nodiscard]] std::string path() const { return dir_.file("disk"); }
  // The disk as the guest ought to see it at first.
  [[nodiscard]] Bytes model() const {
    Bytes bytes = written_;
    bytes.resize(whole_sectors(bytes.size()));
    return bytes;
  }
  // The file's bytes, with zeroes up to the end of its last sector.
  [[nodiscard]] Bytes file_as_seen_by_the_guest() const {
    Bytes bytes = contents(path());
    EXPECT_LE(bytes.size(), node_->size_bytes()) << "the file has grown beyond the disk";
    bytes.resize(node_->size_bytes());
    return bytes;
  }
  Expected<void> resize(std::uint64_t size_bytes) {
    std::optional<Expected<void>> outcome;
    node_->resize(size_bytes, **context_,
                  [&outcome](Expected<void> result) { outcome.emplace(std::move(result)); });
    context_->drain();
    EXPECT_TRUE(outcome.has_value());
    return outcome.value_or(Expected<void>{});
  }
  void check_random_operations(const testing::RandomOperations& options) {
    const Bytes expected =
        testing::run_random_operations(*node_, *context_, model(), options, random_());
    EXPECT_TRUE(context_->read(*node_, 0, node_->size_bytes()) == expected);
    EXPECT_TRUE(file_as_seen_by_the_guest() == expected);
  }

  test::TempDir dir_;
  std::mt19937_64 random_;
  Bytes written_;
  std::unique_ptr<BlockNode> node_;
  std::unique_ptr<Context> context_;
};

TEST_P(RawFile, agrees_with_a_flat_array) {
  open(kDiskBytes);
  if (IsSkipped()) return;
  check_random_operations({});
}

TEST_P(RawFile, reads_any_byte_while_sectors_change) {
  open(kDiskBytes);
  if (IsSkipped()) return;
  check_random_operations({.reads_any_byte = true});
}

// Many small ones in few pages: neighbours share blocks and pages of the file most of the time.
TEST_P(RawFile, loses_no_neighbours_bytes) {
  open(16384);
  if (IsSkipped()) return;
  check_random_operations(
      {.count = 2000, .reads_any_byte = true, .length_bytes_max = 2048, .batch_max = 24});
}

// Regression: flushes failed with EIO for ever, and acknowledged writes were lost, after a write
// into the last, partial sector through the page cache met a direct write to the same page.
TEST_P(RawFile, agrees_with_a_flat_array_whatever_the_size_of_the_file) {
  for (const std::uint64_t size :
       {std::uint64_t{1}, std::uint64_t{511}, std::uint64_t{513}, std::uint64_t{4097},
        std::uint64_t{10000}, std::uint64_t{131072 + 512}, std::uint64_t{131072 + 4095}}) {
    SCOPED_TRACE(size);
    open(size);
    if (IsSkipped()) return;
    ASSERT_EQ(node_->size_bytes(), whole_sectors(size));
    check_random_operations({.count = 300, .length_bytes_max = 16384, .batch_max = 16});
    if (HasFailure()) return;
    node_.reset();
  }
}

TEST_P(RawFile, reads_zeroes_from_the_end_of_the_file_to_the_end_of_its_last_sector) {
  open(700);
  if (IsSkipped()) return;
  Bytes last_sector(written_.begin() + 512, written_.end());
  last_sector.resize(kSectorBytes);
  EXPECT_EQ(context_->read(*node_, 512, kSectorBytes), last_sector);
  EXPECT_EQ(context_->read(*node_, 700, 324), Bytes(324));
  EXPECT_EQ(contents(path()).size(), 700U) << "reading changes nothing";
  const Bytes whole_sector(kSectorBytes, std::byte{0x5a});
  EXPECT_EQ(context_->write(*node_, 512, whole_sector), 0);
  EXPECT_EQ(context_->read(*node_, 512, kSectorBytes), whole_sector);
  EXPECT_EQ(contents(path()).size(), 1024U) << "and writing no more than that sector";
}

TEST_P(RawFile, becomes_larger_with_zeroes_and_never_smaller) {
  const bool direct = uses_direct_io(std::get<CacheMode>(GetParam()));
  open(direct ? 70'144 : 70'000);
  if (IsSkipped()) return;
  const std::uint64_t old_bytes = node_->size_bytes();
  EXPECT_TRUE(resize(old_bytes));
  ASSERT_TRUE(resize(200'192));
  EXPECT_EQ(node_->size_bytes(), 200'192U);
  Bytes expected = model();
  expected.resize(200'192);
  EXPECT_TRUE(context_->read(*node_, 0, 200'192) == expected);
  const Bytes last = testing::random_bytes(random_, 512);
  EXPECT_EQ(context_->write(*node_, 200'192 - 512, last), 0);
  std::ranges::copy(last, expected.end() - 512);
  EXPECT_TRUE(file_as_seen_by_the_guest() == expected);
  for (const std::uint64_t size : {std::uint64_t{0}, std::uint64_t{200'193}, old_bytes})
    EXPECT_FALSE(resize(size)) << size;
  EXPECT_EQ(node_->size_bytes(), 200'192U);
}

TEST_P(RawFile, gets_space_for_its_holes_without_being_written) {
  open(70'144);
  if (IsSkipped()) return;
  struct stat status{};
  ASSERT_EQ(::truncate(path().c_str(), 0), 0);
  ASSERT_EQ(::truncate(path().c_str(), 70'144), 0);
  ASSERT_EQ(::stat(path().c_str(), &status), 0);
  ASSERT_EQ(status.st_blocks, 0);
  testing::TestRequest space(BlockOperation::kWriteZeroes, 512, 69'632);
  space.only_takes_space = true;
  EXPECT_EQ(context_->run(*node_, space), 0);
  ASSERT_EQ(::stat(path().c_str(), &status), 0);
  EXPECT_EQ(status.st_size, 70'144);
  EXPECT_EQ(contents(path()), Bytes(70'144));
  const int fd = ::open(path().c_str(), O_RDWR | O_CLOEXEC);
  const bool works = ::fallocate(fd, FALLOC_FL_ZERO_RANGE, 0, 4096) == 0;
  ::close(fd);
  if (!works) GTEST_SKIP() << "no such file system";
  EXPECT_GE(status.st_blocks * 512, 65'536) << "whole pages";
}

// What the kernel does with the rest of a file's last page must not meet direct writes to its other
// sectors: it would fail the next flush, and may write the page back over them.
TEST_P(RawFile, becomes_larger_beside_writes_to_its_last_page) {
  open(std::uint64_t{8} * 4096 + kSectorBytes);
  if (IsSkipped()) return;
  Bytes expected = model();
  for (int round = 0; round < 100; ++round) {
    const std::uint64_t size = node_->size_bytes();
    const std::uint64_t page = (size - 1) / 4096 * 4096;
    std::vector<std::unique_ptr<testing::TestRequest>> writes;
    for (std::uint64_t offset = page; offset < size; offset += kSectorBytes) {
      const Bytes sector = testing::random_bytes(random_, kSectorBytes);
      std::ranges::copy(sector, expected.begin() + static_cast<std::ptrdiff_t>(offset));
      writes.push_back(
          std::make_unique<testing::TestRequest>(BlockOperation::kWrite, offset, kSectorBytes));
      writes.back()->use_plain_memory();
      writes.back()->fill(sector);
      context_->start(*node_, *writes.back());
    }
    (*context_)->engines().submit();
    ASSERT_TRUE(resize(size + kSectorBytes));
    expected.resize(size + kSectorBytes);
    for (const auto& write : writes) EXPECT_EQ(write->error, 0);
    ASSERT_EQ(context_->flush(*node_), 0);
  }
  EXPECT_TRUE(context_->read(*node_, 0, node_->size_bytes()) == expected);
  EXPECT_TRUE(file_as_seen_by_the_guest() == expected);
}

TEST_P(RawFile, that_ends_within_a_sector_becomes_larger_only_without_direct_io) {
  open(70'000);
  if (IsSkipped()) return;
  EXPECT_EQ(resize(200'192).has_value(), !uses_direct_io(std::get<CacheMode>(GetParam())));
}

TEST_P(RawFile, keeps_the_bytes_of_every_thread) {
  for (const std::uint64_t size : {std::uint64_t{10000}, std::uint64_t{16384}}) {
    open(size);
    if (IsSkipped()) return;
    const Bytes expected = testing::run_neighbouring_threads(
        *node_, model(), [] { return *make_engines(); }, random_());
    EXPECT_TRUE(file_as_seen_by_the_guest() == expected);
    node_.reset();
  }
}

INSTANTIATE_TEST_SUITE_P(AllEnginesAndModes, RawFile,
                         ::testing::Combine(::testing::ValuesIn(aio::kAllEngineNames),
                                            ::testing::ValuesIn(kAllCacheModes)),
                         [](const auto& variant) {
                           return std::string(
                                      aio::to_string(std::get<aio::EngineName>(variant.param))) +
                                  "_" + std::string(to_string(std::get<CacheMode>(variant.param)));
                         });

}  // namespace
}  // namespace vblk::blockdev
