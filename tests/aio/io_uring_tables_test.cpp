// Registered files and buffers: used where they are announced, never needed, and never stale.
#include "aio/io_uring_tables.h"

#include <array>
#include <cstddef>
#include <fcntl.h>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "aio/engine_set.h"
#include "aio/io_uring_engine.h"
#include "tests/support/temp_dir.h"

namespace vblk::aio {
namespace {

constexpr std::size_t kPage = 4096;

// Anonymous pages, as guest memory would be.
class Pages {
 public:
  explicit Pages(std::size_t count, int protection = PROT_READ | PROT_WRITE)
      : bytes_(count * kPage),
        data_(static_cast<std::byte*>(
            ::mmap(nullptr, bytes_, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {}
  ~Pages() { ::munmap(data_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  [[nodiscard]] std::byte* at(std::size_t page) const { return data_ + page * kPage; }
  [[nodiscard]] iovec range() const { return {.iov_base = data_, .iov_len = bytes_}; }

 private:
  std::size_t bytes_;
  std::byte* data_;
};

struct Done : IoRequest {
  int error{-1};
};

class IoUringTables : public testing::Test {
 protected:
  void SetUp() override {
    fd_ = make_file("disk", std::byte{0x11});
    make_engine({.registered_buffers = true});
  }
  void TearDown() override { ::close(fd_); }

  void make_engine(const IoUringFeatures& features, const IoUringLimits& limits = {}) {
    auto engine = IoUringEngine::create({.io_uring = features}, limits);
    if (!engine && engine.error().kind == ErrorKind::kPermission)
      GTEST_SKIP() << engine.error().message;
    ASSERT_TRUE(engine) << engine.error().message;
    engines_ = std::make_unique<EngineSet>(std::move(*engine));
  }
  int make_file(const std::string& name, std::byte fill) {
    const int fd = ::open(dir_.file(name).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    const std::vector<std::byte> bytes(16 * kPage, fill);
    EXPECT_EQ(::pwrite(fd, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    return fd;
  }
  [[nodiscard]] const EngineStatistics& statistics() const {
    return engines_->engines().front()->statistics();
  }
  template <std::size_t kCount>
  int run(IoKind kind, std::array<iovec, kCount> buffers, std::uint64_t offset = 0) {
    Done io;
    io.kind = kind;
    io.fd = fd_;
    io.offset_bytes = offset;
    for (const auto& buffer : buffers) io.length_bytes += buffer.iov_len;
    io.iov = buffers.data();
    io.iov_count = kCount;
    io.complete = [](IoRequest& request, int error) { static_cast<Done&>(request).error = error; };
    engines_->queue(io);
    engines_->drain();
    return io.error;
  }
  static std::array<iovec, 1> one(std::byte* data, std::size_t bytes = kPage) {
    return {{{.iov_base = data, .iov_len = bytes}}};
  }
  static std::array<iovec, 2> two(std::byte* first, std::byte* second) {
    return {{{.iov_base = first, .iov_len = kPage}, {.iov_base = second, .iov_len = kPage}}};
  }

  test::TempDir dir_;
  int fd_{-1};
  std::unique_ptr<EngineSet> engines_;
};

TEST_F(IoUringTables, moves_data_through_registered_memory) {
  const Pages memory(8);
  ASSERT_TRUE(engines_->register_memory(memory.range()));
  *memory.at(1) = std::byte{0x42};
  EXPECT_EQ(run(IoKind::kWrite, one(memory.at(1))), 0);
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(5))), 0);
  EXPECT_EQ(*memory.at(5), std::byte{0x42});
  EXPECT_EQ(statistics().registered_buffers, 2U);
}

TEST_F(IoUringTables, moves_scattered_data_through_registered_memory_where_the_kernel_can) {
  const Pages memory(8);
  ASSERT_TRUE(engines_->register_memory(memory.range()));
  *memory.at(6) = std::byte{0x51};
  *memory.at(2) = std::byte{0x52};
  EXPECT_EQ(run(IoKind::kWrite, two(memory.at(6), memory.at(2))), 0);
  EXPECT_EQ(run(IoKind::kRead, two(memory.at(0), memory.at(7))), 0);
  EXPECT_EQ(*memory.at(0), std::byte{0x51});
  EXPECT_EQ(*memory.at(7), std::byte{0x52});
  if (statistics().registered_buffers == 0) GTEST_SKIP() << "Linux 6.15 and later";
  EXPECT_EQ(statistics().registered_buffers, 2U);
}

TEST_F(IoUringTables, goes_without_where_the_kernel_takes_no_scattered_registered_memory) {
  make_engine({.registered_buffers = true}, {.allow_vectored_fixed = false});
  const Pages memory(8);
  ASSERT_TRUE(engines_->register_memory(memory.range()));
  EXPECT_EQ(run(IoKind::kRead, two(memory.at(0), memory.at(7))), 0);
  EXPECT_EQ(*memory.at(7), std::byte{0x11});
  EXPECT_EQ(statistics().registered_buffers, 0U);
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(3))), 0);
  EXPECT_EQ(statistics().registered_buffers, 1U);
}

TEST_F(IoUringTables, goes_without_for_memory_that_is_not_registered_or_not_in_one_piece) {
  const Pages first(2);
  const Pages second(2);
  const Pages other(2);
  ASSERT_TRUE(engines_->register_memory(first.range()));
  ASSERT_TRUE(engines_->register_memory(second.range()));
  EXPECT_EQ(run(IoKind::kRead, one(other.at(0))), 0);
  EXPECT_EQ(run(IoKind::kRead, two(first.at(0), second.at(0))), 0);
  EXPECT_EQ(run(IoKind::kRead, two(first.at(0), other.at(0))), 0);
  EXPECT_EQ(*second.at(0), std::byte{0x11});
  EXPECT_EQ(*other.at(0), std::byte{0x11});
  EXPECT_EQ(statistics().registered_buffers, 0U);
}

TEST_F(IoUringTables, keeps_memory_registered_until_it_is_taken_back_as_often_as_announced) {
  const Pages memory(2);
  ASSERT_TRUE(engines_->register_memory(memory.range()));
  ASSERT_TRUE(engines_->register_memory(memory.range()));
  engines_->unregister_memory(memory.range());
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
  EXPECT_EQ(statistics().registered_buffers, 1U);
  engines_->unregister_memory(memory.range());
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(1))), 0);
  EXPECT_EQ(*memory.at(1), std::byte{0x11});
  EXPECT_EQ(statistics().registered_buffers, 1U);
}

// The danger of registered memory: pages that are no longer what is mapped there.
TEST_F(IoUringTables, reads_into_what_is_mapped_now_after_the_old_memory_was_taken_back) {
  const Pages memory(2);
  ASSERT_TRUE(engines_->register_memory(memory.range()));
  engines_->unregister_memory(memory.range());
  ASSERT_NE(::mmap(memory.at(0), 2 * kPage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
            MAP_FAILED);
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
  EXPECT_EQ(*memory.at(0), std::byte{0x11});
}

TEST_F(IoUringTables, says_why_memory_is_not_registered_and_does_the_requests_all_the_same) {
  const Pages unreadable(2, PROT_NONE);
  const auto registered = engines_->register_memory(unreadable.range());
  ASSERT_FALSE(registered);
  EXPECT_NE(registered.error().message.find("cannot pin it"), std::string::npos);
  engines_->unregister_memory(unreadable.range());
  const Pages memory(1);
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
}

TEST_F(IoUringTables, takes_and_gives_back_many_pieces_of_memory) {
  const Pages memory(64);
  for (int round = 0; round < 40; ++round) {
    for (std::size_t page = 0; page < 64; ++page)
      ASSERT_TRUE(engines_->register_memory({.iov_base = memory.at(page), .iov_len = kPage}));
    EXPECT_EQ(run(IoKind::kRead, one(memory.at(63))), 0);
    for (std::size_t page = 0; page < 64; ++page)
      engines_->unregister_memory({.iov_base = memory.at(page), .iov_len = kPage});
  }
  EXPECT_EQ(statistics().registered_buffers, 40U);
}

TEST_F(IoUringTables, uses_a_registered_file_until_it_is_taken_back) {
  const Pages memory(1);
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
  EXPECT_EQ(statistics().registered_files, 0U);
  ASSERT_TRUE(engines_->register_file(fd_));
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
  EXPECT_EQ(statistics().registered_files, 1U);
  engines_->unregister_file(fd_);
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
  EXPECT_EQ(statistics().registered_files, 1U);
}

TEST_F(IoUringTables, reads_the_new_file_when_a_descriptor_number_is_used_again) {
  const Pages memory(1);
  ASSERT_TRUE(engines_->register_file(fd_));
  engines_->unregister_file(fd_);
  const int other = make_file("other", std::byte{0x77});
  ASSERT_EQ(::dup2(other, fd_), fd_);
  ::close(other);
  ASSERT_TRUE(engines_->register_file(fd_));
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
  EXPECT_EQ(*memory.at(0), std::byte{0x77});
  EXPECT_EQ(statistics().registered_files, 1U);
}

// Or an image would stay locked after it was closed.
TEST_F(IoUringTables, holds_no_lock_of_a_file_that_was_taken_back_and_closed) {
  int locked = ::open(dir_.file("disk").c_str(), O_RDWR | O_CLOEXEC);
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_len = 1;
  ASSERT_EQ(::fcntl(locked, F_OFD_SETLK, &lock), 0);
  ASSERT_TRUE(engines_->register_file(locked));
  std::swap(fd_, locked);
  const Pages memory(1);
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
  std::swap(fd_, locked);
  engines_->unregister_file(locked);
  ::close(locked);
  ASSERT_EQ(::fcntl(fd_, F_OFD_GETLK, &lock), 0);
  EXPECT_EQ(lock.l_type, F_UNLCK);
}

TEST_F(IoUringTables, registers_nothing_that_is_switched_off) {
  make_engine({.registered_files = false});
  const Pages memory(1);
  EXPECT_TRUE(engines_->register_memory(memory.range()));
  EXPECT_TRUE(engines_->register_file(fd_));
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
  EXPECT_EQ(statistics().registered_buffers, 0U);
  EXPECT_EQ(statistics().registered_files, 0U);
  engines_->unregister_file(fd_);
  engines_->unregister_memory(memory.range());
}

TEST_F(IoUringTables, works_without_defer_taskrun_and_does_not_call_that_a_shortcoming) {
  make_engine({.defer_taskrun = false});
  EXPECT_TRUE(engines_->engines().front()->notes().empty());
  const Pages memory(1);
  EXPECT_EQ(run(IoKind::kRead, one(memory.at(0))), 0);
}

TEST(IoUringFeatures, are_named_one_by_one) {
  const auto features =
      IoUringFeatures::parse("registered-buffers=on,defer-taskrun=off,registered-files=off");
  ASSERT_TRUE(features) << features.error().message;
  EXPECT_TRUE(features->registered_buffers);
  EXPECT_FALSE(features->defer_taskrun);
  EXPECT_FALSE(features->registered_files);
  const auto one = IoUringFeatures::parse("registered-buffers=on");
  ASSERT_TRUE(one);
  EXPECT_TRUE(one->defer_taskrun && one->registered_files && one->registered_buffers);
}

TEST(IoUringFeatures, refuse_what_is_no_feature_or_no_setting) {
  for (const char* text : {"", "registered-files", "registered-files=", "registered-files=yes",
                           "sqpoll=on", "defer-taskrun=on,", ",", "=on"}) {
    const auto features = IoUringFeatures::parse(text);
    ASSERT_FALSE(features) << text;
    EXPECT_NE(features.error().message.find("registered-buffers"), std::string::npos);
  }
}

}  // namespace
}  // namespace vblk::aio
