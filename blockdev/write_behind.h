// Write-behind: what one I/O thread has written to the page cache goes to the disk soon, in
// windows, so that a flush never meets more than a few of them.
//
//   window        its dirty pages
//   current       are being made by the writes that complete now
//   started       writing them has been started when the window was full
//   older         have been waited for: started before `started` was
//
// When the current window is full its writing is started, and then the window before it is waited
// for, so that the disk always has the next one at hand ("start new, wait for old";
// sync_file_range(2)). If the current window is full again before that is done, further writes are
// held back: the guest is slowed to what the disk does, instead of a flush to what has piled up.
// So at most three windows are dirty, and the writes in flight.
//
// This makes nothing durable: sync_file_range writes no metadata and flushes no disk's cache. A
// flush is an fdatasync as ever; it only finds less to do.
//
// Thread: the I/O thread of its context. Each has windows of its own, so that queues share nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>

#include "aio/io_request.h"
#include "blockdev/block_request.h"
#include "blockdev/io_context.h"

namespace vblk::blockdev {

// Counters since it was made; owner thread.
struct WriteBehindStatistics {
  std::uint64_t windows{0};      // started
  std::uint64_t held_writes{0};  // that had to wait for the disk
};

class WriteBehind final : public IoContext::NodeState {
 public:
  struct Options {
    int fd{-1};
    std::uint64_t window_bytes{0};
    // A held write may be submitted now: to the node, again.
    std::move_only_function<void(BlockRequest&)> resubmit;
    // Writing has failed. The kernel reports that once only, so a later fdatasync may not say it.
    std::move_only_function<void(int error)> failed;
  };
  // `context` must outlive it, and have drained its engines before it goes.
  WriteBehind(IoContext& context, Options options)
      : context_(context), options_(std::move(options)) {}

  // False: the write is held, and comes back by `resubmit`.
  [[nodiscard]] bool admit(BlockRequest& write) {
    if (!is_full() || !is_busy_) return true;
    hold(write);
    return false;
  }
  // A write has completed that is in the page cache now.
  void written(std::uint64_t offset_bytes, std::uint64_t length_bytes) {
    current_.extend(offset_bytes, length_bytes);
    if (is_full() && !is_busy_) close_window();
  }
  [[nodiscard]] const WriteBehindStatistics& statistics() const { return statistics_; }

 private:
  struct Window {
    std::uint64_t begin{std::numeric_limits<std::uint64_t>::max()};
    std::uint64_t end{0};
    std::uint64_t written_bytes{0};  // within; the same byte twice counts twice
    void extend(std::uint64_t offset_bytes, std::uint64_t length_bytes) {
      begin = std::min(begin, offset_bytes);
      end = std::max(end, offset_bytes + length_bytes);
      written_bytes += length_bytes;
    }
  };
  struct Io : aio::IoRequest {
    WriteBehind* owner{nullptr};
  };

  [[nodiscard]] bool is_full() const { return current_.written_bytes >= options_.window_bytes; }
  void hold(BlockRequest& write);
  void close_window();
  void sync(const Window& window, bool until_written, aio::IoRequest::Completion complete);
  void wait_for_older();
  void window_done();
  void note(int error);

  IoContext& context_;
  Options options_;
  Window current_;
  Window started_;
  Window older_;
  bool is_busy_{false};  // starting a window or waiting for one
  Io io_;
  BlockRequest* held_head_{nullptr};
  BlockRequest* held_tail_{nullptr};
  WriteBehindStatistics statistics_;
};

}  // namespace vblk::blockdev
