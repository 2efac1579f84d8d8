#include "blockdev/io_context.h"

#include <cassert>
#include <utility>

namespace vblk::blockdev {

IoContext::IoContext(IoLoop& loop, std::unique_ptr<aio::EngineSet> engines)
    : loop_(loop), engines_(std::move(engines)) {
  for (const auto& engine : engines_->engines()) {
    // Being readable only ends the sleep; wake_up() drains the descriptor.
    watches_.push_back(loop_.watch(engine->completion_fd(), [] {}));
    assert(watches_.back() != nullptr && "an engine's completion descriptor can be waited on");
  }
  loop_.add_poller(*this, PollStage::kEngine);
}

IoContext::~IoContext() {
  drain();
  loop_.remove_poller(*this);
}

void IoContext::complete_later(BlockRequest& request, int error) {
  request.deferred_error = error;
  request.next = nullptr;
  if (deferred_tail_ == nullptr) {
    deferred_head_ = &request;
  } else {
    deferred_tail_->next = &request;
  }
  deferred_tail_ = &request;
}

// Takes the list whole first: completions may defer new requests, which wait for the next cycle.
std::size_t IoContext::run_deferred() {
  BlockRequest* request = std::exchange(deferred_head_, nullptr);
  deferred_tail_ = nullptr;
  std::size_t count = 0;
  while (request != nullptr) {
    BlockRequest* const next = request->next;
    request->complete(*request, request->deferred_error);
    request = next;
    ++count;
  }
  return count;
}

void IoContext::drain() {
  while (deferred_head_ != nullptr || engines_->in_flight() > 0) {
    run_deferred();
    engines_->drain();
  }
}

std::size_t IoContext::poll() {
  const std::size_t deferred = run_deferred();
  engines_->submit();
  return engines_->reap() + deferred;
}

bool IoContext::prepare_to_sleep() {
  return deferred_head_ == nullptr && engines_->prepare_to_sleep();
}

void IoContext::wake_up() { engines_->wake_up(); }

}  // namespace vblk::blockdev
