// When a request may go on under a device's limits, and whose turn it is: arithmetic and lists,
// without clock, thread or system call.
//
// Each limit is a leaky bucket. A request pours its cost in when it goes on; the bucket leaks with
// the limit's rate; and a request may go on while the bucket holds no more than its capacity. So a
// request larger than the capacity goes on too, and those after it wait for what it has taken:
// in the long run exactly the rate flows. The unit is a thousand-millionth of an operation or byte,
// because a rate per second times nanoseconds is a whole number of them: nothing is ever rounded.
//
//   bucket    leaks            capacity
//   average   rate             (burst rate - rate) * burst seconds; without a burst: kSlack of rate
//   burst     burst rate       kSlack of the burst rate
//
// kSlack is there for a thread that wakes up late: what flowed too little meanwhile flows then.
//
// Who has requests waiting stands in a line, one for reads and one for writes, and whoever goes on
// with one stands at its end again. So the queues of a device share its limits equally, request by
// request, however many each has waiting; and reads do not wait behind writes that only a limit for
// writes holds up. Where a total limit holds up both, they take turns.
//
// Thread: none of its own; io_limiter.h locks it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "blockdev/io_limits.h"

namespace vblk::blockdev {

__extension__ using WideCount = unsigned __int128;

class LeakyBucket {
 public:
  static constexpr std::uint64_t kUnitsPerOne = 1'000'000'000;

  LeakyBucket() = default;  // no limit
  // `capacity` in units.
  LeakyBucket(std::uint64_t rate, WideCount capacity) : rate_(rate), capacity_(capacity) {}

  // Takes over what `former` holds at `now_ns`, but no more than the new capacity: nobody waits for
  // what he took under another limit.
  void inherit(LeakyBucket& former, std::uint64_t now_ns);
  // When the next request may go on: `now_ns` or later. Times never go back.
  [[nodiscard]] std::uint64_t opens_at(std::uint64_t now_ns);
  void pour(WideCount units) {
    if (rate_ != 0) level_ += units;
  }

 private:
  void leak(std::uint64_t now_ns);

  std::uint64_t rate_{0};  // units per nanosecond; 0: no limit
  WideCount capacity_{0};
  WideCount level_{0};
  std::uint64_t leaked_at_ns_{0};
};

class LimitSchedule {
 public:
  enum class Direction : std::uint8_t { kRead, kWrite };
  // What a thread may be late without a loss: 0.6 % of five seconds.
  static constexpr std::uint64_t kSlackNs = 30'000'000;
  static constexpr std::uint64_t kNever = ~std::uint64_t{0};

  // A request that waits, or does not have to. Its owner's, in place until it has been granted.
  struct Ticket {
    Direction direction{Direction::kRead};
    std::uint64_t bytes{0};  // moved; 0 for what counts as an operation only
    Ticket* next{nullptr};   // the schedule's, then its taker's
  };
  struct TicketList {
    Ticket* head{nullptr};
    Ticket* tail{nullptr};
    void push_back(Ticket& ticket);
    Ticket* pop_front();  // nullptr: empty
    void append(TicketList& other);
  };
  // Whose requests those are: a queue. In no line when it is destroyed.
  class Member {
   public:
    [[nodiscard]] bool is_waiting() const {
      return waiting_[0].head != nullptr || waiting_[1].head != nullptr;
    }

   private:
    friend class LimitSchedule;
    std::array<TicketList, 2> waiting_;  // by Direction
    std::array<Member*, 2> next_{};      // in its line
    TicketList granted_;
  };

  // From now on. What has been used of a limit that stays is kept.
  void configure(const IoLimits& limits, std::uint64_t now_ns);
  // True: `ticket` goes on at once. False: it waits until it is among take_granted().
  [[nodiscard]] bool admit(Member& member, Ticket& ticket, std::uint64_t now_ns);
  // Grants what may go on by now, to all members in turn.
  void distribute(std::uint64_t now_ns);
  // When distribute() has the next one to grant; kNever: nobody waits.
  [[nodiscard]] std::uint64_t next_grant_ns(std::uint64_t now_ns);
  // What has been granted to `member`, first come first.
  [[nodiscard]] Ticket* take_granted(Member& member);
  // All that waits, granted or not, in the order of each direction. It counts as if it had been
  // granted: who stops and starts again has no more than the rest.
  [[nodiscard]] Ticket* take_all(Member& member);
  // The same, to wait elsewhere or not to go on at all: what was not granted counts for nothing.
  [[nodiscard]] Ticket* withdraw(Member& member);

 private:
  struct Line {
    Member* first{nullptr};
    Member* last{nullptr};
  };
  struct Buckets {
    LeakyBucket average;
    LeakyBucket burst;
  };

  [[nodiscard]] std::uint64_t opens_at(const Ticket& ticket, std::uint64_t now_ns);
  void charge(const Ticket& ticket);
  // Calls `use(bucket, is_bytes)` with each bucket that has to do with `ticket`.
  template <typename Use>
  void each_bucket(const Ticket& ticket, Use use);
  bool grant_next(Direction direction, std::uint64_t now_ns);
  void stand_in_line(Member& member, std::size_t direction);
  void leave_line(Member& member, std::size_t direction);
  Ticket* take(Member& member, bool charges);

  IoLimits limits_;
  std::array<Buckets, IoLimits::kKindCount> buckets_;  // by IoLimits::Kind
  std::array<Line, 2> lines_;                          // by Direction
  Direction next_direction_{Direction::kRead};         // whose turn it is where both could go on
};

}  // namespace vblk::blockdev
