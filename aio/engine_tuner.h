// Measures the load on the engines of one I/O thread, for the kinds of operation that are left to
// vblk, and has an AutoChoice for each of them.
//
// While a kind is settled, its load is looked at now and then: one clock reading for 32
// completions. While it explores, which one kind does at a time, the clock is read when something
// was queued or completed, for the time that requests were in flight (Little: its integral is the
// sum of the latencies).
//
//   flip to a candidate   requests of the one before complete, and as many again: not counted
//   epoch                 at least kEpochTime and kEpochRequests
//   lost                  longer than kEpochTimeMax: the load is too thin, or has stopped
//
// Thread: the owner of the engines. Processor time is the whole process's: workers and the kernel's
// own threads for it are in it, and what other I/O threads do meanwhile is the same for all
// candidates.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "aio/auto_choice.h"
#include "aio/engine.h"
#include "aio/engine_name.h"

namespace vblk::aio {

class EngineTuner {
 public:
  // Leaves `kind` to a choice among `candidates`, from `start` on. One that it has already stays.
  void take(IoKind kind, std::vector<EngineName> candidates, EngineName start);
  void leave(IoKind kind);
  [[nodiscard]] bool has_any() const;
  [[nodiscard]] bool is_exploring() const { return trial_.has_value(); }

  // To be called before queued requests are submitted, and after `count` were completed. `engines`
  // are all that carry out requests; none leaves while a kind is left to a choice. True:
  // engine_of() or reason_of() may have changed.
  void before_submit(std::span<const std::unique_ptr<Engine>> engines) {
    if (trial_) sample(engines);
  }
  [[nodiscard]] bool after_reap(std::span<const std::unique_ptr<Engine>> engines,
                                std::size_t count) {
    completions_ += count;
    if (count == 0 || (!trial_ && completions_ < kCompletionsPerLook)) return false;
    completions_ = 0;
    return look(engines);
  }

  // Of a kind that it was given.
  [[nodiscard]] EngineName engine_of(IoKind kind) const { return choice(kind).engine(); }
  [[nodiscard]] const std::string& reason_of(IoKind kind) const { return choice(kind).reason(); }
  [[nodiscard]] std::vector<std::string> report_of(IoKind kind) const {
    return choice(kind).report();
  }
  // Decisions since the last call, for the log.
  [[nodiscard]] std::vector<std::string> take_news();

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::size_t kCompletionsPerLook = 32;

  using Engines = std::span<const std::unique_ptr<Engine>>;
  struct Tuned {
    AutoChoice choice;
    KindStatistics begin;  // of the look at a settled load
    Clock::time_point begin_time;
  };
  // Of the one kind that explores.
  struct Trial {
    IoKind kind;
    bool is_counting{false};              // the epoch has begun
    std::uint64_t completed_at_begin{0};  // that long the old engine's requests are about
    KindStatistics begin;                 // of the epoch, or of what comes before
    Clock::time_point begin_time;
    std::chrono::nanoseconds begin_cpu_time{0};
    KindStatistics last;  // sample
    Clock::time_point last_time;
    double in_flight_ns{0};
  };

  [[nodiscard]] const AutoChoice& choice(IoKind kind) const {
    return tuned_[static_cast<std::size_t>(kind)]->choice;
  }
  [[nodiscard]] static KindStatistics sum(Engines engines, IoKind kind);
  void sample(Engines engines);
  void take_sample(const KindStatistics& now_counts, Clock::time_point now);
  bool look(Engines engines);
  bool look_at_trial(Engines engines, Clock::time_point now);
  bool look_at_settled(Engines engines, Clock::time_point now);
  void begin_look(IoKind kind, Engines engines, Clock::time_point now);
  void begin_turn(Engines engines, Clock::time_point now);
  void begin_epoch(Clock::time_point now);

  std::array<std::optional<Tuned>, kIoKindCount> tuned_;
  std::optional<Trial> trial_;
  std::size_t completions_{0};
};

}  // namespace vblk::aio
