#include "blockdev/bench/machine_usage.h"

#include <array>
#include <cerrno>
#include <fstream>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

namespace vblk::bench {

MachineUsage machine_usage() {
  std::ifstream file("/proc/stat");
  std::string name;
  std::array<std::int64_t, 8> ticks{};  // user nice system idle iowait irq softirq steal
  file >> name;
  for (auto& value : ticks) file >> value;
  const std::int64_t ms_per_tick = 1000 / ::sysconf(_SC_CLK_TCK);
  const auto time = [ms_per_tick](std::int64_t count) {
    return std::chrono::milliseconds(count * ms_per_tick);
  };
  return {.busy = time(ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]),
          .steal = time(ticks[7]),
          .idle = time(ticks[3] + ticks[4])};
}

Expected<FlushCounter> FlushCounter::open(const std::string& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) {
    return make_error(kind_of_errno(errno),
                      fmt::format("cannot look at '{}': {}", path, describe_errno(errno)), errno);
  }
  const dev_t device = S_ISBLK(status.st_mode) ? status.st_rdev : status.st_dev;
  FlushCounter counter(fmt::format("/sys/dev/block/{}:{}/stat", ::major(device), ::minor(device)));
  if (counter.count()) return counter;
  return make_error(ErrorKind::kNotSupported,
                    fmt::format("the kernel counts no flushes of the device of '{}'", path));
}

std::optional<std::uint64_t> FlushCounter::count() const {
  constexpr int kFlushField = 16;
  std::ifstream file(stat_path_);
  std::uint64_t value = 0;
  for (int field = 1; field <= kFlushField; ++field) {
    if (!(file >> value)) return std::nullopt;
  }
  return value;
}

}  // namespace vblk::bench
