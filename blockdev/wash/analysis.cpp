#include "blockdev/wash/analysis.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <memory>
#include <stdexcept>

#include <boost/json.hpp>
#include <fmt/core.h>

#include "blockdev/wash/analysis_text.h"
#include "blockdev/wash/digest.h"

namespace vblk::wash {

namespace {

namespace json = boost::json;

// Reading throws, for the file is ours; parse_analysis() makes an Error of it.
[[noreturn]] void wrong(const std::string& what) { throw std::runtime_error(what); }

std::string text(const json::value& value) { return json::value_to<std::string>(value); }
double number(const json::value& value) { return value.to_number<double>(); }
std::vector<std::string> texts(const json::value& value) {
  return json::value_to<std::vector<std::string>>(value);
}
std::chrono::milliseconds milliseconds(const json::value& value) {
  return std::chrono::milliseconds(value.to_number<std::int64_t>());
}
std::string text_or(const json::object& object, const char* key, const char* otherwise) {
  const auto* const found = object.if_contains(key);
  return found == nullptr ? otherwise : text(*found);
}

bool is_among(const std::vector<std::string>& all, std::string_view one) {
  return std::ranges::find(all, one) != all.end();
}

template <typename Value, std::size_t Count>
Value one_of(const std::string& name, const std::array<std::pair<const char*, Value>, Count>& all) {
  for (const auto& [known, value] : all) {
    if (name == known) return value;
  }
  wrong(fmt::format("'{}' means nothing", name));
}

Rules read_rules(const json::object& object) {
  Rules rules;
  rules.alpha = number(object.at("alpha"));
  for (const auto& [metric, margin] : object.at("margins").as_object())
    rules.margins[metric] = number(margin);
  rules.samples_behind_quantile_min =
      object.at("samples_behind_quantile_min").to_number<unsigned>();
  rules.blocks_share_min = number(object.at("blocks_share_min"));
  rules.wash_share_min = number(object.at("wash_share_min"));
  rules.win_share_min = number(object.at("win_share_min"));
  const auto& before_run = object.at("before_each_run").as_object();
  rules.before_run = {.sync = before_run.at("sync").as_bool(),
                      .drop_cache = before_run.at("drop_cache").as_bool()};
  const auto& noise = object.at("noise").as_object();
  rules.steal_max = number(noise.at("steal_max"));
  rules.foreign_max = number(noise.at("foreign_max"));
  const auto& crossover = object.at("crossover").as_object();
  rules.crossover_core_share = number(crossover.at("core_share"));
  rules.crossover_low = number(crossover.at("low_per_second"));
  rules.crossover_high = number(crossover.at("high_per_second"));
  rules.crossover_r_squared_min = number(crossover.at("r_squared_min"));
  const auto& dominance = object.at("dominance").as_object();
  rules.dominance_holds_from = number(dominance.at("holds_from"));
  rules.dominance_refuted_below = number(dominance.at("refuted_below"));
  const auto& gain = object.at("gain").as_object();
  rules.gain_factor_min = number(gain.at("factor_min"));
  rules.gain_margin = number(gain.at("margin"));
  return rules;
}

Preset read_preset(std::string_view name, const json::object& object) {
  return {.name = std::string(name),
          .label = text(object.at("label")),
          .rounds = object.at("rounds").to_number<unsigned>(),
          .run_time = milliseconds(object.at("run_ms")),
          .ramp_time = milliseconds(object.at("ramp_ms")),
          .idle_time = milliseconds(object.at("idle_ms")),
          .region_bytes = object.at("region_bytes").to_number<std::uint64_t>(),
          .ram_bytes = object.at("ram_bytes").to_number<std::uint64_t>(),
          .slowdown = number(object.at("slowdown")),
          .reruns_max = object.at("reruns_max").to_number<unsigned>(),
          .noisy_share_max = number(object.at("noisy_share_max"))};
}

Arm read_arm(std::string_view name, const json::object& object) {
  Arm arm{.name = std::string(name), .what = text(object.at("what"))};
  for (const auto& [key, value] : object) {
    if (key == "what") continue;
    if (key == "engine") {
      arm.engine =
          one_of<aio::EngineName, 4>(text(value), {{{"inline", aio::EngineName::kInline},
                                                    {"threads", aio::EngineName::kThreads},
                                                    {"native", aio::EngineName::kNative},
                                                    {"io_uring", aio::EngineName::kIoUring}}});
    } else if (key == "pool") {
      const auto kind = threadpool::pool_kind_named(text(value));
      if (!kind) wrong(fmt::format("there is no pool '{}'", text(value)));
      arm.options.pool = *kind;
    } else if (key == "min_threads") {
      arm.options.min_threads = value.to_number<unsigned>();
    } else if (key == "max_batch") {
      arm.options.max_batch = value.to_number<unsigned>();
    } else if (key == "force_async") {
      arm.options.io_uring.force_async = value.as_bool();
    } else if (key == "kernel_workers") {
      arm.options.io_uring.kernel_workers = value.to_number<unsigned>();
    } else if (key == "slowed") {
      arm.slowed = value.as_bool();
    } else if (key == "cache") {
      arm.cache = blockdev::parse_cache_mode(text(value)).value();
    } else if (key == "behind") {
      arm.behind = one_of<Arm::Behind, 4>(text(value), {{{"none", Arm::Behind::kNone},
                                                         {"inline", Arm::Behind::kInline},
                                                         {"threads", Arm::Behind::kThreads},
                                                         {"io_uring", Arm::Behind::kIoUring}}});
    } else if (key == "sync") {
      arm.sync = one_of<SyncCall, 3>(text(value), {{{"range", SyncCall::kRange},
                                                    {"whole", SyncCall::kWhole},
                                                    {"msync", SyncCall::kMsync}}});
    } else if (key == "serve") {
      arm.server =
          one_of<Server, 2>(text(value), {{{"vblk", Server::kVblk}, {"peer", Server::kPeer}}});
    } else {
      wrong(fmt::format("arm '{}': '{}' means nothing", name, std::string_view(key)));
    }
  }
  return arm;
}

Family read_family(const json::object& object) {
  Family family{.id = text(object.at("id")), .what = text(object.at("what"))};
  family.kind = one_of<Kind, 7>(text(object.at("kind")), {{{"load", Kind::kLoad},
                                                           {"burst", Kind::kBurst},
                                                           {"stream", Kind::kStream},
                                                           {"wake", Kind::kWake},
                                                           {"calls", Kind::kCalls},
                                                           {"range", Kind::kRange},
                                                           {"serve", Kind::kServe}}});
  family.devices = texts(object.at("devices"));
  family.cache = blockdev::parse_cache_mode(text_or(object, "cache", "none")).value();
  family.starts_hot =
      one_of<bool, 2>(text_or(object, "page_cache", "cold"), {{{"cold", false}, {"hot", true}}});
  if (const auto* share = object.if_contains("share_flushes"))
    family.share_flushes = share->as_bool();
  if (const auto* times = object.if_contains("run_times"))
    family.run_times = times->to_number<unsigned>();
  if (const auto* workload = object.if_contains("workload")) {
    for (const auto& [key, value] : workload->as_object())
      family.workload.emplace_back(key, text(value));
  }
  family.arms = texts(object.at("arms"));
  for (const auto& [preset, levels] : object.at("levels").as_object()) {
    auto& all = family.levels[preset];
    for (const auto& [level, values] : levels.as_object()) all.emplace_back(level, texts(values));
  }
  return family;
}

Expectation expectation_named(const std::string& name) {
  return one_of<Expectation, 5>(name, {{{"WASH", Expectation::kWash},
                                        {"AIO WINS", Expectation::kAioWins},
                                        {"THREADS WIN", Expectation::kThreadsWin},
                                        {"NO WORSE", Expectation::kNoWorse},
                                        {"LEVEL", Expectation::kLevel}}});
}

bool needs_all_by(const std::string& name) {
  return one_of<bool, 2>(name, {{{"all", true}, {"any", false}}});
}

Level read_level(const json::object& object) {
  Level level;
  for (const auto& [name, value] : object) {
    if (name == "aio_above") {
      level.aio_above = number(value);
    } else if (name == "aio_below") {
      level.aio_below = number(value);
    } else if (name == "threads_at_most") {
      level.threads_at_most = number(value);
    } else {
      wrong(fmt::format("level '{}' means nothing", std::string_view(name)));
    }
  }
  return level;
}

Comparison read_comparison(const json::object& object) {
  Comparison comparison{.name = text(object.at("name")),
                        .families = texts(object.at("families")),
                        .aio = text(object.at("aio")),
                        .threads = text(object.at("threads")),
                        .metrics = texts(object.at("metrics"))};
  if (const auto* where = object.if_contains("where")) {
    for (const auto& [level, values] : where->as_object()) comparison.where[level] = texts(values);
  }
  if (const auto* decides = object.if_contains("decides")) comparison.decides = decides->as_bool();
  if (const auto* expects = object.if_contains("expects"))
    comparison.expects = expectation_named(text(*expects));
  if (const auto* needs = object.if_contains("needs"))
    comparison.needs_all = needs_all_by(text(*needs));
  if (const auto* margins = object.if_contains("margins")) {
    for (const auto& [metric, margin] : margins->as_object())
      comparison.margins[metric] = number(margin);
  }
  if (const auto* levels = object.if_contains("levels")) {
    for (const auto& [metric, level] : levels->as_object())
      comparison.levels[metric] = read_level(level.as_object());
  }
  if (const auto* reports = object.if_contains("reports")) comparison.reports = texts(*reports);
  return comparison;
}

Claim read_claim(const json::object& object) {
  Claim claim{.id = text(object.at("id")),
              .title = text(object.at("title")),
              .sentence = text(object.at("sentence"))};
  claim.rule =
      one_of<ClaimRule, 4>(text_or(object, "rule", "share"), {{{"share", ClaimRule::kShare},
                                                               {"crossover", ClaimRule::kCrossover},
                                                               {"dominance", ClaimRule::kDominance},
                                                               {"gain", ClaimRule::kGain}}});
  if (claim.rule == ClaimRule::kGain) {
    const auto& gain = object.at("gain").as_object();
    claim.gain_level = text(gain.at("level"));
    claim.gain_from = text(gain.at("from"));
    claim.gain_to = text(gain.at("to"));
  }
  for (const auto& value : object.at("comparisons").as_array()) {
    json::object comparison = value.as_object();
    // What the claim says is meant for each that says nothing else.
    for (const char* name : {"expects", "needs"}) {
      if (claim.rule == ClaimRule::kShare && !comparison.contains(name))
        comparison[name] = object.at(name);
    }
    claim.comparisons.push_back(read_comparison(comparison));
  }
  return claim;
}

Controls read_controls(const json::object& object) {
  const auto& slowed = object.at("slowed").as_object();
  std::vector<AgainControl> again;
  for (const auto& value : object.at("again").as_array()) {
    const auto& one = value.as_object();
    again.push_back({.families = texts(one.at("families")),
                     .arm = text(one.at("arm")),
                     .against = text(one.at("against")),
                     .metrics = texts(one.at("metrics"))});
  }
  return {.again = std::move(again),
          .slowed_families = texts(slowed.at("families")),
          .slowed = text(slowed.at("arm")),
          .slowed_against = text(slowed.at("against")),
          .slowed_metric = text(slowed.at("metric")),
          .found_share_min = number(slowed.at("found_share_min"))};
}

// Every name leads somewhere.
void check(const Analysis& analysis) {
  for (const Family& family : analysis.families) {
    for (const auto& arm : family.arms) {
      if (!analysis.arms.contains(arm)) wrong(fmt::format("{}: no arm '{}'", family.id, arm));
    }
    for (const auto& [preset, levels] : family.levels) {
      if (analysis.preset(preset) == nullptr)
        wrong(fmt::format("{}: no preset '{}'", family.id, preset));
    }
  }
  const auto check_pair = [&](const std::string& who, const std::vector<std::string>& families,
                              const std::string& one, const std::string& other,
                              const std::vector<std::string>& metrics) {
    for (const auto& id : families) {
      const Family* const family = analysis.family(id);
      if (family == nullptr) wrong(fmt::format("{}: no family '{}'", who, id));
      for (const auto& arm : {one, other}) {
        if (!is_among(family->arms, arm))
          wrong(fmt::format("{}: family '{}' has no arm '{}'", who, id, arm));
      }
    }
    for (const auto& metric : metrics) {
      if (!analysis.rules.margins.contains(metric))
        wrong(fmt::format("{}: metric '{}' has no margin", who, metric));
    }
  };
  for (const Claim& claim : analysis.claims) {
    if (std::ranges::none_of(claim.comparisons, &Comparison::decides))
      wrong(fmt::format("{}: nothing decides it", claim.id));
    for (const Comparison& comparison : claim.comparisons) {
      check_pair(claim.id, comparison.families, comparison.aio, comparison.threads,
                 comparison.metrics);
      for (const auto& [metric, margin] : comparison.margins) {
        if (!is_among(comparison.metrics, metric))
          wrong(fmt::format("{}: a margin for '{}', which is not compared", claim.id, metric));
      }
      for (const auto& metric : comparison.metrics) {
        if (comparison.decides &&
            comparison.levels.contains(metric) != (comparison.expects == Expectation::kLevel))
          wrong(fmt::format("{}: LEVEL and levels belong together ('{}')", claim.id, metric));
      }
    }
  }
  const Controls& controls = analysis.controls;
  for (const AgainControl& again : controls.again)
    check_pair("again", again.families, again.arm, again.against, again.metrics);
  check_pair("slowed", controls.slowed_families, controls.slowed, controls.slowed_against,
             {controls.slowed_metric});
}

}  // namespace

const Preset* Analysis::preset(std::string_view name) const {
  const auto found = std::ranges::find(presets, name, &Preset::name);
  return found == presets.end() ? nullptr : std::to_address(found);
}

const Family* Analysis::family(std::string_view id) const {
  const auto found = std::ranges::find(families, id, &Family::id);
  return found == families.end() ? nullptr : std::to_address(found);
}

double Analysis::margin(std::string_view metric) const {
  return std::log1p(rules.margins.at(std::string(metric)));
}

double Analysis::margin(const Comparison& comparison, const std::string& metric) const {
  const auto own = comparison.margins.find(metric);
  return own == comparison.margins.end() ? margin(metric) : std::log1p(own->second);
}

bool Analysis::is_control(std::string_view arm) const {
  return arm == controls.slowed ||
         std::ranges::find(controls.again, arm, &AgainControl::arm) != controls.again.end();
}

Expected<Analysis> parse_analysis(std::string_view text_of_file) {
  try {
    const json::value parsed = json::parse(text_of_file);
    const json::object& object = parsed.as_object();
    Analysis analysis;
    analysis.digest = sha256(text_of_file);
    analysis.rules = read_rules(object.at("rules").as_object());
    for (const auto& [name, preset] : object.at("presets").as_object())
      analysis.presets.push_back(read_preset(name, preset.as_object()));
    for (const auto& [name, arm] : object.at("arms").as_object())
      analysis.arms.emplace(name, read_arm(name, arm.as_object()));
    for (const auto& family : object.at("families").as_array())
      analysis.families.push_back(read_family(family.as_object()));
    for (const auto& claim : object.at("claims").as_array())
      analysis.claims.push_back(read_claim(claim.as_object()));
    analysis.controls = read_controls(object.at("controls").as_object());
    check(analysis);
    return analysis;
  } catch (const std::exception& exception) {
    return make_error(ErrorKind::kInvalidArgument, fmt::format("analysis: {}", exception.what()));
  }
}

std::string_view analysis_text() { return kAnalysisText; }

const Analysis& registered_analysis() {
  static const Analysis analysis = [] {
    auto parsed = parse_analysis(kAnalysisText);
    assert(parsed && "tests/wash reads it, too");
    return std::move(*parsed);
  }();
  return analysis;
}

std::vector<Cell> cells_of(const Analysis& analysis, const Preset& preset,
                           const std::vector<std::string>& devices) {
  std::vector<Cell> cells;
  for (const Family& family : analysis.families) {
    const auto levels = family.levels.find(preset.name);
    if (levels == family.levels.end()) continue;
    for (const std::string& device : devices) {
      // A further image is named "image:qcow2" or the like.
      if (!is_among(family.devices, std::string_view(device).substr(0, device.find(':')))) continue;
      // Another server's command knows of one image.
      if (family.kind == Kind::kServe && device != family.devices.front()) continue;
      std::vector<Levels> combinations{{}};
      for (const auto& [name, values] : levels->second) {
        std::vector<Levels> longer;
        for (const Levels& combination : combinations) {
          for (const std::string& value : values) {
            longer.push_back(combination);
            longer.back().emplace_back(name, value);
          }
        }
        combinations = std::move(longer);
      }
      for (Levels& combination : combinations) {
        std::string id = fmt::format("{}/{}", family.id, device);
        const char* separator = "/";
        for (const auto& [name, value] : combination) {
          id += separator + value;
          separator = "-";
        }
        cells.push_back({.id = std::move(id),
                         .family = &family,
                         .device = device,
                         .levels = std::move(combination)});
      }
    }
  }
  return cells;
}

std::string level_of(const Cell& cell, std::string_view name) {
  for (const auto& [level, value] : cell.levels) {
    if (level == name) return value;
  }
  return {};
}

bool applies_to(const Comparison& comparison, const Cell& cell) {
  if (!is_among(comparison.families, cell.family->id)) return false;
  return std::ranges::all_of(comparison.where, [&cell](const auto& condition) {
    return is_among(condition.second, level_of(cell, condition.first));
  });
}

}  // namespace vblk::wash
