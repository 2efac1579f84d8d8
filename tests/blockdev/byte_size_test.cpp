// Sizes as people write them.
#include "blockdev/byte_size.h"

#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <string_view>

#include <gtest/gtest.h>

#include "tests/support/seed.h"

namespace vblk::blockdev {
namespace {

constexpr std::uint64_t kKibi = 1024;
constexpr std::uint64_t kSizeMax = std::numeric_limits<std::int64_t>::max();

TEST(ByteSize, reads_whole_numbers_with_and_without_a_suffix) {
  struct Case {
    std::string_view text;
    std::uint64_t bytes;
  };
  for (const auto& [text, bytes] : {
           Case{"0", 0},
           Case{"512", 512},
           Case{"007", 7},
           Case{"512b", 512},
           Case{"512B", 512},
           Case{"64k", 64 * kKibi},
           Case{"64K", 64 * kKibi},
           Case{"3m", 3 * kKibi * kKibi},
           Case{"3M", 3 * kKibi * kKibi},
           Case{"10G", 10 * kKibi * kKibi * kKibi},
           Case{"2t", 2 * kKibi * kKibi * kKibi * kKibi},
           Case{"5P", 5 * kKibi * kKibi * kKibi * kKibi * kKibi},
           Case{"7E", 7 * kKibi * kKibi * kKibi * kKibi * kKibi * kKibi},
           Case{"0E", 0},
       }) {
    const auto parsed = parse_byte_size(text);
    ASSERT_TRUE(parsed) << parsed.error().message;
    EXPECT_EQ(*parsed, bytes) << text;
  }
}

TEST(ByteSize, refuses_everything_else_and_names_it) {
  using namespace std::string_view_literals;
  for (const std::string_view text :
       {""sv,      " "sv,   "k"sv,    "-1"sv,   "+1"sv,   " 1"sv,   "1 "sv,
        "1 k"sv,   "1kB"sv, "1KiB"sv, "1.5G"sv, "1e3"sv,  "0x10"sv, "1z"sv,
        "1,000"sv, "ten"sv, "1k1"sv,  "1\0"sv,  "1k\0"sv, "\xff"sv}) {
    const auto parsed = parse_byte_size(text);
    ASSERT_FALSE(parsed) << "'" << text << "'";
    EXPECT_EQ(parsed.error().kind, ErrorKind::kInvalidArgument);
    EXPECT_NE(parsed.error().message.find("'" + std::string(text) + "'"), std::string::npos)
        << parsed.error().message;
  }
}

// File offsets are signed, so the last size that exists is 2^63 - 1.
TEST(ByteSize, takes_the_largest_size_and_not_one_byte_more) {
  EXPECT_EQ(parse_byte_size("9223372036854775807"), kSizeMax);
  EXPECT_EQ(parse_byte_size("9007199254740991k"), kSizeMax - 1023);
  for (const std::string_view text :
       {"9223372036854775808", "9223372036854775808b", "18446744073709551615",
        "18446744073709551616", "99999999999999999999999999", "9007199254740992k", "8E", "16E",
        "18446744073709551615E", "36028797018963968k"}) {
    const auto parsed = parse_byte_size(text);
    ASSERT_FALSE(parsed) << text << " became " << *parsed;
    EXPECT_NE(parsed.error().message.find("too large"), std::string::npos);
  }
}

TEST(ByteSize, writes_the_shortest_exact_form) {
  EXPECT_EQ(format_byte_size(0), "0");
  EXPECT_EQ(format_byte_size(1), "1");
  EXPECT_EQ(format_byte_size(513), "513");
  EXPECT_EQ(format_byte_size(1023), "1023");
  EXPECT_EQ(format_byte_size(1024), "1k");
  EXPECT_EQ(format_byte_size(1025), "1025");
  EXPECT_EQ(format_byte_size(1536 * kKibi), "1536k");
  EXPECT_EQ(format_byte_size(1536 * kKibi * kKibi), "1536M");
  EXPECT_EQ(format_byte_size(kKibi * kKibi * kKibi), "1G");
  EXPECT_EQ(format_byte_size(std::uint64_t{1} << 60), "1E");
  EXPECT_EQ(format_byte_size(kSizeMax), "9223372036854775807");
}

TEST(ByteSize, reads_back_what_it_wrote) {
  std::mt19937_64 random(test::test_seed());
  for (int i = 0; i < 20000; ++i) {
    // Sizes of every magnitude, half of them round.
    std::uint64_t bytes = (random() & kSizeMax) >> random() % 63;
    if (i % 2 == 0) bytes = bytes >> 20 << 20;
    const std::string text = format_byte_size(bytes);
    ASSERT_EQ(parse_byte_size(text), bytes) << text;
  }
}

}  // namespace
}  // namespace vblk::blockdev
