// Choosing engines: what may be typed, what comes of it, and what is said when the kernel refuses.
#include "aio/engine_set.h"

#include <cerrno>
#include <cstddef>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <string>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "aio/io_uring_engine.h"

namespace vblk::aio {
namespace {

EngineName engine_of(const AioSelection& selection, IoKind kind) {
  return selection.engine_of_kind[static_cast<std::size_t>(kind)];
}

TEST(AioSelection, takes_one_engine_for_all_kinds) {
  for (const EngineName name : kAllEngineNames) {
    const auto selection = AioSelection::parse(to_string(name));
    ASSERT_TRUE(selection);
    for (const EngineName chosen : selection->engine_of_kind) EXPECT_EQ(chosen, name);
    EXPECT_EQ(selection->to_string(), to_string(name));
  }
}

TEST(AioSelection, takes_an_engine_per_kind_and_threads_for_the_rest) {
  const auto selection = AioSelection::parse("read=io_uring,write=native,discard=io_uring");
  ASSERT_TRUE(selection);
  EXPECT_EQ(engine_of(*selection, IoKind::kRead), EngineName::kIoUring);
  EXPECT_EQ(engine_of(*selection, IoKind::kWrite), EngineName::kNative);
  EXPECT_EQ(engine_of(*selection, IoKind::kFlush), EngineName::kThreads);
  EXPECT_EQ(engine_of(*selection, IoKind::kDiscard), EngineName::kIoUring);
  EXPECT_EQ(engine_of(*selection, IoKind::kWriteZeroes), EngineName::kIoUring)
      << "goes with discard";
  const auto again = AioSelection::parse(selection->to_string());
  ASSERT_TRUE(again);
  EXPECT_EQ(again->engine_of_kind, selection->engine_of_kind);
}

TEST(AioSelection, lets_write_zeroes_go_its_own_way) {
  const auto selection = AioSelection::parse("write-zeroes=threads,discard=io_uring");
  ASSERT_TRUE(selection);
  EXPECT_EQ(engine_of(*selection, IoKind::kWriteZeroes), EngineName::kThreads);
}

TEST(AioSelection, names_the_word_that_is_wrong) {
  const auto message = [](std::string_view text) {
    const auto selection = AioSelection::parse(text);
    return selection ? std::string("accepted") : selection.error().message;
  };
  EXPECT_NE(message("uring").find("'uring'"), std::string::npos);
  EXPECT_NE(message("").find("unknown engine"), std::string::npos);
  EXPECT_NE(message("read=aio").find("'aio'"), std::string::npos);
  EXPECT_NE(message("sync=threads").find("'sync'"), std::string::npos);
  EXPECT_NE(message("read=threads,read=native").find("twice"), std::string::npos);
  EXPECT_NE(message("read=threads,,write=native").find("unknown kind"), std::string::npos);
  EXPECT_NE(message("read=threads,").find("unknown kind"), std::string::npos);
  EXPECT_NE(message("read=").find("unknown engine"), std::string::npos);
}

TEST(EngineSet, tells_what_does_each_kind_and_why_not_what_was_asked_for) {
  const auto set = EngineSet::create(*AioSelection::parse("native"), {});
  ASSERT_TRUE(set) << set.error().message;
  ASSERT_EQ((*set)->routes().size(), kIoKindCount);
  for (const auto& route : (*set)->routes()) {
    EXPECT_EQ(route.requested, "native");
    const bool data = route.kind == IoKind::kRead || route.kind == IoKind::kWrite;
    if (data) {
      EXPECT_EQ(route.chosen, "native");
    }
    if (route.kind == IoKind::kDiscard || route.kind == IoKind::kWriteZeroes) {
      EXPECT_EQ(route.chosen, "threads");
      EXPECT_NE(route.reason.find("fallocate"), std::string::npos);
    }
    if (route.kind == IoKind::kWriteBehind) {
      EXPECT_EQ(route.chosen, "threads");
      EXPECT_NE(route.reason.find("sync_file_range"), std::string::npos);
    }
    EXPECT_EQ(route.reason.empty(), route.chosen == route.requested);
  }
}

TEST(EngineSet, says_what_to_do_when_linux_aio_is_exhausted) {
  const auto set = EngineSet::create(*AioSelection::parse("native"), {.queue_depth = 1U << 30});
  ASSERT_FALSE(set);
  // The kernel refuses absurd depths with EINVAL and too many with EAGAIN.
  EXPECT_NE(set.error().message.find("Linux AIO"), std::string::npos);
  EXPECT_NE(set.error().message.find("--aio"), std::string::npos);
}

// Runs `io_uring` in a child where io_uring_setup fails with `error`, as under a container's
// seccomp policy.
std::string refusal_under_seccomp(int error) {
  int pipe_fds[2];
  EXPECT_EQ(::pipe(pipe_fds), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K,
                 static_cast<unsigned>(SECCOMP_RET_ERRNO) | static_cast<unsigned>(error)),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const sock_fprog program{.len = 4, .filter = filter};
    std::string text = "no seccomp";
    if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
        ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0) {
      const auto set = EngineSet::create(*AioSelection::parse("io_uring"), {});
      text = set ? "created" : set.error().message;
    }
    [[maybe_unused]] const auto written = ::write(pipe_fds[1], text.data(), text.size());
    ::_exit(0);
  }
  ::close(pipe_fds[1]);
  std::string text(4096, '\0');
  const auto bytes = ::read(pipe_fds[0], text.data(), text.size());
  text.resize(bytes > 0 ? static_cast<std::size_t>(bytes) : 0);
  ::close(pipe_fds[0]);
  ::waitpid(child, nullptr, 0);
  return text;
}

