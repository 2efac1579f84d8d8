// What other threads give to the server's loop, and to those of I/O threads, is noticed by loops
// that sleep, also where Asio's own way to wake them does nothing.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <future>
#include <string>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "aio/engine_set.h"
#include "blockdev/driver/blk_driver.h"
#include "blockdev/io_limits.h"
#include "blockdev/io_thread.h"
#include "blockdev/virtio/blk_wire.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using driver::BlkDriver;
using test::eventually;
using test::HoldingDisk;
using test::kPatience;
using test::Served;

// Asio's eventfds are readable all the time, so that a change of how epoll watches them is an
// event. Those of this process are not while this lives.
class MutedAsio {
 public:
  MutedAsio() {
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code error;
      const auto target = std::filesystem::read_symlink(entry.path(), error);
      if (error || target.string() != "anon_inode:[eventfd]") continue;
      const int fd = std::stoi(entry.path().filename().string());
      if (count_of(fd) == 0) continue;  // nobody's, or one that is written to when it is needed
      std::uint64_t count = 0;
      if (::read(fd, &count, sizeof count) == static_cast<ssize_t>(sizeof count))
        fds_.push_back(fd);
    }
  }
  ~MutedAsio() {
    const std::uint64_t one = 1;
    for (const int fd : fds_) {
      [[maybe_unused]] const auto written = ::write(fd, &one, sizeof one);
    }
  }
  MutedAsio(const MutedAsio&) = delete;
  MutedAsio& operator=(const MutedAsio&) = delete;
  [[nodiscard]] std::size_t count() const { return fds_.size(); }

 private:
  static std::uint64_t count_of(int fd) {
    std::ifstream info("/proc/self/fdinfo/" + std::to_string(fd));
    for (std::string word; info >> word;) {
      if (word != "eventfd-count:") continue;
      std::string count;
      info >> count;
      return std::stoull(count, nullptr, 16);
    }
    return 0;
  }

  std::vector<int> fds_;
};

// Long enough for every loop to go to sleep in between, on a machine that is not busy.
void let_loops_sleep() { std::this_thread::sleep_for(std::chrono::milliseconds(5)); }

TEST(LostWakeUps, keep_nobody_from_an_answer_and_no_server_from_its_end) {
  HoldingDisk disk(std::size_t{1} << 20);
  Served served(disk);
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(eventually([&served] { return served.server().status().has_value(); }));
    let_loops_sleep();
  }
  std::future<Expected<void>> end;
  const MutedAsio muted;
  ASSERT_GE(muted.count(), 3U) << "the server's and those of two I/O threads";
  for (int i = 0; i < 10; ++i) {
    EXPECT_TRUE(eventually([&served] { return served.server().status().has_value(); })) << i;
    let_loops_sleep();
    served.device().gate().set_limits(
        blockdev::IoLimits::parse("iops-total=100000", "", {}).value());
    // Starts rings on both I/O threads, and stops them.
    const auto driver = BlkDriver::connect(served.path(), {.queue_count = 2,
                                                           .queue_size = 16,
                                                           .memory_bytes = std::size_t{1} << 20,
                                                           .frontend = {.timeout = kPatience}});
    ASSERT_TRUE(driver.has_value()) << driver.error().message;
    EXPECT_EQ((*driver)->flush().value(), virtio::kBlkSOk);
    let_loops_sleep();
  }
  let_loops_sleep();
  end = std::async(std::launch::async, [&served] { return served.stop(); });
  EXPECT_EQ(end.wait_for(kPatience), std::future_status::ready);
}

TEST(LostWakeUps, keep_no_io_thread_from_what_it_is_given) {
  const auto thread =
      blockdev::IoThread::start("io", {}, [] { return aio::EngineSet::create({}, {}); }).value();
  thread->loop().run_and_wait([] {});
  let_loops_sleep();
  std::vector<std::future<void>> given;
  const MutedAsio muted;
  ASSERT_GE(muted.count(), 1U);
  for (int i = 0; i < 10; ++i) {
    given.push_back(
        std::async(std::launch::async, [&thread] { thread->loop().run_and_wait([] {}); }));
    ASSERT_EQ(given.back().wait_for(kPatience), std::future_status::ready) << i;
    let_loops_sleep();
  }
}

}  // namespace
}  // namespace vblk::vhost_user
