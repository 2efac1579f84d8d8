#include "blockdev/byte_size.h"

#include <cctype>
#include <charconv>
#include <limits>

#include <fmt/core.h>

namespace vblk::blockdev {

namespace {

// Each suffix is 1024 times the one before it.
constexpr std::string_view kSuffixes = "bkmgtpe";
constexpr unsigned kBitsPerSuffix = 10;
// File offsets are signed.
constexpr std::uint64_t kSizeMax = std::numeric_limits<std::int64_t>::max();

std::unexpected<Error> bad_size(std::string_view text, std::string_view why) {
  return make_error(
      ErrorKind::kInvalidArgument,
      fmt::format("cannot read '{}' as a size: {}; write a whole number, with a suffix such as k, "
                  "M, G or T if you like",
                  text, why));
}

}  // namespace

Expected<std::uint64_t> parse_byte_size(std::string_view text) {
  std::uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error == std::errc::result_out_of_range) return bad_size(text, "it is too large");
  if (error != std::errc{}) return bad_size(text, "it does not start with a digit");
  unsigned shift = 0;
  if (rest != end) {
    const auto lower = static_cast<char>(std::tolower(static_cast<unsigned char>(*rest)));
    const auto position = kSuffixes.find(lower);
    if (rest + 1 != end || position == std::string_view::npos)
      return bad_size(text, "the suffix is unknown");
    shift = static_cast<unsigned>(position) * kBitsPerSuffix;
  }
  if (number > (kSizeMax >> shift)) return bad_size(text, "it is too large");
  return number << shift;
}

std::string format_byte_size(std::uint64_t bytes) {
  std::size_t suffix = 0;
  while (bytes != 0 && bytes % 1024 == 0 && suffix + 1 < kSuffixes.size()) {
    bytes /= 1024;
    ++suffix;
  }
  if (suffix == 0) return fmt::format("{}", bytes);
  // "k" is small by custom, the others are capitals.
  const char letter =
      suffix == 1 ? 'k'
                  : static_cast<char>(std::toupper(static_cast<unsigned char>(kSuffixes[suffix])));
  return fmt::format("{}{}", bytes, letter);
}

}  // namespace vblk::blockdev
