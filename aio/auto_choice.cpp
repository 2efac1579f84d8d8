#include "aio/auto_choice.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>
#include <string_view>
#include <utility>

#include <fmt/core.h>

namespace vblk::aio {

namespace {

// Better by less is no reason to change. Time decides first, so its margin is the smallest, and
// keeps the choice well within 5 % of the best.
constexpr double kTimeMargin = 0.03;
constexpr double kLatencyMargin = 0.05;
constexpr double kCpuMargin = 0.10;
// Up to so much more time per request counts as no difference when another question decides.
constexpr double kTimeTie = 0.01;
// Faster by more is far faster: surely, or in all of a few rounds; by much more, in all of fewer.
constexpr double kFarMargin = 0.10;
constexpr std::size_t kRoundsFar = 5;
constexpr double kVeryFarMargin = 0.50;
constexpr std::size_t kRoundsVeryFar = 2;
// Another load than at the beginning of the exploration, by size or depth: more than its edges blur
// and less than the width of a class.
constexpr double kSameLoadFactor = 3;
constexpr unsigned kEpochsLostMax = 3;
// A load on the edge of its class stays in it up to so far beyond.
constexpr double kEdge = 1.25;

double median_of(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

bool differs(double one, double other) {
  return one > other * kSameLoadFactor || other > one * kSameLoadFactor;
}

bool belongs_to(const LoadClass& load, const Epoch& epoch) {
  const auto is_in = [&load](double request_bytes, double depth) {
    return class_of_load(request_bytes, depth) == load;
  };
  const double bytes = epoch.request_bytes;
  const double depth = epoch.depth;
  return is_in(bytes, depth) || is_in(bytes, depth * kEdge) || is_in(bytes, depth / kEdge) ||
         is_in(bytes * kEdge, depth) || is_in(bytes / kEdge, depth);
}

}  // namespace

LoadClass class_of_load(double request_bytes, double depth) {
  LoadClass load;
  load.size = request_bytes <= 16 * 1024    ? SizeClass::kSmall
              : request_bytes <= 128 * 1024 ? SizeClass::kMedium
                                            : SizeClass::kLarge;
  load.depth = depth < 1.5 ? DepthClass::kOne : depth < 8 ? DepthClass::kFew : DepthClass::kMany;
  return load;
}

std::string to_string(LoadClass load) {
  constexpr std::array<std::string_view, 3> kSizes{"up to 16K", "up to 128K", "above 128K"};
  constexpr std::array<std::string_view, 3> kDepths{"one at a time", "a few in flight",
                                                    "8 and more in flight"};
  return fmt::format("{}, {}", kSizes[static_cast<std::size_t>(load.size)],
                     kDepths[static_cast<std::size_t>(load.depth)]);
}

AutoChoice::AutoChoice(std::vector<EngineName> candidates, EngineName start)
    : candidates_(std::move(candidates)), engine_(start) {
  assert(std::ranges::count(candidates_, start) == 1);
}

void AutoChoice::epoch_ended(const Epoch& epoch, Time now, bool may_explore) {
  if (exploration_) return explored_epoch(epoch, now);
  settled_epoch(epoch, now, may_explore);
}

// A class counts when two epochs in a row have seen it: one may have caught a change in the middle.
void AutoChoice::settled_epoch(const Epoch& epoch, Time now, bool may_explore) {
  may_explore = may_explore && candidates_.size() > 1 && now >= rest_until_;
  if (!class_ || !belongs_to(*class_, epoch)) {
    const LoadClass load = class_of_load(epoch.request_bytes, epoch.depth);
    if (std::exchange(seen_, load) != load) return;
    if (const auto known = known_.find(load); known != known_.end())
      return change_class(load, known->second);
    if (may_explore) begin(load, epoch);
    return;
  }
  seen_.reset();
  if (may_explore && now >= known_.at(*class_).next) begin(*class_, epoch);
}

void AutoChoice::change_class(LoadClass load, const Known& known) {
  class_ = load;
  seen_.reset();
  reason_ = fmt::format("{}: {}", to_string(load), known.why);
  if (std::exchange(engine_, known.engine) == engine_) return;
  news_ = fmt::format("{}: {}, as before: {}", to_string(load), to_string(engine_), known.why);
}

void AutoChoice::begin(LoadClass load, const Epoch& epoch) {
  exploration_ = {.load = load,
                  .candidates = {{.engine = engine_, .epochs = {}}},
                  .order = {},
                  .bytes_first = epoch.request_bytes,
                  .depth_first = epoch.depth};
  for (const EngineName engine : candidates_) {
    if (engine != engine_) exploration_->candidates.push_back({.engine = engine, .epochs = {}});
  }
  begin_round();
}

// Each round begins with another candidate.
void AutoChoice::begin_round() {
  Exploration& exploration = *exploration_;
  exploration.turn = 0;
  exploration.order.clear();
  for (std::size_t i = 0; i < exploration.candidates.size(); ++i) {
    if (!exploration.candidates[i].is_out) exploration.order.push_back(i);
  }
  std::ranges::rotate(exploration.order, exploration.order.begin() +
                                             static_cast<std::ptrdiff_t>(exploration.round %
                                                                         exploration.order.size()));
  engine_ = at_turn().engine;
}

AutoChoice::Candidate& AutoChoice::at_turn() {
  return exploration_->candidates[exploration_->order[exploration_->turn]];
}

// Judged by the present engine alone: how many requests are in flight depends on the engine, too.
bool AutoChoice::has_another_load(const Epoch& epoch) {
  return &at_turn() == &exploration_->candidates.front() &&
         (differs(epoch.request_bytes, exploration_->bytes_first) ||
          differs(epoch.depth, exploration_->depth_first));
}

void AutoChoice::explored_epoch(const Epoch& epoch, Time now) {
  Exploration& exploration = *exploration_;
  if (has_another_load(epoch)) return abandon();
  at_turn().epochs.push_back(epoch);
  if (++exploration.turn < exploration.order.size()) {
    engine_ = at_turn().engine;
    return;
  }
  ++exploration.round;
  crown_fastest();
  drop_slow_ones();
  if (is_decided()) return settle(decide(), now);
  begin_round();
}

void AutoChoice::epoch_lost(Time now) {
  if (!exploration_ || ++exploration_->lost <= kEpochsLostMax) return;
  abandon();
  rest_until_ = now + kAfterLoss;
}

// Back to where it was; what was learned of the class before, if anything, stays.
void AutoChoice::abandon() {
  engine_ = exploration_->candidates.front().engine;
  exploration_.reset();
  seen_.reset();
}

bool AutoChoice::Score::is_sure() const {
  const auto n = static_cast<double>(rounds);
  return static_cast<double>(wins) >= n / 2 + 1.5 * std::sqrt(n);
}

bool AutoChoice::Score::is_likely() const {
  const auto n = static_cast<double>(rounds);
  return static_cast<double>(wins) >= n / 2 + std::sqrt(n);
}

AutoChoice::Score AutoChoice::score(const Candidate& one, const Candidate& other,
                                    double Epoch::* cost, double factor) {
  Score score{.wins = 0, .rounds = std::min(one.epochs.size(), other.epochs.size())};
  for (std::size_t i = 0; i < score.rounds; ++i) {
    if (one.epochs[i].*cost < other.epochs[i].*cost * factor) ++score.wins;
  }
  return score;
}

double AutoChoice::median_ratio(const Candidate& one, const Candidate& other,
                                double Epoch::* cost) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < std::min(one.epochs.size(), other.epochs.size()); ++i)
    ratios.push_back(one.epochs[i].*cost / other.epochs[i].*cost);
  return median_of(std::move(ratios));
}

