// Coroutines of several I/O threads that wait for something which a mutex guards.
//
//   std::unique_lock lock(mutex);
//   while (!something) {
//     co_await list.wait(lock, token);   // unlocks, waits; the lock is held again afterwards
//   }
//
// Whoever changes `something` calls wake_all() under the same mutex. Each waiter is resumed on its
// own thread, from that thread's loop.
#pragma once

#include <coroutine>
#include <mutex>
#include <utility>

#include "blockdev/block_request.h"
#include "blockdev/io_context.h"

namespace vblk::blockdev {

class WaitList {
 public:
  class Waiter {
   public:
    Waiter(WaitList& list, std::unique_lock<std::mutex>& lock, BlockRequest& token)
        : list_(list), lock_(lock), token_(token) {}
    static bool await_ready() noexcept { return false; }
    void await_suspend(std::coroutine_handle<> awaiter) {
      awaiter_ = awaiter;
      token_.context->goes_away();
      token_.resume_argument = this;
      token_.resume = [](BlockRequest& token, void* waiter) {
        token.context->is_back();
        static_cast<Waiter*>(waiter)->awaiter_.resume();
      };
      next_ = std::exchange(list_.first_, this);
      // From here on another thread may hand the token over, to be found by this thread's loop.
      lock_.unlock();
    }
    void await_resume() { lock_.lock(); }

   private:
    friend class WaitList;
    WaitList& list_;
    std::unique_lock<std::mutex>& lock_;
    BlockRequest& token_;
    std::coroutine_handle<> awaiter_;
    Waiter* next_{nullptr};
  };

  WaitList() = default;
  WaitList(const WaitList&) = delete;
  WaitList& operator=(const WaitList&) = delete;

  // `token` is a request of the waiting thread that nothing else is using: the one that the
  // coroutine carries out, or one of its own. Its `context` is set.
  [[nodiscard]] Waiter wait(std::unique_lock<std::mutex>& lock, BlockRequest& token) {
    return {*this, lock, token};
  }
  // `here` is the calling thread's context.
  void wake_all(IoContext& here) {
    Waiter* waiter = std::exchange(first_, nullptr);
    while (waiter != nullptr) {
      BlockRequest& token = waiter->token_;
      // The waiter may be gone as soon as its token is handed over.
      waiter = waiter->next_;
      if (token.context == &here) {
        here.resume_before_submission(token);
      } else {
        token.context->hand_over(token);
      }
    }
  }
  [[nodiscard]] bool is_empty() const { return first_ == nullptr; }

 private:
  Waiter* first_{nullptr};
};

}  // namespace vblk::blockdev
