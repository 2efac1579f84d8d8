#include "aio/threads_engine.h"

#include <cassert>
#include <memory>
#include <unistd.h>
#include <utility>

#include "aio/blocking_io.h"
#include "aio/event_fd.h"

namespace vblk::aio {

namespace {

// A longer copy is worth a worker: it would keep the owner from its other requests.
constexpr std::uint64_t kCachedBytesMax = 65536;
constexpr unsigned kMissesTolerated = 8;
constexpr unsigned kTriesWhileMissing = 16;

}  // namespace

Expected<std::unique_ptr<ThreadsEngine>> ThreadsEngine::create(const EngineOptions& options) {
  auto event_fd = make_event_fd("the threads engine");
  if (!event_fd) return std::unexpected(std::move(event_fd.error()));
  return std::unique_ptr<ThreadsEngine>(new ThreadsEngine(options, *event_fd));
}

ThreadsEngine::ThreadsEngine(const EngineOptions& options, int event_fd) : event_fd_(event_fd) {
  pool_ = threadpool::make_pool(options.pool, {.min_threads = options.min_threads,
                                               .max_threads = options.max_threads,
                                               .name = "vblk-worker"});
}

ThreadsEngine::~ThreadsEngine() {
  assert(in_flight_ == 0 && "the owner drains before it destroys an engine");
  pool_.reset();  // a worker may be signalling still
  ::close(event_fd_);
}

void ThreadsEngine::queue(IoRequest& request) {
  accept(request);
  request.run = run_on_worker;
  request.takes_long = request.kind != IoKind::kRead && request.kind != IoKind::kWrite;
  batch_may_be_cached_ |= request.may_be_cached;
  batch_.push_back(request);
}

void ThreadsEngine::submit() {
  if (std::exchange(batch_may_be_cached_, false)) answer_from_page_cache();
  if (batch_.empty()) return;
  ++statistics_.submit_calls;
  statistics_.submitted += batch_.size();
  pool_->submit(batch_);
}

void ThreadsEngine::answer_from_page_cache() {
  threadpool::WorkList rest;
  while (threadpool::Work* const work = batch_.pop_front()) {
    auto& request = static_cast<IoRequest&>(*work);
    if (request.may_be_cached && try_page_cache(request)) {
      cached_.push_back(request);
    } else {
      rest.push_back(request);
    }
  }
  batch_.append(rest);
}

// Where reads keep missing, most are not tried: each try is a system call.
bool ThreadsEngine::try_page_cache(IoRequest& request) {
  if (request.length_bytes > kCachedBytesMax) return false;
  if (misses_in_row_ >= kMissesTolerated) {
    ++misses_in_row_;
    if (misses_in_row_ % kTriesWhileMissing != 0) return false;
  }
  if (!read_from_page_cache(request)) {
    ++misses_in_row_;
    return false;
  }
  misses_in_row_ = 0;
  request.result = 0;
  ++statistics_.page_cache_hits;
  return true;
}

void ThreadsEngine::run_on_worker(threadpool::Work& work) noexcept {
  auto& request = static_cast<IoRequest&>(work);
  request.result = perform_blocking(request);
  auto& engine = static_cast<ThreadsEngine&>(*request.engine);
  // From the push on, the request is the owner's again.
  if (engine.completions_.push(request)) signal_event_fd(engine.event_fd_);
}

std::size_t ThreadsEngine::reap() {
  finished_.append(cached_);
  if (completions_.take_all(finished_) == 0 && finished_.empty()) return 0;
  ++statistics_.reap_calls;
  std::size_t count = 0;
  while (threadpool::Work* const work = finished_.pop_front()) {
    auto& request = static_cast<IoRequest&>(*work);
    ++count;
    finish(request, static_cast<int>(request.result));
  }
  return count;
}

bool ThreadsEngine::prepare_to_sleep() {
  return batch_.empty() && cached_.empty() && completions_.arm();
}

void ThreadsEngine::wake_up() {
  if (completions_.disarm()) drain_event_fd(event_fd_);
}

}  // namespace vblk::aio
