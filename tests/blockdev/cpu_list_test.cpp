// Lists of processors as people write them, and threads that are kept on them.
#include "blockdev/cpu_list.h"

#include <sched.h>
#include <thread>

#include <gtest/gtest.h>

namespace vblk::blockdev {
namespace {

TEST(CpuList, takes_numbers_ranges_and_several_of_them) {
  EXPECT_EQ(parse_cpu_list("3").value(), (CpuList{3}));
  EXPECT_EQ(parse_cpu_list("0-3").value(), (CpuList{0, 1, 2, 3}));
  EXPECT_EQ(parse_cpu_list("4-5:0:5").value(), (CpuList{0, 4, 5}));
  EXPECT_EQ(parse_cpu_lists("0,2-3,1:7").value(), (std::vector<CpuList>{{0}, {2, 3}, {1, 7}}));
}

TEST(CpuList, refuses_what_names_none) {
  for (const char* text : {"", "a", "1-", "-1", "3-1", "1024", "0-99999999999", "1 ", "1:", "0,,1"})
    EXPECT_FALSE(parse_cpu_lists(text).has_value()) << text;
}

TEST(CpuList, keeps_a_thread_and_its_children_there) {
  cpu_set_t allowed;
  ASSERT_EQ(::sched_getaffinity(0, sizeof allowed, &allowed), 0);
  unsigned last = 0;
  for (unsigned cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) last = cpu;
  }
  std::thread([last] {
    const auto pinned = pin_this_thread({last});
    ASSERT_TRUE(pinned.has_value()) << pinned.error().message;
    std::thread([last] { EXPECT_EQ(::sched_getcpu(), static_cast<int>(last)); }).join();
  }).join();
}

TEST(CpuList, names_a_processor_that_is_not_there) {
  std::thread([] {
    const auto alone = pin_this_thread({1023});
    ASSERT_FALSE(alone.has_value());
    EXPECT_NE(alone.error().message.find("1023"), std::string::npos) << alone.error().message;
    cpu_set_t allowed;
    ASSERT_EQ(::sched_getaffinity(0, sizeof allowed, &allowed), 0);
    for (unsigned cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      const auto beside = pin_this_thread({cpu, 1023});
      ASSERT_FALSE(beside.has_value()) << "part of what was wanted is not what was wanted";
      EXPECT_NE(beside.error().message.find("processor 1023:"), std::string::npos)
          << beside.error().message;
      break;
    }
  }).join();
}

}  // namespace
}  // namespace vblk::blockdev
