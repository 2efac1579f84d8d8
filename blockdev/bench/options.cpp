#include "blockdev/bench/options.h"

#include <random>
#include <sstream>
#include <string_view>
#include <utility>

#include <fmt/core.h>
#include <fmt/format.h>

#include "blockdev/byte_size.h"

namespace vblk::bench {

namespace program_options = boost::program_options;
using program_options::value;

namespace {

constexpr std::string_view kUsage =
    R"(Usage: vblk bench --socket-path PATH [options] [JOB-FILE]
       vblk bench --image PATH [--aio ENGINE] [options] [JOB-FILE]
       vblk bench flush ...          (see vblk bench flush --help)

Measures any vhost-user-blk backend through its socket, or an image with an
engine in this process. Everything that is written destroys what is there.

Jobs come from the options or from a file like fio's. Lists, such as
--bs 4k,64k --iodepth 1,32, are runs one after the other, one for each pair.
Without --rate_iops a request starts when one completes (latencies are service
times); with it requests come at their own times, and latencies count from then.
)";

constexpr std::string_view kDefaultRunTime = "5";
constexpr std::string_view kDefaultRampTime = "0.5";

std::unexpected<Error> usage_error(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

program_options::options_description describe_workload() {
  program_options::options_description description("Workload");
  const auto text = [](const char* name) { return value<std::string>()->value_name(name); };
  description.add_options()  //
      ("rw", text("KIND"),   //
       "read, write, rw, trim, writezeroes, the same with rand in front, or flush "
       "(default: randread)")                                                                  //
      ("rwmixread", text("PERCENT"), "reads in rw and randrw (default: 50)")                   //
      ("bs", text("SIZE,..."), "bytes of a request, a multiple of 512 (default: 4k)")          //
      ("iodepth", text("N,..."), "most requests in flight on each queue (default: 1)")         //
      ("numjobs", text("N"), "queues, each with a thread of its own (default: 1)")             //
      ("offset", text("SIZE"), "start of the part of the disk that is used (default: 0)")      //
      ("size", text("SIZE"), "length of that part (default: up to the end)")                   //
      ("io_size", text("SIZE"), "end after so much in all, instead of by time")                //
      ("random_distribution", text("NAME"), "uniform (default) or zipf:THETA (default: 1.2)")  //
      ("fsync", text("N"),
       "a flush after every N writes of each of the depth (default: 0, never)")                  //
      ("sync", text("MODE"), "none (default) or dsync: each write is stable when it completes")  //
      ("rate_iops", text("N"), "requests per second, whatever the disk does")                    //
      ("rate_process", text("NAME"), "distances between these: linear (default) or poisson")     //
      ("runtime", text("TIME"),
       "time to measure, such as 10 (seconds), 500ms or 2m (default: 5)")          //
      ("ramp_time", text("TIME"), "time before that, not counted (default: 0.5)")  //
      ("verify", program_options::bool_switch(),
       "write what follows from seed and place, and check it: in reads, and of what was written "
       "when the job is done")  //
      ("randseed", text("N"), "seed of offsets, times and content (default: a new one)");
  return description;
}

program_options::options_description describe_output() {
  program_options::options_description description("Output");
  const auto text = [](const char* name) { return value<std::string>()->value_name(name); };
  description.add_options()                                                           //
      ("output-format", text("FORMAT"), "normal (default) or json, with fio's keys")  //
      ("output", text("PATH"), "write the report there instead of standard output")   //
      ("hdr-log", text("PATH"), "write all latencies there, as HdrHistogram's log")   //
      ("eta", text("WHEN"),
       "show progress: auto (default; a line each ten seconds where there is no terminal), always "
       "(each second) or never")  //
      ("count-syscalls", program_options::bool_switch(),
       "count the target's system calls (root and tracefs; makes each of them slower)")  //
      ("flush-device", text("PATH"),
       "count the flushes that reach this block device, or that of this file (default: the "
       "image's)")  //
      ("help", "print this text and exit");
  return description;
}

std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> words;
  for (;;) {
    const auto comma = text.find(',');
    words.push_back(text.substr(0, comma));
    if (comma == std::string_view::npos) return words;
    text.remove_prefix(comma + 1);
  }
}

std::string text_of(const program_options::variables_map& map, const char* name,
                    std::string_view otherwise) {
  return map.contains(name) ? map[name].as<std::string>() : std::string(otherwise);
}

Expected<Workload> take_workload(const program_options::variables_map& map,
                                 std::string_view block_bytes, std::string_view depth,
                                 std::uint64_t seed) {
  Workload workload;
  workload.seed = seed;
  const auto set = [&workload](std::string_view key, std::string_view text) -> Expected<void> {
    auto done = set_key(workload, key, text);
    if (!done) done.error().message = "--" + done.error().message;
    return done;
  };
  workload.name = text_of(map, "rw", "randread");
  if (auto done = set("rw", workload.name); !done) return std::unexpected(done.error());
  if (auto done = set("bs", block_bytes); !done) return std::unexpected(done.error());
  if (auto done = set("iodepth", depth); !done) return std::unexpected(done.error());
  if (!map.contains("io_size")) {
    if (auto done = set("runtime", text_of(map, "runtime", kDefaultRunTime)); !done)
      return std::unexpected(done.error());
    if (auto done = set("ramp_time", text_of(map, "ramp_time", kDefaultRampTime)); !done)
      return std::unexpected(done.error());
  } else if (map.contains("runtime") || map.contains("ramp_time")) {
    return usage_error("--io_size ends the run by amount; leave --runtime and --ramp_time away");
  }
  for (const char* key : {"rwmixread", "numjobs", "offset", "size", "io_size",
                          "random_distribution", "fsync", "sync", "rate_process", "rate_iops"}) {
    if (!map.contains(key)) continue;
    if (auto done = set(key, map[key].as<std::string>()); !done)
      return std::unexpected(done.error());
  }
  workload.verify = map["verify"].as<bool>();
  if (workload.run_time.count() == 0 && workload.amount_bytes == 0)
    return usage_error("--runtime 0 measures nothing");
  if (auto done = check(workload); !done) {
    done.error().message = "--" + done.error().message;
    return std::unexpected(std::move(done.error()));
  }
  return workload;
}

Expected<std::vector<JobGroup>> take_jobs(const program_options::variables_map& map) {
  Workload seeded;
  seeded.seed = std::random_device{}();
  if (map.contains("randseed")) {
    if (auto done = set_key(seeded, "randseed", map["randseed"].as<std::string>()); !done)
      return std::unexpected(done.error());
  }
  if (map.contains("job-file")) {
    const auto workload_options = describe_workload();
    for (const auto& option : workload_options.options()) {
      const auto& name = option->long_name();
      if (name != "randseed" && map.contains(name) && !map[name].defaulted())
        return usage_error(fmt::format("--{} and a job file: write it into the file", name));
    }
    seeded.distribution = Distribution::kSequential;  // fio's default
    return read_job_file(map["job-file"].as<std::string>(), seeded);
  }
  std::vector<JobGroup> groups;
  const std::string block_bytes = text_of(map, "bs", "4k");
  const std::string depths = text_of(map, "iodepth", "1");
  for (const std::string_view bytes : split(block_bytes)) {
    for (const std::string_view depth : split(depths)) {
      const auto workload = take_workload(map, bytes, depth, seeded.seed);
      if (!workload) return std::unexpected(workload.error());
      groups.push_back({*workload});
    }
  }
  return groups;
}

Expected<ImageTargetOptions> take_image(const program_options::variables_map& map) {
  ImageTargetOptions options;
  const auto aio = aio::AioSelection::parse(text_of(map, "aio", "threads"));
  if (!aio) return std::unexpected(aio.error());
  options.aio = *aio;
  const auto cache = blockdev::parse_cache_mode(text_of(map, "cache", "none"));
  if (!cache) return std::unexpected(cache.error());
  options.image.cache = *cache;
  options.image.path = map["image"].as<std::string>();
  if (map.contains("format")) {
    const auto format = take_format(map["format"].as<std::string>());
    if (!format) return std::unexpected(format.error());
    options.image.format = *format;
  }
  options.image.read_only = map["read-only"].as<bool>();
  const auto share = text_of(map, "share-flushes", "on");
  if (share != "on" && share != "off")
    return usage_error(fmt::format("--share-flushes {}: use on or off", share));
  options.image.share_flushes = share == "on";
  if (map.contains("write-behind")) {
    const auto size = blockdev::parse_write_behind(map["write-behind"].as<std::string>(), *cache);
    if (!size) return std::unexpected(size.error());
    options.image.write_behind_bytes = *size;
  }
  return options;
}

program_options::options_description describe_target() {
  program_options::options_description description("Target");
  const auto text = [](const char* name) { return value<std::string>()->value_name(name); };
  description.add_options()                                                    //
      ("socket-path", text("PATH"), "the socket of a vhost-user-blk backend")  //
      ("pid", value<int>()->default_value(0)->value_name("PID"),               //
       "the process of that backend, whose CPU time, context switches and, for root, io_uring "
       "punts "
       "to kernel workers are reported; 0: who listens on the socket")               //
      ("ring", text("KIND"), "split (default) or packed: the rings to drive it by")  //
      ("image", text("PATH"),
       "an image, with an engine in this process")                                               //
      ("format", text("raw|qcow2"), "of the image (default: qcow2 if its name ends in .qcow2)")  //
      ("aio", text("ENGINE|KIND=ENGINE,..."), "as vblk serve --aio (default: threads)")          //
      ("cache", text("MODE"), "as vblk serve --cache (default: none)")                           //
      ("read-only", program_options::bool_switch(), "open the image for reading only")           //
      ("share-flushes", text("on|off"), "as vblk serve --share-flushes (default: on)")           //
      ("write-behind", text("SIZE"), "as vblk serve --write-behind");
  return description;
}

Expected<TargetOptions> take_target(const program_options::variables_map& map) {
  TargetOptions options;
  if (map.contains("socket-path") == map.contains("image"))
    return usage_error(
        "name what to measure: a backend by --socket-path PATH, or an image by --image PATH");
  if (map.contains("socket-path")) {
    for (const char* name : {"format", "aio", "cache", "share-flushes", "write-behind"}) {
      if (map.contains(name))
        return usage_error(fmt::format("--{} is for --image; a backend has made its choice", name));
    }
    if (map["read-only"].as<bool>())
      return usage_error("--read-only is for --image; a backend has made its choice");
    options.socket_path = map["socket-path"].as<std::string>();
    options.process = map["pid"].as<int>();
    if (options.process < 0) return usage_error("--pid: use the number of a process");
    const auto ring = text_of(map, "ring", "split");
    if (ring != "split" && ring != "packed")
      return usage_error(fmt::format("--ring {}: use split or packed", ring));
    options.packed_rings = ring == "packed";
    return options;
  }
  if (map["pid"].as<int>() != 0)
    return usage_error("--pid is for --socket-path; an image's engine is in this process");
  if (map.contains("ring"))
    return usage_error("--ring is for --socket-path; an image is measured without rings");
  auto image = take_image(map);
  if (!image) return std::unexpected(std::move(image.error()));
  options.image = std::move(*image);
  return options;
}

}  // namespace

