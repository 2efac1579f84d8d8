// The log of dirty pages: which bits, how far it reaches, and two sides at once.
#include "blockdev/virtio/dirty_log.h"

#include <atomic>
#include <cstdint>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

using testing::MemFd;

constexpr std::uint64_t kPage = DirtyLog::kPageBytes;
constexpr std::uint64_t kMax = ~std::uint64_t{0};

// A log in a file, and the frontend's view of it.
struct Logged {
  explicit Logged(std::uint64_t size_bytes = 4096, std::uint64_t offset_bytes = 0)
      : file(8192), log(DirtyLog::map(file.fd(), size_bytes, offset_bytes).value()) {}
  [[nodiscard]] std::vector<std::uint64_t> pages() const {
    std::vector<std::uint8_t> bytes(8192);
    EXPECT_EQ(::pread(file.fd(), bytes.data(), bytes.size(), 0), 8192);
    std::vector<std::uint64_t> set;
    for (std::uint64_t bit = 0; bit < 8 * bytes.size(); ++bit) {
      if ((bytes[bit / 8] >> bit % 8 & 1) != 0) set.push_back(bit);
    }
    return set;
  }
  MemFd file;
  std::shared_ptr<const DirtyLog> log;
};

TEST(DirtyLog, marks_each_page_that_a_range_touches) {
  const Logged logged;
  logged.log->mark(3 * kPage, 1);
  logged.log->mark(7 * kPage - 1, 2);
  logged.log->mark(9 * kPage, kPage);
  logged.log->mark(11 * kPage, 0);
  logged.log->mark(3 * kPage + 5, 8);
  EXPECT_EQ(logged.pages(), (std::vector<std::uint64_t>{3, 6, 7, 9}));
}

TEST(DirtyLog, begins_at_its_offset_in_the_file) {
  const Logged logged(16, 24);
  logged.log->mark(0, 1);
  EXPECT_EQ(logged.pages(), std::vector<std::uint64_t>{24 * 8});
}

TEST(DirtyLog, reaches_as_far_as_its_bits) {
  const Logged logged(2);
  EXPECT_TRUE(logged.log->covers(0, 16 * kPage));
  EXPECT_TRUE(logged.log->covers(16 * kPage - 1, 1));
  EXPECT_FALSE(logged.log->covers(0, 16 * kPage + 1));
  EXPECT_FALSE(logged.log->covers(16 * kPage, 0));
  EXPECT_FALSE(logged.log->covers(kPage, kMax));
  EXPECT_FALSE(logged.log->covers(kMax, kMax));
}

TEST(DirtyLog, must_lie_in_its_file) {
  const MemFd file(8192);
  EXPECT_FALSE(DirtyLog::map(file.fd(), 8193, 0).has_value());
  EXPECT_FALSE(DirtyLog::map(file.fd(), 1, 8192).has_value());
  EXPECT_FALSE(DirtyLog::map(file.fd(), 0, 0).has_value());
  EXPECT_FALSE(DirtyLog::map(-1, 8, 0).has_value());
}

// The device writes a page and marks it; the frontend takes the bit and copies. What it copied last
// must be what was written last.
TEST(DirtyLog, loses_no_write_to_a_frontend_that_takes_bits_meanwhile) {
  const Logged logged;
  void* const view = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, logged.file.fd(), 0);
  ASSERT_NE(view, MAP_FAILED);
  const std::atomic_ref<std::uint64_t> bits(*static_cast<std::uint64_t*>(view));
  constexpr std::uint64_t kWrites = 200'000;
  std::atomic<std::uint64_t> page{0};
  std::atomic<bool> done{false};
  std::uint64_t copied = 0;
  std::thread device([&] {
    for (std::uint64_t i = 1; i <= kWrites; ++i) {
      page.store(i, std::memory_order_relaxed);
      logged.log->mark(5 * kPage, 1);
    }
    done.store(true);
  });
  const auto take = [&] {
    if (bits.exchange(0) != 0) copied = page.load();
  };
  while (!done.load()) take();
  take();
  device.join();
  EXPECT_EQ(copied, kWrites);
  ::munmap(view, 4096);
}

}  // namespace
}  // namespace vblk::virtio
