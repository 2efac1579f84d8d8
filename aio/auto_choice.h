// Which engine to use for one kind of operation, found by trying them under the load as it is.
//
// What costs least is asked in this order, and the next question only where the one before finds no
// difference:
//
//   1. time per request    where the load waits for the disk (a queue kept full), the faster one
//   2. latency             where requests come at their own times, the one that answers sooner
//   3. processor time      otherwise, the one that leaves more of it to the guest
//
// A load belongs to a class (size x depth). A choice is made for a class and remembered. In a class
// that is new, or was explored long ago, all candidates are tried:
//
//   settled --- class is new, or its time has come ---> exploring --- decided ---> settled
//      |                                                    |
//      +--- class is known: its choice at once              +--- load too thin ---> as it was
//
// Exploring goes in rounds, in each of which every candidate that is left gets one epoch; only
// epochs of one round are compared, so that what the machine does besides, or a load that drifts,
// falls on all alike. All are compared with one, the champion, at first the engine in use. What
// counts is in how many rounds a candidate was better: that needs no assumption about noise, and
// one bad epoch is one round. "Surely" below means so many of n rounds as chance alone gives once
// in a thousand, n/2 + 1.5 sqrt(n); "likely", n/2 + sqrt(n), once in forty.
//
//   faster than the champion by 10 %, surely     becomes the champion; that one is out
//   slower by 10 %, surely                       out
//   better, surely, and by the margin in half    chosen, at the end
//   not better by the margin, likely             nothing more to be learned of it
//
// The end is when nothing is left to be learned, or after kRoundsMax. Otherwise the champion is
// chosen: that, and the remembered classes, are the hysteresis.
//
// What exploring may cost: an engine twice as slow is tried for two epochs. And it is done again
// after 30 s, then ever more rarely, up to 10 minutes, while it changes nothing.
//
// No clock, no engine, no I/O: epochs come in, engines come out.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "aio/engine_name.h"

namespace vblk::aio {

enum class SizeClass : std::uint8_t { kSmall, kMedium, kLarge };  // to 16 KiB, to 128 KiB, above
enum class DepthClass : std::uint8_t { kOne, kFew, kMany };       // below 1.5, below 8, from there

struct LoadClass {
  SizeClass size{};
  DepthClass depth{};
  auto operator<=>(const LoadClass&) const = default;
};
[[nodiscard]] LoadClass class_of_load(double request_bytes, double depth);
[[nodiscard]] std::string to_string(LoadClass load);  // "up to 16K, one at a time"

// One stretch of time on one engine.
struct Epoch {
  std::uint64_t requests{0};  // completed; of this kind, as everything here
  double request_bytes{0};    // mean
  double depth{0};            // mean number in flight when one arrives, itself included
  double time_ns{0};          // per request: from one completion to the next
  double latency_ns{0};       // per request: from queue() to completion
  double cpu_ns{0};           // per request: of the whole process
};

class AutoChoice {
 public:
  using Time = std::chrono::nanoseconds;  // since any point, the same for all calls

  // `start` is one of the candidates, each of which is there once.
  AutoChoice(std::vector<EngineName> candidates, EngineName start);

  // The engine for the epoch that begins now.
  [[nodiscard]] EngineName engine() const { return engine_; }
  [[nodiscard]] bool is_exploring() const { return exploration_.has_value(); }
  // Whether an epoch that ends may begin to explore: one kind at a time does.
  void epoch_ended(const Epoch& epoch, Time now, bool may_explore);
  // The epoch that was to be tried came to nothing: requests are too rare, or there was a pause.
  void epoch_lost(Time now);

  // What has been decided since the last call, for the log; empty if nothing.
  [[nodiscard]] std::string take_news();
  // Why the present engine, in one line.
  [[nodiscard]] const std::string& reason() const { return reason_; }
  // What has been learned, one line per class.
  [[nodiscard]] std::vector<std::string> report() const;

  static constexpr unsigned kRoundsMin = 9;
  static constexpr unsigned kRoundsMax = 40;

 private:
  struct Known {
    EngineName engine;
    std::string why;
    Time next;  // exploration
    Time interval{kAgainMin};
  };
  struct Candidate {
    EngineName engine;
    std::vector<Epoch> epochs;  // one per round; as many as rounds while it is in
    bool is_out{false};
  };
  struct Exploration {
    LoadClass load;
    std::vector<Candidate> candidates;  // the engine in use first
    std::size_t champion{0};
    std::vector<std::size_t> order;  // of this round: those that are in
    std::size_t turn{0};             // in that order
    unsigned round{0};
    unsigned lost{0};
    double bytes_first{0};
    double depth_first{0};
  };
  struct Verdict {
    EngineName engine;
    std::string why;
  };

  void settled_epoch(const Epoch& epoch, Time now, bool may_explore);
  void change_class(LoadClass load, const Known& known);
  void begin(LoadClass load, const Epoch& epoch);
  void begin_round();
  void explored_epoch(const Epoch& epoch, Time now);
  void abandon();
  [[nodiscard]] Candidate& at_turn();
  [[nodiscard]] bool has_another_load(const Epoch& epoch);
  // In how many of `rounds`, in which both were in, `one` was below `factor` times the other.
  struct Score {
    std::size_t wins;
    std::size_t rounds;
    [[nodiscard]] bool is_sure() const;
    [[nodiscard]] bool is_likely() const;
  };
  static Score score(const Candidate& one, const Candidate& other, double Epoch::* cost,
                     double factor);
  static double median_ratio(const Candidate& one, const Candidate& other, double Epoch::* cost);
  static bool is_better(const Candidate& one, const Candidate& other, double Epoch::* cost,
                        double margin);
  static bool is_far_faster(const Candidate& one, const Candidate& other);
  [[nodiscard]] const Candidate& champion() const;
  void crown_fastest();
  void drop_slow_ones();
  [[nodiscard]] bool is_decided() const;
  [[nodiscard]] Verdict decide() const;
  [[nodiscard]] std::string costs(double Epoch::* cost) const;
  void settle(const Verdict& verdict, Time now);

  static constexpr Time kAgainMin = std::chrono::seconds(30);
  static constexpr Time kAgainMax = std::chrono::minutes(10);
  static constexpr Time kAfterLoss = std::chrono::seconds(5);

  std::vector<EngineName> candidates_;
  EngineName engine_;
  std::optional<LoadClass> class_;  // that `engine_` was chosen for
  std::optional<LoadClass> seen_;   // another one, in the last epoch
  std::map<LoadClass, Known> known_;
  std::optional<Exploration> exploration_;
  Time rest_until_{0};  // no exploration before
  std::string reason_{"no load has been seen yet"};
  std::string news_;
};

}  // namespace vblk::aio
