#include "aio/engine_tuner.h"

#include <time.h>
#include <utility>

#include <fmt/core.h>

namespace vblk::aio {

namespace {

using namespace std::chrono_literals;

// Long enough for the loop and the pool to find their pace, and for some thousand requests of a
// fast disk; short enough for a dozen rounds within seconds.
constexpr auto kEpochTime = 40ms;
constexpr std::uint64_t kEpochRequests = 16;
constexpr auto kEpochTimeMax = 1500ms;
// Of a settled load: a class that has changed is seen in two looks.
constexpr auto kLookTime = 100ms;
constexpr std::uint64_t kLookRequests = 32;
constexpr auto kLookTimeMax = 2s;
// After a change of the engine, beyond what was in flight: so that the new one has begun.
constexpr std::uint64_t kWarmUpRequests = 4;

std::chrono::nanoseconds cpu_time_of_process() {
  timespec time{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

double ns(std::chrono::nanoseconds time) { return static_cast<double>(time.count()); }

// Without the costs.
Epoch epoch_between(const KindStatistics& begin, const KindStatistics& end, IoKind kind) {
  const auto queued = static_cast<double>(end.queued - begin.queued);
  Epoch epoch{.requests = end.completed - begin.completed};
  if (queued == 0) return epoch;
  if (kind != IoKind::kFlush)
    epoch.request_bytes = static_cast<double>(end.queued_bytes - begin.queued_bytes) / queued;
  epoch.depth = static_cast<double>(end.depth_sum - begin.depth_sum) / queued;
  return epoch;
}

}  // namespace

void EngineTuner::take(IoKind kind, std::vector<EngineName> candidates, EngineName start) {
  auto& tuned = tuned_[static_cast<std::size_t>(kind)];
  if (!tuned)
    tuned =
        Tuned{.choice = AutoChoice(std::move(candidates), start), .begin = {}, .begin_time = {}};
}

void EngineTuner::leave(IoKind kind) {
  tuned_[static_cast<std::size_t>(kind)].reset();
  if (trial_ && trial_->kind == kind) trial_.reset();
}

KindStatistics EngineTuner::sum(Engines engines, IoKind kind) {
  KindStatistics all;
  for (const auto& engine : engines) {
    const KindStatistics& one = engine->statistics_of(kind);
    all.queued += one.queued;
    all.completed += one.completed;
    all.queued_bytes += one.queued_bytes;
    all.depth_sum += one.depth_sum;
  }
  return all;
}

void EngineTuner::sample(Engines engines) {
  const KindStatistics counts = sum(engines, trial_->kind);
  if (counts.queued != trial_->last.queued) take_sample(counts, Clock::now());
}

void EngineTuner::take_sample(const KindStatistics& counts, Clock::time_point now) {
  Trial& trial = *trial_;
  const auto in_flight = static_cast<double>(trial.last.queued - trial.last.completed);
  trial.in_flight_ns += in_flight * ns(now - trial.last_time);
  trial.last = counts;
  trial.last_time = now;
}

bool EngineTuner::look(Engines engines) {
  const auto now = Clock::now();
  const bool trial_changed = trial_ && look_at_trial(engines, now);
  return look_at_settled(engines, now) || trial_changed;
}

bool EngineTuner::look_at_trial(Engines engines, Clock::time_point now) {
  const Trial& trial = *trial_;
  AutoChoice& choice = tuned_[static_cast<std::size_t>(trial.kind)]->choice;
  take_sample(sum(engines, trial.kind), now);
  const auto time = now - trial.begin_time;
  if (time > kEpochTimeMax) {
    choice.epoch_lost(now.time_since_epoch());
  } else if (!trial.is_counting) {
    if (trial.last.completed >= trial.completed_at_begin) begin_epoch(now);
    return false;
  } else {
    Epoch epoch = epoch_between(trial.begin, trial.last, trial.kind);
    if (time < kEpochTime || epoch.requests < kEpochRequests) return false;
    const auto requests = static_cast<double>(epoch.requests);
    epoch.time_ns = ns(time) / requests;
    epoch.latency_ns = trial.in_flight_ns / requests;
    epoch.cpu_ns = ns(cpu_time_of_process() - trial.begin_cpu_time) / requests;
    choice.epoch_ended(epoch, now.time_since_epoch(), true);
  }
  if (choice.is_exploring()) {
    begin_turn(engines, now);
  } else {
    const IoKind kind = trial.kind;
    trial_.reset();
    begin_look(kind, engines, now);
  }
  return true;
}

bool EngineTuner::look_at_settled(Engines engines, Clock::time_point now) {
  bool changed = false;
  for (std::size_t i = 0; i < tuned_.size(); ++i) {
    const auto kind = static_cast<IoKind>(i);
    if (!tuned_[i] || (trial_ && trial_->kind == kind)) continue;
    Tuned& tuned = *tuned_[i];
    const auto time = now - tuned.begin_time;
    if (time < kLookTime) continue;
    const Epoch epoch = epoch_between(tuned.begin, sum(engines, kind), kind);
    if (time > kLookTimeMax) {
      begin_look(kind, engines, now);
      continue;
    }
    if (epoch.requests < kLookRequests) continue;
    const EngineName before = tuned.choice.engine();
    tuned.choice.epoch_ended(epoch, now.time_since_epoch(), !trial_);
    changed |= tuned.choice.engine() != before || tuned.choice.is_exploring();
    begin_look(kind, engines, now);
    if (!tuned.choice.is_exploring()) continue;
    trial_ = Trial{.kind = kind, .begin = {}, .begin_time = {}, .last = {}, .last_time = {}};
    begin_turn(engines, now);
  }
  return changed;
}

void EngineTuner::begin_look(IoKind kind, Engines engines, Clock::time_point now) {
  Tuned& tuned = *tuned_[static_cast<std::size_t>(kind)];
  tuned.begin = sum(engines, kind);
  tuned.begin_time = now;
}

// What is in flight is the last engine's; as much again is this one's way to its pace.
void EngineTuner::begin_turn(Engines engines, Clock::time_point now) {
  Trial& trial = *trial_;
  trial.last = sum(engines, trial.kind);
  trial.last_time = now;
  trial.begin_time = now;
  trial.is_counting = false;
  const std::uint64_t in_flight = trial.last.queued - trial.last.completed;
  trial.completed_at_begin = trial.last.completed + 2 * in_flight + kWarmUpRequests;
}

void EngineTuner::begin_epoch(Clock::time_point now) {
  Trial& trial = *trial_;
  trial.is_counting = true;
  trial.begin = trial.last;
  trial.begin_time = now;
  trial.begin_cpu_time = cpu_time_of_process();
  trial.in_flight_ns = 0;
}

std::vector<std::string> EngineTuner::take_news() {
  std::vector<std::string> news;
  for (std::size_t i = 0; i < tuned_.size(); ++i) {
    if (!tuned_[i]) continue;
    std::string text = tuned_[i]->choice.take_news();
    if (!text.empty())
      news.push_back(fmt::format("{} {}", to_string(static_cast<IoKind>(i)), text));
  }
  return news;
}

}  // namespace vblk::aio
