// Limits in simulated time: what flows, who is served, and what a change does to those who wait.
// Nothing here sleeps; a nanosecond passes when the test says so.
#include "blockdev/limit_schedule.h"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/seed.h"

namespace vblk::blockdev {
namespace {

using Direction = LimitSchedule::Direction;
constexpr std::uint64_t kSecond = 1'000'000'000;

IoLimits limits(std::string_view text) { return IoLimits::parse(text, "limits", {}).value(); }

// Clients that each keep some requests waiting, and count what goes on. Looks at the schedule when
// it says so, and `lateness_ns` later.
class Simulation {
 public:
  struct Client {
    std::size_t depth;
    Direction direction;
    std::uint64_t bytes;
    LimitSchedule::Member member;
    std::deque<LimitSchedule::Ticket> tickets;
    std::vector<LimitSchedule::Ticket*> idle;
    std::uint64_t done{0};
  };

  explicit Simulation(std::string_view text) { schedule.configure(limits(text), now_ns); }
  ~Simulation() {
    for (Client& client : clients) static_cast<void>(schedule.take_all(client.member));
  }
  Simulation(const Simulation&) = delete;
  Simulation& operator=(const Simulation&) = delete;

  Client& add(std::size_t depth, Direction direction, std::uint64_t bytes) {
    Client& client = clients.emplace_back(depth, direction, bytes);
    for (std::size_t i = 0; i < depth; ++i) {
      client.tickets.push_back({.direction = direction, .bytes = bytes});
      client.idle.push_back(&client.tickets.back());
    }
    return client;
  }

  // Until `end_ns`; whatever goes on is done at once, and asked for again at once.
  void run_until(std::uint64_t end_ns, std::uint64_t lateness_ns = 0) {
    while (now_ns < end_ns) {
      for (bool again = true; again;) {
        again = false;
        schedule.distribute(now_ns);
        for (Client& client : clients) {
          for (auto* ticket = schedule.take_granted(client.member); ticket != nullptr;) {
            auto* const next = ticket->next;
            ++client.done;
            client.idle.push_back(ticket);
            ticket = next;
          }
          // One at a time: the clients' requests arrive in between each other's.
          if (client.idle.empty()) continue;
          again = true;
          LimitSchedule::Ticket& ticket = *client.idle.back();
          client.idle.pop_back();
          if (schedule.admit(client.member, ticket, now_ns)) {
            ++client.done;
            client.idle.push_back(&ticket);
          }
        }
      }
      const std::uint64_t next_ns = schedule.next_grant_ns(now_ns);
      ASSERT_GT(next_ns, now_ns) << "it would have been granted";
      now_ns = std::min(end_ns, next_ns + lateness_ns);
    }
  }