bool AutoChoice::is_better(const Candidate& one, const Candidate& other, double Epoch::* cost,
                           double margin) {
  return score(one, other, cost, 1).is_sure() && median_ratio(one, other, cost) <= 1 - margin;
}

bool AutoChoice::is_far_faster(const Candidate& one, const Candidate& other) {
  const Score far = score(one, other, &Epoch::time_ns, 1 / (1 + kFarMargin));
  const Score very_far = score(one, other, &Epoch::time_ns, 1 / (1 + kVeryFarMargin));
  return far.is_sure() || (far.wins == far.rounds && far.rounds >= kRoundsFar) ||
         (very_far.wins == very_far.rounds && very_far.rounds >= kRoundsVeryFar);
}

const AutoChoice::Candidate& AutoChoice::champion() const {
  return exploration_->candidates[exploration_->champion];
}

void AutoChoice::crown_fastest() {
  Exploration& exploration = *exploration_;
  std::optional<std::size_t> fastest;
  double least = 1;
  for (std::size_t i = 0; i < exploration.candidates.size(); ++i) {
    const Candidate& candidate = exploration.candidates[i];
    if (candidate.is_out || i == exploration.champion) continue;
    const double ratio = median_ratio(candidate, champion(), &Epoch::time_ns);
    if (ratio > least || !is_far_faster(candidate, champion())) continue;
    fastest = i;
    least = ratio;
  }
  if (!fastest) return;
  exploration.candidates[exploration.champion].is_out = true;
  exploration.champion = *fastest;
}

