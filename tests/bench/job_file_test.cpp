// Job files: what they mean, and what is said of those that mean nothing.
#include "blockdev/bench/job_file.h"

#include <chrono>
#include <string>

#include <gtest/gtest.h>

namespace vblk::bench {
namespace {

std::vector<JobGroup> parse(const std::string& text) {
  auto groups = parse_job_file(text, "x.fio", {});
  EXPECT_TRUE(groups.has_value()) << groups.error().message;
  return groups ? *groups : std::vector<JobGroup>{{{}}};
}

std::string refusal(const std::string& text) {
  const auto groups = parse_job_file(text, "x.fio", {});
  return groups ? "accepted" : groups.error().message;
}

TEST(JobFile, is_read_as_fio_reads_it) {
  const auto groups = parse(R"(
# a comment
[global]
bs=8k
runtime=10
time_based
; another
[one]
rw=randrw
rwmixread=70
iodepth = 16
random_distribution=zipf:1.1
[two]
stonewall
rw=write
bs=64k
offset=1M
size=64M
fsync=1
numjobs=2
)");
  ASSERT_EQ(groups.size(), 2U);
  const Workload& one = groups[0][0];
  EXPECT_EQ(one.name, "one");
  EXPECT_EQ(one.read_percent, 70U);
  EXPECT_EQ(one.block_bytes, 8192U);
  EXPECT_EQ(one.depth, 16U);
  EXPECT_EQ(one.distribution, Distribution::kZipf);
  EXPECT_DOUBLE_EQ(one.zipf_theta, 1.1);
  EXPECT_EQ(one.run_time, std::chrono::seconds(10));
  EXPECT_EQ(one.amount_bytes, 0U);
  const Workload& two = groups[1][0];
  EXPECT_EQ(two.read_percent, 0U);
  EXPECT_EQ(two.distribution, Distribution::kSequential);
  EXPECT_EQ(two.block_bytes, 65536U);
  EXPECT_EQ(two.offset_bytes, 1U << 20);
  EXPECT_EQ(two.flush_every, 1U);
  EXPECT_EQ(two.queue_count, 2U);
}

TEST(JobFile, runs_jobs_together_unless_there_is_a_stonewall) {
  EXPECT_EQ(parse("[a]\nsize=1M\n[b]\nsize=1M\n").size(), 1U);
  EXPECT_EQ(parse("[a]\nsize=1M\n[b]\nstonewall\nsize=1M\n").size(), 2U);
  EXPECT_EQ(parse("[global]\nstonewall\n[a]\nsize=1M\n[b]\nsize=1M\n").size(), 2U);
}

TEST(JobFile, ends_a_job_by_its_size_unless_it_says_otherwise) {
  EXPECT_EQ(parse("[a]\nsize=1M\n")[0][0].amount_bytes, 1U << 20);
  EXPECT_EQ(parse("[a]\nsize=1M\nio_size=4M\n")[0][0].amount_bytes, 4U << 20);
  EXPECT_EQ(parse("[a]\nsize=1M\nruntime=5\n")[0][0].amount_bytes, 1U << 20);
  EXPECT_EQ(parse("[a]\nsize=1M\nruntime=5\ntime_based=1\n")[0][0].amount_bytes, 0U);
}

TEST(JobFile, takes_keys_in_any_order) {
  const auto groups = parse("[a]\nrwmixread=30\nrandom_distribution=zipf\nrw=randrw\nsize=1M\n");
  EXPECT_EQ(groups[0][0].read_percent, 30U);
  EXPECT_EQ(groups[0][0].distribution, Distribution::kZipf);
}

TEST(JobFile, says_what_is_wrong_and_where) {
  const struct {
    const char* text;
    const char* named;
  } cases[] = {
      {"bs=4k\n", "x.fio:1"},
      {"[a]\nbs=700\nsize=1M\n", "x.fio:2: bs '700'"},
      {"[a]\nbs=4k,8k\nsize=1M\n", "bs '4k,8k'"},
      {"[a]\nrw=sideways\n", "sideways"},
      {"[a]\nioengine=libaio\n", "--aio"},
      {"[a]\nfilename=/dev/sda\n", "--image"},
      {"[a]\nwarp=9\n", "'warp'"},
      {"[a]\niodepth=0\n", "iodepth '0'"},
      {"[a]\niodepth=many\n", "iodepth 'many'"},
      {"[a]\nsize\n", "'size' needs a value"},
      {"[a\n", "section"},
      {"[global]\nbs=4k\n", "no job"},
      {"", "no job"},
      {"[a]\nrw=read\n", "never end"},
      {"[a]\ntime_based\nsize=1M\n", "runtime"},
      {"[a]\nrw=read\nfsync=1\nsize=1M\n", "fsync"},
      {"[a]\nrate_process=poisson\nsize=1M\n", "rate_iops"},
      {"[a]\nrate_iops=0\nsize=1M\n", "rate_iops '0'"},
      {"[a]\nrw=trim\nverify=pattern\nsize=1M\n", "verify"},
      {"[a]\nrw=write\nio_size=5000\n", "io_size"},
      {"[a]\nbs=8k\nsize=12k\n", "size is not a whole number"},
      {"[a]\nrw=read\nrwmixread=40\nsize=1M\n", "rwmixread"},
      {"[a]\nrw=read\nrandom_distribution=zipf:1\nsize=1M\n", "random_distribution"},
      {"[a]\noffset=100\nsize=1M\n", "offset"},
      {"[a]\nbs=1M\niodepth=1024\nnumjobs=64\nsize=1M\n", "buffers"},
      {"[a]\nruntime=soon\n", "runtime 'soon'"},
      {"[a]\nruntime=-1\n", "runtime '-1'"},
      {"[a]\nrate_iops=nan\nsize=1M\n", "rate_iops 'nan'"},
  };
  for (const auto& each : cases) {
    EXPECT_NE(refusal(each.text).find(each.named), std::string::npos)
        << each.text << "said: " << refusal(each.text);
  }
}

TEST(ParseDuration, takes_units) {
  EXPECT_EQ(parse_duration("t", "2"), std::chrono::seconds(2));
  EXPECT_EQ(parse_duration("t", "500ms"), std::chrono::milliseconds(500));
  EXPECT_EQ(parse_duration("t", "20us"), std::chrono::microseconds(20));
  EXPECT_EQ(parse_duration("t", "1.5m"), std::chrono::seconds(90));
  EXPECT_FALSE(parse_duration("t", "1y").has_value());
  EXPECT_FALSE(parse_duration("t", "").has_value());
}

}  // namespace
}  // namespace vblk::bench
