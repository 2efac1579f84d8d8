#include "blockdev/conform/options.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <filesystem>
#include <random>
#include <sstream>
#include <string_view>

#include <boost/program_options.hpp>
#include <fmt/core.h>

#include "blockdev/byte_size.h"
#include "blockdev/conform/profile.h"
#include "blockdev/conform/registry.h"

namespace vblk::conform {

namespace program_options = boost::program_options;
using program_options::value;

namespace {

constexpr std::string_view kUsage =
    R"(Usage: vblk conform --profile NAME [options]
       vblk conform --backend-command 'PROGRAM ... {socket} ... {image}' [options]
       vblk conform --socket-path PATH [options]
       vblk conform --list

Tests a vhost-user-blk backend, any one, against what the virtio and vhost-user
specifications want of it, from the driver's side. With a profile or a command
the suite starts the backend itself, anew for every test, on a scratch image of
its own. The exit status is 0 if all tests passed (or were skipped), 1 if one
failed, 2 if the command line makes no sense, 3 if there is no backend to test,
4 if the time ended before the tests did.
)";

std::unexpected<Error> usage_error(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

program_options::options_description describe() {
  program_options::options_description description("Options");
  const auto text = [](const char* name) { return value<std::string>()->value_name(name); };
  const auto texts = [](const char* name) {
    return value<std::vector<std::string>>()->value_name(name)->composing();
  };
  description.add_options()  //
      ("profile", text("NAME"),
       "a backend whose command line is known: vblk, qemu-storage-daemon or spdk")            //
      ("program", text("PATH"), "the profile's program, where it is not the usual one")       //
      ("aio", text("ENGINE"), "the profile's engine: threads (default), native or io_uring")  //
      ("format", text("raw|qcow2"), "of the scratch image (default: raw)")                    //
      ("cache", text("MODE"),
       "the profile's cache mode: none (default), writeback, writethrough or directsync")  //
      ("backend-command", text("COMMAND"),
       "starts a backend; {socket} and {image} stand for the paths; no shell looks at it")  //
      ("read-only-command", text("COMMAND"), "the same, of a disk that cannot be written")  //
      ("resize-command", text("COMMAND"),
       "makes the served disk {bytes} long; {monitor} is a path for use in both commands")  //
      ("image-size", text("SIZE"), "of the scratch image (default: 64M)")                   //
      ("socket-path", text("PATH"), "a backend that runs already")                          //
      ("image", text("PATH"), "the file that it serves, to see what reaches the disk")      //
      ("destructive", program_options::bool_switch(),
       "write to the disk of a backend that runs already; its content is lost")  //
      ("list", program_options::bool_switch(),
       "print the tests, each with its statement, and exit")                               //
      ("test", texts("NAME"), "only this test; * and ? stand for parts; may be repeated")  //
      ("group", texts("NAME"),
       "only tests of this group (the part of a name before the slash); may be repeated")  //
      ("output", text("FORMAT"), "human (default), tap or junit")                          //
      ("randseed", text("N"), "seed of what is random (default: a new one, printed)")      //
      ("duration", text("TIME"),
       "of each integrity test, such as 10 (seconds), 5m or 2h (default: 4)")  //
      ("help", "print this text and exit");
  return description;
}

Expected<std::uint64_t> parse_number(const std::string& option, const std::string& text) {
  std::uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc{} || rest != end)
    return usage_error(fmt::format("--{} {}: must be a whole number", option, text));
  return number;
}

Expected<std::chrono::seconds> parse_duration(std::string text) {
  std::uint64_t factor = 1;
  const std::string whole = text;
  if (text.ends_with('s') || text.ends_with('m') || text.ends_with('h')) {
    factor = text.back() == 's' ? 1 : (text.back() == 'm' ? 60 : 3600);
    text.pop_back();
  }
  const auto number = parse_number("duration", text);
  constexpr std::uint64_t kMax = std::uint64_t{7} * 24 * 3600;
  if (!number || *number == 0 || *number * factor > kMax) {
    return usage_error(
        fmt::format("--duration {}: use seconds, or a number with s, m or h, up to "
                    "a week",
                    whole));
  }
  return std::chrono::seconds(*number * factor);
}

// What a shell takes for itself, besides letters and digits.
constexpr std::string_view kPlainMarks = "_-./:=,@%+";

std::string quoted(const std::string& word) {
  const auto is_plain = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || kPlainMarks.contains(c);
  };
  if (!word.empty() && std::ranges::all_of(word, is_plain)) return word;
  std::string text = "'";
  for (const char c : word) {
    if (c == '\'') {
      text += "'\\''";
    } else {
      text += c;
    }
  }
  return text + "'";
}

