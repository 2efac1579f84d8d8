// Reads lines of numbers from the standard input and prints what blockdev/wash/statistics.h makes
// of each, for a script that asks R the same. First word: estimate, margin, holm or line.
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include <fmt/core.h>

#include "blockdev/wash/statistics.h"

namespace {

using namespace vblk::wash;

std::vector<double> numbers(std::istream& words) {
  std::vector<double> values;
  for (double value = 0; words >> value;) values.push_back(value);
  return values;
}

void answer(const std::string& what, std::istream& words) {
  constexpr double kAlpha = 0.05;
  double margin = 0;
  if (what == "margin") words >> margin;
  const auto values = numbers(words);
  if (what == "estimate") {
    const auto result = estimate(values, kAlpha);
    fmt::print("{:.12g} {:.12g} {:.12g} {:.12g}\n", result.mean, result.standard_deviation,
               result.lower, result.upper);
  } else if (what == "margin") {
    const auto tests = test_margin(values, margin);
    fmt::print("{:.12g} {:.12g} {:.12g} {:.12g} {:.12g}\n", tests.equivalent, tests.above,
               tests.below, tests.not_above, tests.not_below);
  } else if (what == "holm") {
    for (const double adjusted : holm(values)) fmt::print("{:.12g} ", adjusted);
    fmt::print("\n");
  } else if (what == "bootstrap") {
    const auto interval = bootstrap(values, kAlpha, 1);
    fmt::print("{:.12g} {:.12g}\n", interval->lower, interval->upper);
  } else if (what == "blocks") {
    // Standard deviation, margin, power.
    fmt::print("{}\n", blocks_for_wash(values.at(0), values.at(1), kAlpha, values.at(2)));
  } else if (what == "line") {
    const std::size_t half = values.size() / 2;
    const auto line = fit_line(std::span(values).first(half), std::span(values).last(half), kAlpha);
    fmt::print("{:.12g} {:.12g} {:.12g} {:.12g} {:.12g}\n", line->intercept, line->slope,
               line->slope_lower, line->slope_upper, line->r_squared);
  }
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string what;
    words >> what;
    answer(what, words);
  }
}
