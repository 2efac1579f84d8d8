#include "blockdev/img/snapshot_list.h"

#include <array>
#include <ctime>
#include <string>

#include <fmt/core.h>

#include "blockdev/img/command.h"
#include "blockdev/img/names.h"
#include "blockdev/img/output.h"

namespace vblk::img {

namespace {

constexpr std::uint64_t kNanoseconds = 1'000'000'000;

std::string local_time(std::uint32_t seconds) {
  const std::time_t time = seconds;
  std::tm parts{};
  ::localtime_r(&time, &parts);
  std::array<char, 32> text{};
  const std::size_t length = std::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M:%S", &parts);
  return {text.data(), length};
}

}  // namespace

void print_snapshots(const std::vector<qcow2::Snapshot>& snapshots) {
  if (snapshots.empty()) return;
  say("Snapshot list:\n{:<9} {:<16} {:>8} {:>19} {:>12} {:>10}\n", "ID", "TAG", "VM SIZE", "DATE",
      "VM CLOCK", "ICOUNT");
  for (const qcow2::Snapshot& snapshot : snapshots) {
    const qcow2::SnapshotEntry& entry = snapshot.entry;
    const std::uint64_t seconds = entry.vm_clock_nanoseconds / kNanoseconds;
    const std::string clock =
        fmt::format("{:02}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60,
                    entry.vm_clock_nanoseconds / 1'000'000 % 1000);
    const std::string count =
        entry.instructions == ~std::uint64_t{0} ? "" : std::to_string(entry.instructions);
    say("{:<9} {:<16} {:>8} {:>19} {:>12} {:>10}\n", printable(snapshot.id),
        printable(snapshot.name), human_size(entry.vm_state_bytes), local_time(entry.date_seconds),
        clock, count);
  }
}

}  // namespace vblk::img
