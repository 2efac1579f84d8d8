#include "aio/threads_engine.h"

#include <cassert>
#include <memory>
#include <unistd.h>

#include "aio/blocking_io.h"
#include "aio/event_fd.h"

namespace vblk::aio {

Expected<std::unique_ptr<ThreadsEngine>> ThreadsEngine::create(const EngineOptions& options) {
  auto event_fd = make_event_fd("the threads engine");
  if (!event_fd) return std::unexpected(std::move(event_fd.error()));
  return std::unique_ptr<ThreadsEngine>(new ThreadsEngine(options, *event_fd));
}

ThreadsEngine::ThreadsEngine(const EngineOptions& options, int event_fd) : event_fd_(event_fd) {
  pool_ = std::make_unique<threadpool::ThreadPool>(
      threadpool::ThreadPoolOptions{.max_threads = options.max_threads, .name = "vblk-worker"});
}

ThreadsEngine::~ThreadsEngine() {
  assert(in_flight_ == 0 && "the owner drains before it destroys an engine");
  pool_.reset();  // a worker may be signalling still
  ::close(event_fd_);
}

void ThreadsEngine::queue(IoRequest& request) {
  request.run = run_on_worker;
  request.engine = this;
  request.takes_long = request.kind != IoKind::kRead && request.kind != IoKind::kWrite;
  batch_.push_back(request);
  ++in_flight_;
  ++statistics_.requests;
}

void ThreadsEngine::submit() {
  if (batch_.empty()) return;
  ++statistics_.submit_calls;
  statistics_.submitted += batch_.size();
  pool_->submit(batch_);
}

void ThreadsEngine::run_on_worker(threadpool::Work& work) noexcept {
  auto& request = static_cast<IoRequest&>(work);
  request.result = perform_blocking(request);
  auto& engine = static_cast<ThreadsEngine&>(*request.engine);
  // From the push on, the request is the owner's again.
  if (engine.completions_.push(request)) signal_event_fd(engine.event_fd_);
}

std::size_t ThreadsEngine::reap() {
  if (completions_.take_all(finished_) == 0) return 0;
  ++statistics_.reap_calls;
  std::size_t count = 0;
  while (threadpool::Work* const work = finished_.pop_front()) {
    auto& request = static_cast<IoRequest&>(*work);
    --in_flight_;
    ++statistics_.completed;
    ++count;
    request.complete(request, static_cast<int>(request.result));
  }
  return count;
}

bool ThreadsEngine::prepare_to_sleep() { return batch_.empty() && completions_.arm(); }

void ThreadsEngine::wake_up() {
  if (completions_.disarm()) drain_event_fd(event_fd_);
}

}  // namespace vblk::aio
