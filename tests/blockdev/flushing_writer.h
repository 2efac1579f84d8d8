// A guest on a thread of its own that believes what flushes say.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <future>
#include <sys/uio.h>

#include "aio/simulated_disk.h"
#include "blockdev/block_node.h"
#include "blockdev/io_thread.h"

namespace vblk::blockdev::testing {

// Writes a sector of its own and flushes, again and again, until told to stop or so many rounds are
// done. What a flush has covered must be durable, and each request completes once.
class FlushingWriter {
 public:
  // `rounds_max` 0: until stop().
  FlushingWriter(BlockNode& node, aio::SimulatedDisk& disk, IoThread& thread, std::uint64_t sector,
                 std::uint64_t rounds_max = 0)
      : node_(node), disk_(disk), thread_(thread), rounds_max_(rounds_max) {
    request_.writer = this;
    request_.offset_bytes = sector * kSectorBytes;
    request_.complete = [](BlockRequest& request, int error) {
      static_cast<Request&>(request).writer->completed(error);
    };
  }
  void start() {
    thread_.loop().post([this] { write(); });
  }
  void stop() { is_stopping_ = true; }
  void wait() { done_.get_future().wait(); }
  // After wait().
  [[nodiscard]] int lost() const { return lost_; }
  [[nodiscard]] std::uint64_t rounds() const { return round_; }

 private:
  struct Request : BlockRequest {
    FlushingWriter* writer{nullptr};
  };

  void write() {
    ++round_;
    is_in_flight_ = true;
    data_.fill(std::byte(round_));
    element_ = {data_.data(), data_.size()};
    request_.operation = BlockOperation::kWrite;
    request_.length_bytes = kSectorBytes;
    request_.iov = &element_;
    request_.iov_count = 1;
    node_.submit(request_, thread_.context());
  }
  void completed(int error) {
    if (error != 0 || !is_in_flight_) ++lost_;
    if (request_.operation == BlockOperation::kWrite) {
      request_.operation = BlockOperation::kFlush;
      return node_.submit(request_, thread_.context());
    }
    is_in_flight_ = false;
    if (disk_.durable()[request_.offset_bytes] != std::byte(round_)) ++lost_;
    if (is_stopping_ || round_ == rounds_max_) return done_.set_value();
    // Not from a completion every time: from the loop as well.
    if (round_ % 3 != 0) return write();
    thread_.loop().post([this] { write(); });
  }

  BlockNode& node_;
  aio::SimulatedDisk& disk_;
  IoThread& thread_;
  const std::uint64_t rounds_max_;
  Request request_;
  alignas(512) std::array<std::byte, kSectorBytes> data_{};
  iovec element_{};
  std::uint64_t round_{0};
  bool is_in_flight_{false};
  int lost_{0};
  std::atomic<bool> is_stopping_{false};
  std::promise<void> done_;
};

}  // namespace vblk::blockdev::testing
