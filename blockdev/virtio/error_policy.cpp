#include "blockdev/virtio/error_policy.h"

#include <array>
#include <cerrno>
#include <span>
#include <string>

#include <fmt/core.h>

namespace vblk::virtio {

namespace {

// Indexed by ErrorChoice.
constexpr std::array<std::string_view, 4> kNames{"report", "ignore", "stop", "enospc"};

Expected<ErrorChoice> parse(std::string_view text, std::string_view option,
                            std::span<const std::string_view> names) {
  std::string known;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (names[i] == text) return static_cast<ErrorChoice>(i);
    known += (i == 0 ? "" : i + 1 == names.size() ? " and " : ", ") + std::string(names[i]);
  }
  return make_error(ErrorKind::kInvalidArgument,
                    fmt::format("{} {}: there are {}", option, text, known));
}

}  // namespace

ErrorAction ErrorPolicy::action(blockdev::BlockOperation operation, int error) const {
  // What a disk cannot do is no failure of it.
  if (error == EOPNOTSUPP) return ErrorAction::kReport;
  switch (operation == blockdev::BlockOperation::kRead ? read : write) {
    case ErrorChoice::kReport:
      return ErrorAction::kReport;
    case ErrorChoice::kIgnore:
      return ErrorAction::kIgnore;
    case ErrorChoice::kStop:
      return ErrorAction::kStop;
    case ErrorChoice::kEnospc:
      return error == ENOSPC ? ErrorAction::kStop : ErrorAction::kReport;
  }
  return ErrorAction::kReport;
}

Expected<ErrorChoice> parse_read_error_choice(std::string_view text, std::string_view option) {
  return parse(text, option, std::span(kNames).first(kNames.size() - 1));
}

Expected<ErrorChoice> parse_write_error_choice(std::string_view text, std::string_view option) {
  return parse(text, option, kNames);
}

std::string_view to_string(ErrorChoice choice) { return kNames[static_cast<std::size_t>(choice)]; }

}  // namespace vblk::virtio