Expected<blockdev::ImageFormat> take_format(const std::string& text) {
  const auto format = blockdev::parse_image_format(text);
  if (!format || *format == blockdev::ImageFormat::kNull)
    return usage_error(fmt::format("--format {}: use raw or qcow2", text));
  return *format;
}

Expected<program_options::variables_map> parse_words(
    std::span<char*> arguments, const program_options::options_description& options,
    const program_options::positional_options_description& positional, const std::string& command) {
  program_options::variables_map map;
  try {
    const auto style = program_options::command_line_style::unix_style &
                       ~program_options::command_line_style::allow_guessing;
    const std::vector<std::string> words(arguments.begin() + 1, arguments.end());
    program_options::store(program_options::command_line_parser(words)
                               .options(options)
                               .positional(positional)
                               .style(style)
                               .run(),
                           map);
  } catch (const program_options::too_many_positional_options_error&) {
    return usage_error(fmt::format("more words than the command takes; see {} --help", command));
  } catch (const program_options::error& error) {
    return usage_error(fmt::format("{}; see {} --help", error.what(), command));
  }
  return map;
}

Expected<OutputWords> take_output_words(const program_options::variables_map& map) {
  OutputWords words;
  const auto format = text_of(map, "output-format", "normal");
  if (format != "normal" && format != "json")
    return usage_error(fmt::format("--output-format {}: use normal or json", format));
  words.json = format == "json";
  const auto eta = text_of(map, "eta", "auto");
  if (eta != "auto" && eta != "always" && eta != "never")
    return usage_error(fmt::format("--eta {}: use auto, always or never", eta));
  if (eta != "auto")
    words.show_progress = eta == "always" ? ShowProgress::kAlways : ShowProgress::kNever;
  return words;
}

