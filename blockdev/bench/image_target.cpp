#include "blockdev/bench/image_target.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/bench/noise.h"
#include "blockdev/image/open_image.h"
#include "blockdev/io_context.h"
#include "blockdev/io_loop.h"

namespace vblk::bench {

namespace {

constexpr std::size_t kBufferAlignmentBytes = 4096;

class ImagePort final : public Port {
 public:
  ImagePort(blockdev::BlockNode& node, std::unique_ptr<aio::EngineSet> engines, bool write_through)
      : node_(node),
        write_through_(write_through),
        context_(std::make_unique<blockdev::IoContext>(loop_, std::move(engines))) {
    node_.attach(*context_);
  }
  ~ImagePort() override {
    context_->drain();
    node_.detach(*context_);
  }

  Expected<Io*> make_io(std::size_t buffer_bytes) override {
    const std::size_t rounded =
        (buffer_bytes + kBufferAlignmentBytes - 1) / kBufferAlignmentBytes * kBufferAlignmentBytes;
    auto* const memory = static_cast<std::byte*>(
        std::aligned_alloc(kBufferAlignmentBytes, std::max(rounded, kBufferAlignmentBytes)));
    if (memory == nullptr) return make_error(ErrorKind::kExhausted, "no memory for buffers");
    ImageIo& io = ios_.emplace_back();
    io.memory.reset(memory);
    io.buffer = {memory, buffer_bytes};
    fill_with_noise(io.buffer, ios_.size());
    io.request.io_of_bench = &io;
    return &io;
  }

  bool submit(Io& asked) override {
    auto& io = static_cast<ImageIo&>(asked);
    io.request.operation = static_cast<blockdev::BlockOperation>(io.operation);
    io.request.offset_bytes = io.offset_bytes;
    io.request.length_bytes = io.operation == Operation::kFlush ? 0 : io.length_bytes;
    io.request.write_through = write_through_;
    io.request.may_unmap = false;
    io.element = {io.buffer.data(), io.length_bytes};
    const bool moves_data = io.operation == Operation::kRead || io.operation == Operation::kWrite;
    io.request.iov = moves_data ? &io.element : nullptr;
    io.request.iov_count = moves_data ? 1 : 0;
    io.request.complete = [](blockdev::BlockRequest& request, int error) {
      ImageIo& done = *static_cast<ImageRequest&>(request).io_of_bench;
      done.error = error;
      done.complete(done);
    };
    node_.submit(io.request, *context_);
    return true;
  }
  void kick() override { context_->engines().submit(); }
  Expected<std::size_t> poll() override { return context_->poll(); }
  Expected<void> sleep(std::chrono::nanoseconds timeout) override {
    ++wake_ups_;
    context_->wait(timeout);
    return {};
  }
  [[nodiscard]] TargetStatistics statistics() const override {
    TargetStatistics sum{.wake_ups = wake_ups_};
    for (const auto& engine : context_->engines().engines()) {
      sum.submit_calls += engine->statistics().submit_calls;
      sum.submitted += engine->statistics().submitted;
    }
    return sum;
  }

 private:
  struct ImageIo;
  struct ImageRequest : blockdev::BlockRequest {
    ImageIo* io_of_bench{nullptr};
  };
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  struct ImageIo : Io {
    ImageRequest request;
    iovec element{};
    std::unique_ptr<std::byte, Free> memory;
  };

  blockdev::BlockNode& node_;
  const bool write_through_;
  blockdev::IoLoop loop_;  // never runs: the port's caller looks for itself
  std::unique_ptr<blockdev::IoContext> context_;
  std::deque<ImageIo> ios_;
  std::uint64_t wake_ups_{0};
};

static_assert(static_cast<int>(Operation::kRead) == static_cast<int>(aio::IoKind::kRead) &&
              static_cast<int>(Operation::kWrite) == static_cast<int>(aio::IoKind::kWrite) &&
              static_cast<int>(Operation::kFlush) == static_cast<int>(aio::IoKind::kFlush) &&
              static_cast<int>(Operation::kDiscard) == static_cast<int>(aio::IoKind::kDiscard) &&
              static_cast<int>(Operation::kWriteZeroes) ==
                  static_cast<int>(aio::IoKind::kWriteZeroes));

class ImageTarget final : public Target {
 public:
  ImageTarget(std::unique_ptr<blockdev::BlockNode> node, ImageTargetOptions options)
      : node_(std::move(node)), options_(std::move(options)) {
    write_through_ = !blockdev::has_write_cache(options_.image.cache);
  }

  [[nodiscard]] std::string name() const override {
    return fmt::format("{} ({}, {})", node_->name(), options_.aio.to_string(),
                       blockdev::to_string(options_.image.cache));
  }
  [[nodiscard]] std::uint64_t size_bytes() const override { return node_->size_bytes(); }
  [[nodiscard]] std::size_t transfer_bytes_max() const override { return std::size_t{1} << 30; }
  [[nodiscard]] bool can(Operation operation) const override {
    if (operation == Operation::kDiscard) return node_->limits().can_discard;
    return operation != Operation::kWriteZeroes || node_->limits().can_write_zeroes;
  }
  [[nodiscard]] bool is_read_only() const override { return node_->limits().read_only; }
  [[nodiscard]] pid_t process() const override { return ::getpid(); }
  [[nodiscard]] bool is_in_process() const override { return true; }
  Expected<void> set_write_through(bool write_through) override {
    write_through_ = write_through || !blockdev::has_write_cache(options_.image.cache);
    return {};
  }
  Expected<std::unique_ptr<Port>> open_port(unsigned /*index*/) override {
    auto engines = aio::EngineSet::create(options_.aio, options_.engine);
    if (!engines) return std::unexpected(std::move(engines.error()));
    return std::make_unique<ImagePort>(*node_, std::move(*engines), write_through_);
  }
  [[nodiscard]] TargetStatistics statistics() const override {
    const auto flushes = node_->flush_statistics();
    return {.flushes = flushes.submitted, .flushes_issued = flushes.begun};
  }

 private:
  std::unique_ptr<blockdev::BlockNode> node_;
  const ImageTargetOptions options_;
  bool write_through_;
};

}  // namespace

Expected<std::unique_ptr<Target>> open_image_target(const ImageTargetOptions& options) {
  auto node = blockdev::open_image(options.image);
  if (!node) return std::unexpected(std::move(node.error()));
  return std::make_unique<ImageTarget>(std::move(*node), options);
}

}  // namespace vblk::bench
