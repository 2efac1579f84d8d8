// What one I/O thread lends to the nodes that work on it: its engines, its bounce buffers, its list
// of completions that need no kernel call, and the way by which another thread hands it a request.
//
// A node is shared by all I/O threads; everything a request needs that must not be shared comes
// from here. One IoContext per I/O thread, created and destroyed on it.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <poll.h>
#include <utility>
#include <vector>

#include "aio/engine_set.h"
#include "blockdev/block_request.h"
#include "blockdev/bounce_pool.h"
#include "blockdev/io_loop.h"
#include "threadpool/completion_queue.h"

namespace vblk::blockdev {

class BlockNode;

class IoContext final : public Poller {
 public:
  // What a node keeps for its work on one thread.
  class NodeState {
   public:
    NodeState() = default;
    virtual ~NodeState() = default;
    NodeState(const NodeState&) = delete;
    NodeState& operator=(const NodeState&) = delete;
  };

  // Registers itself and the engines' descriptors with `loop`, which must outlive it. Loop thread.
  // Throws std::system_error if there is no descriptor left, or no more can be waited for.
  IoContext(IoLoop& loop, std::unique_ptr<aio::EngineSet> engines);
  // Drains the engines first.
  ~IoContext() override;

  [[nodiscard]] IoLoop& loop() { return loop_; }
  [[nodiscard]] aio::EngineSet& engines() { return *engines_; }
  [[nodiscard]] BouncePool& bounce_pool() { return bounce_pool_; }

  // Keeps `state` for `node`, once (asserted), until the context goes; the node must outlive it.
  // state_of(): what is kept, or nothing. Loop thread.
  void keep(const BlockNode& node, std::unique_ptr<NodeState> state);
  [[nodiscard]] NodeState* state_of(const BlockNode& node) const {
    for (const auto& [owner, state] : node_states_) {
      if (owner == &node) return state.get();
    }
    return nullptr;
  }

  // Nodes go, and none of them has a request left: what is kept for all of them goes first. Loop
  // thread.
  void forget_nodes() { node_states_.clear(); }

  // Completes `request` with `error` from the loop, not from here (law 1: never inside submit).
  void complete_later(BlockRequest& request, int error);

  // Takes an engine that has left the set, without requests. On the loop's thread, which has no
  // time to destroy it (EngineSet::take_retired()).
  using Retire = std::function<void(std::unique_ptr<aio::Engine> engine)>;
  // Has the engines that were made for a change wake this thread once they are in use. Loop thread.
  // Error: kExhausted, there is no room among what is waited for (fs.epoll.max_user_watches);
  // cancel the change then.
  [[nodiscard]] Expected<void> prepare_change(const aio::EngineChange& change);
  // Puts a change of the engines into effect (aio::EngineSet::commit()), after prepare_change():
  // requests from now on go the new way. What serves no kind any more goes to `retire` when its
  // last request has completed. Loop thread, not from a completion.
  void change_engines(aio::EngineChange change, Retire retire);
  // Takes it back: nothing has happened. Engines that no route needs are let go as above.
  void cancel_change(aio::EngineChange change);

  // Runs `request.resume(request, request.resume_argument)` from the loop, when everything that
  // could be dispatched has been and the engines are about to submit.
  void resume_before_submission(BlockRequest& request);
  // The same, from any other thread. Uses `request.io`. The context must not go before this has
  // returned: contexts that share a node are destroyed when none of them has a request of it left.
  void hand_over(BlockRequest& request) noexcept;

  // Calls `function(argument)` from the loop when `delay` has passed; drain() does not wait that
  // long. One call at a time for each argument. Loop thread.
  using Call = void (*)(void* argument);
  void call_after(std::chrono::nanoseconds delay, Call function, void* argument);
  // It does not come any more; nothing if there is none. Loop thread.
  void cancel_call(void* argument);

  // A request waits for another thread, and comes back by hand_over() or otherwise. For drain().
  void goes_away() { ++away_; }
  void is_back() { --away_; }

  // No request is left, of nodes' own either, and none waits for another thread. Loop thread.
  [[nodiscard]] bool is_idle() const {
    return !has_work() && away_ == 0 && engines_->in_flight() == 0;
  }
  // Runs completions until no request is left, of those that wait for other threads as well.
  // Loop thread; blocks it. For shutdown and tests: a running loop makes progress by itself.
  void drain();
  // For a thread whose loop does not run: sleeps until poll() may have something to do, at most
  // `timeout`; a signal ends it too.
  static constexpr std::chrono::nanoseconds kForEver{-1};
  void wait(std::chrono::nanoseconds timeout);

  std::size_t poll() override;
  [[nodiscard]] bool is_worth_looking() const override { return engines_->is_worth_looking(); }
  [[nodiscard]] bool is_steady() const override { return !engines_->is_exploring(); }
  [[nodiscard]] bool prepare_to_sleep() override;
  void wake_up() override;

 private:
  // Linked through BlockRequest::next.
  struct RequestList {
    BlockRequest* head{nullptr};
    BlockRequest* tail{nullptr};
    void push_back(BlockRequest& request);
  };
  std::size_t run_deferred();
  std::size_t run_resumed();
  std::size_t run_calls();
  std::size_t run_calls_until(std::chrono::steady_clock::time_point time);
  [[nodiscard]] std::chrono::steady_clock::time_point first_call() const;
  [[nodiscard]] bool has_work() const;
  [[nodiscard]] Expected<void> wake_by(int fd);
  void stop_waking_by(int fd);
  void part_with_retired();
  void log_news();

  IoLoop& loop_;
  std::unique_ptr<aio::EngineSet> engines_;
  BouncePool bounce_pool_;
  RequestList deferred_;                  // to be completed
  RequestList resumed_;                   // to be resumed before the next submission
  threadpool::CompletionQueue arrivals_;  // from other threads; `io` of the requests
  int arrival_fd_{-1};
  std::size_t away_{0};
  // Few: one for each node.
  struct LaterCall {
    std::chrono::steady_clock::time_point when;
    Call function;
    void* argument;
  };
  std::vector<LaterCall> calls_;
  std::unique_ptr<IoLoop::Timer> call_timer_;  // ends a sleep
  std::chrono::steady_clock::time_point call_timer_end_;
  // What ends a sleep, for wait(), and the same for the loop, in the same order.
  std::vector<pollfd> descriptors_;
  std::vector<std::unique_ptr<IoLoop::Watch>> watches_;
  Retire retire_;
  std::vector<std::pair<const BlockNode*, std::unique_ptr<NodeState>>> node_states_;
};

}  // namespace vblk::blockdev