Expected<std::variant<BenchOptions, HelpText>> parse_options(std::span<char*> arguments) {
  program_options::options_description visible;
  visible.add(describe_target()).add(describe_workload()).add(describe_output());
  program_options::options_description all;
  all.add(visible).add_options()("job-file", value<std::string>());
  program_options::positional_options_description positional;
  positional.add("job-file", 1);
  const auto map = parse_words(arguments, all, positional, "vblk bench");
  if (!map) return std::unexpected(map.error());
  if (map->contains("help")) {
    std::ostringstream text;
    text << kUsage << visible;
    return HelpText{text.str()};
  }
  BenchOptions options;
  auto target = take_target(*map);
  if (!target) return std::unexpected(std::move(target.error()));
  options.target = std::move(*target);
  auto groups = take_jobs(*map);
  if (!groups) return std::unexpected(std::move(groups.error()));
  options.groups = std::move(*groups);
  options.count_system_calls = (*map)["count-syscalls"].as<bool>();
  options.flush_device =
      text_of(*map, "flush-device", options.target.image ? options.target.image->image.path : "");
  options.flush_device_is_named = map->contains("flush-device");
  options.output_path = text_of(*map, "output", "");
  options.hdr_log_path = text_of(*map, "hdr-log", "");
  const auto output = take_output_words(*map);
  if (!output) return std::unexpected(output.error());
  options.json = output->json;
  options.show_progress = output->show_progress;
  return options;
}

}  // namespace vblk::bench
