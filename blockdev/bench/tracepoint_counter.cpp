#include "blockdev/bench/tracepoint_counter.h"

#include <filesystem>
#include <fstream>
#include <linux/perf_event.h>
#include <string>
#include <sys/syscall.h>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::bench {

namespace {

std::optional<std::uint64_t> id_of(std::string_view event) {
  std::ifstream file(fmt::format("/sys/kernel/tracing/events/{}/id", event));
  std::uint64_t id = 0;
  if (file >> id) return id;
  return std::nullopt;
}

int open_event(std::uint64_t id, pid_t thread) {
  perf_event_attr attributes{};
  attributes.size = sizeof attributes;
  attributes.type = PERF_TYPE_TRACEPOINT;
  attributes.config = id;
  attributes.inherit = 1;  // threads that this one starts
  constexpr int kAnyProcessor = -1;
  constexpr int kNoGroup = -1;
  return static_cast<int>(::syscall(SYS_perf_event_open, &attributes, thread, kAnyProcessor,
                                    kNoGroup, PERF_FLAG_FD_CLOEXEC));
}

}  // namespace

TracepointCounter::TracepointCounter(pid_t process, std::string_view event) {
  const auto id = id_of(event);
  if (!id) return;
  std::error_code ignored;  // a process that has ended
  for (const auto& task :
       std::filesystem::directory_iterator(fmt::format("/proc/{}/task", process), ignored)) {
    const int fd = open_event(*id, std::stoi(task.path().filename()));
    if (fd >= 0) events_.push_back(fd);
  }
}

TracepointCounter::~TracepointCounter() {
  for (const int fd : events_) ::close(fd);
}

std::optional<std::uint64_t> TracepointCounter::count() const {
  if (events_.empty()) return std::nullopt;
  std::uint64_t sum = 0;
  for (const int fd : events_) {
    std::uint64_t value = 0;
    if (::read(fd, &value, sizeof value) == sizeof value) sum += value;
  }
  return sum;
}

}  // namespace vblk::bench
