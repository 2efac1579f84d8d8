// What a handful of paired measurements says, and how sure that is. Pure arithmetic.
//
// Both arms of a comparison run in each block; what is kept of a block is the logarithm of the
// ratio of their metrics. A drift of the machine changes both and leaves the ratio. Of these d_1 ..
// d_n:
//
//   the interval        mean +- t * sd / sqrt(n), two-sided at 1 - 2 alpha (alpha 0.05: 90 %)
//   equivalent (WASH)   both one-sided t tests reject "the mean lies outside the margin": TOST
//                       (Schuirmann 1987). Not finding a difference is no sign that there is none.
//   a win               the one-sided t test rejects "the mean is within the margin, or beyond it
//   on
//                       the other side": a difference that is sure, and too small to matter, is
//                       none.
//   Holm                the p values of a family of cells are raised so that the chance of any
//   wrong
//                       verdict in the family stays below alpha (Holm 1979)
//
// Student's t distribution is Boost.Math's. tests/wash checks all of it against R.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace vblk::wash {

// A mean and its two-sided interval.
struct Estimate {
  std::size_t count{0};
  double mean{0};
  double standard_deviation{0};
  double lower{0};
  double upper{0};
};
// At confidence 1 - 2 alpha. With fewer than two samples the interval is everything.
[[nodiscard]] Estimate estimate(std::span<const double> samples, double alpha);

// p values of the one-sided questions that a margin asks. All 1 with fewer than two samples.
struct MarginTests {
  double equivalent{1};  // TOST: of "not within +-margin"
  double not_above{1};   // its two halves: of "beyond +margin"
  double not_below{1};   // and "beyond -margin"
  double above{1};       // of "not beyond +margin"
  double below{1};       // of "not beyond -margin"
};
// `margin` > 0, in the samples' unit.
[[nodiscard]] MarginTests test_margin(std::span<const double> samples, double margin);

// Adjusted p values in the order of `p_values`.
[[nodiscard]] std::vector<double> holm(std::span<const double> p_values);

enum class Direction : std::uint8_t { kEquivalent, kAbove, kBelow, kUnknown };

// Which differences are asked about: one side alone where it is known beforehand which one it is.
enum class Sides : std::uint8_t { kBoth, kAbove, kBelow };

// One family: for each cell of samples what can be said at `alpha`, Holm's adjustment included. The
// equivalences are one family; the differences are another, of a hypothesis for each cell and side;
// and the two halves of an equivalence, by themselves, are one each.
// A side that is not asked about has p = 1.
struct CellDecision {
  Direction direction{Direction::kUnknown};
  double p_equivalent{1};  // adjusted
  double p_not_above{1};
  double p_not_below{1};
  double p_above{1};
  double p_below{1};
};
[[nodiscard]] std::vector<CellDecision> decide(std::span<const std::vector<double>> cells,
                                               std::span<const double> margins, double alpha,
                                               Sides sides = Sides::kBoth);
// With one margin for all.
[[nodiscard]] std::vector<CellDecision> decide(std::span<const std::vector<double>> cells,
                                               double margin, double alpha,
                                               Sides sides = Sides::kBoth);

// BCa bootstrap interval of the mean at confidence 1 - 2 alpha (Efron 1987): the check on the t
// interval where samples are not normal. Deterministic in `seed`. Nothing with fewer than three
// samples, or where all are alike.
struct BootstrapInterval {
  double lower{0};
  double upper{0};
};
[[nodiscard]] std::optional<BootstrapInterval> bootstrap(std::span<const double> samples,
                                                         double alpha, std::uint64_t seed);

// Ordinary least squares of y on x, with the slope's two-sided interval at 1 - 2 alpha.
struct Line {
  std::size_t count{0};
  double intercept{0};
  double slope{0};
  double slope_lower{0};
  double slope_upper{0};
  double r_squared{0};
};
// Requires as many x as y. Nothing with fewer than three points, or where all x are alike.
[[nodiscard]] std::optional<Line> fit_line(std::span<const double> x, std::span<const double> y,
                                           double alpha);

// Blocks that would have had to be run for a wash to be provable with `power`, if the true ratio is
// 1 and pairs differ by `standard_deviation`. The usual approximation by t quantiles.
[[nodiscard]] std::size_t blocks_for_wash(double standard_deviation, double margin, double alpha,
                                          double power);

}  // namespace vblk::wash
