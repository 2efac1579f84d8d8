// I/O limits as people write them.
#include "blockdev/io_limits.h"

#include <string>

#include <gtest/gtest.h>

namespace vblk::blockdev {
namespace {

using Kind = IoLimits::Kind;

IoLimits parsed(std::string_view text, const IoLimits& base = {}) {
  auto limits = IoLimits::parse(text, "--limits", base);
  EXPECT_TRUE(limits.has_value()) << text << ": " << limits.error().message;
  return limits.value_or(IoLimits{});
}

TEST(IoLimits, have_qemus_names_and_read_back_what_they_print) {
  const auto limits = parsed(
      "iops-total=1000,iops-total-max=2000,iops-total-max-length=5,bps-read=10M,bps-write=4096,"
      "iops-size=8k");
  EXPECT_EQ(limits.of(Kind::kIopsTotal).rate, 1000U);
  EXPECT_EQ(limits.of(Kind::kIopsTotal).burst_rate, 2000U);
  EXPECT_EQ(limits.of(Kind::kIopsTotal).burst_seconds, 5U);
  EXPECT_EQ(limits.of(Kind::kBpsRead).rate, std::uint64_t{10} << 20);
  EXPECT_EQ(limits.of(Kind::kBpsWrite).rate, 4096U);
  EXPECT_EQ(limits.iops_size_bytes, 8192U);
  EXPECT_TRUE(limits.any());
  EXPECT_EQ(parsed(limits.to_string()), limits);
  EXPECT_EQ(IoLimits{}.to_string(), "none");
  EXPECT_FALSE(parsed("none").any());
}

TEST(IoLimits, that_are_not_named_stay_and_zero_takes_one_away) {
  const auto base = parsed("iops-read=100,iops-read-max=200,bps-total=1M");
  const auto changed = parsed("iops-write=50,bps-total=0", base);
  EXPECT_EQ(changed.to_string(), "iops-read=100,iops-read-max=200,iops-write=50");
  EXPECT_EQ(parsed("iops-read-max=0", base).of(Kind::kIopsRead), IoLimit{.rate = 100});
  EXPECT_FALSE(parsed("iops-read=0,bps-total=0", base).any());
  EXPECT_EQ(parsed("none", base), IoLimits{});
}

TEST(IoLimits, that_make_no_sense_are_refused_by_name) {
  for (const char* text :
       {"", "1000", "iops=5", "iops-total", "iops-total=", "iops-total=x", "iops-total=1k",
        "iops-total=-1", "iops-total=1000000000000001", "bps-total=1X", "iops-total-max=5",
        "iops-total=10,iops-total-max=9", "iops-total=1,iops-total-max-length=4",
        "iops-total=1,iops-total-max=2,iops-total-max-length=0", "iops-size=x",
        "iops-total=1,iops-total-max=2,iops-total-max-length=86401", "iops-total=1,,bps-read=1",
        "iops-total=1,none", "iops-total-burst=1"}) {
    const auto limits = IoLimits::parse(text, "set-limits", {});
    ASSERT_FALSE(limits.has_value()) << text;
    EXPECT_EQ(limits.error().message.rfind("set-limits ", 0), 0U) << limits.error().message;
  }
}

}  // namespace
}  // namespace vblk::blockdev
