#include "blockdev/log.h"

#include <array>
#include <atomic>
#include <memory>

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

void write(Level level, const std::string& line) {
  for (const auto& known : kLevels) {
    if (known.level == level) logger().log(known.spdlog_level, line);
  }
}

}  // namespace vblk::log