TEST(EngineSet, says_what_to_do_when_io_uring_is_not_permitted) {
  const std::string message = refusal_under_seccomp(EPERM);
  if (message == "no seccomp") GTEST_SKIP() << "seccomp filters are not permitted here";
  EXPECT_NE(message.find("not permitted"), std::string::npos) << message;
  EXPECT_NE(message.find("--aio"), std::string::npos) << message;
}

TEST(EngineSet, says_what_to_do_when_there_is_no_io_uring) {
  const std::string message = refusal_under_seccomp(ENOSYS);
  if (message == "no seccomp") GTEST_SKIP() << "seccomp filters are not permitted here";
  EXPECT_NE(message.find("no io_uring"), std::string::npos) << message;
}

TEST(EngineSet, is_not_to_be_looked_at_while_the_kernel_needs_the_processor_for_a_flush) {
  for (const EngineName name : {EngineName::kThreads, EngineName::kNative}) {
    AioSelection selection;
    selection.engine_of_kind.fill(name);
    const auto set = EngineSet::create(selection, {});
    ASSERT_TRUE(set) << set.error().message;
    const int fd = ::memfd_create("vblk-test", MFD_CLOEXEC);
    IoRequest flush;
    flush.kind = IoKind::kFlush;
    flush.fd = fd;
    flush.complete = [](IoRequest& /*request*/, int error) { EXPECT_EQ(error, 0); };
    EXPECT_TRUE((*set)->is_worth_looking());
    (*set)->queue(flush);
    EXPECT_EQ((*set)->is_worth_looking(), name != EngineName::kNative);
    (*set)->drain();
    EXPECT_TRUE((*set)->is_worth_looking());
    ::close(fd);
  }
}

// A kernel that is older, as far as the engine can tell.
// Completions that were taken without a sleep have signalled all the same, and must not keep the
// loop awake for ever.
class IdleSet : public testing::TestWithParam<EngineName> {};

TEST_P(IdleSet, sleeps_though_its_engine_has_signalled_before) {
  AioSelection selection;
  selection.engine_of_kind.fill(GetParam());
  auto made = EngineSet::create(selection, {});
  if (!made && made.error().kind == ErrorKind::kPermission) GTEST_SKIP() << made.error().message;
  ASSERT_TRUE(made) << made.error().message;
  EngineSet& set = **made;
  const int fd = ::memfd_create("vblk-test", MFD_CLOEXEC);
  std::string text = "signals";
  iovec element{text.data(), text.size()};
  for (int i = 0; i < 3; ++i) {
    IoRequest write;
    write.kind = IoKind::kWrite;
    write.fd = fd;
    write.length_bytes = text.size();
    write.iov = &element;
    write.iov_count = 1;
    write.complete = [](IoRequest& /*request*/, int error) { EXPECT_EQ(error, 0); };
    set.queue(write);
    while (set.in_flight() > 0) {
      set.submit();
      set.reap();
    }
  }
  std::size_t signalled = 1;
  for (int sleeps = 0; sleeps < 3 && signalled > 0; ++sleeps) {
    ASSERT_TRUE(set.prepare_to_sleep());
    signalled = 0;
    for (const auto& engine : set.engines()) {
      pollfd descriptor{.fd = engine->completion_fd(), .events = POLLIN, .revents = 0};
      signalled += static_cast<std::size_t>(::poll(&descriptor, 1, 0));
    }
    set.wake_up();
  }
  EXPECT_EQ(signalled, 0U);
  ::close(fd);
}

INSTANTIATE_TEST_SUITE_P(Engines, IdleSet, testing::ValuesIn(kAllEngineNames),
                         [](const auto& each) { return std::string(to_string(each.param)); });

class OlderKernel : public testing::TestWithParam<IoUringLimits> {};

TEST_P(OlderKernel, still_reads_and_writes) {
  auto engine = IoUringEngine::create({}, GetParam());
  if (!engine && engine.error().kind == ErrorKind::kPermission)
    GTEST_SKIP() << engine.error().message;
  ASSERT_TRUE(engine) << engine.error().message;
  EXPECT_EQ((*engine)->supports(IoKind::kDiscard), GetParam().allow_fallocate);
  EXPECT_EQ((*engine)->notes().empty(), GetParam().allow_defer_taskrun)
      << "the user is told what is missing";
  const int fd = ::memfd_create("vblk-test", MFD_CLOEXEC);
  struct Done : IoRequest {
    int error{-1};
  } write;
  std::string text = "older";
  iovec element{text.data(), text.size()};
  write.kind = IoKind::kWrite;
  write.fd = fd;
  write.length_bytes = text.size();
  write.iov = &element;
  write.iov_count = 1;
  write.complete = [](IoRequest& request, int error) { static_cast<Done&>(request).error = error; };
  EngineSet set(std::move(*engine));
  set.queue(write);
  set.drain();
  EXPECT_EQ(write.error, 0);
  std::string back(text.size(), '\0');
  EXPECT_EQ(::pread(fd, back.data(), back.size(), 0), static_cast<ssize_t>(back.size()));
  EXPECT_EQ(back, "older");
  ::close(fd);
}

INSTANTIATE_TEST_SUITE_P(
    Fallbacks, OlderKernel,
    testing::Values(IoUringLimits{}, IoUringLimits{.allow_defer_taskrun = false},
                    IoUringLimits{.allow_defer_taskrun = false, .allow_coop_taskrun = false},
                    IoUringLimits{.allow_fallocate = false}, IoUringLimits{.allow_tables = false}));

}  // namespace
}  // namespace vblk::aio
