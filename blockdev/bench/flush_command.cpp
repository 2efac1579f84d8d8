#include "blockdev/bench/flush_command.h"

#include <chrono>
#include <csignal>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <variant>

#include <fmt/core.h>

#include "blockdev/bench/flush_page.h"
#include "blockdev/bench/flush_report.h"
#include "blockdev/bench/flush_suite.h"
#include "blockdev/bench/machine_usage.h"
#include "blockdev/bench/measure.h"
#include "blockdev/bench/output.h"
#include "blockdev/bench/progress.h"

namespace vblk::bench {

namespace {

namespace program_options = boost::program_options;
using program_options::value;

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;

constexpr std::string_view kUsage =
    R"(Usage: vblk bench flush --image PATH [--aio ENGINE,...] [--cache MODE,...] [options]
       vblk bench flush --socket-path PATH [options]

Measures what a flush costs: by itself, many at once, beside other writes, as
write-through, after a rest, and with nothing to do; each for every engine and
cache mode. Everything on the disk is destroyed. Exit status 1 if the p99 of a
write and its flush is above the limit anywhere.
)";

struct FlushOptions {
  FlushSuiteOptions suite;
  std::string html_path;
  std::string output_path;
  bool json{false};
  bool flush_device_is_named{false};
  ShowProgress show_progress{ShowProgress::kAuto};
};

std::unexpected<Error> usage_error(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

program_options::options_description describe() {
  program_options::options_description description("Options");
  const auto text = [](const char* name) { return value<std::string>()->value_name(name); };
  description.add_options()                                                    //
      ("socket-path", text("PATH"), "the socket of a vhost-user-blk backend")  //
      ("pid", value<int>()->default_value(0)->value_name("PID"),
       "the process of that backend; 0: who listens on the socket")  //
      ("image", text("PATH"),
       "an image, with the engines in this process")                                             //
      ("format", text("raw|qcow2"), "of the image (default: qcow2 if its name ends in .qcow2)")  //
      ("aio", text("ENGINE,..."), "engines (default: threads,native,io_uring)")                  //
      ("cache", text("MODE,..."), "cache modes (default: none,writeback)")                       //
      ("runtime", text("TIME"), "of each measurement (default: 5)")                              //
      ("idle", text("TIME"), "rest before the burst (default: 15)")                              //
      ("p99-limit", text("TIME"),
       "what a write and its flush may take to pass (default: 10ms, which "
       "etcd asks for)")  //
      ("write-behind", text("SIZE"),
       "what --cache writeback is tried with as well (default: 8M)")  //
      ("flush-device", text("PATH"),
       "count the flushes that reach this block device, or that of this file (default: the "
       "image's)")                                                                   //
      ("randseed", text("N"), "seed of offsets (default: a new one)")                //
      ("output-format", text("FORMAT"), "normal (default) or json")                  //
      ("output", text("PATH"), "write the report there instead of standard output")  //
      ("html", text("PATH"), "write a page with plots there (gnuplot draws them)")   //
      ("eta", text("WHEN"), "show progress, as vblk bench --eta")                    //
      ("help", "print this text and exit");
  return description;
}

std::string text_of(const program_options::variables_map& map, const char* name,
                    std::string_view otherwise) {
  return map.contains(name) ? map[name].as<std::string>() : std::string(otherwise);
}

// Calls `take(word)` for each word between commas.
template <typename Take>
Expected<void> for_each_word(const std::string& list, Take&& take) {
  std::istringstream stream(list);
  for (std::string word; std::getline(stream, word, ',');) {
    if (auto done = take(word); !done) return done;
  }
  return {};
}

Expected<void> take_image(const program_options::variables_map& map, FlushOptions& options) {
  ImageTargetOptions image;
  image.image.path = map["image"].as<std::string>();
  if (map.contains("format")) {
    const auto format = take_format(map["format"].as<std::string>());
    if (!format) return std::unexpected(format.error());
    image.image.format = *format;
  }
  options.suite.target.image = image;
  auto done = for_each_word(text_of(map, "aio", "threads,native,io_uring"),
                            [&options](const std::string& word) -> Expected<void> {
                              const auto aio = aio::AioSelection::parse(word);
                              if (!aio) return std::unexpected(aio.error());
                              if (word.contains('='))
                                return usage_error(fmt::format(
                                    "--aio {}: each engine is tried for everything; name engines "
                                    "alone",
                                    word));
                              options.suite.engines.push_back(aio->engine_of_kind.front());
                              return {};
                            });
  if (!done) return done;
  return for_each_word(text_of(map, "cache", "none,writeback"),
                       [&options](const std::string& word) -> Expected<void> {
                         const auto cache = blockdev::parse_cache_mode(word);
                         if (!cache) return std::unexpected(cache.error());
                         options.suite.caches.push_back(*cache);
                         return {};
                       });
}

Expected<void> take_times(const program_options::variables_map& map, FlushSuiteOptions& suite) {
  const auto time = [&map](const char* name, std::string_view otherwise,
                           std::chrono::nanoseconds& target) -> Expected<void> {
    auto parsed = parse_duration(name, text_of(map, name, otherwise));
    if (!parsed) return usage_error("--" + parsed.error().message);
    target = *parsed;
    return {};
  };
  if (auto done = time("runtime", "5", suite.test_time); !done) return done;
  if (auto done = time("idle", "15", suite.idle_time); !done) return done;
  if (auto done = time("p99-limit", "10ms", suite.p99_limit); !done) return done;
  if (suite.test_time.count() == 0) return usage_error("--runtime 0 measures nothing");
  return {};
}

Expected<std::variant<FlushOptions, HelpText>> parse(std::span<char*> arguments) {
  const auto description = describe();
  const auto map = parse_words(arguments, description, {}, "vblk bench flush");
  if (!map) return std::unexpected(map.error());
  if (map->contains("help")) {
    std::ostringstream text;
    text << kUsage << '\n' << description;
    return HelpText{text.str()};
  }
  FlushOptions options;
  FlushSuiteOptions& suite = options.suite;
  if (map->contains("socket-path") == map->contains("image"))
    return usage_error(
        "name what to measure: a backend by --socket-path PATH, or an image by --image PATH");
  if (map->contains("image")) {
    if (auto done = take_image(*map, options); !done) return std::unexpected(done.error());
  } else {
    for (const char* name : {"format", "aio", "cache", "write-behind"}) {
      if (map->contains(name))
        return usage_error(fmt::format("--{} is for --image; a backend has made its choice", name));
    }
    suite.target.socket_path = (*map)["socket-path"].as<std::string>();
    suite.target.process = (*map)["pid"].as<int>();
  }
  if (auto done = take_times(*map, suite); !done) return std::unexpected(done.error());
  const auto behind = blockdev::parse_write_behind(text_of(*map, "write-behind", "8M"),
                                                   blockdev::CacheMode::kWriteback);
  if (!behind) return std::unexpected(behind.error());
  suite.write_behind_bytes = *behind;
  Workload seeded;
  seeded.seed = std::random_device{}();
  if (map->contains("randseed")) {
    if (auto done = set_key(seeded, "randseed", (*map)["randseed"].as<std::string>()); !done)
      return usage_error("--" + done.error().message);
  }
  suite.seed = seeded.seed;
  suite.flush_device =
      text_of(*map, "flush-device", suite.target.image ? suite.target.image->image.path : "");
  options.flush_device_is_named = map->contains("flush-device");
  options.html_path = text_of(*map, "html", "");
  options.output_path = text_of(*map, "output", "");
  const auto output = take_output_words(*map);
  if (!output) return std::unexpected(output.error());
  options.json = output->json;
  options.show_progress = output->show_progress;
  return options;
}

int fail(const Error& error, int status) {
  fmt::print(stderr, "vblk: bench flush: {}\n", error.message);
  return status;
}

int report_all(const FlushOptions& options, const FlushReport& report) {
  int status = 0;
  const auto check = [&status](const Expected<void>& written) {
    if (!written) status = fail(written.error(), kExitFailure);
  };
  check(write_output(options.output_path, options.json ? flush_json(report) : flush_text(report)));
  if (!options.html_path.empty()) {
    const auto page = flush_page(report, options.suite);
    check(page ? write_file(options.html_path, *page) : std::unexpected(page.error()));
  }
  return status;
}

// What makes the exit status 1 though all went well; empty: nothing.
std::string verdict(const FlushOptions& options, const FlushReport& report) {
  std::string text;
  const auto say = [&text](const std::string& more) { text += (text.empty() ? "" : "; ") + more; };
  std::string failed;
  for (const FlushRow& row : report.rows) {
    if (row.passed == false)
      failed += fmt::format("{}'{}'", failed.empty() ? "" : ", ", row.target);
  }
  const double limit_ms =
      std::chrono::duration<double, std::milli>(options.suite.p99_limit).count();
  if (!failed.empty())
    say(fmt::format("FAIL: the p99 of a write and its flush is above {:g} ms on {}", limit_ms,
                    failed));
  std::string unjudged;
  for (const std::string& target : report.unjudged)
    unjudged += fmt::format("{}'{}'", unjudged.empty() ? "" : ", ", target);
  if (!unjudged.empty())
    say(fmt::format("NO VERDICT: no write with a flush was measured on {}", unjudged));
  if (report.power_cuts.lost != 0 || !report.power_cuts.canary_noticed)
    say("FAIL: the power-cut model lost flushed writes, or did not notice a disk that does");
  return text;
}

// All that can be known to go wrong before minutes are spent on measuring.
Expected<void> check_before(const FlushOptions& options) {
  if (auto checked = check_target(options.suite.target, true); !checked) return checked;
  for (const std::string& path : {options.output_path, options.html_path}) {
    if (auto checked = check_can_write(path); !checked) return checked;
  }
  TargetOptions target = options.suite.target;
  // A cache mode that is not to be had is told where its rows would be.
  if (target.image) target.image->image.cache = blockdev::CacheMode::kWriteback;
  const auto opened = open_target(target, {Workload{}});
  return opened ? Expected<void>{} : std::unexpected(opened.error());
}

}  // namespace

int run_flush(std::span<char*> arguments) {
  auto parsed = parse(arguments);
  if (!parsed) return fail(parsed.error(), kExitUsage);
  if (const auto* help = std::get_if<HelpText>(&*parsed)) {
    fmt::print("{}", help->text);
    return 0;
  }
  auto& options = std::get<FlushOptions>(*parsed);
  if (!options.html_path.empty()) {
    if (const auto found = find_gnuplot(); !found) return fail(found.error(), kExitUsage);
  }
  if (options.flush_device_is_named) {
    if (const auto counter = FlushCounter::open(options.suite.flush_device); !counter)
      return fail(counter.error(), kExitUsage);
  }
  if (const auto checked = check_before(options); !checked)
    return fail(checked.error(), kExitFailure);
  FlushReport report;
  {
    ProgressLine line(options.show_progress);
    options.suite.interrupted = &interrupt_flag();
    options.suite.show = [&line](const std::string& title, const Progress& progress) {
      line.show(title, progress);
    };
    report = run_flush_suite(options.suite);
  }
  const int status = report_all(options, report);
  if (report.error) return fail(*report.error, kExitFailure);
  if (report.interrupted) {
    fmt::print(stderr, "vblk: bench flush: interrupted; this is what was measured up to then\n");
    return 128 + SIGINT;
  }
  if (const std::string text = verdict(options, report); !text.empty()) {
    if (status == 0) fmt::print(stderr, "vblk: bench flush: {}\n", text);
    return kExitFailure;
  }
  return status;
}

}  // namespace vblk::bench
