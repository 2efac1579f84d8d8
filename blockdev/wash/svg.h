// Plots as SVG that lives in a page: colours are the page's, so that light, dark and print follow.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace vblk::wash {

struct ForestRow {
  std::string label;
  std::string value;          // written at the right end
  std::string verdict_class;  // of the page's style sheet
  double middle{0};           // natural logarithms of ratios
  double lower{0};
  double upper{0};
  double margin{0};
};
// Ratios with their intervals, one below the other, with the margin as a band behind each.
// `left` and `right` say what the sides mean.
[[nodiscard]] std::string forest_plot(const std::vector<ForestRow>& rows, const std::string& left,
                                      const std::string& right);

struct Series {
  std::string label;
  std::vector<std::pair<double, double>> points;
  bool is_line{true};  // otherwise single dots
  bool is_dashed{false};
};
struct Axis {
  std::string label;
  bool is_logarithmic{false};
  // Where marks are, and what they say; empty: chosen.
  std::vector<std::pair<double, std::string>> marks;
};
struct Chart {
  Axis x;
  Axis y;
  std::vector<Series> series;
  std::optional<std::pair<double, std::string>> vertical;  // a line with its name
};
// Empty where there is nothing to draw.
[[nodiscard]] std::string chart(const Chart& chart);

}  // namespace vblk::wash
