#include "blockdev/demo/demo.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <sys/utsname.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <variant>
#include <vector>

#include <fmt/core.h>

#include "aio/engine_set.h"
#include "blockdev/byte_size.h"
#include "blockdev/demo/backend_process.h"
#include "blockdev/demo/options.h"
#include "blockdev/demo/report.h"
#include "blockdev/demo/scratch_image.h"
#include "blockdev/demo/workloads.h"
#include "blockdev/driver/blk_driver.h"

namespace vblk::demo {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;

constexpr const char* kCaveats =
    R"(How to read this
  IOPS are medians over the rounds, with the slowest and the fastest round beside them; latencies
  are those of all rounds together, n/a where too few requests lie beyond one (--seconds helps).
  CPU and context switches are those of the server process, busy polling included, the driver's not.
  Write + flush counts the pair as one. An engine is called ahead only if its slowest round beats the
  other's fastest: a rule of thumb, not a statistical test.
What the numbers do not mean
  They are no verdict on the engines: one disk, one machine, one queue, one request size, a minute.
  The driver shares the processors with the server, so at depth 32 the two compete for them.
  What the kernel does in threads of its own and in interrupts is charged to nobody here.
  The page cache is not used (cache=none), but the caches of the disk and of a host below this
  machine are; a flush costs what they make of it. Other load on this machine or on its host shows as
  spread. A guest adds its own costs on top: its kernel, its interrupts, its exits.
)";

// Where the user is: one line that is rewritten on a terminal, and a line per step elsewhere.
class ProgressLine {
 public:
  ~ProgressLine() { clear(); }
  ProgressLine() = default;
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void step(const std::string& text) {
    if (terminal_) {
      fmt::print(stderr, "\r\033[K{}", text);
      std::fflush(stderr);
    } else {
      fmt::print(stderr, "{}\n", text);
    }
  }
  // For steps that come too often to be kept.
  void detail(const std::string& text) {
    if (terminal_) step(text);
  }
  void clear() {
    if (terminal_) fmt::print(stderr, "\r\033[K");
  }

 private:
  const bool terminal_{::isatty(STDERR_FILENO) == 1};
};

// Leaves out, with its reason, what this kernel refuses, and tells what it replaces.
std::vector<aio::EngineName> usable_engines(const std::vector<aio::EngineName>& wanted) {
  std::vector<aio::EngineName> usable;
  for (const aio::EngineName name : wanted) {
    aio::AioSelection selection;
    selection.engine_of_kind.fill(name);
    const auto engines = aio::EngineSet::create(selection, {});
    if (!engines) {
      fmt::print("{} is left out: {}\n", aio::to_string(name), engines.error().message);
      continue;
    }
    usable.push_back(name);
    for (const aio::EngineRoute& route : (*engines)->routes()) {
      const bool measured = route.kind == aio::IoKind::kRead || route.kind == aio::IoKind::kWrite ||
                            route.kind == aio::IoKind::kFlush;
      if (measured && route.chosen != route.requested) {
        fmt::print("{}: {} goes to {}: {}\n", route.requested, aio::to_string(route.kind),
                   route.chosen, route.reason);
      }
    }
  }
  return usable;
}

Expected<ScratchImage> make_image(const DemoOptions& options) {
  if (options.image_path.empty())
    return ScratchImage::create_temporary(options.directory, options.image_bytes);
  return ScratchImage::create_at(options.image_path, options.image_bytes, options.overwrite);
}

Expected<void> fill_image(ScratchImage& image, std::uint64_t seed, ProgressLine& progress) {
  const auto percent = [&image](std::uint64_t bytes) { return bytes * 100 / image.size_bytes(); };
  progress.step(
      fmt::format("filling {} ({})", image.name(), blockdev::format_byte_size(image.size_bytes())));
  return image.precondition(seed, [&](std::uint64_t written_bytes) {
    progress.detail(fmt::format("filling {}: {} %", image.name(), percent(written_bytes)));
  });
}

// All measurements: `round_count` rounds, each with every engine in a new order, each engine with
// every workload on a server of its own (two writers of one image exclude each other).
class Experiment {
 public:
  Experiment(const DemoOptions& options, const ScratchImage& image,
             const std::vector<aio::EngineName>& engines, ProgressLine& progress)
      : options_(options), image_(image), progress_(progress), random_(options.seed) {
    for (const aio::EngineName engine : engines) {
      engines_.push_back(engine);
      results_.push_back({.engine = std::string(aio::to_string(engine)), .series = {}});
    }
  }