using Map = program_options::variables_map;

Expected<void> take_command(const Map& map, const char* option, std::vector<std::string>& words) {
  if (!map.contains(option)) return {};
  auto split = split_command(map[option].as<std::string>());
  if (!split) return std::unexpected(std::move(split.error()));
  if (split->empty()) return usage_error(fmt::format("--{} is empty", option));
  words = std::move(*split);
  return {};
}

bool contains_word(const std::vector<std::string>& words, std::string_view part) {
  return std::ranges::any_of(
      words, [part](const std::string& word) { return word.find(part) != std::string::npos; });
}

Expected<void> take_profile(const Map& map, Target& target) {
  const auto text = [&map](const char* name, const char* otherwise) {
    return map.contains(name) ? map[name].as<std::string>() : std::string(otherwise);
  };
  return apply_profile({.name = text("profile", ""),
                        .program = text("program", ""),
                        .aio = text("aio", ""),
                        .format = text("format", "raw"),
                        .cache = text("cache", "none")},
                       target);
}

Expected<void> take_target(const Map& map, Target& target) {
  const int ways = static_cast<int>(map.contains("profile") + map.contains("backend-command") +
                                    map.contains("socket-path"));
  if (ways != 1)
    return usage_error("name the backend by one of --profile, --backend-command or --socket-path");
  for (const char* option : {"program", "aio", "cache"}) {
    if (map.contains(option) && !map.contains("profile"))
      return usage_error(fmt::format("--{} is for --profile", option));
  }
  if (map.contains("image-size")) {
    auto size = blockdev::parse_byte_size(map["image-size"].as<std::string>());
    if (!size) return std::unexpected(std::move(size.error()));
    constexpr std::uint64_t kMin = std::uint64_t{16} << 20;
    if (*size < kMin || *size % kMin != 0)
      return usage_error("--image-size: use a multiple of 16M");
    target.image_bytes = *size;
  }
  if (map.contains("socket-path")) {
    for (const char* option : {"format", "image-size", "read-only-command", "resize-command"}) {
      if (map.contains(option))
        return usage_error(fmt::format("--{} is for a backend that the suite starts", option));
    }
    target.socket_path = map["socket-path"].as<std::string>();
    target.may_write = map["destructive"].as<bool>();
    if (map.contains("image")) target.image_path = map["image"].as<std::string>();
    return {};
  }
  if (map["destructive"].as<bool>() || map.contains("image")) {
    return usage_error(
        "--destructive and --image are for --socket-path; the suite's own image is always written");
  }
  target.may_write = true;
  if (map.contains("profile")) return take_profile(map, target);
  if (map.contains("format")) {
    const auto& format = map["format"].as<std::string>();
    if (format != "raw" && format != "qcow2")
      return usage_error(fmt::format("--format {}: use raw or qcow2", format));
    target.format = format == "qcow2" ? ImageFormat::kQcow2 : ImageFormat::kRaw;
  }
  if (auto taken = take_command(map, "backend-command", target.command); !taken) return taken;
  if (auto taken = take_command(map, "read-only-command", target.read_only_command); !taken)
    return taken;
  if (auto taken = take_command(map, "resize-command", target.resize_command); !taken) return taken;
  if (!target.resize_command.empty()) target.resize_by = ResizeBy::kCommand;
  if (!contains_word(target.command, "{socket}"))
    return usage_error("--backend-command: {socket} must say where the socket's path belongs");
  return {};
}

