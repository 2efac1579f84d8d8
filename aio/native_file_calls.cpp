// Calls on files by Linux AIO, which has two of them: IOCB_CMD_FSYNC and IOCB_CMD_FDSYNC. See
// file_call.h.
#include <array>
#include <cassert>
#include <vector>

#include <fmt/core.h>
#include <libaio.h>

#include "aio/file_call.h"

namespace vblk::aio {

namespace {

class NativeFileCalls final : public FileCallEngine {
 public:
  ~NativeFileCalls() override {
    assert(in_flight_ == 0);
    if (context_ != nullptr) ::io_destroy(context_);
  }

  Expected<void> set_up(const EngineOptions& options) {
    const int error = -::io_setup(static_cast<int>(options.queue_depth), &context_);
    if (error != 0) {
      return make_error(kind_of_errno(error),
                        fmt::format("cannot set up Linux AIO: {}", describe_errno(error)), error);
    }
    iocbs_.resize(options.queue_depth);
    for (iocb& control : iocbs_) free_.push_back(&control);
    return {};
  }

  [[nodiscard]] bool supports(FileCallKind kind) const override {
    return kind == FileCallKind::kFsync || kind == FileCallKind::kFdatasync;
  }
  void queue(FileCall& call) override {
    assert(supports(call.kind));
    accept(call);
    waiting_.push_back(call);
  }
  void submit() override {
    std::vector<iocb*> batch;
    while (!waiting_.empty() && !free_.empty()) {
      auto& call = static_cast<FileCall&>(*waiting_.pop_front());
      iocb* const control = free_.back();
      free_.pop_back();
      if (call.kind == FileCallKind::kFsync) {
        io_prep_fsync(control, call.fd);
      } else {
        io_prep_fdsync(control, call.fd);
      }
      control->data = &call;
      batch.push_back(control);
    }
    std::size_t done = 0;
    while (done < batch.size()) {
      const int taken = ::io_submit(context_, static_cast<long>(batch.size() - done), &batch[done]);
      if (taken > 0) {
        done += static_cast<std::size_t>(taken);
        continue;
      }
      // The first is refused.
      auto& refused = *static_cast<FileCall*>(batch[done]->data);
      refused.result = taken == 0 ? -EAGAIN : taken;
      free_.push_back(batch[done]);
      refused_.push_back(refused);
      ++done;
    }
  }
  std::size_t reap() override {
    timespec now{};
    return take(0, now);
  }
  void sleep(std::chrono::nanoseconds timeout) override {
    if (in_flight_ == 0 || fetched_count_ > 0 || !refused_.empty()) return;
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
    timespec limit{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
    fetch(1, limit);
  }

 private:
  void fetch(long least, timespec& limit) {
    const int count = ::io_getevents(context_, least, static_cast<long>(fetched_.size()),
                                     fetched_.data(), &limit);
    fetched_count_ = count > 0 ? static_cast<std::size_t>(count) : 0;
  }
  std::size_t take(long least, timespec& limit) {
    if (fetched_count_ == 0) fetch(least, limit);
    const std::size_t count = std::exchange(fetched_count_, 0);
    const std::array<io_event, kFetchedMax> events = fetched_;
    for (std::size_t i = 0; i < count; ++i) {
      free_.push_back(events[i].obj);
      auto& call = *static_cast<FileCall*>(events[i].data);
      call.result = static_cast<long>(events[i].res);
      finish(call);
    }
    threadpool::WorkList refused = std::exchange(refused_, {});
    const std::size_t refused_count = refused.size();
    while (threadpool::Work* const work = refused.pop_front())
      finish(static_cast<FileCall&>(*work));
    return count + refused_count;
  }

  static constexpr std::size_t kFetchedMax = 64;
  io_context_t context_{nullptr};
  std::vector<iocb> iocbs_;
  std::vector<iocb*> free_;
  threadpool::WorkList waiting_;
  threadpool::WorkList refused_;
  std::array<io_event, kFetchedMax> fetched_{};
  std::size_t fetched_count_{0};
};

}  // namespace

Expected<std::unique_ptr<FileCallEngine>> make_native_file_calls(const EngineOptions& options) {
  auto engine = std::make_unique<NativeFileCalls>();
  if (auto set_up = engine->set_up(options); !set_up) return std::unexpected(set_up.error());
  return engine;
}

}  // namespace vblk::aio
