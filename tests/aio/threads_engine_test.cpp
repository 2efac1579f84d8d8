// What only the threads engine does: answer reads from the page cache without a worker.
#include "aio/threads_engine.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/temp_dir.h"

namespace vblk::aio {
namespace {

constexpr std::size_t kFileBytes = std::size_t{1} << 20;

class PageCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string path = dir_.file("file");
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ASSERT_GE(fd_, 0);
    content_.resize(kFileBytes);
    for (std::size_t i = 0; i < content_.size(); ++i)
      content_[i] = static_cast<std::byte>(i * 7 + i / 4096);
    ASSERT_EQ(::pwrite(fd_, content_.data(), kFileBytes, 0), static_cast<ssize_t>(kFileBytes));
    iovec probe{.iov_base = content_.data(), .iov_len = 512};
    if (::preadv2(fd_, &probe, 1, 0, RWF_NOWAIT) != 512)
      GTEST_SKIP() << "this file system has no RWF_NOWAIT for reads";
    engine_ = std::move(ThreadsEngine::create({}).value());
  }
  void TearDown() override { ::close(fd_); }

  struct Read : IoRequest {
    std::vector<std::byte> data;
    iovec vector{};
    int error{-1};
  };
  void start(Read& read, std::uint64_t offset, std::size_t length, bool may_be_cached = true) {
    read.data.assign(length, std::byte{0xee});
    read.vector = {.iov_base = read.data.data(), .iov_len = length};
    read.kind = IoKind::kRead;
    read.may_be_cached = may_be_cached;
    read.fd = fd_;
    read.offset_bytes = offset;
    read.length_bytes = length;
    read.iov = &read.vector;
    read.iov_count = 1;
    read.complete = [](IoRequest& request, int error) {
      static_cast<Read&>(request).error = error;
    };
    engine_->queue(read);
  }
  void finish() {
    while (engine_->in_flight() > 0) {
      if (engine_->reap() > 0 || !engine_->prepare_to_sleep()) continue;
      pollfd ready{.fd = engine_->completion_fd(), .events = POLLIN, .revents = 0};
      ::poll(&ready, 1, 10'000);
      engine_->wake_up();
    }
  }
  void expect_content(const Read& read) {
    EXPECT_EQ(read.error, 0);
    EXPECT_EQ(std::memcmp(read.data.data(), &content_[read.offset_bytes], read.data.size()), 0);
  }
  // The kernel keeps pages that it is still busy with, such as those of a read-ahead.
  void drop_page_cache() const {
    ASSERT_EQ(::fdatasync(fd_), 0);
    for (int tries = 0; tries < 1000 && is_any_page_cached(); ++tries) {
      ASSERT_EQ(::posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED), 0);
      std::this_thread::sleep_for(std::chrono::milliseconds(tries == 0 ? 0 : 1));
    }
    ASSERT_FALSE(is_any_page_cached());
  }
  [[nodiscard]] bool is_any_page_cached() const {
    void* const mapping = ::mmap(nullptr, kFileBytes, PROT_READ, MAP_SHARED, fd_, 0);
    if (mapping == MAP_FAILED) return true;
    std::vector<unsigned char> pages((kFileBytes + 4095) / 4096);
    const bool known = ::mincore(mapping, kFileBytes, pages.data()) == 0;
    ::munmap(mapping, kFileBytes);
    return !known || std::ranges::any_of(pages, [](unsigned char page) { return page % 2 != 0; });
  }

  test::TempDir dir_;
  int fd_{-1};
  std::vector<std::byte> content_;
  std::unique_ptr<ThreadsEngine> engine_;
};

TEST_F(PageCacheTest, answers_what_is_there_without_a_worker_and_from_reap) {
  std::array<Read, 4> reads;
  for (std::size_t i = 0; i < reads.size(); ++i) start(reads[i], i * 8192, 4096);
  engine_->submit();
  for (const Read& read : reads) EXPECT_EQ(read.error, -1) << "completed inside submit()";
  EXPECT_FALSE(engine_->prepare_to_sleep()) << "there is something to reap";
  EXPECT_EQ(engine_->reap(), reads.size());
  for (const Read& read : reads) expect_content(read);
  EXPECT_EQ(engine_->statistics().page_cache_hits, reads.size());
  EXPECT_EQ(engine_->pool_statistics().threads, 0U);
}

TEST_F(PageCacheTest, leaves_to_a_worker_what_is_not_there) {
  drop_page_cache();
  Read read;
  start(read, 0, 4096);
  engine_->submit();
  finish();
  expect_content(read);
  EXPECT_EQ(engine_->statistics().page_cache_hits, 0U);
  // A second one helps where the first is slow to start.
  EXPECT_GE(engine_->pool_statistics().threads, 1U);
}

TEST_F(PageCacheTest, leaves_long_copies_to_a_worker) {
  Read read;
  start(read, 0, kFileBytes);
  engine_->submit();
  finish();
  expect_content(read);
  EXPECT_EQ(engine_->statistics().page_cache_hits, 0U);
}

TEST_F(PageCacheTest, goes_on_trying_now_and_then_after_many_misses) {
  Read read;
  for (std::uint64_t i = 0; i < 40; ++i) {
    drop_page_cache();
    start(read, i * 16384, 512);
    engine_->submit();
    finish();
    expect_content(read);
  }
  ASSERT_EQ(engine_->statistics().page_cache_hits, 0U);
  for (int i = 0; i < 40; ++i) {
    start(read, 0, 512);
    engine_->submit();
    finish();
    expect_content(read);
  }
  EXPECT_GE(engine_->statistics().page_cache_hits, 20U);
}

TEST_F(PageCacheTest, does_not_try_where_the_file_is_direct) {
  Read read;
  start(read, 0, 4096, false);
  engine_->submit();
  finish();
  expect_content(read);
  EXPECT_EQ(engine_->statistics().page_cache_hits, 0U);
}

}  // namespace
}  // namespace vblk::aio