void AutoChoice::drop_slow_ones() {
  for (Candidate& candidate : exploration_->candidates) {
    if (&candidate != &champion()) candidate.is_out |= is_far_faster(champion(), candidate);
  }
}

bool AutoChoice::is_decided() const {
  if (exploration_->round >= kRoundsMax) return true;
  bool has_rivals = false;
  bool is_clear = true;
  for (const Candidate& candidate : exploration_->candidates) {
    if (&candidate == &champion() || candidate.is_out) continue;
    has_rivals = true;
    // In so many rounds it was not faster by the margin.
    const Score slower = score(champion(), candidate, &Epoch::time_ns, 1 / (1 - kTimeMargin));
    is_clear &=
        slower.is_likely() || is_better(candidate, champion(), &Epoch::time_ns, kTimeMargin);
  }
  return !has_rivals || (exploration_->round >= kRoundsMin && is_clear);
}

AutoChoice::Verdict AutoChoice::decide() const {
  struct Question {
    double Epoch::* cost;
    double margin;
    std::string_view answer;
  };
  constexpr std::array kQuestions{
      Question{&Epoch::time_ns, kTimeMargin, "least time per request"},
      Question{&Epoch::latency_ns, kLatencyMargin, "no more time than others, and least latency"},
      Question{&Epoch::cpu_ns, kCpuMargin, "no more time than others, and least processor time"}};
  for (const Question& question : kQuestions) {
    const Candidate* best = nullptr;
    double least = 1;
    for (const Candidate& candidate : exploration_->candidates) {
      if (&candidate == &champion() || candidate.is_out) continue;
      const bool is_tie =
          question.cost == &Epoch::time_ns ||
          !score(champion(), candidate, &Epoch::time_ns, 1 / (1 + kTimeTie)).is_likely();
      const double ratio = median_ratio(candidate, champion(), question.cost);
      if (!is_tie || ratio > least ||
          !is_better(candidate, champion(), question.cost, question.margin))
        continue;
      best = &candidate;
      least = ratio;
    }
    if (best != nullptr)
      return {best->engine, fmt::format("{}: {}", question.answer, costs(question.cost))};
  }
  const std::string_view answer =
      exploration_->champion == 0 ? "no other is better by a margin" : "least time per request";
  return {champion().engine, fmt::format("{}: {}", answer, costs(&Epoch::time_ns))};
}

// "threads 92.0 us, io_uring 43.1 us (-53 %)": against the engine that was in use.
std::string AutoChoice::costs(double Epoch::* cost) const {
  std::string text;
  const Candidate& first = exploration_->candidates.front();
  for (const Candidate& candidate : exploration_->candidates) {
    std::vector<double> values(candidate.epochs.size());
    std::ranges::transform(candidate.epochs, values.begin(), cost);
    text += fmt::format("{}{} {:.1f} us", text.empty() ? "" : ", ", to_string(candidate.engine),
                        median_of(values) / 1000);
    if (&candidate != &first)
      text += fmt::format(" ({:+.0f} %)", (median_ratio(candidate, first, cost) - 1) * 100);
  }
  return text;
}

void AutoChoice::settle(const Verdict& verdict, Time now) {
  const LoadClass load = exploration_->load;
  const EngineName before = exploration_->candidates.front().engine;
  const auto [known, is_first] = known_.try_emplace(load);
  const bool is_news = is_first || verdict.engine != before;
  known->second.interval =
      is_news ? kAgainMin : std::min<Time>(2 * known->second.interval, kAgainMax);
  known->second.next = now + known->second.interval;
  known->second.engine = verdict.engine;
  known->second.why = fmt::format("{} ({} rounds)", verdict.why, exploration_->round);
  engine_ = verdict.engine;
  class_ = load;
  seen_.reset();
  reason_ = fmt::format("{}: {}", to_string(load), known->second.why);
  if (is_news)
    news_ = fmt::format("{}: {}: {}", to_string(load), to_string(engine_), known->second.why);
  exploration_.reset();
}

std::string AutoChoice::take_news() { return std::exchange(news_, {}); }

std::vector<std::string> AutoChoice::report() const {
  std::vector<std::string> lines;
  lines.reserve(known_.size());
  for (const auto& [load, known] : known_)
    lines.push_back(fmt::format("{}: {}: {}", to_string(load), to_string(known.engine), known.why));
  return lines;
}

}  // namespace vblk::aio
