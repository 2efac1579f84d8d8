// Calls on files by io_uring. See file_call.h.
#include <algorithm>
#include <array>
#include <cassert>
#include <fcntl.h>
#include <limits>

#include <fmt/core.h>
#include <liburing.h>

#include "aio/file_call.h"

namespace vblk::aio {

namespace {

class IoUringFileCalls final : public FileCallEngine {
 public:
  explicit IoUringFileCalls(bool force_async) : force_async_(force_async) {}
  ~IoUringFileCalls() override {
    assert(in_flight_ == 0);
    if (is_set_up_) io_uring_queue_exit(&ring_);
  }

  Expected<void> set_up(const EngineOptions& options) {
    const int error = -io_uring_queue_init(options.queue_depth, &ring_, 0);
    if (error != 0) {
      return make_error(kind_of_errno(error),
                        fmt::format("cannot set up an io_uring: {}", describe_errno(error)), error);
    }
    is_set_up_ = true;
    const unsigned count = options.io_uring.kernel_workers;
    std::array<unsigned, 2> bounds{count, count};
    if (count != 0) io_uring_register_iowq_max_workers(&ring_, bounds.data());
    return {};
  }

  [[nodiscard]] bool supports(FileCallKind /*kind*/) const override { return true; }
  void queue(FileCall& call) override {
    accept(call);
    waiting_.push_back(call);
  }
  void submit() override {
    while (!waiting_.empty()) {
      io_uring_sqe* const entry = io_uring_get_sqe(&ring_);
      if (entry == nullptr) break;
      auto& call = static_cast<FileCall&>(*waiting_.pop_front());
      prepare(*entry, call);
      if (force_async_) entry->flags |= IOSQE_ASYNC;
      io_uring_sqe_set_data(entry, &call);
    }
    if (io_uring_sq_ready(&ring_) > 0) io_uring_submit(&ring_);
  }
  std::size_t reap() override {
    std::size_t count = 0;
    io_uring_cqe* completion = nullptr;
    for (; io_uring_peek_cqe(&ring_, &completion) == 0; ++count) {
      auto& call = *static_cast<FileCall*>(io_uring_cqe_get_data(completion));
      call.result = completion->res;
      io_uring_cqe_seen(&ring_, completion);
      finish(call);
    }
    return count;
  }
  void sleep(std::chrono::nanoseconds timeout) override {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
    __kernel_timespec limit{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
    io_uring_cqe* completion = nullptr;
    io_uring_wait_cqes(&ring_, &completion, 1, &limit, nullptr);
  }

 private:
  static void prepare(io_uring_sqe& entry, const FileCall& call) {
    switch (call.kind) {
      case FileCallKind::kOpenat:
        return io_uring_prep_openat(&entry, call.fd, call.name, O_RDONLY | O_CLOEXEC, 0);
      case FileCallKind::kUnlinkat:
        return io_uring_prep_unlinkat(&entry, call.fd, call.name, 0);
      case FileCallKind::kFadvise:
        return io_uring_prep_fadvise(&entry, call.fd, call.offset_bytes,
                                     static_cast<off_t>(call.length_bytes), POSIX_FADV_WILLNEED);
      case FileCallKind::kFsync:
        return io_uring_prep_fsync(&entry, call.fd, 0);
      case FileCallKind::kFdatasync:
        return io_uring_prep_fsync(&entry, call.fd, IORING_FSYNC_DATASYNC);
      case FileCallKind::kMsync:
        io_uring_prep_fsync(&entry, call.fd, 0);
        return set_range(entry, call);
      case FileCallKind::kRangeFdatasync:
        io_uring_prep_fsync(&entry, call.fd, IORING_FSYNC_DATASYNC);
        return set_range(entry, call);
    }
  }
  // io_uring_enter(2), IORING_OP_FSYNC: "off" and "len" are the range; liburing sets neither.
  static void set_range(io_uring_sqe& entry, const FileCall& call) {
    entry.off = call.offset_bytes;
    entry.len = static_cast<unsigned>(
        std::min<std::uint64_t>(call.length_bytes, std::numeric_limits<int>::max()));
  }

  const bool force_async_;
  bool is_set_up_{false};
  io_uring ring_{};
  threadpool::WorkList waiting_;
};

}  // namespace

Expected<std::unique_ptr<FileCallEngine>> make_io_uring_file_calls(const EngineOptions& options) {
  auto engine = std::make_unique<IoUringFileCalls>(options.io_uring.force_async);
  if (auto set_up = engine->set_up(options); !set_up) return std::unexpected(set_up.error());
  return engine;
}

}  // namespace vblk::aio
