// The eventfd(2) calls that the engines share.
#pragma once

#include "aio/error.h"

namespace vblk::aio {

// A new non-blocking, close-on-exec eventfd. Error: kExhausted, naming what it was for.
Expected<int> make_event_fd(const char* purpose);
// Makes it readable. Any thread. Never blocks: a full counter is readable already.
void signal_event_fd(int fd) noexcept;
// Makes it unreadable again.
void drain_event_fd(int fd) noexcept;

}  // namespace vblk::aio
