// Logging for the control path, on spdlog. Never used per request.
//
// One line per event, to standard error. Thread-safe. The heavy header stays in log.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/core.h>

#include "aio/error.h"

namespace vblk::log {

enum class Level : std::uint8_t { kTrace, kDebug, kInfo, kWarning, kError, kOff };

// "trace", "debug", "info", "warning", "error", "off". Error: kInvalidArgument listing them.
Expected<Level> parse_level(std::string_view text);
void set_level(Level level);
[[nodiscard]] bool enabled(Level level);
void write(Level level, const std::string& line);

// What the calling thread logs begins with "NAME: " from now on, where a process serves several
// devices. Empty: nothing. Threads begin with nothing.
void set_thread_subject(std::string name);

// For lines that a guest or a frontend can cause as often as it likes: whether one may be written
// now. At most kPeerLinesMax in ten seconds, so that nobody fills a disk, or a pipe that is read
// slowly, from inside a virtual machine. What is left out is said once. Any thread.
inline constexpr unsigned kPeerLinesMax = 100;
[[nodiscard]] bool peer_line_allowed();

template <typename... Arguments>
void debug(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  if (enabled(Level::kDebug))
    write(Level::kDebug, fmt::format(format, std::forward<Arguments>(arguments)...));
}
template <typename... Arguments>
void info(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  if (enabled(Level::kInfo))
    write(Level::kInfo, fmt::format(format, std::forward<Arguments>(arguments)...));
}
template <typename... Arguments>
void warning(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  if (enabled(Level::kWarning))
    write(Level::kWarning, fmt::format(format, std::forward<Arguments>(arguments)...));
}
template <typename... Arguments>
void error(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  if (enabled(Level::kError))
    write(Level::kError, fmt::format(format, std::forward<Arguments>(arguments)...));
}

}  // namespace vblk::log
