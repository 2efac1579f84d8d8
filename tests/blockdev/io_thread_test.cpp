// An I/O thread, and those who wait for it.
#include "blockdev/io_thread.h"

#include <array>
#include <cerrno>
#include <fcntl.h>
#include <memory>
#include <unistd.h>
#include <utility>

#include <gtest/gtest.h>

#include "aio/inline_engine.h"

namespace vblk::blockdev {
namespace {

std::unique_ptr<IoThread> start_thread() {
  auto thread = IoThread::start("io", {}, []() -> Expected<std::unique_ptr<aio::EngineSet>> {
    return std::make_unique<aio::EngineSet>(aio::InlineEngine::create().value());
  });
  return std::move(thread.value());
}

TEST(IoThread, runs_what_another_thread_waits_for) {
  const auto thread = start_thread();
  bool on_its_thread = false;
  thread->run_and_wait([&] { on_its_thread = thread->loop().is_loop_thread(); });
  EXPECT_TRUE(on_its_thread);
}

// A peer may make a descriptor that it has handed over blocking again, behind the server's back.
TEST(IoThread, is_interrupted_where_it_hangs_in_a_descriptor_while_another_waits_for_it) {
  const auto thread = start_thread();
  std::array<int, 2> pipe{};
  ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC), 0);
  int error = 0;
  thread->loop().post([&] {
    char byte = 0;
    if (::read(pipe[0], &byte, 1) < 0) error = errno;
  });
  bool has_run = false;
  thread->run_and_wait([&] { has_run = true; });
  EXPECT_TRUE(has_run);
  EXPECT_EQ(error, EINTR);
  for (const int fd : pipe) ::close(fd);
}

}  // namespace
}  // namespace vblk::blockdev
