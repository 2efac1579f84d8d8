// What is measured and how it is decided, read from analysis.json, which is compiled in: claims,
// cells, arms, margins, presets, rules. No other file of vblk wash knows a number of these.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "aio/engine_options.h"
#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/image.h"

namespace vblk::wash {

// What is done with the image before each run (settle.h).
struct BeforeRun {
  bool sync{false};
  bool drop_cache{false};
};

struct Rules {
  double alpha{0};
  std::map<std::string, double> margins;  // by metric, as parts: 0.05
  unsigned samples_behind_quantile_min{0};
  double blocks_share_min{0};  // of a cell's blocks, for it to count as measured
  double wash_share_min{0};    // of a claim's cells, for WASH
  double win_share_min{0};     // and to win
  BeforeRun before_run;
  double steal_max{0};    // of a block's processor time, for it not to be noisy
  double foreign_max{0};  // the same of what other processes use
  double crossover_core_share{0};
  double crossover_low{0};  // operations per second
  double crossover_high{0};
  double crossover_r_squared_min{0};
  double dominance_holds_from{0};
  double dominance_refuted_below{0};
  double gain_factor_min{0};
  double gain_margin{0};
};

struct Preset {
  std::string name;
  std::string label;  // what a result of it may be called
  unsigned rounds{0};
  std::chrono::milliseconds run_time{0};
  std::chrono::milliseconds ramp_time{0};
  std::chrono::milliseconds idle_time{0};  // before a burst
  std::uint64_t region_bytes{0};           // of the image that is used
  std::uint64_t ram_bytes{0};
  double slowdown{0};         // of a request's processor time, injected
  unsigned reruns_max{0};     // of a block that is noisy
  double noisy_share_max{0};  // of all blocks, for verdicts
};

enum class Server : std::uint8_t { kNone, kVblk, kPeer };
// What is called to make something durable, for the "range" family.
enum class SyncCall : std::uint8_t { kNone, kRange, kWhole, kMsync };

struct Arm {
  std::string name;
  std::string what;
  aio::EngineName engine{aio::EngineName::kThreads};
  aio::EngineOptions options;
  bool slowed{false};
  std::optional<blockdev::CacheMode> cache;  // instead of the family's
  // Write-behind: nothing said, none, or who calls sync_file_range.
  enum class Behind : std::uint8_t { kNone, kInline, kThreads, kIoUring } behind{Behind::kNone};
  SyncCall sync{SyncCall::kNone};
  Server server{Server::kNone};
};

enum class Kind : std::uint8_t { kLoad, kBurst, kStream, kWake, kCalls, kRange, kServe };

// A setting: name and value, such as "iodepth" and "32", in the order of the file.
using Levels = std::vector<std::pair<std::string, std::string>>;

struct Family {
  std::string id;
  std::string what;
  Kind kind{Kind::kLoad};
  std::vector<std::string> devices;  // "image", "ram", "files", "none"
  blockdev::CacheMode cache{blockdev::CacheMode::kNone};
  bool starts_hot{false};  // a run begins with its part of the image in the page cache
  bool share_flushes{true};
  unsigned run_times{1};  // a run is so many times the preset's
  Levels workload;        // the same in all cells
  std::vector<std::string> arms;
  // By preset; a family that a preset does not have is not there. Each name with its values.
  std::map<std::string, std::vector<std::pair<std::string, std::vector<std::string>>>> levels;
};

// What the sides must be in themselves, each by a metric, for sure: their geometric means over the
// blocks. What is not said is not asked.
struct Level {
  std::optional<double> aio_above;
  std::optional<double> aio_below;
  // And what is as much as the AIO side's, or above `aio_above`, refutes it.
  std::optional<double> threads_at_most;
};

// What a comparison must come to for its claim to hold.
enum class Expectation : std::uint8_t {
  kWash,
  kAioWins,
  kThreadsWin,
  kNoWorse,  // the AIO side is not worse by more than the margin
  kLevel     // the levels are as they are said to be
};

struct Comparison {
  std::string name;
  std::vector<std::string> families;
  std::map<std::string, std::vector<std::string>> where;  // level: values that are meant; none: all
  std::string aio;                                        // arms
  std::string threads;
  std::vector<std::string> metrics;
  bool decides{false};  // whether the claim hangs on it
  // Of one that decides; the claim's, where it says nothing itself.
  Expectation expects{Expectation::kWash};
  bool needs_all{true};                   // in each metric, or in any
  std::map<std::string, double> margins;  // by metric, as parts, instead of the rules'
  std::map<std::string, Level> levels;    // by metric, of kLevel
  std::vector<std::string> reports;       // counters to be told beside it
};

enum class ClaimRule : std::uint8_t { kShare, kCrossover, kDominance, kGain };

struct Claim {
  std::string id;
  std::string title;
  std::string sentence;  // of the mail, verbatim
  ClaimRule rule{ClaimRule::kShare};
  std::string gain_level;  // kGain
  std::string gain_from;
  std::string gain_to;
  std::vector<Comparison> comparisons;
};

// An arm that is another one once more, where it is, and by what the two are compared.
struct AgainControl {
  std::vector<std::string> families;
  std::string arm;
  std::string against;
  std::vector<std::string> metrics;
};

struct Controls {
  std::vector<AgainControl> again;
  std::vector<std::string> slowed_families;
  std::string slowed;
  std::string slowed_against;
  std::string slowed_metric;
  double found_share_min{0};
};

struct Analysis {
  std::string digest;  // SHA-256 of the file
  Rules rules;
  std::vector<Preset> presets;
  std::map<std::string, Arm> arms;
  std::vector<Family> families;
  std::vector<Claim> claims;
  Controls controls;

  [[nodiscard]] const Preset* preset(std::string_view name) const;
  [[nodiscard]] const Family* family(std::string_view id) const;
  // On the logarithmic scale.
  [[nodiscard]] double margin(std::string_view metric) const;
  [[nodiscard]] double margin(const Comparison& comparison, const std::string& metric) const;
  // Whether an arm is there to be compared with another by the controls alone.
  [[nodiscard]] bool is_control(std::string_view arm) const;
};

// Error: kInvalidArgument: not JSON, something is missing, or names something that is not there.
Expected<Analysis> parse_analysis(std::string_view text);
// The one that is compiled in; asserted to be right.
[[nodiscard]] const Analysis& registered_analysis();
[[nodiscard]] std::string_view analysis_text();

// One combination of a family's levels on one device.
struct Cell {
  std::string id;  // "core/image/randread-32"
  const Family* family{nullptr};
  std::string device;
  Levels levels;
};
// All cells of a preset, on those of the `devices`, by the order of the file.
[[nodiscard]] std::vector<Cell> cells_of(const Analysis& analysis, const Preset& preset,
                                         const std::vector<std::string>& devices);
[[nodiscard]] std::string level_of(const Cell& cell, std::string_view name);
// Whether `comparison` is about `cell`.
[[nodiscard]] bool applies_to(const Comparison& comparison, const Cell& cell);

}  // namespace vblk::wash
