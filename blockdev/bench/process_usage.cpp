#include "blockdev/bench/process_usage.h"

#include <cerrno>
#include <csignal>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include <fmt/core.h>

namespace vblk::bench {

namespace {

ContextSwitches context_switches_of(const std::filesystem::path& status_file) {
  std::ifstream status(status_file);
  ContextSwitches switches;
  for (std::string line; std::getline(status, line);) {
    const std::size_t value = line.find(':') + 1;
    if (line.starts_with("voluntary_ctxt_switches:"))
      switches.voluntary = std::stoull(line.substr(value));
    if (line.starts_with("nonvoluntary_ctxt_switches:"))
      switches.involuntary = std::stoull(line.substr(value));
  }
  return switches;
}

// proc(5), /proc/pid/stat: utime and stime are the 12th and 13th fields after the name, which may
// hold anything, and ends with the last parenthesis.
void add_ticks(pid_t process, ProcessUsage& usage) {
  std::ifstream file(fmt::format("/proc/{}/stat", process));
  std::string text;
  std::getline(file, text);
  const std::size_t end_of_name = text.rfind(')');
  if (end_of_name == std::string::npos) return;
  std::istringstream fields(text.substr(end_of_name + 1));
  std::string field;
  for (int i = 0; i < 11; ++i) fields >> field;
  fields >> usage.user_ticks >> usage.system_ticks;
}

}  // namespace

ProcessUsage usage_of(pid_t process) {
  ProcessUsage usage;
  clockid_t clock{};
  timespec time{};
  // Process 0 would be this one.
  usage.exists = process != 0 && ::clock_getcpuclockid(process, &clock) == 0 &&
                 ::clock_gettime(clock, &time) == 0;
  if (!usage.exists) return usage;
  usage.cpu_time = std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  add_ticks(process, usage);
  std::error_code ignored;  // a thread or process that ends meanwhile
  for (const auto& task :
       std::filesystem::directory_iterator(fmt::format("/proc/{}/task", process), ignored)) {
    usage.context_switches[std::stoi(task.path().filename())] =
        context_switches_of(task.path() / "status");
  }
  return usage;
}

ContextSwitches context_switches_between(const ProcessUsage& before, const ProcessUsage& after) {
  ContextSwitches sum;
  for (const auto& [thread, count] : after.context_switches) {
    const auto found = before.context_switches.find(thread);
    const ContextSwitches earlier =
        found == before.context_switches.end() ? ContextSwitches{} : found->second;
    sum.voluntary += count.voluntary - earlier.voluntary;
    sum.involuntary += count.involuntary - earlier.involuntary;
  }
  return sum;
}

bool process_exists(pid_t process) {
  return process > 0 && (::kill(process, 0) == 0 || errno == EPERM);
}

}  // namespace vblk::bench
