#include "blockdev/limit_schedule.h"

#include <algorithm>
#include <utility>

namespace vblk::blockdev {

namespace {

constexpr std::size_t index_of(LimitSchedule::Direction direction) {
  return static_cast<std::size_t>(direction);
}

constexpr LimitSchedule::Direction other(LimitSchedule::Direction direction) {
  return direction == LimitSchedule::Direction::kRead ? LimitSchedule::Direction::kWrite
                                                      : LimitSchedule::Direction::kRead;
}

LeakyBucket average_of(const IoLimit& limit) {
  constexpr WideCount kSlack = LimitSchedule::kSlackNs;
  const WideCount slack = limit.rate * kSlack;
  const WideCount burst = WideCount{limit.burst_rate - std::min(limit.burst_rate, limit.rate)} *
                          limit.burst_seconds * LeakyBucket::kUnitsPerOne;
  return {limit.rate, limit.burst_rate == 0 ? slack : std::max(slack, burst)};
}

LeakyBucket burst_of(const IoLimit& limit) {
  return {limit.burst_rate, WideCount{limit.burst_rate} * LimitSchedule::kSlackNs};
}

}  // namespace

void LeakyBucket::leak(std::uint64_t now_ns) {
  if (now_ns <= leaked_at_ns_) return;
  const WideCount leaked = WideCount{rate_} * (now_ns - leaked_at_ns_);
  level_ -= std::min(level_, leaked);
  leaked_at_ns_ = now_ns;
}

void LeakyBucket::inherit(LeakyBucket& former, std::uint64_t now_ns) {
  former.leak(now_ns);
  level_ = rate_ == 0 ? 0 : std::min(former.level_, capacity_);
  leaked_at_ns_ = now_ns;
}

std::uint64_t LeakyBucket::opens_at(std::uint64_t now_ns) {
  if (rate_ == 0) return now_ns;
  leak(now_ns);
  if (level_ <= capacity_) return now_ns;
  const WideCount wait = (level_ - capacity_ + rate_ - 1) / rate_;
  // A debt of centuries, by requests that went on without a look at the limits.
  constexpr std::uint64_t kFar = std::uint64_t{1} << 62;
  return now_ns + (wait > kFar ? kFar : static_cast<std::uint64_t>(wait));
}

void LimitSchedule::TicketList::push_back(Ticket& ticket) {
  ticket.next = nullptr;
  (tail == nullptr ? head : tail->next) = &ticket;
  tail = &ticket;
}

LimitSchedule::Ticket* LimitSchedule::TicketList::pop_front() {
  Ticket* const first = head;
  if (first == nullptr) return nullptr;
  head = first->next;
  if (head == nullptr) tail = nullptr;
  return first;
}

void LimitSchedule::TicketList::append(TicketList& other_list) {
  if (other_list.head == nullptr) return;
  (tail == nullptr ? head : tail->next) = other_list.head;
  tail = other_list.tail;
  other_list = {};
}

void LimitSchedule::configure(const IoLimits& limits, std::uint64_t now_ns) {
  limits_ = limits;
  for (std::size_t i = 0; i < buckets_.size(); ++i) {
    Buckets next{.average = average_of(limits.limits[i]), .burst = burst_of(limits.limits[i])};
    next.average.inherit(buckets_[i].average, now_ns);
    next.burst.inherit(buckets_[i].burst, now_ns);
    buckets_[i] = next;
  }
}

template <typename Use>
void LimitSchedule::each_bucket(const Ticket& ticket, Use use) {
  using Kind = IoLimits::Kind;
  const bool is_read = ticket.direction == Direction::kRead;
  const auto each = [&](Kind kind, bool is_bytes) {
    Buckets& buckets = buckets_[static_cast<std::size_t>(kind)];
    use(buckets.average, is_bytes);
    use(buckets.burst, is_bytes);
  };
  each(Kind::kIopsTotal, false);
  each(is_read ? Kind::kIopsRead : Kind::kIopsWrite, false);
  if (ticket.bytes == 0) return;
  each(Kind::kBpsTotal, true);
  each(is_read ? Kind::kBpsRead : Kind::kBpsWrite, true);
}

std::uint64_t LimitSchedule::opens_at(const Ticket& ticket, std::uint64_t now_ns) {
  std::uint64_t latest_ns = now_ns;
  each_bucket(ticket, [&](LeakyBucket& bucket, bool) {
    latest_ns = std::max(latest_ns, bucket.opens_at(now_ns));
  });
  return latest_ns;
}

void LimitSchedule::charge(const Ticket& ticket) {
  const WideCount byte_units = WideCount{ticket.bytes} * LeakyBucket::kUnitsPerOne;
  WideCount operation_units = LeakyBucket::kUnitsPerOne;
  if (limits_.iops_size_bytes != 0 && ticket.bytes > limits_.iops_size_bytes)
    operation_units = (byte_units + limits_.iops_size_bytes - 1) / limits_.iops_size_bytes;
  each_bucket(ticket, [&](LeakyBucket& bucket, bool is_bytes) {
    bucket.pour(is_bytes ? byte_units : operation_units);
  });
}

void LimitSchedule::stand_in_line(Member& member, std::size_t direction) {
  Line& line = lines_[direction];
  member.next_[direction] = nullptr;
  (line.last == nullptr ? line.first : line.last->next_[direction]) = &member;
  line.last = &member;
}

void LimitSchedule::leave_line(Member& member, std::size_t direction) {
  Line& line = lines_[direction];
  Member* previous = nullptr;
  for (Member* each = line.first; each != nullptr; each = each->next_[direction]) {
    if (each == &member) {
      (previous == nullptr ? line.first : previous->next_[direction]) = member.next_[direction];
      if (line.last == &member) line.last = previous;
      return;
    }
    previous = each;
  }
}

bool LimitSchedule::admit(Member& member, Ticket& ticket, std::uint64_t now_ns) {
  const std::size_t direction = index_of(ticket.direction);
  // Those who wait could perhaps go on by now, and come first.
  if (lines_[0].first != nullptr || lines_[1].first != nullptr) distribute(now_ns);
  if (lines_[direction].first == nullptr && member.granted_.head == nullptr &&
      opens_at(ticket, now_ns) == now_ns) {
    charge(ticket);
    return true;
  }
  if (member.waiting_[direction].head == nullptr) stand_in_line(member, direction);
  member.waiting_[direction].push_back(ticket);
  return false;
}

// Grants the request whose turn it is in one direction, if it may go on.
bool LimitSchedule::grant_next(Direction direction, std::uint64_t now_ns) {
  const std::size_t index = index_of(direction);
  Member* const member = lines_[index].first;
  if (member == nullptr || opens_at(*member->waiting_[index].head, now_ns) > now_ns) return false;
  Ticket& ticket = *member->waiting_[index].pop_front();
  charge(ticket);
  member->granted_.push_back(ticket);
  leave_line(*member, index);
  if (member->waiting_[index].head != nullptr) stand_in_line(*member, index);
  return true;
}

void LimitSchedule::distribute(std::uint64_t now_ns) {
  for (;;) {
    const Direction direction = next_direction_;
    if (grant_next(direction, now_ns)) {
      next_direction_ = other(direction);
    } else if (!grant_next(other(direction), now_ns)) {
      return;
    }
  }
}

std::uint64_t LimitSchedule::next_grant_ns(std::uint64_t now_ns) {
  std::uint64_t earliest_ns = kNever;
  for (std::size_t direction = 0; direction < lines_.size(); ++direction) {
    const Member* const member = lines_[direction].first;
    if (member == nullptr) continue;
    earliest_ns = std::min(earliest_ns, opens_at(*member->waiting_[direction].head, now_ns));
  }
  return earliest_ns;
}

LimitSchedule::Ticket* LimitSchedule::take_granted(Member& member) {
  return std::exchange(member.granted_, {}).head;
}

LimitSchedule::Ticket* LimitSchedule::take_all(Member& member) { return take(member, true); }
LimitSchedule::Ticket* LimitSchedule::withdraw(Member& member) { return take(member, false); }

LimitSchedule::Ticket* LimitSchedule::take(Member& member, bool charges) {
  TicketList all = std::exchange(member.granted_, {});
  for (std::size_t direction = 0; direction < lines_.size(); ++direction) {
    TicketList& waiting = member.waiting_[direction];
    if (waiting.head == nullptr) continue;
    leave_line(member, direction);
    for (const Ticket* ticket = waiting.head; charges && ticket != nullptr; ticket = ticket->next)
      charge(*ticket);
    all.append(waiting);
  }
  return all.head;
}

}  // namespace vblk::blockdev
