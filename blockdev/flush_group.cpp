#include "blockdev/flush_group.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "blockdev/io_context.h"

namespace vblk::blockdev {

void FlushGroup::submit(BlockRequest& flush) {
  submitted_.fetch_add(1, std::memory_order_relaxed);
  flush.context->goes_away();
  IoContext& context = *flush.context;
  const std::uint32_t here =
      gathers_ ? waiting_count_.fetch_add(1, std::memory_order_seq_cst) + 1 : 0;
  BlockRequest* others = waiting_.load(std::memory_order_relaxed);
  do {
    flush.next_in_group = others == nullptr ? &bottom_ : others;
  } while (!waiting_.compare_exchange_weak(others, &flush, std::memory_order_seq_cst,
                                           std::memory_order_relaxed));
  if (others != nullptr) {
    // Its call may be over by now, but not `flush`, which completes on this thread: so the group is
    // there, and the leader's context.
    if (gathers_ && here >= expected_.load(std::memory_order_relaxed)) all_are_there(context);
    return;
  }
  flush.resume = [](BlockRequest& leader, void* group) {
    static_cast<FlushGroup*>(group)->become_leader(leader);
  };
  flush.resume_argument = this;
  context.resume_before_submission(flush);
}

// On the leader's thread, as everything of the leader's.
void FlushGroup::become_leader(BlockRequest& leader) {
  if (gathers_ && changed_.load(std::memory_order_seq_cst)) {
    const std::uint32_t here = waiting_count_.load(std::memory_order_relaxed);
    const auto window = policy_.window(here);
    if (window.count() > 0) return gather(leader, window, here);
  }
  lead(leader);
}

void FlushGroup::gather(BlockRequest& leader, std::chrono::nanoseconds window, std::uint32_t here) {
  gather_begin_ = Clock::now();
  here_before_ = here;
  // For who makes the number full, on this thread or another.
  leader.resume = [](BlockRequest& hurried, void* group) {
    hurried.context->cancel_call(group);
    static_cast<FlushGroup*>(group)->lead(hurried);
  };
  leader.resume_argument = this;
  leader.context->call_after(window, &FlushGroup::time_is_over, this);
  gathering_.store(&leader, std::memory_order_seq_cst);
  if (waiting_count_.load(std::memory_order_seq_cst) >= expected_.load(std::memory_order_relaxed))
    all_are_there(*leader.context);
}

void FlushGroup::all_are_there(IoContext& context) {
  if (gathering_.load(std::memory_order_seq_cst) == nullptr) return;
  BlockRequest* const leader = gathering_.exchange(nullptr, std::memory_order_acq_rel);
  if (leader == nullptr) return;
  if (leader->context == &context) {
    context.resume_before_submission(*leader);
  } else {
    leader->context->hand_over(*leader);
  }
}

void FlushGroup::time_is_over(void* group) {
  auto& self = *static_cast<FlushGroup*>(group);
  // Otherwise somebody has it on its way.
  BlockRequest* const leader = self.gathering_.exchange(nullptr, std::memory_order_acq_rel);
  if (leader != nullptr) self.lead(*leader);
}

void FlushGroup::count_members() {
  member_count_ = 0;
  for (const BlockRequest* member = members_; member != &bottom_; member = member->next_in_group)
    ++member_count_;
}

// Everybody who waits by now was submitted before the call begins.
void FlushGroup::lead(BlockRequest& leader) {
  assert(members_ == nullptr && "one call at a time");
  members_ = waiting_.exchange(&bottom_, std::memory_order_seq_cst);
  if (gathers_) {
    count_members();
    waiting_count_.fetch_sub(member_count_, std::memory_order_relaxed);
    call_begin_ = Clock::now();
    if (here_before_ > 0) {
      const std::uint32_t joined = member_count_ - std::min(member_count_, here_before_);
      policy_.has_waited(call_begin_ - gather_begin_, std::exchange(here_before_, 0), joined);
      gathered_.fetch_add(1, std::memory_order_relaxed);
    }
  }
  if (changed_.exchange(false, std::memory_order_seq_cst)) {
    begun_.fetch_add(1, std::memory_order_relaxed);
    call_is_timed_ = gathers_;
    begin_(leader);
    return;
  }
  if (!gathers_) count_members();
  elided_.fetch_add(member_count_, std::memory_order_relaxed);
  finished(leader, 0);
}

void FlushGroup::finished(BlockRequest& leader, int error) {
  // Nobody knows what a failed call has left unstable.
  if (error != 0) changed_.store(true, std::memory_order_seq_cst);
  IoContext& context = *leader.context;
  const BlockRequest* const bottom = &bottom_;
  if (std::exchange(call_is_timed_, false)) {
    policy_.call_ended(Clock::now() - call_begin_, member_count_,
                       waiting_count_.load(std::memory_order_relaxed));
    expected_.store(policy_.expected(), std::memory_order_relaxed);
  }
  BlockRequest* member = std::exchange(members_, nullptr);
  BlockRequest* nobody = &bottom_;
  if (!waiting_.compare_exchange_strong(nobody, nullptr, std::memory_order_seq_cst)) {
    BlockRequest& next = *choose_leader(context);
    next.resume = [](BlockRequest& chosen, void* group) {
      static_cast<FlushGroup*>(group)->become_leader(chosen);
    };
    next.resume_argument = this;
    if (next.context == &context) {
      context.resume_before_submission(next);
    } else {
      next.context->hand_over(next);
    }
  }
  // From here on only the members' own memory: with the last of them the disk may go.
  while (member != bottom) {
    BlockRequest& flush = *std::exchange(member, member->next_in_group);
    flush.deferred_error = error;
    if (flush.context == &context) {
      context.is_back();
      flush.complete(flush, error);
    } else {
      flush.resume = [](BlockRequest& foreign, void* /*unused*/) {
        foreign.context->is_back();
        foreign.complete(foreign, foreign.deferred_error);
      };
      flush.context->hand_over(flush);
    }
  }
}

// One of those that wait: of this thread, or the one that has waited longest. Others may join on
// top meanwhile; nobody leaves.
BlockRequest* FlushGroup::choose_leader(const IoContext& context) {
  BlockRequest* chosen = nullptr;
  for (BlockRequest* flush = waiting_.load(std::memory_order_acquire); flush != &bottom_;
       flush = flush->next_in_group) {
    chosen = flush;
    if (flush->context == &context) break;
  }
  return chosen;
}

FlushStatistics FlushGroup::statistics() const {
  return {.submitted = submitted_.load(std::memory_order_relaxed),
          .begun = begun_.load(std::memory_order_relaxed),
          .elided = elided_.load(std::memory_order_relaxed),
          .gathered = gathered_.load(std::memory_order_relaxed)};
}

}  // namespace vblk::blockdev
