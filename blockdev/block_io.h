// Requests to a node as coroutines make them (task.h).
#pragma once

#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "blockdev/block_node.h"
#include "blockdev/block_request.h"

namespace vblk::blockdev {

// Memory that any disk takes directly.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t bytes)
      : bytes_(bytes), data_(static_cast<std::byte*>(::operator new(bytes, kAlignment))) {}
  [[nodiscard]] std::byte* data() { return data_.get(); }
  [[nodiscard]] const std::byte* data() const { return data_.get(); }
  [[nodiscard]] std::size_t size() const { return bytes_; }
  [[nodiscard]] std::span<std::byte> bytes() { return {data_.get(), bytes_}; }

 private:
  static constexpr std::align_val_t kAlignment{BouncePool::kAlignment};
  struct Free {
    void operator()(std::byte* data) const { ::operator delete(data, kAlignment); }
  };
  std::size_t bytes_{0};
  std::unique_ptr<std::byte, Free> data_;
};

// One request, started and awaited in one: `const int error = co_await BlockIo(...)`.
class BlockIo : public BlockRequest {
 public:
  // Flush, discard, write zeroes.
  BlockIo(BlockNode& target, IoContext& here, BlockOperation kind, std::uint64_t offset,
          std::uint64_t length)
      : target_(target), here_(here) {
    operation = kind;
    offset_bytes = offset;
    length_bytes = length;
  }
  // Read, write: of one piece of memory.
  BlockIo(BlockNode& target, IoContext& here, BlockOperation kind, std::uint64_t offset,
          std::span<std::byte> memory)
      : BlockIo(target, here, kind, offset, memory.size()) {
    element_ = {memory.data(), memory.size()};
    iov = &element_;
    iov_count = 1;
  }
  BlockIo(const BlockIo&) = delete;
  BlockIo& operator=(const BlockIo&) = delete;

  static bool await_ready() noexcept { return false; }
  void await_suspend(std::coroutine_handle<> awaiter) {
    awaiter_ = awaiter;
    complete = [](BlockRequest& request, int error) {
      auto& self = static_cast<BlockIo&>(request);
      self.error_ = error;
      self.awaiter_.resume();
    };
    target_.submit(*this, here_);
  }
  [[nodiscard]] int await_resume() const noexcept { return error_; }

 private:
  BlockNode& target_;
  IoContext& here_;
  iovec element_{};
  std::coroutine_handle<> awaiter_;
  int error_{0};
};

// Several requests at once, awaited together.
//
//   IoGroup group(context);
//   group.start(node, BlockOperation::kRead, offset, std::move(iovecs));
//   const int error = co_await group;      // the first error; all have ended
class IoGroup {
 public:
  explicit IoGroup(IoContext& context) : context_(context) {}
  IoGroup(const IoGroup&) = delete;
  IoGroup& operator=(const IoGroup&) = delete;

  void start(BlockNode& node, BlockOperation kind, std::uint64_t offset, std::vector<iovec> iovecs,
             bool write_through = false) {
    auto member = std::make_unique<Member>();
    for (const iovec& element : iovecs) member->length_bytes += element.iov_len;
    member->iovecs = std::move(iovecs);
    member->group = this;
    member->operation = kind;
    member->offset_bytes = offset;
    member->iov = member->iovecs.data();
    member->iov_count = static_cast<std::uint32_t>(member->iovecs.size());
    member->write_through = write_through;
    member->complete = [](BlockRequest& request, int error) {
      static_cast<Member&>(request).group->ended(error);
    };
    ++running_;
    members_.push_back(std::move(member));
    node.submit(*members_.back(), context_);
  }
  [[nodiscard]] bool is_empty() const { return members_.empty(); }

  [[nodiscard]] bool await_ready() const noexcept { return running_ == 0; }
  void await_suspend(std::coroutine_handle<> awaiter) { awaiter_ = awaiter; }
  [[nodiscard]] int await_resume() noexcept {
    members_.clear();
    return std::exchange(error_, 0);
  }

 private:
  struct Member : BlockRequest {
    IoGroup* group{nullptr};
    std::vector<iovec> iovecs;
  };
  void ended(int error) {
    if (error_ == 0) error_ = error;
    if (--running_ == 0 && awaiter_) std::exchange(awaiter_, nullptr).resume();
  }

  IoContext& context_;
  std::vector<std::unique_ptr<Member>> members_;
  std::size_t running_{0};
  int error_{0};
  std::coroutine_handle<> awaiter_;
};

}  // namespace vblk::blockdev
