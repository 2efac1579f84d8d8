// From the kick to the interrupt, on every engine, the steady state allocates nothing: each call of
// operator new in this program, on any thread, is counted.
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <new>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/image.h"
#include "blockdev/image/open_image.h"
#include "tests/qcow2/image_format.h"
#include "tests/support/seed.h"
#include "tests/vhost_user/served_disk.h"

namespace {
std::atomic<std::uint64_t> allocation_count{0};
}  // namespace

void* operator new(std::size_t bytes) {
  allocation_count.fetch_add(1, std::memory_order_relaxed);
  if (void* const memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
// NOLINTBEGIN(clang-analyzer-cplusplus.NewDelete): these are the operators themselves.
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*bytes*/) noexcept { std::free(memory); }
// NOLINTEND(clang-analyzer-cplusplus.NewDelete)

namespace vblk::driver {
namespace {

constexpr std::size_t kDiskBytes = std::size_t{8} << 20;
constexpr unsigned kDepth = 32;
constexpr auto kQcow2 = blockdev::ImageFormat::kQcow2;

struct Case {
  aio::EngineName engine;
  blockdev::CacheMode cache;
  blockdev::ImageFormat format{blockdev::ImageFormat::kRaw};
  bool inflight{false};
};

// A raw image of zeroes, or a qcow2 image in which all is mapped.
void make_image(const std::string& path, blockdev::ImageFormat format) {
  std::ofstream file(path, std::ios::binary);
  if (format == blockdev::ImageFormat::kQcow2) {
    std::mt19937_64 random(1);
    const auto image =
        qcow2::testing::format_image({.size_bytes = kDiskBytes, .mapped_percent = 100}, random);
    file.write(reinterpret_cast<const char*>(image.bytes.data()),
               static_cast<std::streamsize>(image.bytes.size()));
  }
  file.close();
  if (format == blockdev::ImageFormat::kRaw) std::filesystem::resize_file(path, kDiskBytes);
}

// A closed loop of all kinds of requests; an eighth of them in memory that O_DIRECT does not take.
class Load {
 public:
  explicit Load(BlkDriver& driver) : driver_(driver), random_(test::test_seed()), ios_(kDepth) {
    for (BlkIo& io : ios_) {
      buffers_.push_back(driver.memory().allocate(8192, 4096));
      io.context = this;
      io.complete = [](BlkIo& done) {
        Load& load = *static_cast<Load*>(done.context);
        load.failed_ += done.status == virtio::kBlkSOk ? 0 : 1;
        --load.in_flight_;
        load.next(done);
      };
    }
  }

  // Completes `count` more requests, and leaves none in flight.
  void run(unsigned count) {
    left_ = count;
    for (BlkIo& io : ios_) next(io);
    driver_.kick(0);
    while (in_flight_ > 0) {
      ASSERT_TRUE(driver_.wait(0, test::kPatience).has_value());
      driver_.kick(0);
    }
    ASSERT_EQ(failed_, 0U);
  }

 private:
  void next(BlkIo& io) {
    if (left_ == 0) return;
    --left_;
    ++in_flight_;
    const auto slot = static_cast<std::size_t>(&io - ios_.data());
    const bool flush = random_() % 16 == 0;
    constexpr std::array kTransfers{virtio::kBlkTIn, virtio::kBlkTOut};
    io.type = flush ? virtio::kBlkTFlush : kTransfers[random_() % 2];
    io.sector = flush ? 0 : random_() % (kDiskBytes / 4096) * 8;
    const std::size_t misalignment = random_() % 8 == 0 ? 7 : 0;
    io.data = flush ? std::span<std::byte>{} : buffers_[slot].subspan(misalignment, 4096);
    ASSERT_TRUE(driver_.submit(0, io));
  }

  BlkDriver& driver_;
  std::mt19937_64 random_;
  std::vector<BlkIo> ios_;
  std::vector<std::span<std::byte>> buffers_;
  unsigned left_{0};
  unsigned in_flight_{0};
  unsigned failed_{0};
};

class Allocation : public ::testing::TestWithParam<Case> {};

TEST_P(Allocation, five_thousand_requests_allocate_nothing) {
  const test::TempDir dir;
  const std::string path = dir.file("disk");
  make_image(path, GetParam().format);
  aio::AioSelection selection;
  selection.engine_of_kind.fill(GetParam().engine);
  // Few workers, so that all are there after the warm-up: starting one allocates.
  const auto make_engines = [&selection] {
    return aio::EngineSet::create(selection, {.max_threads = 2});
  };
  if (const auto probe = make_engines(); !probe) GTEST_SKIP() << probe.error().message;
  const auto node =
      blockdev::open_image({.path = path, .format = GetParam().format, .cache = GetParam().cache});
  if (!node) GTEST_SKIP() << node.error().message;
  test::Served served(**node, {.make_engines = make_engines});
  const auto driver = BlkDriver::connect(
      served.path(), {.memory_bytes = std::size_t{4} << 20, .inflight = GetParam().inflight});
  ASSERT_TRUE(driver.has_value()) << driver.error().message;
  Load load(**driver);
  load.run(2000);
  const std::uint64_t before = allocation_count.load();
  load.run(5000);
  EXPECT_EQ(allocation_count.load() - before, 0U);
}

INSTANTIATE_TEST_SUITE_P(
    Engines, Allocation,
    ::testing::Values(Case{aio::EngineName::kThreads, blockdev::CacheMode::kNone},
                      Case{aio::EngineName::kThreads, blockdev::CacheMode::kWriteback},
                      Case{aio::EngineName::kNative, blockdev::CacheMode::kNone},
                      Case{aio::EngineName::kNative, blockdev::CacheMode::kWriteback},
                      Case{aio::EngineName::kIoUring, blockdev::CacheMode::kNone},
                      Case{aio::EngineName::kIoUring, blockdev::CacheMode::kWriteback},
                      Case{aio::EngineName::kThreads, blockdev::CacheMode::kNone, kQcow2},
                      Case{aio::EngineName::kNative, blockdev::CacheMode::kNone, kQcow2},
                      Case{aio::EngineName::kIoUring, blockdev::CacheMode::kNone, kQcow2},
                      Case{aio::EngineName::kIoUring, blockdev::CacheMode::kNone,
                           blockdev::ImageFormat::kRaw, true},
                      Case{aio::EngineName::kIoUring, blockdev::CacheMode::kNone, kQcow2, true}),
    [](const auto& each) {
      return std::string(aio::to_string(each.param.engine)) + "_" +
             std::string(blockdev::to_string(each.param.cache)) +
             (each.param.format == kQcow2 ? "_qcow2" : "") +
             (each.param.inflight ? "_with_recovery" : "");
    });

TEST(AllocationCounter, counts) {
  const std::uint64_t before = allocation_count.load();
  const auto canary = std::make_unique<std::array<int, 100>>();
  ASSERT_NE(canary, nullptr);
  EXPECT_GT(allocation_count.load(), before);
}

}  // namespace
}  // namespace vblk::driver
