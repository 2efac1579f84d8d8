#include "blockdev/wash/statistics.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include <boost/math/distributions/normal.hpp>
#include <boost/math/distributions/students_t.hpp>

namespace vblk::wash {

namespace {

using boost::math::cdf;
using boost::math::complement;
using boost::math::quantile;
using boost::math::students_t;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::size_t kResamples = 4000;

double mean_of(std::span<const double> samples) {
  return std::accumulate(samples.begin(), samples.end(), 0.0) / static_cast<double>(samples.size());
}

double deviation_of(std::span<const double> samples, double mean) {
  double sum = 0;
  for (const double sample : samples) sum += (sample - mean) * (sample - mean);
  return std::sqrt(sum / static_cast<double>(samples.size() - 1));
}

double standard_error_of(std::span<const double> samples, double mean) {
  return deviation_of(samples, mean) / std::sqrt(static_cast<double>(samples.size()));
}

// Of "the mean is at most `bound`". Samples that are all alike leave no doubt, unless at the bound.
double p_above(double mean, double standard_error, double bound, double degrees) {
  if (standard_error == 0) return mean > bound ? 0 : 1;
  return cdf(complement(students_t(degrees), (mean - bound) / standard_error));
}

}  // namespace

Estimate estimate(std::span<const double> samples, double alpha) {
  Estimate result{.count = samples.size()};
  if (samples.empty()) return {.lower = -kInfinity, .upper = kInfinity};
  result.mean = mean_of(samples);
  result.lower = -kInfinity;
  result.upper = kInfinity;
  if (samples.size() < 2) return result;
  result.standard_deviation = deviation_of(samples, result.mean);
  const auto degrees = static_cast<double>(samples.size() - 1);
  const double half =
      quantile(complement(students_t(degrees), alpha)) * standard_error_of(samples, result.mean);
  result.lower = result.mean - half;
  result.upper = result.mean + half;
  return result;
}

MarginTests test_margin(std::span<const double> samples, double margin) {
  assert(margin > 0);
  if (samples.size() < 2) return {};
  const double mean = mean_of(samples);
  const double error = standard_error_of(samples, mean);
  const auto degrees = static_cast<double>(samples.size() - 1);
  const double p_within_upper = p_above(-mean, error, -margin, degrees);
  const double p_within_lower = p_above(mean, error, -margin, degrees);
  return {.equivalent = std::max(p_within_upper, p_within_lower),
          .not_above = p_within_upper,
          .not_below = p_within_lower,
          .above = p_above(mean, error, margin, degrees),
          .below = p_above(-mean, error, margin, degrees)};
}

std::vector<double> holm(std::span<const double> p_values) {
  std::vector<std::size_t> order(p_values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  // Equal ones come out equal in any order: the larger factor comes first.
  std::ranges::sort(order, {}, [p_values](std::size_t i) { return p_values[i]; });
  std::vector<double> adjusted(p_values.size());
  double highest = 0;
  for (std::size_t rank = 0; rank < order.size(); ++rank) {
    const auto left = static_cast<double>(order.size() - rank);
    highest = std::max(highest, std::min(1.0, left * p_values[order[rank]]));
    adjusted[order[rank]] = highest;
  }
  return adjusted;
}

std::vector<CellDecision> decide(std::span<const std::vector<double>> cells, double margin,
                                 double alpha, Sides sides) {
  return decide(cells, std::vector<double>(cells.size(), margin), alpha, sides);
}

std::vector<CellDecision> decide(std::span<const std::vector<double>> cells,
                                 std::span<const double> margins, double alpha, Sides sides) {
  assert(cells.size() == margins.size());
  std::vector<double> equivalences;
  std::vector<double> not_above;
  std::vector<double> not_below;
  std::vector<double> differences;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    const MarginTests tests = test_margin(cells[i], margins[i]);
    equivalences.push_back(tests.equivalent);
    not_above.push_back(tests.not_above);
    not_below.push_back(tests.not_below);
    if (sides != Sides::kBelow) differences.push_back(tests.above);
    if (sides != Sides::kAbove) differences.push_back(tests.below);
  }
  equivalences = holm(equivalences);
  not_above = holm(not_above);
  not_below = holm(not_below);
  differences = holm(differences);
  std::vector<CellDecision> decisions;
  auto difference = differences.begin();
  for (const double equivalence : equivalences) {
    const std::size_t i = decisions.size();
    CellDecision decision{
        .p_equivalent = equivalence, .p_not_above = not_above[i], .p_not_below = not_below[i]};
    if (sides != Sides::kBelow) decision.p_above = *difference++;
    if (sides != Sides::kAbove) decision.p_below = *difference++;
    if (decision.p_equivalent <= alpha) {
      decision.direction = Direction::kEquivalent;
    } else if (decision.p_above <= alpha) {
      decision.direction = Direction::kAbove;
    } else if (decision.p_below <= alpha) {
      decision.direction = Direction::kBelow;
    }
    decisions.push_back(decision);
  }
  return decisions;
}

std::optional<BootstrapInterval> bootstrap(std::span<const double> samples, double alpha,
                                           std::uint64_t seed) {
  const std::size_t count = samples.size();
  if (count < 3) return std::nullopt;
  const double mean = mean_of(samples);
  if (deviation_of(samples, mean) == 0) return std::nullopt;
  std::mt19937_64 random(seed);
  std::vector<double> means(kResamples);
  for (double& resampled : means) {
    double sum = 0;
    for (std::size_t i = 0; i < count; ++i) sum += samples[random() % count];
    resampled = sum / static_cast<double>(count);
  }
  std::ranges::sort(means);
  const boost::math::normal normal;
  // How far the resampled means lie to one side of the mean: the bias. Ties count half.
  const auto below = std::ranges::lower_bound(means, mean) - means.begin();
  const auto up_to = std::ranges::upper_bound(means, mean) - means.begin();
  const double share = std::clamp(static_cast<double>(below + up_to) / 2 / kResamples,
                                  0.5 / kResamples, 1 - 0.5 / kResamples);
  const double bias = quantile(normal, share);
  // The acceleration, by leaving out one sample each: a mean's skewness.
  double cubes = 0;
  double squares = 0;
  for (const double sample : samples) {
    const double influence = sample - mean;  // of the jackknife, up to a factor that cancels
    cubes += influence * influence * influence;
    squares += influence * influence;
  }
  const double acceleration = cubes / (6 * std::pow(squares, 1.5));
  const auto bound = [&](double probability) {
    const double z = bias + quantile(normal, probability);
    const double adjusted = cdf(normal, bias + z / (1 - acceleration * z));
    const auto index = static_cast<std::size_t>(std::lround(adjusted * (kResamples - 1)));
    return means[std::min(index, kResamples - 1)];
  };
  return BootstrapInterval{.lower = bound(alpha), .upper = bound(1 - alpha)};
}

std::optional<Line> fit_line(std::span<const double> x, std::span<const double> y, double alpha) {
  assert(x.size() == y.size());
  if (x.size() < 3) return std::nullopt;
  const double x_mean = mean_of(x);
  const double y_mean = mean_of(y);
  double xx = 0;
  double xy = 0;
  double yy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    xx += (x[i] - x_mean) * (x[i] - x_mean);
    xy += (x[i] - x_mean) * (y[i] - y_mean);
    yy += (y[i] - y_mean) * (y[i] - y_mean);
  }
  if (xx == 0) return std::nullopt;
  Line line{.count = x.size(), .slope = xy / xx};
  line.intercept = y_mean - line.slope * x_mean;
  const double residual = std::max(0.0, yy - line.slope * xy);
  line.r_squared = yy == 0 ? 1 : 1 - residual / yy;
  const auto degrees = static_cast<double>(x.size() - 2);
  const double half =
      quantile(complement(students_t(degrees), alpha)) * std::sqrt(residual / degrees / xx);
  line.slope_lower = line.slope - half;
  line.slope_upper = line.slope + half;
  return line;
}

std::size_t blocks_for_wash(double standard_deviation, double margin, double alpha, double power) {
  constexpr std::size_t kMost = 1'000'000;
  for (std::size_t count = 2; count < kMost; count += 1 + count / 100) {
    const students_t t(static_cast<double>(count - 1));
    const double reach = quantile(complement(t, alpha)) + quantile(complement(t, (1 - power) / 2));
    if (reach * standard_deviation / std::sqrt(static_cast<double>(count)) <= margin) return count;
  }
  return kMost;
}

}  // namespace vblk::wash
