#include "blockdev/bench/measure.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/bench/pattern.h"
#include "blockdev/bench/process_usage.h"
#include "blockdev/image_lock.h"

namespace vblk::bench {

namespace {

constexpr unsigned kVerifyDepth = 16;

// The pattern of a job that verifies; nothing for others.
std::unique_ptr<Pattern> pattern_of(const Workload& job) {
  if (!job.verify) return nullptr;
  if (!job.writes()) return Pattern::everywhere(job.seed);
  return Pattern::where_written(job.seed, job.offset_bytes, job.offset_bytes + job.size_bytes,
                                job.block_bytes);
}

// Reads the whole part of the disk that `job` has written to, and checks what was written.
Expected<RunResult> read_back(Target& target, const Workload& job, Pattern& pattern,
                              const MeasureOptions& options) {
  Workload reading = job;
  reading.name = job.name + ", verify";
  reading.read_percent = 100;
  reading.distribution = Distribution::kSequential;
  reading.depth = std::min(job.depth, kVerifyDepth);
  reading.queue_count = 1;
  reading.flush_every = 0;
  reading.arrival = Arrival::kClosed;
  reading.run_time = reading.ramp_time = {};
  reading.amount_bytes = job.size_bytes;
  return run_jobs(target, {.jobs = {reading},
                           .interrupted = options.interrupted,
                           .show = options.show,
                           .content = [&pattern](std::size_t) { return &pattern; }});
}

}  // namespace

Expected<void> check_target(const TargetOptions& options, bool changes_disk) {
  if (!options.image && options.process != 0 && !process_exists(options.process)) {
    return make_error(ErrorKind::kNotFound,
                      fmt::format("--pid {}: there is no such process", options.process));
  }
  if (!options.image || !changes_disk || options.image->image.read_only) return {};
  return blockdev::check_is_not_mounted(options.image->image.path);
}

Expected<std::unique_ptr<Target>> open_target(const TargetOptions& options, const JobGroup& group) {
  if (options.image) return open_image_target(*options.image);
  SocketTargetOptions socket{.socket_path = options.socket_path,
                             .process = options.process,
                             .packed_rings = options.packed_rings};
  socket.queue_count = queue_count(group);
  for (const Workload& job : group) {
    socket.depth_max = std::max(socket.depth_max, job.depth);
    socket.block_bytes_max = std::max(socket.block_bytes_max, job.block_bytes);
    if (job.verify) socket.runs = 2;
  }
  return open_socket_target(socket);
}

Expected<NamedRun> measure(const TargetOptions& target_options, const JobGroup& group,
                           const MeasureOptions& options) {
  auto target = open_target(target_options, group);
  if (!target) return std::unexpected(std::move(target.error()));
  auto run = measure_on(**target, group, options);
  const auto has_died = [](const JobResult& job) { return job.in_flight > 0; };
  if (run && std::ranges::any_of(run->result.jobs, has_died)) static_cast<void>(target->release());
  return run;
}

Expected<NamedRun> measure_on(Target& target, const JobGroup& group,
                              const MeasureOptions& options) {
  RunSetup setup{.count_system_calls = options.count_system_calls,
                 .flush_device = options.flush_device,
                 .interrupted = options.interrupted,
                 .show = options.show};
  std::vector<std::unique_ptr<Pattern>> patterns;
  for (const Workload& job : group) {
    if (job.write_through != group.front().write_through) {
      return make_error(ErrorKind::kNotSupported,
                        "jobs at the same time share the disk's write cache: give all of them the "
                        "same sync, or stonewall");
    }
    auto fitted = fit_to(target, job);
    if (!fitted) return std::unexpected(std::move(fitted.error()));
    setup.jobs.push_back(*fitted);
    patterns.push_back(pattern_of(*fitted));
  }
  setup.content = [&patterns](std::size_t job) { return patterns[job].get(); };
  if (auto set = target.set_write_through(group.front().write_through); !set)
    return std::unexpected(std::move(set.error()));
  auto result = run_jobs(target, setup);
  if (!result) return std::unexpected(std::move(result.error()));
  for (std::size_t i = 0; i < setup.jobs.size(); ++i) {
    if (!patterns[i] || !setup.jobs[i].writes()) continue;
    result->unverified_blocks += patterns[i]->written_blocks();
    if (result->error || result->interrupted) continue;
    auto reading = read_back(target, setup.jobs[i], *patterns[i], options);
    if (!reading) {
      result->error = std::move(reading.error());
      continue;
    }
    result->error = std::move(reading->error);
    result->interrupted = reading->interrupted;
    result->failed_verification += reading->jobs.front().failed;
    if (result->error || result->interrupted) continue;
    result->unverified_blocks -= patterns[i]->written_blocks();
    result->verified_blocks += patterns[i]->written_blocks();
  }
  return NamedRun{
      .target = target.name(), .in_process = target.is_in_process(), .result = std::move(*result)};
}

}  // namespace vblk::bench
