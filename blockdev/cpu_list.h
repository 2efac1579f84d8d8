// On which of the machine's processors a thread may run.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "aio/error.h"

namespace vblk::blockdev {

// Processor numbers, ascending.
using CpuList = std::vector<unsigned>;

// "3", "0-3", "0-1:4-5": one thread's, of parts joined by ':'. Several threads' are separated by
// commas: parse_cpu_lists(). Errors: kInvalidArgument: no number, an empty range, a number that no
// mask of the kernel's can hold (CPU_SETSIZE).
Expected<CpuList> parse_cpu_list(std::string_view text);
Expected<std::vector<CpuList>> parse_cpu_lists(std::string_view text);
[[nodiscard]] std::string to_string(const CpuList& cpus);

// Keeps the calling thread, and those that it starts from now on, on `cpus`. Error:
// kInvalidArgument naming those of them that this process may not use, or that do not exist.
Expected<void> pin_this_thread(const CpuList& cpus);

}  // namespace vblk::blockdev
