#include "blockdev/io_limits.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include <fmt/core.h>

#include "blockdev/byte_size.h"

namespace vblk::blockdev {

namespace {

constexpr std::array<std::string_view, IoLimits::kKindCount> kNames{
    "iops-total", "iops-read", "iops-write", "bps-total", "bps-read", "bps-write"};
constexpr std::string_view kBurstSuffix = "-max";
constexpr std::string_view kLengthSuffix = "-max-length";
constexpr std::string_view kSizeName = "iops-size";
constexpr std::string_view kNone = "none";

std::unexpected<Error> refused(std::string_view option, std::string_view item,
                               std::string_view why) {
  return make_error(ErrorKind::kInvalidArgument, fmt::format("{} {}: {}", option, item, why));
}

std::optional<std::uint64_t> plain_number(std::string_view text) {
  std::uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc{} || rest != end) return std::nullopt;
  return number;
}

// The value of one NAME=VALUE, put where its name says.
Expected<void> take(IoLimits& limits, std::string_view name, std::string_view value,
                    std::string_view option, std::string_view item) {
  if (name == kSizeName) {
    const auto size = parse_byte_size(value);
    if (!size) return refused(option, item, size.error().message);
    limits.iops_size_bytes = *size;
    return {};
  }
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (!name.starts_with(kNames[i])) continue;
    IoLimit& limit = limits.limits[i];
    const auto suffix = name.substr(kNames[i].size());
    if (suffix == kLengthSuffix) {
      const auto seconds = plain_number(value);
      if (!seconds || *seconds == 0 || *seconds > IoLimit::kBurstSecondsMax) {
        return refused(option, item,
                       fmt::format("use whole seconds from 1 to {}", IoLimit::kBurstSecondsMax));
      }
      limit.burst_seconds = static_cast<std::uint32_t>(*seconds);
      return {};
    }
    if (!suffix.empty() && suffix != kBurstSuffix) break;
    const bool is_bytes = name.starts_with("bps");
    std::optional<std::uint64_t> rate = plain_number(value);
    if (!rate && is_bytes) {
      if (const auto size = parse_byte_size(value)) rate = *size;
    }
    if (!rate || *rate > IoLimit::kRateMax) {
      return refused(option, item,
                     is_bytes ? "use bytes per second, such as 10M; 0 is no limit"
                              : "use a whole number per second; 0 is no limit");
    }
    (suffix.empty() ? limit.rate : limit.burst_rate) = *rate;
    // What is taken away is taken away whole.
    if (*rate == 0) limit = suffix.empty() ? IoLimit{} : IoLimit{.rate = limit.rate};
    return {};
  }
  return refused(option, item,
                 "there are iops-total, iops-read, iops-write, bps-total, bps-read and bps-write, "
                 "each also with -max and -max-length, and iops-size");
}

Expected<void> check(const IoLimits& limits, std::string_view option) {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    const IoLimit& limit = limits.limits[i];
    const auto name = kNames[i];
    if (limit.burst_rate != 0 && limit.rate == 0) {
      return refused(option, name,
                     fmt::format("{}-max is a burst above {}, which is not given", name, name));
    }
    if (limit.burst_rate != 0 && limit.burst_rate < limit.rate) {
      return refused(
          option, name,
          fmt::format("{}-max, {}, is less than {}, {}", name, limit.burst_rate, name, limit.rate));
    }
    if (limit.burst_seconds != 1 && limit.burst_rate == 0) {
      return refused(
          option, name,
          fmt::format("{}-max-length is the length of {}-max, which is not given", name, name));
    }
  }
  return {};
}

}  // namespace

Expected<IoLimits> IoLimits::parse(std::string_view text, std::string_view option,
                                   const IoLimits& base) {
  if (text == kNone) return IoLimits{};
  IoLimits limits = base;
  std::string_view rest = text;
  for (;;) {
    const auto comma = rest.find(',');
    const auto item = rest.substr(0, comma);
    const auto equals = item.find('=');
    if (equals == std::string_view::npos)
      return refused(option, text, "write NAME=VALUE,... such as iops-total=1000, or none");
    if (auto taken = take(limits, item.substr(0, equals), item.substr(equals + 1), option, item);
        !taken) {
      return std::unexpected(std::move(taken.error()));
    }
    if (comma == std::string_view::npos) break;
    rest = rest.substr(comma + 1);
  }
  if (auto checked = check(limits, option); !checked)
    return std::unexpected(std::move(checked.error()));
  return limits;
}

std::string IoLimits::to_string() const {
  std::string text;
  const auto add = [&text](std::string_view name, std::string_view suffix, std::uint64_t value) {
    text += fmt::format("{}{}{}={}", text.empty() ? "" : ",", name, suffix, value);
  };
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    const IoLimit& limit = limits[i];
    if (limit.rate != 0) add(kNames[i], "", limit.rate);
    if (limit.burst_rate != 0) add(kNames[i], kBurstSuffix, limit.burst_rate);
    if (limit.burst_rate != 0 && limit.burst_seconds != 1)
      add(kNames[i], kLengthSuffix, limit.burst_seconds);
  }
  if (iops_size_bytes != 0) add(kSizeName, "", iops_size_bytes);
  return text.empty() ? std::string(kNone) : text;
}

bool IoLimits::any() const {
  return std::ranges::any_of(limits, [](const IoLimit& limit) { return limit.rate != 0; });
}

}  // namespace vblk::blockdev
