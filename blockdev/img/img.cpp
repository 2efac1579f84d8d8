#include "blockdev/img/img.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <limits>

#include <fmt/core.h>

#include "blockdev/img/command.h"
#include "blockdev/img/output.h"
#include "blockdev/log.h"

namespace vblk::img {

namespace {

struct Command {
  std::string_view name;
  int (*run)(std::span<const std::string> words);
  std::string_view usage;
};

constexpr std::array kCommands{
    Command{"amend", amend_command, "[-p] [-q] [-f FORMAT] [-t CACHE] -o OPTIONS FILE"},
    Command{"bitmap", bitmap_command,
            "[-b SOURCE_FILE [-F FORMAT]] [-g GRANULARITY] [-f FORMAT]\n"
            "           (--add | --remove | --clear | --enable | --disable | --merge SOURCE)...\n"
            "           FILE BITMAP"},
    Command{"check", check_command,
            "[-q] [-f FORMAT] [--output=human|json] [-r leaks|all] [-T CACHE] [-U] FILE"},
    Command{"commit", commit_command,
            "[-q] [-f FORMAT] [-t CACHE] [-b BASE] [-r RATE] [-d] [-p] FILE"},
    Command{"compare", compare_command,
            "[-f FORMAT] [-F FORMAT] [-T CACHE] [-p] [-q] [-s] [-U] FILE1 FILE2"},
    Command{
        "convert", convert_command,
        "[-U] [-C | -c] [-p] [-q] [-n] [-f FORMAT] [-t CACHE] [-T CACHE] [-O FORMAT]\n"
        "          [-B BACKING -F FORMAT] [-o OPTIONS] [-l SNAPSHOT] [-S SIZE] [-r RATE] [-m N]\n"
        "          [-W] [--target-is-zero] [--salvage] [--bitmaps [--skip-broken-bitmaps]]\n"
        "          FILE [FILE2 ...] OUTPUT"},
    Command{"create", create_command,
            "[-q] [-f FORMAT] [-b BACKING -F FORMAT] [-u] [-o OPTIONS] FILE [SIZE]"},
    Command{
        "dd", dd_command,
        "[-U] [-f FORMAT] [-O FORMAT] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=FILE of=OUTPUT"},
    Command{"info", info_command, "[-f FORMAT] [--output=human|json] [--backing-chain] [-U] FILE"},
    Command{"map", map_command,
            "[-f FORMAT] [--start-offset=OFFSET] [--max-length=LENGTH] [--output=human|json] [-U]\n"
            "           FILE"},
    Command{"measure", measure_command,
            "[--output=human|json] [-O FORMAT] [-o OPTIONS] [-U]\n"
            "           [--size N | [-f FORMAT] [-l SNAPSHOT] FILE]"},
    Command{"rebase", rebase_command,
            "[-f FORMAT] [-t CACHE] [-T CACHE] [-p] [-q] [-u] -b BACKING [-F FORMAT] FILE"},
    Command{"resize", resize_command,
            "[-f FORMAT] [--preallocation=MODE] [-q] [--shrink] FILE [+|-]SIZE"},
    Command{"snapshot", snapshot_command,
            "[-U] [-q] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] FILE"}};

void print_usage() {
  say("Usage: vblk img COMMAND [options]\n\n"
      "Makes, describes, checks and converts raw and qcow2 images; commands, options, output\n"
      "and exit statuses are those of qemu-img.\n\nCommands:\n");
  for (const Command& command : kCommands) say("  {:9}{}\n", command.name, command.usage);
  say("\nFORMAT is raw or qcow2; without it the file's first bytes tell. '-o help' lists the\n"
      "options of a format. Sizes are in bytes, or with a suffix k, M, G, T, P, E.\n"
      "See docs/img.md and the manual page vblk(1).\n");
}

}  // namespace

int fail(std::string_view message, int status) {
  flush_output();
  warn("vblk img: {}\n", message);
  return status;
}

Expected<OutputFormat> parse_output_format(std::string_view text) {
  if (text.empty() || text == "human") return OutputFormat::kHuman;
  if (text == "json") return OutputFormat::kJson;
  return make_error(ErrorKind::kInvalidArgument, "--output takes human or json");
}

Expected<std::uint64_t> parse_size(std::string_view text, std::string_view what) {
  const std::string copy(text);
  const auto bad = [&](std::string_view why) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("cannot read '{}' as {}: {}; write a number, with a suffix k, M, "
                                  "G, T, P or E if you like",
                                  text, what, why));
  };
  if (text.empty() || text.front() < '0' || text.front() > '9')
    return bad("it does not begin with a digit");
  char* end = nullptr;
  const bool is_hex = text.starts_with("0x") || text.starts_with("0X");
  const std::size_t digits = text.find_first_not_of("0123456789");
  const bool has_fraction = !is_hex && digits != std::string_view::npos && text[digits] == '.';
  errno = 0;
  const unsigned long long whole = std::strtoull(copy.c_str(), &end, is_hex ? 16 : 10);
  if (errno != 0) return bad("it is too large");
  double fraction = 0;
  if (has_fraction) fraction = std::strtod(copy.c_str() + digits, &end);
  const std::string_view suffix = text.substr(static_cast<std::size_t>(end - copy.c_str()));
  unsigned shift = 0;
  if (!suffix.empty()) {
    constexpr std::string_view kSuffixes = "bkmgtpe";
    const auto lower = static_cast<char>(std::tolower(static_cast<unsigned char>(suffix.front())));
    const std::size_t position = kSuffixes.find(lower);
    if (suffix.size() > 1 || position == std::string_view::npos || is_hex)
      return bad("the suffix is unknown");
    shift = static_cast<unsigned>(position) * 10;
  }
  if (has_fraction && shift == 0) return bad("a byte has no fraction");
  constexpr std::uint64_t kMax = std::numeric_limits<std::int64_t>::max();
  if (whole > kMax >> shift) return bad("it is too large");
  return (std::uint64_t{whole} << shift) +
         static_cast<std::uint64_t>(fraction * static_cast<double>(std::uint64_t{1} << shift));
}

std::string human_size(std::uint64_t bytes) {
  constexpr std::array kUnits{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  // No more than three digits before the point: 1000 of one are 0.977 of the next.
  while (value >= 1000 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.3g} {}", value, kUnits[unit]);
}

int run(std::span<const std::string> words) {
  if (words.empty()) return fail("no command; see vblk img --help");
  if (words[0] == "--help" || words[0] == "-h" || words[0] == "help") {
    print_usage();
    return 0;
  }
  if (words[0] == "--version" || words[0] == "-V") {
    say("vblk img {}\n", VBLK_VERSION);
    return finish_output(0);
  }
  const auto found = std::ranges::find(kCommands, std::string_view(words[0]), &Command::name);
  if (found == kCommands.end())
    return fail(fmt::format("there is no command '{}'; see vblk img --help", words[0]));
  const auto rest = words.subspan(1);
  const auto end = std::ranges::find(rest, std::string("--"));
  const auto is_help = [](const std::string& word) { return word == "--help" || word == "-h"; };
  if (std::any_of(rest.begin(), end, is_help)) {
    say("Usage: vblk img {} {}\n", found->name, found->usage);
    return 0;
  }
  // What a command tells of an image it says itself.
  log::set_level(log::Level::kWarning);
  return finish_output(found->run(rest));
}

}  // namespace vblk::img