  LimitSchedule schedule;
  std::deque<Client> clients;
  std::uint64_t now_ns{12'345};
};

// What may have gone on more than the limit says: the slack, and a request for each client.
std::uint64_t slack_of(std::uint64_t rate) { return rate * LimitSchedule::kSlackNs / kSecond + 2; }

std::size_t count(const LimitSchedule::Ticket* tickets) {
  std::size_t count = 0;
  for (; tickets != nullptr; tickets = tickets->next) ++count;
  return count;
}

TEST(LimitSchedule, lets_exactly_the_rate_through) {
  for (const std::uint64_t rate : {1U, 7U, 100U, 1'000U, 33'333U, 250'000U}) {
    Simulation simulation("iops-total=" + std::to_string(rate));
    auto& client = simulation.add(32, Direction::kWrite, 4096);
    const std::uint64_t begin = simulation.now_ns;
    simulation.run_until(begin + 5 * kSecond);
    EXPECT_GE(client.done, 5 * rate) << rate;
    EXPECT_LE(client.done, 5 * rate + slack_of(rate)) << rate;
    // In the long run not even the slack is seen: it was used up once.
    const std::uint64_t before = client.done;
    simulation.run_until(begin + 25 * kSecond);
    EXPECT_GE(client.done - before, 20 * rate - 1) << rate;
    EXPECT_LE(client.done - before, 20 * rate + 1) << rate;
  }
}

TEST(LimitSchedule, loses_nothing_to_threads_that_wake_up_late) {
  for (const std::uint64_t late_ns : {500'000U, 5'000'000U, 25'000'000U}) {
    Simulation simulation("iops-total=20000");
    auto& client = simulation.add(4096, Direction::kRead, 4096);
    simulation.run_until(simulation.now_ns + 5 * kSecond, late_ns);
    EXPECT_GE(client.done, 98'000U) << late_ns;
    EXPECT_LE(client.done, 102'000U) << late_ns;
  }
}

TEST(LimitSchedule, counts_bytes_also_of_requests_larger_than_a_seconds_worth) {
  Simulation simulation("bps-write=1M");
  auto& client = simulation.add(4, Direction::kWrite, std::uint64_t{4} << 20);
  simulation.run_until(simulation.now_ns + 100 * kSecond);
  EXPECT_GE(client.done, 25U);
  EXPECT_LE(client.done, 26U) << "the first one goes on at once";
}

TEST(LimitSchedule, counts_large_requests_as_several_operations_in_fractions) {
  Simulation simulation("iops-total=1000,iops-size=8k");
  auto& client = simulation.add(32, Direction::kWrite, 12 * 1024);
  simulation.run_until(simulation.now_ns + 30 * kSecond);
  EXPECT_GE(client.done, 20'000U);
  EXPECT_LE(client.done, 20'000U + slack_of(1000));
  Simulation small("iops-total=1000,iops-size=8k");
  auto& other = small.add(32, Direction::kWrite, 512);
  small.run_until(small.now_ns + 30 * kSecond);
  EXPECT_GE(other.done, 30'000U) << "a small one is a whole operation";
  EXPECT_LE(other.done, 30'000U + slack_of(1000));
}

TEST(LimitSchedule, a_burst_lasts_as_long_as_it_says_and_comes_back_when_it_was_saved_up) {
  Simulation simulation("iops-total=100,iops-total-max=1000,iops-total-max-length=5");
  auto& client = simulation.add(32, Direction::kRead, 4096);
  const std::uint64_t begin = simulation.now_ns;
  simulation.run_until(begin + 5 * kSecond);
  EXPECT_GE(client.done, 4990U);
  EXPECT_LE(client.done, 5000U + slack_of(1000));
  std::uint64_t before = client.done;
  simulation.run_until(begin + 15 * kSecond);
  EXPECT_GE(client.done - before, 960U);
  EXPECT_LE(client.done - before, 1010U) << "the burst is over";
  // Silence of 9 s saves up 900 operations, a second at 1000 per second.
  Simulation quiet("iops-total=100,iops-total-max=1000,iops-total-max-length=5");
  auto& other = quiet.add(32, Direction::kRead, 4096);
  quiet.run_until(quiet.now_ns + 20 * kSecond);
  before = other.done;
  // Its requests are put aside for that time.
  static_cast<void>(quiet.schedule.take_all(other.member));
  quiet.now_ns += 9 * kSecond;
  other.idle.clear();
  for (auto& ticket : other.tickets) other.idle.push_back(&ticket);
  quiet.run_until(quiet.now_ns + kSecond);
  EXPECT_GE(other.done - before, 900U);
  EXPECT_LE(other.done - before, 1000U + slack_of(1000));
}

TEST(LimitSchedule, serves_queues_equally_however_deep_they_are) {
  Simulation simulation("iops-total=1000");
  for (const std::size_t depth : {1U, 4U, 32U, 128U}) simulation.add(depth, Direction::kRead, 4096);
  simulation.run_until(simulation.now_ns + 8 * kSecond);
  for (const auto& client : simulation.clients) {
    EXPECT_GE(client.done, 1990U) << client.depth;
    EXPECT_LE(client.done, 2040U) << client.depth;
  }
}

TEST(LimitSchedule, does_not_hold_up_one_direction_by_the_limit_of_the_other) {
  Simulation simulation("iops-write=10,iops-read=1000");
  auto& writer = simulation.add(32, Direction::kWrite, 4096);
  auto& reader = simulation.add(32, Direction::kRead, 4096);
  simulation.run_until(simulation.now_ns + 5 * kSecond);
  EXPECT_GE(writer.done, 50U);
  EXPECT_LE(writer.done, 50U + slack_of(10));
  EXPECT_GE(reader.done, 5000U);
  EXPECT_LE(reader.done, 5000U + slack_of(1000));
}

TEST(LimitSchedule, lets_reads_and_writes_take_turns_at_a_total_limit) {
  Simulation simulation("bps-total=4000k");
  auto& writer = simulation.add(128, Direction::kWrite, 4096);
  auto& reader = simulation.add(1, Direction::kRead, 4096);
  simulation.run_until(simulation.now_ns + 5 * kSecond);
  EXPECT_NEAR(static_cast<double>(writer.done), 2500, 50);
  EXPECT_NEAR(static_cast<double>(reader.done), 2500, 50);
}

TEST(LimitSchedule, holds_every_limit_when_there_are_several) {
  Simulation simulation("iops-total=1000,bps-total=2M,iops-read=300");
  auto& large = simulation.add(16, Direction::kWrite, 64 * 1024);
  auto& reader = simulation.add(16, Direction::kRead, 512);
  simulation.run_until(simulation.now_ns + 10 * kSecond);
  const std::uint64_t bytes = large.done * 64 * 1024 + reader.done * 512;
  EXPECT_LE(bytes, (std::uint64_t{20} << 20) * 101 / 100 + 64 * 1024);
  EXPECT_LE(reader.done, 3000U + slack_of(300));
  EXPECT_GE(bytes, (std::uint64_t{20} << 20) - 64 * 1024) << "something was held up for nothing";
}

TEST(LimitSchedule, follows_a_change_while_requests_wait) {
  Simulation simulation("iops-total=1");
  auto& client = simulation.add(32, Direction::kRead, 4096);
  simulation.run_until(simulation.now_ns + 3 * kSecond);
  const std::uint64_t slow = client.done;
  EXPECT_LE(slow, 5U);
  simulation.schedule.configure(limits("iops-total=1000"), simulation.now_ns);
  simulation.run_until(simulation.now_ns + 2 * kSecond);
  EXPECT_GE(client.done - slow, 1990U);
  EXPECT_LE(client.done - slow, 2000U + slack_of(1000));
  simulation.schedule.configure({}, simulation.now_ns);
  simulation.schedule.distribute(simulation.now_ns);
  EXPECT_EQ(count(simulation.schedule.take_granted(client.member)), 32U)
      << "without a limit nobody waits";
}

TEST(LimitSchedule, forgives_the_debts_of_another_limit_but_gives_no_second_burst) {
  const auto text = "iops-total=10,iops-total-max=100,iops-total-max-length=10";
  Simulation simulation(text);
  auto& client = simulation.add(8, Direction::kRead, 4096);
  simulation.run_until(simulation.now_ns + 12 * kSecond);
  const std::uint64_t before = client.done;
  for (int i = 0; i < 50; ++i) {
    simulation.schedule.configure(limits(text), simulation.now_ns);
    simulation.run_until(simulation.now_ns + kSecond / 10);
  }
  EXPECT_LE(client.done - before, 52U) << "setting the same again is no way to get more";
}

TEST(LimitSchedule, what_is_withdrawn_costs_nobody_anything) {
  Simulation simulation("iops-total=100");
  auto& client = simulation.add(300, Direction::kWrite, 4096);
  simulation.run_until(simulation.now_ns + kSecond);
  EXPECT_EQ(count(simulation.schedule.withdraw(client.member)), 300U);
  EXPECT_FALSE(client.member.is_waiting());
  client.idle.clear();
  for (auto& ticket : client.tickets) client.idle.push_back(&ticket);
  const std::uint64_t before = client.done;
  simulation.run_until(simulation.now_ns + 2 * kSecond);
  EXPECT_NEAR(static_cast<double>(client.done - before), 200, 5) << "as if nothing had happened";
}

TEST(LimitSchedule, what_goes_on_without_its_turn_is_at_the_expense_of_what_comes_later) {
  Simulation simulation("iops-total=100");
  auto& client = simulation.add(300, Direction::kWrite, 4096);
  simulation.run_until(simulation.now_ns + kSecond);
  EXPECT_EQ(count(simulation.schedule.take_all(client.member)), 300U);
  EXPECT_FALSE(client.member.is_waiting());
  client.idle.clear();
  for (auto& ticket : client.tickets) client.idle.push_back(&ticket);
  const std::uint64_t before = client.done;
  simulation.run_until(simulation.now_ns + 2 * kSecond);
  EXPECT_EQ(client.done, before) << "300 were taken in advance";
  simulation.run_until(simulation.now_ns + 2 * kSecond);
  EXPECT_NEAR(static_cast<double>(client.done - before), 100, 5);
}

// Whatever arrives whenever: nothing is granted twice or lost, and no window of time sees more than
// its limit.
TEST(LimitSchedule, random_arrivals_never_exceed_a_limit_and_all_go_on) {
  std::mt19937_64 random(test::test_seed());
  const auto below = [&random](std::uint64_t bound) { return random() % bound; };
  for (int round = 0; round < 40; ++round) {
    const std::uint64_t rate = 1 + below(5000);
    const std::uint64_t bytes_rate = 4096 * (1 + below(4000));
    LimitSchedule schedule;
    IoLimits both;
    both.limits[0].rate = rate;
    both.limits[3].rate = bytes_rate;
    std::uint64_t now = below(kSecond);
    schedule.configure(both, now);
    std::deque<LimitSchedule::Member> members(1 + below(5));
    std::deque<LimitSchedule::Ticket> tickets;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> gone;  // time, bytes
    std::uint64_t largest = 0;
    const auto take = [&] {
      for (auto& member : members) {
        for (auto* ticket = schedule.take_granted(member); ticket != nullptr; ticket = ticket->next)
          gone.emplace_back(now, ticket->bytes);
      }
    };
    for (int i = 0; i < 400; ++i) {
      now += below(2 * kSecond / rate + 2);
      const std::uint64_t bytes = 512 * (1 + below(128));
      largest = std::max(largest, bytes);
      auto& ticket =
          tickets.emplace_back(below(2) == 0 ? Direction::kRead : Direction::kWrite, bytes);
      if (schedule.admit(members[below(members.size())], ticket, now))
        gone.emplace_back(now, bytes);
      schedule.distribute(now);
      take();
    }
    while (schedule.next_grant_ns(now) != LimitSchedule::kNever) {
      now = std::max(now, schedule.next_grant_ns(now));
      schedule.distribute(now);
      take();
    }
    ASSERT_EQ(gone.size(), tickets.size());
    // Windows from every 20th on.
    for (std::size_t first = 0; first < gone.size(); first += 20) {
      std::uint64_t count = 0;
      std::uint64_t bytes = 0;
      for (std::size_t i = first; i < gone.size(); ++i) {
        ++count;
        bytes += gone[i].second;
        const double seconds =
            static_cast<double>(gone[i].first - gone[first].first + LimitSchedule::kSlackNs) / 1e9;
        ASSERT_LE(static_cast<double>(count), seconds * static_cast<double>(rate) + 2);
        ASSERT_LE(static_cast<double>(bytes),
                  seconds * static_cast<double>(bytes_rate) + 2 * static_cast<double>(largest));
      }
    }
  }
}

}  // namespace
}  // namespace vblk::blockdev
