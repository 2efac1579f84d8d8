// Job files as fio has them: sections in brackets, a key and a value on each line.
#pragma once

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

#include "aio/error.h"
#include "blockdev/bench/workload.h"

namespace vblk::bench {

// Sets what fio's `key` means, and says clearly what means nothing here. Keys: rw, rwmixread, bs,
// iodepth, numjobs, offset, size, io_size, runtime, ramp_time, fsync, fdatasync, sync, rate_iops,
// rate_process, random_distribution, verify, randseed.
// Error: kInvalidArgument, naming key and value.
Expected<void> set_key(Workload& workload, std::string_view key, std::string_view value);

// "10", "500ms", "2m": seconds, or with one of fio's units us, ms, s, m, h, d. Error:
// kInvalidArgument, naming key and value.
Expected<std::chrono::nanoseconds> parse_duration(std::string_view key, std::string_view value);

// Whether the keys make sense together. Error: kInvalidArgument.
Expected<void> check(const Workload& workload);

// Jobs that run at the same time.
using JobGroup = std::vector<Workload>;

// Groups run one after the other: a job with "stonewall" begins a new one. `defaults`: what
// [global] changes. As in fio a job ends when `size` bytes are done, unless io_size or time_based
// says otherwise. `name`: of the file, for messages. Errors: kInvalidArgument, naming file and
// line.
Expected<std::vector<JobGroup>> parse_job_file(std::string_view text, const std::string& name,
                                               const Workload& defaults);
// The same from a file. Errors: also those of opening it.
Expected<std::vector<JobGroup>> read_job_file(const std::string& path, const Workload& defaults);

}  // namespace vblk::bench
