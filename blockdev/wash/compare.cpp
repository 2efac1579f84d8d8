#include "blockdev/wash/compare.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <boost/json.hpp>
#include <fmt/core.h>

#include "aio/error.h"

namespace vblk::wash {

namespace {

namespace json = boost::json;

constexpr std::string_view kUsage = R"(Usage: vblk wash compare DIR DIR...

Sets the results in these folders side by side: machines, outcomes, and the
ratios of the comparisons that decide.
)";

struct Summary {
  std::string folder;
  json::object object;
};

std::string text(const json::object& object, std::string_view name) {
  const auto* const value = object.if_contains(name);
  if (value == nullptr) return "unknown";
  return value->is_string() ? json::value_to<std::string>(*value) : json::serialize(*value);
}

Expected<Summary> read_summary(const std::string& folder) {
  const std::string path = folder + "/summary.json";
  std::ifstream file(path);
  if (!file) {
    return make_error(kind_of_errno(errno),
                      fmt::format("cannot read '{}': {}", path, describe_errno(errno)));
  }
  const std::string whole{std::istreambuf_iterator<char>(file), {}};
  try {
    Summary summary{.folder = folder, .object = json::parse(whole).as_object()};
    if (summary.object.at("schema").to_number<int>() != 1)
      throw std::runtime_error("another version of vblk wrote it");
    static_cast<void>(summary.object.at("claims").as_array());
    static_cast<void>(summary.object.at("machine").as_object());
    return summary;
  } catch (const std::exception& exception) {
    return make_error(ErrorKind::kCorrupt, fmt::format("'{}': {}", path, exception.what()));
  }
}

void print_row(const std::string& name, const std::vector<std::string>& values) {
  constexpr std::size_t kWidthMax = 44;
  std::string row = fmt::format("{:<30}", name);
  for (const std::string& value : values)
    row += fmt::format("  {:<44}", value.substr(0, kWidthMax));
  row.erase(row.find_last_not_of(' ') + 1);
  fmt::print("{}\n", row);
}

const json::object* claim_of(const Summary& summary, const std::string& id) {
  for (const auto& claim : summary.object.at("claims").as_array()) {
    if (text(claim.as_object(), "id") == id) return &claim.as_object();
  }
  return nullptr;
}

// "metric cell comparison" of every cell that decides, with its ratio and verdict.
std::vector<std::pair<std::string, std::string>> deciding_cells(const json::object& claim) {
  std::vector<std::pair<std::string, std::string>> cells;
  for (const auto& comparison : claim.at("comparisons").as_array()) {
    if (!comparison.at("decides").as_bool()) continue;
    for (const auto& value : comparison.at("cells").as_array()) {
      const json::object& cell = value.as_object();
      std::string said = text(cell, "verdict");
      if (const auto* ratio = cell.if_contains("ratio")) {
        const auto& interval = cell.at("interval").as_array();
        said = fmt::format("{:.3f} ({:.3f} to {:.3f}) {}", ratio->to_number<double>(),
                           interval.at(0).to_number<double>(), interval.at(1).to_number<double>(),
                           said);
      }
      cells.emplace_back(fmt::format("  {} {} {}", text(comparison.as_object(), "aio"),
                                     text(cell, "cell"), text(cell, "metric")),
                         said);
    }
  }
  return cells;
}

void print_claim(const std::vector<Summary>& summaries, const std::string& id) {
  std::vector<std::string> outcomes;
  std::vector<std::string> names;
  std::vector<std::vector<std::pair<std::string, std::string>>> cells;
  for (const Summary& summary : summaries) {
    const json::object* const claim = claim_of(summary, id);
    outcomes.push_back(claim == nullptr ? "not there" : text(*claim, "outcome"));
    cells.emplace_back();
    if (claim != nullptr) cells.back() = deciding_cells(*claim);
    for (const auto& [name, said] : cells.back()) {
      if (std::ranges::find(names, name) == names.end()) names.push_back(name);
    }
  }
  print_row(id, outcomes);
  for (const std::string& name : names) {
    std::vector<std::string> row;
    for (const auto& of_one : cells) {
      const auto found =
          std::ranges::find(of_one, name, [](const auto& cell) { return cell.first; });
      row.push_back(found == of_one.end() ? "" : found->second);
    }
    fmt::print("{}\n", name);
    print_row("", row);
  }
}

void print_comparison(const std::vector<Summary>& summaries) {
  const auto row = [&summaries](const std::string& name, auto&& value) {
    std::vector<std::string> values;
    values.reserve(summaries.size());
    for (const Summary& summary : summaries) values.push_back(value(summary));
    print_row(name, values);
  };
  row("", [](const Summary& summary) { return summary.folder; });
  for (const char* name : {"preset", "label", "complete", "started", "analysis_sha256"})
    row(name, [name](const Summary& summary) { return text(summary.object, name); });
  for (const char* name : {"kernel", "processors", "memory", "file system", "block device"}) {
    row(name, [name](const Summary& summary) {
      return text(summary.object.at("machine").as_object(), name);
    });
  }
  fmt::print("\n");
  for (const auto& claim : summaries.front().object.at("claims").as_array())
    print_claim(summaries, text(claim.as_object(), "id"));
}

}  // namespace

int run_compare(std::span<char*> arguments) {
  const std::vector<std::string> words(arguments.begin() + 1, arguments.end());
  if (std::ranges::find(words, "--help") != words.end()) {
    fmt::print("{}", kUsage);
    return 0;
  }
  if (words.size() < 2) {
    fmt::print(stderr, "vblk: wash compare: name two folders or more\n");
    return 2;
  }
  std::vector<Summary> summaries;
  for (const std::string& word : words) {
    auto summary = read_summary(word);
    if (!summary) {
      fmt::print(stderr, "vblk: wash compare: {}\n", summary.error().message);
      return 1;
    }
    summaries.push_back(std::move(*summary));
  }
  try {
    print_comparison(summaries);
  } catch (const std::system_error&) {
    throw;  // of writing, not of what a summary says
  } catch (const std::exception& exception) {
    fmt::print(stderr, "vblk: wash compare: a summary is damaged: {}\n", exception.what());
    return 1;
  }
  return 0;
}

}  // namespace vblk::wash
