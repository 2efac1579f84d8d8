// Reports: what is told, what is not, and in whose format.
#include "blockdev/bench/report.h"

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>
#include <zlib.h>

#include <boost/json.hpp>
#include <gtest/gtest.h>

#include "blockdev/bench/flush_report.h"
#include "blockdev/bench/flush_suite.h"
#include "blockdev/bench/hdr_log.h"

namespace vblk::bench {
namespace {

LatencyHistogram evenly(std::uint64_t count) {
  LatencyHistogram latencies;
  for (std::uint64_t i = 1; i <= count; ++i) latencies.add(i * 1000);
  return latencies;
}

NamedRun a_run() {
  JobResult job;
  job.workload.name = "reads, of \"all\"";
  job.elapsed = std::chrono::seconds(2);
  job.latencies[0] = evenly(2000);
  NamedRun run{.target = "disk", .result = {}};
  run.result.jobs.push_back(job);
  return run;
}

TEST(KnownQuantile, needs_ten_samples_beyond_it) {
  EXPECT_TRUE(known_quantile_ns(evenly(1000), 0.99));
  EXPECT_FALSE(known_quantile_ns(evenly(999), 0.99));
  EXPECT_TRUE(known_quantile_ns(evenly(20), 0.5));
  EXPECT_FALSE(known_quantile_ns({}, 0.5));
}

TEST(TextReport, says_n_a_for_what_few_samples_cannot_tell) {
  const std::string text = text_report(a_run());
  EXPECT_NE(text.find("n/a"), std::string::npos) << text;
  EXPECT_NE(text.find("1000"), std::string::npos) << text;  // IOPS
}

TEST(TextReport, tells_no_latency_of_a_saturated_run) {
  NamedRun run = a_run();
  run.result.jobs[0].workload.arrival = Arrival::kFixed;
  run.result.jobs[0].lag = std::chrono::seconds(1);
  const std::string text = text_report(run);
  EXPECT_NE(text.find("SATURATED"), std::string::npos);
  EXPECT_EQ(text.find("mean us"), std::string::npos);
}

TEST(Report, tells_nothing_of_a_process_that_has_gone) {
  NamedRun run = a_run();
  run.result.usage.process_has_gone = true;
  const std::string text = text_report(run);
  EXPECT_NE(text.find("CPU us per I/O: backend n/a (it has gone), load"), std::string::npos)
      << text;
  EXPECT_EQ(text.find("wake-ups"), std::string::npos) << text;
  const auto document = boost::json::parse(json_report(std::vector{run})).as_object();
  const auto& job = document.at("jobs").as_array().at(0).as_object();
  EXPECT_TRUE(job.at("vblk").at("usage").at("cpu_us_per_io").is_null());
}

TEST(JsonReport, tells_no_latency_of_a_saturated_run_and_the_log_neither) {
  NamedRun run = a_run();
  run.result.jobs[0].workload.arrival = Arrival::kFixed;
  run.result.jobs[0].lag = std::chrono::seconds(1);
  const auto document = boost::json::parse(json_report(std::vector{run})).as_object();
  const auto& job = document.at("jobs").as_array().at(0).as_object();
  EXPECT_TRUE(job.at("vblk").at("saturated").as_bool());
  EXPECT_EQ(job.at("read").at("lat_ns").at("N").to_number<int>(), 0);
  EXPECT_EQ(job.at("read").at("total_ios").to_number<int>(), 2000);
  EXPECT_EQ(hdr_log(std::vector{run}).find("Tag="), std::string::npos);
}

TEST(JsonReport, has_the_keys_of_fio) {
  const auto document = boost::json::parse(json_report(std::vector{a_run()})).as_object();
  const auto& job = document.at("jobs").as_array().at(0).as_object();
  EXPECT_EQ(job.at("jobname").as_string(), "reads, of \"all\"");
  const auto& read = job.at("read").as_object();
  EXPECT_EQ(read.at("total_ios").to_number<int>(), 2000);
  EXPECT_DOUBLE_EQ(read.at("iops").to_number<double>(), 1000);
  EXPECT_EQ(read.at("bw_bytes").to_number<int>(), 4096000);
  const auto& latencies = read.at("clat_ns").as_object();
  EXPECT_EQ(latencies.at("N").to_number<int>(), 2000);
  EXPECT_NEAR(latencies.at("percentile").at("50.000000").to_number<double>(), 1e6, 1e4);
  EXPECT_FALSE(latencies.at("percentile").as_object().contains("99.900000"));
  std::uint64_t counted = 0;
  for (const auto& bin : latencies.at("bins").as_object())
    counted += bin.value().to_number<std::uint64_t>();
  EXPECT_EQ(counted, 2000U);
  EXPECT_EQ(job.at("write").at("total_ios").to_number<int>(), 0);
}

// HdrHistogram's V2 encoding, read as its specification says: an implementation of its own.
std::map<std::uint64_t, std::uint64_t> decode_hdr(const std::string& text) {
  constexpr std::string_view kAlphabet =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<unsigned char> bytes;
  std::uint32_t bits = 0;
  int bit_count = 0;
  for (const char letter : text) {
    if (letter == '=') break;
    bits = bits << 6U | static_cast<std::uint32_t>(kAlphabet.find(letter));
    bit_count += 6;
    if (bit_count < 8) continue;
    bit_count -= 8;
    bytes.push_back(static_cast<unsigned char>(bits >> static_cast<unsigned>(bit_count)));
  }
  const auto u32 = [](const std::vector<unsigned char>& from, std::size_t at) {
    return static_cast<std::uint32_t>(from[at]) << 24U |
           static_cast<std::uint32_t>(from[at + 1]) << 16U |
           static_cast<std::uint32_t>(from[at + 2]) << 8U | from[at + 3];
  };
  EXPECT_EQ(u32(bytes, 0), 0x1c849314U);
  EXPECT_EQ(u32(bytes, 4), bytes.size() - 8);
  std::vector<unsigned char> plain(1 << 20);
  uLongf length = plain.size();
  EXPECT_EQ(::uncompress(plain.data(), &length, bytes.data() + 8, bytes.size() - 8), Z_OK);
  EXPECT_EQ(u32(plain, 0), 0x1c849313U);
  EXPECT_EQ(u32(plain, 4), length - 40);
  EXPECT_EQ(u32(plain, 12), 3U) << "significant digits";
  std::map<std::uint64_t, std::uint64_t> counts;
  std::uint64_t index = 0;
  for (std::size_t at = 40; at < length;) {
    std::uint64_t raw = 0;
    for (unsigned shift = 0; shift < 63; shift += 7) {
      const unsigned char byte = plain[at++];
      raw |= static_cast<std::uint64_t>(shift == 56 ? byte : byte & 0x7fU) << shift;
      if (shift == 56 || (byte & 0x80U) == 0) break;
    }
    const auto value = static_cast<std::int64_t>((raw >> 1U) ^ (~(raw & 1U) + 1));
    if (value < 0) {
      index += static_cast<std::uint64_t>(-value);
      continue;
    }
    // 2048 values of one, then 1024 of each further power of two.
    const std::uint64_t bucket = index < 2048 ? 0 : index / 1024 - 1;
    const std::uint64_t sub = index < 2048 ? index : index % 1024 + 1024;
    counts[sub << bucket] += static_cast<std::uint64_t>(value);
    ++index;
  }
  return counts;
}

TEST(HdrLog, holds_every_latency_within_its_three_digits) {
  LatencyHistogram latencies;
  const std::array<std::uint64_t, 7> values{3, 100, 2047, 2048, 54'321, 1'234'567, 40'000'000'000};
  for (std::size_t i = 0; i < values.size(); ++i) {
    for (std::size_t j = 0; j <= i * 50; ++j) latencies.add(values[i]);
  }
  const auto counts = decode_hdr(encode_hdr(latencies));
  ASSERT_EQ(counts.size(), values.size());
  std::size_t i = 0;
  for (const auto& [value, count] : counts) {
    const auto exact = static_cast<double>(values[i]);
    EXPECT_NEAR(static_cast<double>(value), exact, exact * 0.009);
    EXPECT_EQ(count, i * 50 + 1);
    ++i;
  }
}

TEST(HdrLog, has_a_tagged_line_for_each_thing_that_was_timed) {
  const std::string log = hdr_log(std::vector{a_run()});
  EXPECT_NE(log.find("#[Histogram log format version 1.3]"), std::string::npos);
  EXPECT_NE(log.find("\nTag=reads__of_\"all\".read,0.000,2.000,2.000,HISTFAA"), std::string::npos)
      << log.substr(0, 400);
}

TEST(PowerCuts, lose_nothing_that_was_flushed_and_notice_a_disk_that_does) {
  const PowerCutCheck check = check_power_cuts(1);
  EXPECT_GT(check.cuts, 100U);
  EXPECT_EQ(check.lost, 0U);
  EXPECT_TRUE(check.canary_noticed);
}

TEST(FlushReport, says_pass_and_fail_and_what_was_shared) {
  FlushReport report;
  report.rows.push_back({.target = "io_uring, none", .latencies = evenly(2000), .timed = "flush"});
  report.rows.back().passed = false;
  report.rows.back().sharing = 4.0;
  report.warnings.emplace_back("something below");
  const std::string text = flush_text(report);
  EXPECT_NE(text.find("FAIL; 4.00 flushes per fdatasync"), std::string::npos) << text;
  EXPECT_NE(text.find("warning: something below"), std::string::npos);
  const auto row = boost::json::parse(flush_json(report)).at("rows").as_array().at(0).as_object();
  EXPECT_EQ(row.at("passed").as_bool(), false);
  EXPECT_FALSE(row.at("lat_ns").at("percentile").as_object().contains("99.900000"));
}

}  // namespace
}  // namespace vblk::bench
