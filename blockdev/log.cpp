#include "blockdev/log.h"

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

namespace vblk::log {

namespace {

struct NamedLevel {
  std::string_view name;
  Level level;
  spdlog::level::level_enum spdlog_level;
};

constexpr std::array kLevels{
    NamedLevel{"trace", Level::kTrace, spdlog::level::trace},
    NamedLevel{"debug", Level::kDebug, spdlog::level::debug},
    NamedLevel{"info", Level::kInfo, spdlog::level::info},
    NamedLevel{"warning", Level::kWarning, spdlog::level::warn},
    NamedLevel{"error", Level::kError, spdlog::level::err},
    NamedLevel{"off", Level::kOff, spdlog::level::off},
};

std::atomic<Level> current_level{Level::kInfo};
thread_local std::string thread_subject;

// Never destroyed: threads that are still winding down at exit may log.
spdlog::logger& logger() {
  static spdlog::logger& the_logger = *[] {
    auto* made = new spdlog::logger("vblk", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_level(spdlog::level::trace);  // enabled() decides
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%e %n %l: %v");
    made->flush_on(spdlog::level::trace);
    return made;
  }();
  return the_logger;
}

// Lines by the peers of one device in the window that is open now.
struct PeerWindow {
  std::chrono::steady_clock::time_point end;
  unsigned count{0};
};

// By thread_subject: what one device's guest does takes no lines from another's. As many as there
// are devices in this process.
struct PeerLines {
  std::mutex mutex;
  std::map<std::string, PeerWindow, std::less<>> windows;
};

PeerLines& peer_lines() {
  static PeerLines& lines = *new PeerLines;  // never destroyed, as the logger
  return lines;
}

}  // namespace

Expected<Level> parse_level(std::string_view text) {
  for (const auto& known : kLevels) {
    if (known.name == text) return known.level;
  }
  return make_error(
      ErrorKind::kInvalidArgument,
      fmt::format("unknown log level '{}': use trace, debug, info, warning, error or off", text));
}

void set_level(Level level) { current_level.store(level, std::memory_order_relaxed); }

bool enabled(Level level) {
  return level != Level::kOff && level >= current_level.load(std::memory_order_relaxed);
}

bool peer_line_allowed() {
  constexpr std::chrono::seconds kWindow{10};
  PeerLines& lines = peer_lines();
  const std::scoped_lock lock(lines.mutex);
  PeerWindow& window = lines.windows[thread_subject];
  const auto now = std::chrono::steady_clock::now();
  if (now >= window.end) window = {.end = now + kWindow};
  if (window.count < kPeerLinesMax) {
    ++window.count;
    return true;
  }
  if (window.count == kPeerLinesMax) {
    ++window.count;
    warning("more than {} lines about the frontend or the guest in {} s: leaving them out for now",
            kPeerLinesMax, kWindow.count());
  }
  return false;
}

void set_thread_subject(std::string name) { thread_subject = std::move(name); }

void write(Level level, const std::string& line) {
  for (const auto& known : kLevels) {
    if (known.level != level) continue;
    if (thread_subject.empty()) {
      logger().log(known.spdlog_level, line);
    } else {
      logger().log(known.spdlog_level, fmt::format("{}: {}", thread_subject, line));
    }
  }
}

}  // namespace vblk::log
