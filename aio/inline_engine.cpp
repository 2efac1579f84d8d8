#include "aio/inline_engine.h"

#include <cassert>
#include <unistd.h>
#include <utility>

#include "aio/blocking_io.h"
#include "aio/event_fd.h"

namespace vblk::aio {

Expected<std::unique_ptr<InlineEngine>> InlineEngine::create() {
  auto event_fd = make_event_fd("the inline engine");
  if (!event_fd) return std::unexpected(std::move(event_fd.error()));
  return std::unique_ptr<InlineEngine>(new InlineEngine(*event_fd));
}

InlineEngine::~InlineEngine() {
  assert(in_flight_ == 0 && "the owner drains before it destroys an engine");
  ::close(event_fd_);
}

void InlineEngine::queue(IoRequest& request) {
  accept(request);
  queued_.push_back(request);
}

void InlineEngine::submit() {
  if (queued_.empty()) return;
  ++statistics_.submit_calls;
  while (threadpool::Work* const work = queued_.pop_front()) {
    auto& request = static_cast<IoRequest&>(*work);
    ++statistics_.submitted;
    request.result = perform_blocking(request);
    finished_.push_back(request);
  }
}

std::size_t InlineEngine::reap() {
  if (finished_.empty()) return 0;
  ++statistics_.reap_calls;
  // Taken whole: a completion may queue, and what it queues is carried out by the next submit().
  threadpool::WorkList finished = std::exchange(finished_, {});
  std::size_t count = 0;
  for (; threadpool::Work* const work = finished.pop_front(); ++count) {
    auto& request = static_cast<IoRequest&>(*work);
    finish(request, static_cast<int>(request.result));
  }
  return count;
}

}  // namespace vblk::aio
