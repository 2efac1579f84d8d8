// Every order in which a few events can come, each in a world of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include <gtest/gtest.h>

namespace vblk::test {

// `make_world()` makes a world (by std::unique_ptr) with
//   is_possible(char), happen(char)   an event, one of the letters of `events`
//   settle()                          everything that was begun comes to its end
//   problem()                         what has gone wrong; an empty string
template <typename MakeWorld>
class EveryOrder {
 public:
  EveryOrder(std::string_view events, MakeWorld make_world)
      : events_(events), make_world_(std::move(make_world)) {}

  // Expects no problem in any order of `length` events after those of `beginning`, and ends at the
  // first; returns how many orders there were.
  std::uint64_t explore(std::size_t length, std::string_view beginning = {}) {
    order_ = beginning;
    length_ = beginning.size() + length;
    count_ = 0;
    extend();
    return count_;
  }

 private:
  void extend() {
    const auto world = make_world_();
    for (const char event : order_) world->happen(event);
    std::string possible;
    if (order_.size() < length_) {
      for (const char event : events_) {
        if (world->is_possible(event)) possible += event;
      }
    } else {
      ++count_;
    }
    world->settle();
    EXPECT_EQ(world->problem(), "") << "after " << order_;
    for (const char event : possible) {
      if (::testing::Test::HasFailure()) return;
      order_ += event;
      extend();
      order_.pop_back();
    }
  }

  const std::string_view events_;
  MakeWorld make_world_;
  std::string order_;
  std::size_t length_{0};
  std::uint64_t count_{0};
};

// What happens in the order of the letters of `events`; is settled, and expected to have no
// problem.
template <typename World>
void tell(World& world, std::string_view events) {
  for (const char event : events) world.happen(event);
  world.settle();
  EXPECT_EQ(world.problem(), "") << "after " << events;
}

}  // namespace vblk::test
