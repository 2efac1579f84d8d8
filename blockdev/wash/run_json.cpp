// Specifications and outcomes of runs as JSON.
#include <boost/json.hpp>
#include <fmt/core.h>

#include "blockdev/wash/run.h"

namespace vblk::wash {

namespace {

namespace json = boost::json;

template <typename Value>
Value take(const json::object& object, const char* key) {
  return json::value_to<Value>(object.at(key));
}

json::object object_of(const std::map<std::string, double>& values) {
  json::object object;
  for (const auto& [name, value] : values) object[name] = value;
  return object;
}

std::map<std::string, double> values_of(const json::value& value) {
  std::map<std::string, double> values;
  for (const auto& [name, number] : value.as_object()) values[name] = number.to_number<double>();
  return values;
}

template <typename Value, typename Read>
Expected<Value> parsed(const std::string& text, const char* what, Read&& read) {
  try {
    return read(json::parse(text).as_object());
  } catch (const std::exception& exception) {
    return make_error(ErrorKind::kCorrupt, fmt::format("{}: {}", what, exception.what()));
  }
}

}  // namespace

std::string to_json(const RunSpec& spec) {
  json::array levels;
  for (const auto& [name, value] : spec.levels) levels.push_back(json::array{name, value});
  return json::serialize(json::object{{"family", spec.family},
                                      {"levels", levels},
                                      {"arm", spec.arm},
                                      {"image", spec.image_path},
                                      {"format", static_cast<int>(spec.format)},
                                      {"directory", spec.directory},
                                      {"region_bytes", spec.region_bytes},
                                      {"run_ms", spec.run_time.count()},
                                      {"ramp_ms", spec.ramp_time.count()},
                                      {"idle_ms", spec.idle_time.count()},
                                      {"seed", spec.seed},
                                      {"spin_ns", spec.spin_ns},
                                      {"peer", spec.peer},
                                      {"count_system_calls", spec.count_system_calls}});
}

Expected<RunSpec> parse_run_spec(const std::string& text) {
  return parsed<RunSpec>(text, "a run", [](const json::object& object) {
    RunSpec spec{.family = take<std::string>(object, "family"),
                 .arm = take<std::string>(object, "arm"),
                 .image_path = take<std::string>(object, "image"),
                 .format = static_cast<blockdev::ImageFormat>(take<int>(object, "format")),
                 .directory = take<std::string>(object, "directory"),
                 .region_bytes = take<std::uint64_t>(object, "region_bytes"),
                 .run_time = std::chrono::milliseconds(take<std::int64_t>(object, "run_ms")),
                 .ramp_time = std::chrono::milliseconds(take<std::int64_t>(object, "ramp_ms")),
                 .idle_time = std::chrono::milliseconds(take<std::int64_t>(object, "idle_ms")),
                 .seed = take<std::uint64_t>(object, "seed"),
                 .spin_ns = take<double>(object, "spin_ns"),
                 .peer = take<std::string>(object, "peer"),
                 .count_system_calls = take<bool>(object, "count_system_calls")};
    for (const auto& level : object.at("levels").as_array()) {
      spec.levels.emplace_back(json::value_to<std::string>(level.at(0)),
                               json::value_to<std::string>(level.at(1)));
    }
    return spec;
  });
}

std::string to_json(const RunRecord& record) {
  json::array histogram;
  for (const auto& [latency_ns, count] : record.histogram)
    histogram.push_back(json::array{latency_ns, count});
  return json::serialize(json::object{{"metrics", object_of(record.metrics)},
                                      {"counters", object_of(record.counters)},
                                      {"samples", record.samples},
                                      {"saturated", record.saturated},
                                      {"seconds", record.seconds},
                                      {"steal_share", record.steal_share},
                                      {"histogram", histogram}});
}

Expected<RunRecord> parse_run_record(const std::string& text) {
  return parsed<RunRecord>(text, "the outcome of a run", [](const json::object& object) {
    RunRecord record{.metrics = values_of(object.at("metrics")),
                     .counters = values_of(object.at("counters")),
                     .samples = take<std::uint64_t>(object, "samples"),
                     .saturated = take<bool>(object, "saturated"),
                     .seconds = take<double>(object, "seconds"),
                     .steal_share = take<double>(object, "steal_share")};
    for (const auto& bucket : object.at("histogram").as_array()) {
      record.histogram.emplace_back(bucket.at(0).to_number<double>(),
                                    bucket.at(1).to_number<std::uint64_t>());
    }
    return record;
  });
}

std::string level_of(const RunSpec& spec, std::string_view name) {
  for (const auto& [level, value] : spec.levels) {
    if (level == name) return value;
  }
  return {};
}

}  // namespace vblk::wash
