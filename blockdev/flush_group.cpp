#include "blockdev/flush_group.h"

#include <cassert>
#include <utility>

#include "blockdev/io_context.h"

namespace vblk::blockdev {

void FlushGroup::submit(BlockRequest& flush) {
  submitted_.fetch_add(1, std::memory_order_relaxed);
  flush.context->goes_away();
  BlockRequest* others = waiting_.load(std::memory_order_relaxed);
  do {
    flush.next_in_group = others == nullptr ? &bottom_ : others;
  } while (!waiting_.compare_exchange_weak(others, &flush, std::memory_order_seq_cst,
                                           std::memory_order_relaxed));
  if (others != nullptr) return;
  flush.resume = [](BlockRequest& leader, void* group) {
    static_cast<FlushGroup*>(group)->lead(leader);
  };
  flush.resume_argument = this;
  flush.context->resume_before_submission(flush);
}

// On the leader's thread. Everybody who waits by now was submitted before the call begins.
void FlushGroup::lead(BlockRequest& leader) {
  assert(members_ == nullptr && "one call at a time");
  members_ = waiting_.exchange(&bottom_, std::memory_order_seq_cst);
  if (changed_.exchange(false, std::memory_order_seq_cst)) {
    begun_.fetch_add(1, std::memory_order_relaxed);
    begin_(leader);
    return;
  }
  std::uint64_t count = 0;
  for (const BlockRequest* member = members_; member != &bottom_; member = member->next_in_group)
    ++count;
  elided_.fetch_add(count, std::memory_order_relaxed);
  finished(leader, 0);
}

void FlushGroup::finished(BlockRequest& leader, int error) {
  // Nobody knows what a failed call has left unstable.
  if (error != 0) changed_.store(true, std::memory_order_seq_cst);
  IoContext& context = *leader.context;
  const BlockRequest* const bottom = &bottom_;
  BlockRequest* member = std::exchange(members_, nullptr);
  BlockRequest* nobody = &bottom_;
  if (!waiting_.compare_exchange_strong(nobody, nullptr, std::memory_order_seq_cst)) {
    BlockRequest& next = *choose_leader(context);
    next.resume = [](BlockRequest& chosen, void* group) {
      static_cast<FlushGroup*>(group)->lead(chosen);
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
          .elided = elided_.load(std::memory_order_relaxed)};
}

}  // namespace vblk::blockdev
