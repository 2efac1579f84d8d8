#include "aio/engine_options.h"

#include <algorithm>
#include <array>
#include <ranges>

#include <fmt/core.h>

namespace vblk::aio {

namespace {

struct NamedFeature {
  std::string_view name;
  bool IoUringFeatures::* member;
};

constexpr std::array kFeatures{
    NamedFeature{"defer-taskrun", &IoUringFeatures::defer_taskrun},
    NamedFeature{"registered-files", &IoUringFeatures::registered_files},
    NamedFeature{"registered-buffers", &IoUringFeatures::registered_buffers},
};

}  // namespace

Expected<IoUringFeatures> IoUringFeatures::parse(std::string_view text) {
  const auto wrong = [](std::string_view word) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("--io-uring: '{}' is not FEATURE=on or FEATURE=off; features are "
                                  "defer-taskrun, registered-files and registered-buffers",
                                  word));
  };
  if (text.empty()) return wrong(text);
  IoUringFeatures features;
  for (const auto part : std::views::split(text, ',')) {
    const std::string_view word(part.begin(), part.end());
    const std::size_t equals = std::min(word.find('='), word.size());
    const auto feature = std::ranges::find(kFeatures, word.substr(0, equals), &NamedFeature::name);
    const std::string_view setting = word.substr(equals);
    if (feature == kFeatures.end() || (setting != "=on" && setting != "=off")) return wrong(word);
    features.*(feature->member) = setting == "=on";
  }
  return features;
}

}  // namespace vblk::aio
