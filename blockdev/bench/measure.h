// Opens a target, runs jobs on it, and checks what they have written.
#pragma once

#include <atomic>
#include <functional>
#include <string>

#include "aio/error.h"
#include "blockdev/bench/job_file.h"
#include "blockdev/bench/options.h"
#include "blockdev/bench/report.h"

namespace vblk::bench {

struct MeasureOptions {
  bool count_system_calls{false};
  std::string flush_device;
  const std::atomic<bool>* interrupted{nullptr};
  std::function<void(const Progress&)> show;
};

// Errors: where nothing was measured; otherwise they are in the result.
Expected<NamedRun> measure(const TargetOptions& target, const JobGroup& group,
                           const MeasureOptions& options);

// As measure() does it, on a target that is open. All jobs of a group agree on write_through.
Expected<NamedRun> measure_on(Target& target, const JobGroup& group, const MeasureOptions& options);

// What can be told before anything is measured. Errors: kNotFound (the backend's process); kBusy (a
// device that is mounted, and `changes_disk`).
Expected<void> check_target(const TargetOptions& options, bool changes_disk);

// With queues and memory for all of these.
Expected<std::unique_ptr<Target>> open_target(const TargetOptions& options, const JobGroup& group);

}  // namespace vblk::bench