  Expected<std::vector<EngineResults>> run() {
    begin_ = Clock::now();
    std::vector<std::size_t> order(engines_.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (round_ = 1; round_ <= options_.round_count; ++round_) {
      std::ranges::shuffle(order, random_);
      for (const std::size_t engine : order) {
        if (auto done = run_engine(engine); !done) {
          done.error().message = fmt::format("round {}, {}: {}", round_, results_[engine].engine,
                                             done.error().message);
          return std::unexpected(std::move(done.error()));
        }
      }
    }
    return std::move(results_);
  }

 private:
  Expected<void> run_engine(std::size_t engine) {
    auto server = BackendProcess::start(image_, engines_[engine]);
    if (!server) return std::unexpected(std::move(server.error()));
    auto driver = driver::BlkDriver::adopt((*server)->take_socket());
    if (!driver) return std::unexpected(std::move(driver.error()));
    auto target = bench::adopt_driver(std::move(*driver),
                                      {.socket_path = image_.name(), .process = (*server)->pid()});
    if (!target) return std::unexpected(std::move(target.error()));
    StampedContent content;
    for (std::size_t i = 0; i < workloads.size(); ++i) {
      tell(engine, workloads[i]);
      bench::Workload workload = workloads[i].load;
      workload.name = workloads[i].name;
      workload.size_bytes = image_.size_bytes();
      workload.ramp_time = options_.cell_time / 10;
      workload.run_time = options_.cell_time;
      workload.seed = random_();
      const auto result = bench::run_jobs(
          **target, {.jobs = {workload}, .content = [&content](std::size_t) { return &content; }});
      if (!result) return std::unexpected(result.error());
      if (result->error) return std::unexpected(*result->error);
      results_[engine].series[i].add(*result);
      ++cells_done_;
    }
    target->reset();  // the server ends with its connection
    return (*server)->finish();
  }

  void tell(std::size_t engine, const NamedWorkload& workload) {
    const std::string text =
        fmt::format("round {}/{}  {:<8}  {:<33}  about {} s left", round_, options_.round_count,
                    results_[engine].engine, workload.name, seconds_left());
    if (&workload == workloads.data()) {
      progress_.step(text);
    } else {
      progress_.detail(text);
    }
  }

  // From the pace so far, which includes starting servers and warming up.
  [[nodiscard]] std::int64_t seconds_left() const {
    const std::size_t cells = options_.round_count * engines_.size() * workloads.size();
    const double planned = std::chrono::duration<double>(options_.cell_time).count() * 1.1;
    const double spent = std::chrono::duration<double>(Clock::now() - begin_).count();
    const double pace = cells_done_ == 0 ? planned : spent / static_cast<double>(cells_done_);
    return std::lround(pace * static_cast<double>(cells - cells_done_));
  }

  const DemoOptions& options_;
  const ScratchImage& image_;
  ProgressLine& progress_;
  std::mt19937_64 random_;
  std::vector<aio::EngineName> engines_;
  std::vector<EngineResults> results_;
  Clock::time_point begin_;
  unsigned round_{0};
  std::size_t cells_done_{0};
};

void print_setting(const DemoOptions& options, const ScratchImage& image) {
  utsname system{};
  ::uname(&system);
  fmt::print("Image: {}, {}, filled with data that cannot be compressed; cache=none.\n",
             image.name(), blockdev::format_byte_size(image.size_bytes()));
  fmt::print("Linux {}, {} processors. {} rounds of {} s per measurement; seed {}.\n",
             system.release, std::thread::hardware_concurrency(), options.round_count,
             std::chrono::duration<double>(options.cell_time).count(), options.seed);
  std::fflush(stdout);
}

Expected<void> compare_engines(const DemoOptions& options) {
  const auto engines = usable_engines(options.engines);
  if (engines.empty())
    return make_error(ErrorKind::kNotSupported, "this kernel refuses every engine named");
  auto image = make_image(options);
  if (!image) return std::unexpected(std::move(image.error()));
  print_setting(options, *image);
  ProgressLine progress;
  if (auto filled = fill_image(*image, options.seed, progress); !filled) return filled;
  Experiment experiment(options, *image, engines, progress);
  const auto results = experiment.run();
  progress.clear();
  if (!results) return std::unexpected(results.error());
  fmt::print("\n{}\n", table(*results));
  if (const std::string words = verdict(*results); !words.empty())
    fmt::print("In words\n{}", words);
  fmt::print("{}", kCaveats);
  return {};
}

}  // namespace

int run(int argc, char** argv) {
  const auto parsed = parse_options(argc, argv);
  if (!parsed) {
    fmt::print(stderr, "vblk: demo: {}\n", parsed.error().message);
    return kExitUsage;
  }
  if (const auto* help = std::get_if<std::string>(&*parsed)) {
    fmt::print("{}", *help);
    return 0;
  }
  if (auto done = compare_engines(std::get<DemoOptions>(*parsed)); !done) {
    fmt::print(stderr, "vblk: demo: {}\n", done.error().message);
    return kExitFailure;
  }
  return 0;
}

}  // namespace vblk::demo
