#include "blockdev/cpu_list.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <sched.h>
#include <utility>

#include <fmt/core.h>

namespace vblk::blockdev {

namespace {

std::unexpected<Error> bad_list(std::string_view text) {
  return make_error(ErrorKind::kInvalidArgument,
                    fmt::format("'{}' names no processors: write numbers below {}, such as 3, 0-3 "
                                "or 0-1:4-5",
                                text, CPU_SETSIZE));
}

bool parse_number(std::string_view text, unsigned& number) {
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  return error == std::errc{} && rest == end && number < CPU_SETSIZE;
}

// The parts of `text` between separators; one at least.
std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const auto position = text.find(separator);
    parts.push_back(text.substr(0, position));
    if (position == std::string_view::npos) return parts;
    text = text.substr(position + 1);
  }
}

}  // namespace

Expected<CpuList> parse_cpu_list(std::string_view text) {
  CpuList cpus;
  for (const auto part : split(text, ':')) {
    const auto dash = part.find('-');
    unsigned first = 0;
    if (!parse_number(part.substr(0, dash), first)) return bad_list(text);
    unsigned last = first;
    if (dash != std::string_view::npos && !parse_number(part.substr(dash + 1), last))
      return bad_list(text);
    if (last < first) return bad_list(text);
    for (unsigned cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  std::ranges::sort(cpus);
  const auto twice = std::ranges::unique(cpus);
  cpus.erase(twice.begin(), twice.end());
  return cpus;
}

Expected<std::vector<CpuList>> parse_cpu_lists(std::string_view text) {
  std::vector<CpuList> lists;
  for (const auto part : split(text, ',')) {
    auto list = parse_cpu_list(part);
    if (!list) return std::unexpected(std::move(list.error()));
    lists.push_back(std::move(*list));
  }
  return lists;
}

std::string to_string(const CpuList& cpus) {
  std::string text;
  for (const unsigned cpu : cpus) text += fmt::format("{}{}", text.empty() ? "" : ":", cpu);
  return text;
}

Expected<void> pin_this_thread(const CpuList& cpus) {
  cpu_set_t wanted;
  CPU_ZERO(&wanted);
  for (const unsigned cpu : cpus) CPU_SET(cpu, &wanted);
  const int status = ::sched_setaffinity(0, sizeof wanted, &wanted);
  const int error = status == 0 ? 0 : errno;
  // The kernel takes what is left of a set once it has removed what may not be used.
  cpu_set_t granted;
  CPU_ZERO(&granted);
  const bool is_known = error == 0 && ::sched_getaffinity(0, sizeof granted, &granted) == 0;
  if (is_known && CPU_EQUAL(&wanted, &granted) != 0) return {};
  CpuList refused;
  for (const unsigned cpu : cpus) {
    if (!is_known || !CPU_ISSET(cpu, &granted)) refused.push_back(cpu);
  }
  return make_error(
      ErrorKind::kInvalidArgument,
      fmt::format("an I/O thread cannot run on processor {}: {}; see 'nproc' and "
                  "Cpus_allowed_list in /proc/self/status for what this process may use",
                  to_string(refused),
                  is_known ? "it does not exist, or a cpuset forbids it" : describe_errno(error)),
      error);
}

}  // namespace vblk::blockdev
