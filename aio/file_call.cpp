#include "aio/file_call.h"

#include <array>
#include <cassert>
#include <cerrno>
#include <ctime>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include "aio/event_fd.h"
#include "threadpool/completion_queue.h"
#include "threadpool/pool.h"

namespace vblk::aio {

namespace {

long result_of(int value) { return value < 0 ? -errno : value; }

// In the caller, inside submit().
class InlineFileCalls final : public FileCallEngine {
 public:
  [[nodiscard]] bool supports(FileCallKind /*kind*/) const override { return true; }
  void queue(FileCall& call) override {
    accept(call);
    queued_.push_back(call);
  }
  void submit() override {
    while (threadpool::Work* const work = queued_.pop_front()) {
      auto& call = static_cast<FileCall&>(*work);
      call.result = perform_blocking(call);
      finished_.push_back(call);
    }
  }
  std::size_t reap() override {
    threadpool::WorkList finished = std::exchange(finished_, {});
    const std::size_t count = finished.size();
    while (threadpool::Work* const work = finished.pop_front())
      finish(static_cast<FileCall&>(*work));
    return count;
  }
  // What is in flight is finished already.
  void sleep(std::chrono::nanoseconds /*timeout*/) override {}

 private:
  threadpool::WorkList queued_;
  threadpool::WorkList finished_;
};

class PoolFileCalls final : public FileCallEngine {
 public:
  PoolFileCalls(const EngineOptions& options, int event_fd)
      : event_fd_(event_fd),
        pool_(threadpool::make_pool(options.pool, {.min_threads = options.min_threads,
                                                   .max_threads = options.max_threads,
                                                   .name = "vblk-worker"})) {}
  ~PoolFileCalls() override {
    pool_.reset();
    ::close(event_fd_);
  }
  [[nodiscard]] bool supports(FileCallKind /*kind*/) const override { return true; }
  void queue(FileCall& call) override {
    accept(call);
    call.run = [](threadpool::Work& work) noexcept {
      auto& self = static_cast<FileCall&>(work);
      self.result = perform_blocking(self);
      auto& engine = static_cast<PoolFileCalls&>(*self.engine);
      // From the push on, the call is the owner's again.
      if (engine.completions_.push(self)) signal_event_fd(engine.event_fd_);
    };
    call.takes_long = call.kind != FileCallKind::kOpenat && call.kind != FileCallKind::kFadvise;
    batch_.push_back(call);
  }
  void submit() override {
    if (!batch_.empty()) pool_->submit(batch_);
  }
  std::size_t reap() override {
    threadpool::WorkList finished;
    completions_.take_all(finished);
    const std::size_t count = finished.size();
    while (threadpool::Work* const work = finished.pop_front())
      finish(static_cast<FileCall&>(*work));
    return count;
  }
  void sleep(std::chrono::nanoseconds timeout) override {
    if (completions_.arm()) {
      pollfd descriptor{.fd = event_fd_, .events = POLLIN, .revents = 0};
      const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
      const timespec limit{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
      ::ppoll(&descriptor, 1, &limit, nullptr);
    }
    if (completions_.disarm()) drain_event_fd(event_fd_);
  }

 private:
  const int event_fd_;
  threadpool::WorkList batch_;
  threadpool::CompletionQueue completions_;
  std::unique_ptr<threadpool::Pool> pool_;
};

}  // namespace

long perform_blocking(const FileCall& call) noexcept {
  const auto offset = static_cast<off_t>(call.offset_bytes);
  const auto length = static_cast<off_t>(call.length_bytes);
  switch (call.kind) {
    case FileCallKind::kOpenat:
      return result_of(::openat(call.fd, call.name, O_RDONLY | O_CLOEXEC));
    case FileCallKind::kUnlinkat:
      return result_of(::unlinkat(call.fd, call.name, 0));
    case FileCallKind::kFadvise:
      return -::posix_fadvise(call.fd, offset, length, POSIX_FADV_WILLNEED);
    case FileCallKind::kMsync:
      return result_of(::msync(call.address, call.length_bytes, MS_SYNC));
    case FileCallKind::kFsync:
      return result_of(::fsync(call.fd));
    case FileCallKind::kFdatasync:
      return result_of(::fdatasync(call.fd));
    case FileCallKind::kRangeFdatasync: {
      constexpr unsigned kAll =
          SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
      const int synced = ::sync_file_range(call.fd, offset, length, kAll);
      return synced < 0 ? result_of(synced) : result_of(::fdatasync(call.fd));
    }
  }
  return -ENOSYS;
}

Expected<std::unique_ptr<FileCallEngine>> make_file_call_engine(EngineName name,
                                                                const EngineOptions& options) {
  switch (name) {
    case EngineName::kInline:
      return std::make_unique<InlineFileCalls>();
    case EngineName::kThreads: {
      auto event_fd = make_event_fd("a pool");
      if (!event_fd) return std::unexpected(std::move(event_fd.error()));
      return std::make_unique<PoolFileCalls>(options, *event_fd);
    }
    case EngineName::kNative:
      return make_native_file_calls(options);
    case EngineName::kIoUring:
      return make_io_uring_file_calls(options);
    case EngineName::kAuto:
      break;
  }
  return make_error(ErrorKind::kInvalidArgument, "no such engine");
}

}  // namespace vblk::aio