Expected<std::vector<const Test*>> take_tests(const Map& map) {
  const auto list = [&map](const char* name) {
    return map.contains(name) ? map[name].as<std::vector<std::string>>()
                              : std::vector<std::string>{};
  };
  const auto names = list("test");
  const auto groups = list("group");
  for (const std::string& group : groups) {
    if (!is_group(group))
      return usage_error(fmt::format("--group {}: there is none; see vblk conform --list", group));
  }
  for (const std::string& name : names) {
    if (select_tests({&name, 1}, {}).empty())
      return usage_error(fmt::format("--test {}: there is none; see vblk conform --list", name));
  }
  auto tests = select_tests(names, groups);
  if (tests.empty()) return usage_error("no test is of both --test and --group");
  return tests;
}

// The same command line without what a single test's does not need.
std::string repeat_of(std::span<char*> arguments, std::uint64_t seed) {
  std::string text = "vblk conform";
  for (std::size_t i = 1; i < arguments.size(); ++i) {
    const std::string word = arguments[i];
    const std::string name = word.substr(0, word.find('='));
    const bool dropped =
        name == "--test" || name == "--group" || name == "--output" || name == "--randseed";
    if (!dropped) {
      text += " " + quoted(word);
    } else if (word.find('=') == std::string::npos) {
      ++i;
    }
  }
  return text + fmt::format(" --randseed {}", seed);
}

Expected<Map> parse(std::span<char*> arguments, const program_options::options_description& all) {
  Map map;
  try {
    const auto style = program_options::command_line_style::unix_style &
                       ~program_options::command_line_style::allow_guessing;
    const std::vector<std::string> words(arguments.begin() + 1, arguments.end());
    const program_options::positional_options_description none;
    program_options::store(program_options::command_line_parser(words)
                               .options(all)
                               .positional(none)
                               .style(style)
                               .run(),
                           map);
    program_options::notify(map);
  } catch (const program_options::error& error) {
    return usage_error(fmt::format("{}; see --help", error.what()));
  }
  return map;
}

}  // namespace

Expected<std::variant<Text, ConformOptions>> parse_options(std::span<char*> arguments) {
  const auto description = describe();
  const auto map = parse(arguments, description);
  if (!map) return std::unexpected(map.error());
  if (map->contains("help")) {
    std::ostringstream text;
    text << kUsage << '\n' << description;
    return Text{text.str()};
  }
  ConformOptions options;
  auto tests = take_tests(*map);
  if (!tests) return std::unexpected(std::move(tests.error()));
  options.tests = std::move(*tests);
  if ((*map)["list"].as<bool>()) return Text{list_text(options.tests)};
  if (auto taken = take_target(*map, options.probe.target); !taken)
    return std::unexpected(std::move(taken.error()));
  const std::string format = map->contains("output") ? (*map)["output"].as<std::string>() : "human";
  if (format != "human" && format != "tap" && format != "junit")
    return usage_error(fmt::format("--output {}: use human, tap or junit", format));
  options.format = format == "tap"     ? ReportFormat::kTap
                   : format == "junit" ? ReportFormat::kJunit
                                       : ReportFormat::kHuman;
  options.probe.seed = std::random_device{}();
  if (map->contains("randseed")) {
    const auto seed = parse_number("randseed", (*map)["randseed"].as<std::string>());
    if (!seed) return std::unexpected(seed.error());
    options.probe.seed = *seed;
  }
  if (map->contains("duration")) {
    const auto duration = parse_duration((*map)["duration"].as<std::string>());
    if (!duration) return std::unexpected(duration.error());
    options.probe.soak = *duration;
  }
  options.repeat = repeat_of(arguments, options.probe.seed);
  return options;
}

}  // namespace vblk::conform
