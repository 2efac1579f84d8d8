#include "blockdev/io_context.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <pthread.h>
#include <system_error>
#include <unistd.h>
#include <utility>

#include "aio/event_fd.h"
#include "blockdev/log.h"

namespace vblk::blockdev {

void IoContext::RequestList::push_back(BlockRequest& request) {
  request.next = nullptr;
  if (tail == nullptr) {
    head = &request;
  } else {
    tail->next = &request;
  }
  tail = &request;
}

IoContext::IoContext(IoLoop& loop, std::unique_ptr<aio::EngineSet> engines)
    : loop_(loop), engines_(std::move(engines)), call_timer_(loop.make_timer([] {})) {
  const auto arrival_fd = aio::make_event_fd("an I/O thread");
  if (!arrival_fd) {
    throw std::system_error(arrival_fd.error().errno_value, std::generic_category(),
                            arrival_fd.error().message);
  }
  arrival_fd_ = *arrival_fd;
  std::vector<int> fds{arrival_fd_};
  for (const auto& engine : engines_->engines()) fds.push_back(engine->completion_fd());
  for (const int fd : fds) {
    if (const auto woken = wake_by(fd); !woken) {
      watches_.clear();
      ::close(arrival_fd_);
      throw std::system_error(ENOSPC, std::generic_category(), woken.error().message);
    }
  }
  loop_.add_poller(*this, PollStage::kEngine);
}

IoContext::~IoContext() {
  drain();
  loop_.remove_poller(*this);
  watches_.clear();
  ::close(arrival_fd_);
}

// Being readable only ends the sleep; wake_up() drains the descriptor.
Expected<void> IoContext::wake_by(int fd) {
  auto watch = loop_.watch(fd, [] {});
  if (watch == nullptr) {
    return make_error(ErrorKind::kExhausted,
                      "the kernel waits for no more descriptors; raise fs.epoll.max_user_watches");
  }
  descriptors_.push_back({.fd = fd, .events = POLLIN, .revents = 0});
  watches_.push_back(std::move(watch));
  return {};
}

// An engine may leave between this and change_engines(): its place is found by its descriptor.
Expected<void> IoContext::prepare_change(const aio::EngineChange& change) {
  for (const int fd : change.completion_fds()) {
    if (auto woken = wake_by(fd); !woken) return woken;
  }
  return {};
}

void IoContext::change_engines(aio::EngineChange change, Retire retire) {
  retire_ = std::move(retire);
  engines_->commit(std::move(change));
}

void IoContext::cancel_change(aio::EngineChange change) {
  for (const int fd : change.completion_fds()) stop_waking_by(fd);
  engines_->cancel(std::move(change));
}

void IoContext::stop_waking_by(int fd) {
  const auto place = std::ranges::find(descriptors_, fd, &pollfd::fd);
  if (place == descriptors_.end()) return;
  watches_.erase(watches_.begin() + (place - descriptors_.begin()));
  descriptors_.erase(place);
}

void IoContext::part_with_retired() {
  while (auto engine = engines_->take_retired()) {
    stop_waking_by(engine->completion_fd());
    if (retire_) retire_(std::move(engine));
  }
}

void IoContext::log_news() {
  std::array<char, 16> thread_name{};
  pthread_getname_np(pthread_self(), thread_name.data(), thread_name.size());
  for (const auto& line : engines_->take_news())
    log::info("engine: {}: auto: {}", thread_name.data(), line);
}

void IoContext::keep(const BlockNode& node, std::unique_ptr<NodeState> state) {
  assert(state_of(node) == nullptr);
  node_states_.emplace_back(&node, std::move(state));
}

void IoContext::complete_later(BlockRequest& request, int error) {
  request.deferred_error = error;
  deferred_.push_back(request);
}

void IoContext::resume_before_submission(BlockRequest& request) { resumed_.push_back(request); }

void IoContext::hand_over(BlockRequest& request) noexcept {
  request.io.parent = &request;
  if (arrivals_.push(request.io)) aio::signal_event_fd(arrival_fd_);
}

void IoContext::call_after(std::chrono::nanoseconds delay, Call function, void* argument) {
  calls_.push_back({std::chrono::steady_clock::now() + delay, function, argument});
}

void IoContext::cancel_call(void* argument) {
  std::erase_if(calls_, [argument](const LaterCall& call) { return call.argument == argument; });
}

std::chrono::steady_clock::time_point IoContext::first_call() const {
  return std::ranges::min_element(calls_, {}, &LaterCall::when)->when;
}

std::size_t IoContext::run_calls() {
  return calls_.empty() ? 0 : run_calls_until(std::chrono::steady_clock::now());
}

// What is called may ask for another call.
std::size_t IoContext::run_calls_until(std::chrono::steady_clock::time_point time) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < calls_.size();) {
    const LaterCall call = calls_[i];
    if (call.when > time) {
      ++i;
      continue;
    }
    calls_.erase(calls_.begin() + static_cast<std::ptrdiff_t>(i));
    call.function(call.argument);
    ++count;
  }
  return count;
}

