// Image locks, between our own opens (whose locks conflict within one process as between two) and
// against QEMU's tools where these are installed.
#include "blockdev/image_lock.h"

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <sys/stat.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#include <gtest/gtest.h>

#include "blockdev/image.h"
#include "blockdev/image/open_image.h"
#include "tests/support/temp_dir.h"

namespace vblk::blockdev {
namespace {

class ImageLock : public ::testing::Test {
 protected:
  void SetUp() override { std::ofstream(path_) << std::string(65536, '\0'); }

  Expected<std::unique_ptr<BlockNode>> open(bool read_only) {
    return open_image({.path = path_, .cache = CacheMode::kWriteback, .read_only = read_only});
  }
  Expected<std::unique_ptr<BlockNode>> open_writer() { return open(false); }
  Expected<std::unique_ptr<BlockNode>> open_reader() { return open(true); }
  // Expects a refusal because of the lock, and returns its message.
  std::string refusal(const Expected<std::unique_ptr<BlockNode>>& node) {
    if (node) {
      ADD_FAILURE() << "opened in spite of the lock";
      return {};
    }
    EXPECT_EQ(node.error().kind, ErrorKind::kBusy);
    EXPECT_NE(node.error().message.find("'" + path_ + "'"), std::string::npos)
        << node.error().message;
    return node.error().message;
  }

