#include "blockdev/bench/process_usage.h"

#include <ctime>
#include <filesystem>
#include <fstream>
#include <string>

#include <fmt/core.h>

namespace vblk::bench {

namespace {

std::uint64_t context_switches_of(const std::filesystem::path& status_file) {
  std::ifstream status(status_file);
  std::uint64_t sum = 0;
  for (std::string line; std::getline(status, line);) {
    const auto name = line.find("ctxt_switches:");
    if (name != std::string::npos) sum += std::stoull(line.substr(line.find(':') + 1));
  }
  return sum;
}

}  // namespace

ProcessUsage usage_of(pid_t process) {
  ProcessUsage usage;
  clockid_t clock{};
  timespec time{};
  if (::clock_getcpuclockid(process, &clock) == 0 && ::clock_gettime(clock, &time) == 0)
    usage.cpu_time = std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  std::error_code ignored;  // a thread or process that ends meanwhile
  for (const auto& task :
       std::filesystem::directory_iterator(fmt::format("/proc/{}/task", process), ignored)) {
    usage.context_switches[std::stoi(task.path().filename())] =
        context_switches_of(task.path() / "status");
  }
  return usage;
}

std::uint64_t context_switches_between(const ProcessUsage& before, const ProcessUsage& after) {
  std::uint64_t sum = 0;
  for (const auto& [thread, count] : after.context_switches) {
    const auto earlier = before.context_switches.find(thread);
    sum += count - (earlier == before.context_switches.end() ? 0 : earlier->second);
  }
  return sum;
}

}  // namespace vblk::bench