// Takes the list whole first: completions may defer new requests, which wait for the next cycle.
std::size_t IoContext::run_deferred() {
  BlockRequest* request = std::exchange(deferred_, {}).head;
  std::size_t count = 0;
  while (request != nullptr) {
    BlockRequest* const next = request->next;
    request->complete(*request, request->deferred_error);
    request = next;
    ++count;
  }
  return count;
}

// What is resumed while this runs waits for the next cycle, as above.
std::size_t IoContext::run_resumed() {
  threadpool::WorkList arrived;
  arrivals_.take_all(arrived);
  while (threadpool::Work* const work = arrived.pop_front())
    resumed_.push_back(*static_cast<BlockRequest::Io*>(work)->parent);
  BlockRequest* request = std::exchange(resumed_, {}).head;
  std::size_t count = 0;
  while (request != nullptr) {
    BlockRequest* const next = request->next;
    request->resume(*request, request->resume_argument);
    request = next;
    ++count;
  }
  return count;
}

bool IoContext::has_work() const { return deferred_.head != nullptr || resumed_.head != nullptr; }

void IoContext::drain() {
  while (!is_idle()) {
    const std::size_t called = run_calls_until(std::chrono::steady_clock::time_point::max());
    if (poll() + called == 0) wait(kForEver);
  }
}

void IoContext::wait(std::chrono::nanoseconds timeout) {
  if (!calls_.empty()) {
    const std::chrono::nanoseconds left =
        std::max<std::chrono::nanoseconds>(first_call() - std::chrono::steady_clock::now(), {});
    timeout = timeout == kForEver ? left : std::min(timeout, left);
  }
  // Nobody hands over anything while nothing is away.
  if (away_ == 0 && !has_work() && engines_->sleep(timeout)) return;
  if (prepare_to_sleep()) {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
    const timespec limit{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
    ::ppoll(descriptors_.data(), descriptors_.size(), timeout == kForEver ? nullptr : &limit,
            nullptr);
  }
  wake_up();
}

std::size_t IoContext::poll() {
  const std::size_t done = run_calls() + run_deferred() + run_resumed();
  engines_->submit();
  const std::size_t reaped = engines_->reap();
  if (engines_->has_retired()) part_with_retired();
  if (engines_->has_news()) log_news();
  return reaped + done;
}

bool IoContext::prepare_to_sleep() {
  if (has_work()) return false;
  if (!calls_.empty()) {
    const auto end = first_call();
    const auto left = end - std::chrono::steady_clock::now();
    if (left.count() <= 0) return false;
    // One that runs for an earlier call ends this sleep early, and is set anew then: to set it
    // while it runs would take memory.
    if (!call_timer_->is_running() || call_timer_end_ > end) {
      call_timer_->start(left);
      call_timer_end_ = end;
    }
  }
  return arrivals_.arm() && engines_->prepare_to_sleep();
}

void IoContext::wake_up() {
  if (arrivals_.disarm()) aio::drain_event_fd(arrival_fd_);
  engines_->wake_up();
}

}  // namespace vblk::blockdev