  test::TempDir dir_;
  const std::string path_{dir_.file("disk")};
};

TEST_F(ImageLock, keeps_a_second_writer_out_until_the_first_is_gone) {
  auto first = open_writer();
  ASSERT_TRUE(first) << first.error().message;
  EXPECT_NE(refusal(open_writer()).find("in use by another process"), std::string::npos);
  first->reset();
  EXPECT_TRUE(open_writer());
}

TEST_F(ImageLock, lets_any_number_of_readers_in) {
  const auto first = open_reader();
  const auto second = open_reader();
  const auto third = open_reader();
  EXPECT_TRUE(first);
  EXPECT_TRUE(second);
  EXPECT_TRUE(third);
}

TEST_F(ImageLock, keeps_readers_and_writers_apart) {
  {
    const auto writer = open_writer();
    ASSERT_TRUE(writer);
    EXPECT_NE(refusal(open_reader()).find("is being written"), std::string::npos);
  }
  const auto reader = open_reader();
  ASSERT_TRUE(reader);
  EXPECT_NE(refusal(open_writer()).find("in use by another process"), std::string::npos);
}

// A refused open must not leave locks behind that refuse the next one.
TEST_F(ImageLock, leaves_nothing_behind_when_it_is_refused) {
  auto reader = open_reader();
  ASSERT_TRUE(reader);
  refusal(open_writer());
  EXPECT_TRUE(open_reader()) << "the refused writer still counts as one";
  reader->reset();
  EXPECT_TRUE(open_writer());
}

// A restarted server may come while the kernel still holds what its killed predecessor held.
TEST_F(ImageLock, waits_a_moment_for_a_predecessor_to_be_gone) {
  auto predecessor = open_writer();
  ASSERT_TRUE(predecessor);
  std::thread leaver([&predecessor] {
    std::this_thread::sleep_for(std::chrono::milliseconds(3 * kLockRetryMilliseconds));
    predecessor->reset();
  });
  EXPECT_TRUE(open_writer());
  leaver.join();
}

// As a ring of io_uring keeps it.
TEST_F(ImageLock, is_given_back_though_the_open_file_lives_on) {
  for (const bool is_direct : {false, true}) {
    auto predecessor =
        is_direct ? open_image({.path = path_, .cache = CacheMode::kNone}) : open_writer();
    if (!predecessor && predecessor.error().kind == ErrorKind::kNotSupported) continue;
    ASSERT_TRUE(predecessor) << predecessor.error().message;
    const pid_t child = ::fork();
    if (child == 0) {
      for (;;) ::pause();
    }
    predecessor->reset();
    const auto next = open_writer();
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    EXPECT_TRUE(next) << next.error().message;
  }
}

TEST_F(ImageLock, is_released_when_the_process_is_killed) {
  int ready[2];
  ASSERT_EQ(::pipe2(ready, O_CLOEXEC), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const int fd = ::open(path_.c_str(), O_RDWR | O_CLOEXEC);
    const char locked = lock_image(fd, path_, false) ? 'y' : 'n';
    [[maybe_unused]] const ssize_t told = ::write(ready[1], &locked, 1);
    for (;;) ::pause();
  }
  char locked = 'n';
  ASSERT_EQ(::read(ready[0], &locked, 1), 1);
  ASSERT_EQ(locked, 'y');
  refusal(open_writer());
  ASSERT_EQ(::kill(child, SIGKILL), 0);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_TRUE(open_writer());
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST_F(ImageLock, covers_the_modes_with_direct_io) {
  const auto direct = open_image({.path = path_, .cache = CacheMode::kNone});
  if (!direct && direct.error().kind == ErrorKind::kNotSupported)
    GTEST_SKIP() << direct.error().message;
  ASSERT_TRUE(direct) << direct.error().message;
  refusal(open_writer());
}

// ---- QEMU's tools.

class QemuLock : public ImageLock {
 protected:
  void SetUp() override {
    ImageLock::SetUp();
    if (std::system("command -v qemu-img qemu-io >/dev/null") != 0)
      GTEST_SKIP() << "qemu-img and qemu-io are not installed";
  }
  // What a command prints, and its exit status.
  struct Result {
    std::string output;
    int status;
  };
  static Result run(const std::string& command) {
    Result result{};
    FILE* const pipe = ::popen((command + " 2>&1").c_str(), "r");
    if (pipe == nullptr) throw std::runtime_error("cannot run " + command);
    for (int byte = std::fgetc(pipe); byte != EOF; byte = std::fgetc(pipe))
      result.output += static_cast<char>(byte);
    result.status = ::pclose(pipe);
    return result;
  }
  // qemu-io with the image open, until destroyed.
  class Holder {
   public:
    Holder(const std::string& path, const std::string& flags, const std::string& log) {
      pipe_ =
          ::popen(("qemu-io -f raw " + flags + " '" + path + "' >'" + log + "' 2>&1").c_str(), "w");
      if (pipe_ == nullptr) throw std::runtime_error("cannot run qemu-io");
      // It prints this once it has the image.
      std::fputs("length\n", pipe_);
      std::fflush(pipe_);
      for (int i = 0; i < 1000 && !has_text(log); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    ~Holder() { ::pclose(pipe_); }
    Holder(const Holder&) = delete;
    Holder& operator=(const Holder&) = delete;

   private:
    static bool has_text(const std::string& log) {
      std::ifstream file(log);
      std::string text;
      return static_cast<bool>(std::getline(file, text)) && text.find("KiB") != std::string::npos;
    }
    FILE* pipe_;
  };
};

TEST_F(QemuLock, keeps_qemu_from_writing_what_we_write_or_read) {
  for (const bool read_only : {false, true}) {
    const auto ours = open(read_only);
    ASSERT_TRUE(ours) << ours.error().message;
    const Result result = run("qemu-io -f raw -c 'write 0 512' '" + path_ + "'");
    EXPECT_NE(result.status, 0);
    EXPECT_NE(result.output.find("lock"), std::string::npos) << result.output;
  }
}

TEST_F(QemuLock, lets_qemu_read_what_we_read_and_look_at_what_we_write) {
  {
    const auto ours = open_reader();
    ASSERT_TRUE(ours);
    const Result result = run("qemu-io -r -f raw -c 'read 0 512' '" + path_ + "'");
    EXPECT_EQ(result.status, 0) << result.output;
  }
  const auto ours = open_writer();
  ASSERT_TRUE(ours);
  const Result forced = run("qemu-img info -U -f raw '" + path_ + "'");
  EXPECT_EQ(forced.status, 0) << forced.output;
}

TEST_F(QemuLock, respects_what_qemu_holds) {
  {
    const Holder writer(path_, "", dir_.file("log"));
    refusal(open_writer());
    refusal(open_reader());
  }
  {
    const Holder reader(path_, "-r", dir_.file("log2"));
    EXPECT_TRUE(open_reader());
  }
  EXPECT_TRUE(open_writer());
}

}  // namespace
}  // namespace vblk::blockdev
