#include "blockdev/bench/options.h"

#include <cmath>
#include <random>
#include <sstream>
#include <string_view>
#include <utility>

#include <boost/program_options.hpp>
#include <fmt/core.h>

#include "blockdev/byte_size.h"
#include "blockdev/virtio/blk_wire.h"

namespace vblk::bench {

namespace program_options = boost::program_options;
using program_options::value;

namespace {

constexpr std::string_view kUsage = R"(Usage: vblk bench --socket-path PATH [options]

Drives a vhost-user-blk backend, this one or another, through its socket, and prints
what came out. Writes destroy what is on the disk. Option names are fio's.
)";

constexpr unsigned kDepthMax = 1024;
constexpr std::size_t kBlockBytesMax = std::size_t{4} << 20;
constexpr std::size_t kBuffersBytesMax = std::size_t{1} << 30;

program_options::options_description describe() {
  program_options::options_description description("Options");
  description.add_options()                                                                  //
      ("socket-path", value<std::string>()->value_name("PATH"), "the backend's socket")      //
      ("rw", value<std::string>()->default_value("randread")->value_name("KIND"),            //
       "read, write, randread or randwrite")                                                 //
      ("bs", value<std::string>()->default_value("4k")->value_name("SIZE"),                  //
       "bytes per request, a multiple of 512 up to 4M")                                      //
      ("iodepth", value<unsigned>()->default_value(1)->value_name("N"),                      //
       "requests in flight, 1 to 1024")                                                      //
      ("fsync", value<unsigned>()->default_value(0)->value_name("N"),                        //
       "flush after every N writes of each of the iodepth lanes; counts with the last "      //
       "of them as one operation")                                                           //
      ("size", value<std::string>()->value_name("SIZE"),                                     //
       "use so many bytes from the start of the disk (default: all)")                        //
      ("runtime", value<double>()->default_value(5)->value_name("S"), "seconds to measure")  //
      ("ramp_time", value<double>()->default_value(0.5)->value_name("S"),                    //
       "seconds before that, not counted")                                                   //
      ("pid", value<int>()->default_value(0)->value_name("PID"),                             //
       "the backend's process: report its CPU time, context switches and, for root, io_uring punts "
       "to kernel workers")                                                                     //
      ("seed", value<std::uint64_t>()->value_name("N"), "of the offsets (default: a new one)")  //
      ("output-format", value<std::string>()->default_value("normal")->value_name("FORMAT"),    //
       "normal or json")                                                                        //
      ("help", "print this text and exit");
  return description;
}

std::unexpected<Error> usage_error(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

Expected<void> take_workload(const program_options::variables_map& map, BenchOptions& options) {
  options.workload_name = map["rw"].as<std::string>();
  std::string_view name = options.workload_name;
  options.workload.random = name.starts_with("rand");
  if (options.workload.random) name.remove_prefix(4);
  if (name != "read" && name != "write") {
    return usage_error(
        fmt::format("--rw {}: use read, write, randread or randwrite", options.workload_name));
  }
  options.workload.operation = name == "read" ? Operation::kRead : Operation::kWrite;
  const auto block_bytes = blockdev::parse_byte_size(map["bs"].as<std::string>());
  if (!block_bytes) return std::unexpected(block_bytes.error());
  if (*block_bytes == 0 || *block_bytes % virtio::kSectorBytes != 0 ||
      *block_bytes > kBlockBytesMax) {
    return usage_error(
        fmt::format("--bs {}: use a multiple of 512 up to 4M", map["bs"].as<std::string>()));
  }
  options.workload.block_bytes = *block_bytes;
  options.workload.depth = map["iodepth"].as<unsigned>();
  if (options.workload.depth == 0 || options.workload.depth > kDepthMax) {
    return usage_error(fmt::format("--iodepth {}: use 1 to {}", options.workload.depth, kDepthMax));
  }
  if (options.workload.depth * options.workload.block_bytes > kBuffersBytesMax)
    return usage_error("--iodepth times --bs is more than 1G of buffers; use less of one");
  options.workload.flush_every = map["fsync"].as<unsigned>();
  if (options.workload.flush_every != 0 && options.workload.operation == Operation::kRead)
    return usage_error("--fsync is for writes; use --rw write or randwrite");
  return {};
}

Expected<std::chrono::nanoseconds> seconds(const program_options::variables_map& map,
                                           const char* name, double least) {
  const double value = map[name].as<double>();
  if (!std::isfinite(value) || value < least || value > 1e6)
    return usage_error(fmt::format("--{} {}: use {} to 1000000 seconds", name, value, least));
  return std::chrono::nanoseconds(std::llround(value * 1e9));
}

}  // namespace

Expected<std::variant<BenchOptions, HelpText>> parse_options(std::span<char*> arguments) {
  const auto description = describe();
  program_options::variables_map map;
  try {
    const auto style = program_options::command_line_style::unix_style &
                       ~program_options::command_line_style::allow_guessing;
    const std::vector<std::string> words(arguments.begin() + 1, arguments.end());
    const program_options::positional_options_description none;
    program_options::store(program_options::command_line_parser(words)
                               .options(description)
                               .positional(none)
                               .style(style)
                               .run(),
                           map);
  } catch (const program_options::too_many_positional_options_error&) {
    return usage_error("more words than the command takes; see vblk bench --help");
  } catch (const program_options::error& error) {
    return usage_error(fmt::format("{}; see vblk bench --help", error.what()));
  }
  if (map.contains("help")) {
    std::ostringstream text;
    text << kUsage << '\n' << description;
    return HelpText{text.str()};
  }
  BenchOptions options;
  if (!map.contains("socket-path")) return usage_error("name a backend by --socket-path PATH");
  options.socket_path = map["socket-path"].as<std::string>();
  if (auto done = take_workload(map, options); !done) return std::unexpected(done.error());
  if (map.contains("size")) {
    const auto size = blockdev::parse_byte_size(map["size"].as<std::string>());
    if (!size) return std::unexpected(size.error());
    if (*size < options.workload.block_bytes)
      return usage_error("--size is smaller than one request (--bs)");
    options.size_bytes = *size;
  }
  const auto run_time = seconds(map, "runtime", 0.001);
  if (!run_time) return std::unexpected(run_time.error());
  options.run_time = *run_time;
  const auto ramp_time = seconds(map, "ramp_time", 0);
  if (!ramp_time) return std::unexpected(ramp_time.error());
  options.ramp_time = *ramp_time;
  options.server = map["pid"].as<int>();
  options.seed = map.contains("seed") ? map["seed"].as<std::uint64_t>() : std::random_device{}();
  const auto& format = map["output-format"].as<std::string>();
  if (format != "normal" && format != "json")
    return usage_error(fmt::format("--output-format {}: use normal or json", format));
  options.json = format == "json";
  return options;
}

}  // namespace vblk::bench
