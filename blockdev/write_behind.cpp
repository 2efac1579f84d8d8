#include "blockdev/write_behind.h"

#include <utility>

namespace vblk::blockdev {

void WriteBehind::hold(BlockRequest& write) {
  ++statistics_.held_writes;
  write.next = nullptr;
  if (held_tail_ == nullptr) {
    held_head_ = &write;
  } else {
    held_tail_->next = &write;
  }
  held_tail_ = &write;
}

void WriteBehind::close_window() {
  is_busy_ = true;
  ++statistics_.windows;
  older_ = std::exchange(started_, std::exchange(current_, {}));
  sync(started_, false, [](aio::IoRequest& io, int error) {
    WriteBehind& self = *static_cast<Io&>(io).owner;
    self.note(error);
    self.wait_for_older();
  });
}

void WriteBehind::wait_for_older() {
  if (older_.written_bytes == 0) return window_done();
  sync(older_, true, [](aio::IoRequest& io, int error) {
    WriteBehind& self = *static_cast<Io&>(io).owner;
    self.note(error);
    self.window_done();
  });
}

void WriteBehind::sync(const Window& window, bool until_written,
                       aio::IoRequest::Completion complete) {
  io_.owner = this;
  io_.kind = aio::IoKind::kWriteBehind;
  io_.until_written = until_written;
  io_.fd = options_.fd;
  io_.offset_bytes = window.begin;
  io_.length_bytes = window.end - window.begin;
  io_.complete = complete;
  context_.engines().queue(io_);
}

// Held writes are let go as a whole: they are no more than the rings hold.
void WriteBehind::window_done() {
  is_busy_ = false;
  if (is_full()) close_window();
  BlockRequest* write = std::exchange(held_head_, nullptr);
  held_tail_ = nullptr;
  while (write != nullptr) options_.resubmit(*std::exchange(write, write->next));
}

void WriteBehind::note(int error) {
  if (error != 0) options_.failed(error);
}

}  // namespace vblk::blockdev
