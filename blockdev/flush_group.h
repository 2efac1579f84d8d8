// Flushes of one disk that share a flush of what lies below, and those that need none.
//
// A flush promises that what was changed before it was submitted is stable when it completes. So
// one call to the kernel serves every flush that was submitted before the call began; and where
// nothing has been changed since the last successful call began, none is needed.
//
//   waiting_                   meaning
//   nullptr                    idle
//   flush > ... > bottom_      a leader is chosen and has not begun: these will share its call
//   the same, gathering_       it waits a moment for others (group_commit_policy.h)
//   bottom_                    a call is under way (members_ share it), nobody waits
//   flush > ... > bottom_      a call is under way, these wait for the next
//
// The flush that finds the group idle leads it. It begins when its thread is about to submit to the
// kernel, so that whatever else is in the rings by then comes along. When its call ends, one of
// those that wait leads the next: one of the same thread if there is any, otherwise the leadership
// goes to another thread. What belongs to other threads is handed over to them to be completed.
//
// Where calls take their time, the leader may wait until as many are there as came lately. Either
// its thread ends that when the time is over, or whoever makes the number full: the one that takes
// gathering_ away. Who comes counts itself first and then looks for gathering_; the leader sets
// gathering_ first and then looks at the count.
//
// Whether there is anything to flush is one flag. A change sets it when it has completed, before
// anybody is told; a leader clears it before its call begins. Either the leader saw the flag set,
// and then the change is in what its call flushes; or the flag is set after, for the next. Both
// sides use sequential consistency: a change that found the flag set did so before the leader
// cleared it. While no flush comes the flag is only read, so queues do not share a line that is
// written.
//
// Threads: note_change() and submit() on any I/O thread. Between two of its states the group is the
// leader's: members_ needs no more protection than the hand-over through waiting_. Lock-free, and
// nothing is allocated.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "blockdev/block_request.h"
#include "blockdev/group_commit_policy.h"

namespace vblk::blockdev {

class IoContext;

// Counters since the group was made.
struct FlushStatistics {
  std::uint64_t submitted{0};  // by the guest
  std::uint64_t begun{0};      // calls to the kernel that these became
  std::uint64_t elided{0};     // of the submitted: answered without a call
  std::uint64_t gathered{0};   // of the begun: put off a moment, for others to share
};

class FlushGroup {
 public:
  // Begins the flush of what lies below, on the leader's thread, and ends in finished(), later.
  using Begin = void (*)(BlockRequest& leader);
  explicit FlushGroup(Begin begin, GroupCommitPolicy policy = GroupCommitPolicy::never())
      : begin_(begin), gathers_(policy.is_used()), policy_(policy), expected_(policy.expected()) {}
  FlushGroup(const FlushGroup&) = delete;
  FlushGroup& operator=(const FlushGroup&) = delete;

  // A change has completed that is not known to be stable. To be called before its own completion
  // is told.
  void note_change() {
    if (!changed_.load(std::memory_order_seq_cst)) changed_.store(true, std::memory_order_seq_cst);
  }
  // Completes `flush` in time: as all of those that share a call, with that call's error. `flush`
  // has its node and its context set.
  void submit(BlockRequest& flush);
  // Counts a flush that gets a call of its own, outside of the group.
  void note_alone() {
    submitted_.fetch_add(1, std::memory_order_relaxed);
    begun_.fetch_add(1, std::memory_order_relaxed);
  }
  // The leader's call has ended with `error`. The group may be gone afterwards.
  void finished(BlockRequest& leader, int error);

  // Any thread; a moment old.
  [[nodiscard]] FlushStatistics statistics() const;

 private:
  using Clock = std::chrono::steady_clock;

  void become_leader(BlockRequest& leader);
  void gather(BlockRequest& leader, std::chrono::nanoseconds window, std::uint32_t here);
  void lead(BlockRequest& leader);
  [[nodiscard]] BlockRequest* choose_leader(const IoContext& context);
  void count_members();
  void all_are_there(IoContext& context);
  static void time_is_over(void* group);

  const Begin begin_;
  const bool gathers_;
  std::atomic<bool> changed_{true};  // nobody knows what was written before
  std::atomic<BlockRequest*> waiting_{nullptr};
  BlockRequest bottom_;             // never a request: ends the list, and says that there is one
  BlockRequest* members_{nullptr};  // of the call under way, down to bottom_; the leader's
  std::atomic<std::uint64_t> submitted_{0};
  std::atomic<std::uint64_t> begun_{0};
  std::atomic<std::uint64_t> elided_{0};
  std::atomic<std::uint64_t> gathered_{0};

  // ---- Only if it gathers. The leader's:
  GroupCommitPolicy policy_;
  Clock::time_point call_begin_;
  bool call_is_timed_{false};
  std::uint32_t member_count_{0};
  Clock::time_point gather_begin_;
  std::uint32_t here_before_{0};  // when it began to wait; 0: it did not
  // Any thread's:
  std::atomic<std::uint32_t> waiting_count_{0};  // never fewer than are in waiting_
  std::atomic<std::uint32_t> expected_;
  std::atomic<BlockRequest*> gathering_{nullptr};  // the leader, while it waits for others
};

}  // namespace vblk::blockdev
