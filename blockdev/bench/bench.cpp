#include "blockdev/bench/bench.h"

#include <algorithm>
#include <array>
#include <bit>
#include <csignal>
#include <cstdio>
#include <span>
#include <string>
#include <utility>

#include <boost/json.hpp>
#include <fmt/core.h>

#include "blockdev/bench/closed_loop.h"
#include "blockdev/bench/options.h"
#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"

namespace vblk::bench {

namespace {

namespace json = boost::json;

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;

// Samples that must lie beyond a quantile for it to be told.
constexpr double kSamplesBeyondMin = 10;

struct Quantile {
  const char* name;  // fio's key
  double fraction;
};
constexpr std::array kQuantiles{Quantile{"50.000000", 0.5}, Quantile{"90.000000", 0.9},
                                Quantile{"99.000000", 0.99}, Quantile{"99.900000", 0.999},
                                Quantile{"99.990000", 0.9999}};

bool is_known(const LatencyHistogram& latencies, const Quantile& quantile) {
  return static_cast<double>(latencies.total()) * (1 - quantile.fraction) >= kSamplesBeyondMin;
}

// The driver's side of a disk: memory for every buffer, and a ring that holds the depth.
Expected<std::unique_ptr<driver::BlkDriver>> connect(const BenchOptions& options) {
  driver::BlkDriverOptions driver_options;
  driver_options.queue_size = std::max<std::uint16_t>(
      128, std::bit_ceil(static_cast<std::uint16_t>(options.workload.depth)));
  const std::size_t buffers = options.workload.depth * (options.workload.block_bytes + 4096);
  constexpr std::size_t kRoomForRings = std::size_t{4} << 20;
  driver_options.memory_bytes = (buffers + kRoomForRings + 4095) / 4096 * 4096;
  return driver::BlkDriver::connect(options.socket_path, driver_options);
}

Expected<Measurement> measure(const BenchOptions& options) {
  const auto driver = connect(options);
  if (!driver) return std::unexpected(driver.error());
  const std::uint64_t disk_bytes = (*driver)->config().capacity_sectors * virtio::kSectorBytes;
  const std::uint64_t size_bytes = options.size_bytes == 0 ? disk_bytes : options.size_bytes;
  if (size_bytes > disk_bytes || size_bytes < options.workload.block_bytes) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("the disk has {} bytes; choose --size and --bs to fit it", disk_bytes));
  }
  auto load = LoadGenerator::create(**driver, options.server, size_bytes, options.workload.depth,
                                    options.workload.block_bytes);
  if (!load) return std::unexpected(load.error());
  return load->run(options.workload, options.ramp_time, options.run_time, options.seed);
}

// fio's keys where fio has one; what the backend has used is beside them.
json::value as_json(const BenchOptions& options, const Measurement& measurement) {
  const LatencyHistogram& latencies = measurement.latencies;
  json::object percentiles;
  for (const Quantile& quantile : kQuantiles) {
    if (is_known(latencies, quantile))
      percentiles[quantile.name] = latencies.quantile_ns(quantile.fraction);
  }
  const double bandwidth =
      measurement.operations_per_second * static_cast<double>(options.workload.block_bytes);
  const char* const direction = options.workload.operation == Operation::kRead ? "read" : "write";
  json::object job{
      {"jobname", options.workload_name},
      {"job options",
       {{"rw", options.workload_name},
        {"bs", options.workload.block_bytes},
        {"iodepth", options.workload.depth},
        {"fsync", options.workload.flush_every},
        {"seed", options.seed}}},
      {direction,
       {{"total_ios", latencies.total()},
        {"iops", measurement.operations_per_second},
        {"bw_bytes", bandwidth},
        {"runtime", std::chrono::milliseconds(
                        std::chrono::duration_cast<std::chrono::milliseconds>(measurement.elapsed))
                        .count()},
        {"lat_ns",
         {{"N", latencies.total()},
          {"mean", latencies.mean_ns()},
          {"percentile", std::move(percentiles)}}}}}};
  if (options.server != 0) {
    const auto& punts = measurement.punts_per_operation;
    job["backend"] = {{"cpu_us_per_io", measurement.cpu_us_per_operation},
                      {"context_switches_per_io", measurement.context_switches_per_operation},
                      {"io_uring_punts_per_io", punts ? json::value(*punts) : json::value()}};
  }
  return {{"jobs", json::array{std::move(job)}}};
}

void print_text(const BenchOptions& options, const Measurement& measurement) {
  const LatencyHistogram& latencies = measurement.latencies;
  fmt::print("{}, {} bytes, depth {}{}\n", options.workload_name, options.workload.block_bytes,
             options.workload.depth,
             options.workload.flush_every == 0
                 ? ""
                 : fmt::format(", a flush after every {}", options.workload.flush_every));
  fmt::print("  IOPS      {:.0f}\n  MiB/s     {:.1f}\n", measurement.operations_per_second,
             measurement.operations_per_second * static_cast<double>(options.workload.block_bytes) /
                 (1U << 20U));
  fmt::print("  latency   mean {:.1f} us", latencies.mean_ns() / 1000);
  for (const Quantile& quantile : kQuantiles) {
    if (is_known(latencies, quantile)) {
      fmt::print(", p{:g} {:.1f}", quantile.fraction * 100,
                 latencies.quantile_ns(quantile.fraction) / 1000);
    } else {
      fmt::print(", p{:g} n/a", quantile.fraction * 100);
    }
  }
  fmt::print(" ({} samples)\n", latencies.total());
  if (options.server != 0) {
    const auto& punts = measurement.punts_per_operation;
    fmt::print(
        "  backend   {:.2f} us of CPU, {:.2f} context switches and {} io_uring punts per "
        "operation\n",
        measurement.cpu_us_per_operation, measurement.context_switches_per_operation,
        punts ? fmt::format("{:.2f}", *punts) : "n/a");
  }
}

}  // namespace

int run(int argc, char** argv) {
  const auto parsed = parse_options(std::span(argv, static_cast<std::size_t>(argc)));
  if (!parsed) {
    fmt::print(stderr, "vblk: bench: {}\n", parsed.error().message);
    return kExitUsage;
  }
  if (const auto* help = std::get_if<HelpText>(&*parsed)) {
    fmt::print("{}", help->text);
    return 0;
  }
  const auto& options = std::get<BenchOptions>(*parsed);
  const auto measurement = measure(options);
  if (!measurement) {
    fmt::print(stderr, "vblk: bench: {}\n", measurement.error().message);
    return kExitFailure;
  }
  if (options.json) {
    fmt::print("{}\n", json::serialize(as_json(options, *measurement)));
  } else {
    print_text(options, *measurement);
  }
  return 0;
}

}  // namespace vblk::bench
