#include "blockdev/demo/options.h"

#include <algorithm>
#include <cstdlib>
#include <random>
#include <sstream>
#include <string_view>

#include <boost/program_options.hpp>
#include <fmt/core.h>

#include "blockdev/byte_size.h"

namespace vblk::demo {

namespace {

namespace program_options = boost::program_options;
using program_options::value;

constexpr std::string_view kUsage = R"(Usage: vblk demo [options]

Compares the I/O engines on this machine: serves a disk image by each of them in
turn, drives it through its vhost-user socket, and prints what came out.

)";

// A block per request in flight would be too little for "random"; beyond, the size is the user's.
constexpr std::uint64_t kImageBytesMin = std::uint64_t{1} << 20;
constexpr double kSecondsMin = 0.05;
constexpr double kSecondsMax = 600;
constexpr unsigned kRoundsMax = 1000;

std::unexpected<Error> usage_error(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

program_options::options_description description() {
  program_options::options_description options("Options");
  options.add_options()                                                              //
      ("image", value<std::string>()->value_name("PATH"),                            //
       "file or block device to fill and use; a file that does not exist is made, "  //
       "and kept (default: a nameless temporary file)")                              //
      ("overwrite", program_options::bool_switch(),                                  //
       "allow --image to destroy the content of what exists")                        //
      ("directory", value<std::string>()->value_name("DIR"),                         //
       "where the temporary file lies (default: $TMPDIR, or else /var/tmp)")         //
      ("size", value<std::string>()->default_value("1G")->value_name("BYTES"),       //
       "size of the image, 1M or more")                                              //
      ("seconds", value<double>()->default_value(1, "1")->value_name("S"),           //
       "time of one measurement; there are five per engine and round")               //
      ("rounds", value<unsigned>()->default_value(5)->value_name("N"),               //
       "rounds, each with every engine in a new random order")                       //
      ("seed", value<std::uint64_t>()->value_name("N"),                              //
       "of the order and of the offsets (default: a new one, printed)")              //
      ("aio", value<std::string>()->default_value("threads,native,io_uring")->value_name("LIST"),
       "engines to compare")  //
      ("help", "print this text and exit");
  return options;
}

Expected<std::vector<aio::EngineName>> parse_engines(const std::string& list) {
  std::vector<aio::EngineName> engines;
  std::istringstream words(list);
  for (std::string word; std::getline(words, word, ',');) {
    const auto* const found = std::ranges::find_if(
        aio::kAllEngineNames,
        [&word](aio::EngineName name) { return aio::to_string(name) == word; });
    if (found == aio::kAllEngineNames.end()) {
      return usage_error(
          fmt::format("--aio {}: '{}' is none of threads, native, io_uring", list, word));
    }
    if (std::ranges::find(engines, *found) != engines.end()) {
      return usage_error(fmt::format("--aio {}: {} is named twice", list, word));
    }
    engines.push_back(*found);
  }
  if (engines.empty()) return usage_error("--aio names no engine");
  return engines;
}

std::string default_directory() {
  const char* const directory = std::getenv("TMPDIR");
  return directory != nullptr && *directory != '\0' ? directory : "/var/tmp";
}

Expected<DemoOptions> take(const program_options::variables_map& map) {
  DemoOptions options;
  if (map.contains("image") && map.contains("directory")) {
    return usage_error(
        "--directory is for the temporary file, and --image names another; drop one");
  }
  if (map.contains("image")) options.image_path = map["image"].as<std::string>();
  options.overwrite = map["overwrite"].as<bool>();
  if (options.overwrite && options.image_path.empty()) {
    return usage_error("--overwrite is for --image PATH; name one");
  }
  options.directory =
      map.contains("directory") ? map["directory"].as<std::string>() : default_directory();
  const auto size = blockdev::parse_byte_size(map["size"].as<std::string>());
  if (!size) return std::unexpected(size.error());
  if (*size < kImageBytesMin) return usage_error("--size: less than 1M");
  options.image_bytes = *size;
  const double seconds = map["seconds"].as<double>();
  if (!(seconds >= kSecondsMin && seconds <= kSecondsMax)) {
    return usage_error(
        fmt::format("--seconds {}: must be from {} to {}", seconds, kSecondsMin, kSecondsMax));
  }
  options.cell_time = std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000));
  options.round_count = map["rounds"].as<unsigned>();
  if (options.round_count == 0 || options.round_count > kRoundsMax) {
    return usage_error(
        fmt::format("--rounds {}: must be from 1 to {}", options.round_count, kRoundsMax));
  }
  options.seed = map.contains("seed") ? map["seed"].as<std::uint64_t>() : std::random_device{}();
  auto engines = parse_engines(map["aio"].as<std::string>());
  if (!engines) return std::unexpected(std::move(engines.error()));
  options.engines = std::move(*engines);
  return options;
}

}  // namespace

Expected<std::variant<DemoOptions, std::string>> parse_options(int argc, char** argv) {
  const auto options = description();
  program_options::variables_map map;
  try {
    const auto style = program_options::command_line_style::unix_style &
                       ~program_options::command_line_style::allow_guessing;
    program_options::store(program_options::command_line_parser(argc, argv)
                               .options(options)
                               .positional({})
                               .style(style)
                               .run(),
                           map);
  } catch (const program_options::error& error) {
    return usage_error(fmt::format("{}; see vblk demo --help", error.what()));
  }
  if (map.contains("help")) {
    std::ostringstream text;
    text << kUsage << options;
    return text.str();
  }
  return take(map);
}

}  // namespace vblk::demo
