// The pieces of `vblk img` that have corners: what a user types, and what a user reads.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "blockdev/block_node.h"
#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/json.h"
#include "blockdev/img/names.h"
#include "blockdev/img/source.h"
#include "blockdev/img/zeroes.h"

namespace vblk::img {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

constexpr std::array<std::string_view, 8> kOptions{"f:", "o:",      "q",        "p",
                                                   "U",  "output:", "object:!", "output-file:"};

Expected<Arguments> parse(const std::vector<std::string>& words) {
  return Arguments::parse(words, kOptions);
}

TEST(ImgArguments, may_stand_anywhere_joined_or_apart) {
  const auto arguments =
      parse({"a", "-qf", "raw", "-U", "b", "--output=json", "-oa=1", "-o", "b=2"});
  ASSERT_TRUE(arguments) << arguments.error().message;
  EXPECT_THAT(arguments->names(), ElementsAre("a", "b"));
  EXPECT_TRUE(arguments->has("q"));
  EXPECT_FALSE(arguments->has("p"));
  EXPECT_EQ(arguments->value_or("f", ""), "raw");
  EXPECT_EQ(arguments->value_or("output", ""), "json");
  EXPECT_THAT(arguments->values("o"), ElementsAre("a=1", "b=2"));
}

TEST(ImgArguments, end_at_two_dashes) {
  const auto arguments = parse({"-q", "--", "-p", "--output"});
  ASSERT_TRUE(arguments) << arguments.error().message;
  EXPECT_THAT(arguments->names(), ElementsAre("-p", "--output"));
}

TEST(ImgArguments, may_be_abbreviated_while_they_are_clear) {
  EXPECT_EQ(parse({"--output-f=x"})->value_or("output-file", ""), "x");
  EXPECT_EQ(parse({"--output", "x"})->value_or("output", ""), "x");
  EXPECT_THAT(parse({"--outp=x"}).error().message, HasSubstr("ambiguous"));
}

TEST(ImgArguments, that_are_wrong_are_named) {
  EXPECT_THAT(parse({"-x"}).error().message, HasSubstr("'-x'"));
  EXPECT_THAT(parse({"--nonsense"}).error().message, HasSubstr("'--nonsense'"));
  EXPECT_THAT(parse({"-f"}).error().message, HasSubstr("needs a value"));
  EXPECT_THAT(parse({"--output"}).error().message, HasSubstr("needs a value"));
  EXPECT_THAT(parse({"-q=1"}).error().message, HasSubstr("'-='"));
  EXPECT_THAT(parse({"--object=secret"}).error().message, HasSubstr("--object is not supported"));
}

TEST(ImgKeyValues, have_commas_doubled) {
  EXPECT_THAT(parse_key_values("a=1,b=x,,y,c"),
              ElementsAre(Pair("a", "1"), Pair("b", "x,y"), Pair("c", "on")));
  EXPECT_THAT(parse_key_values(""), ElementsAre());
  EXPECT_THAT(parse_key_values("a=b=c,,"), ElementsAre(Pair("a", "b=c,")));
}

TEST(ImgSize, is_a_number_with_a_suffix_and_a_fraction) {
  const std::array<std::pair<std::string_view, std::uint64_t>, 8> sizes{
      {{"0", 0},
       {"512", 512},
       {"1k", 1024},
       {"1.5M", 1572864},
       {"0x200", 512},
       {"3b", 3},
       {"7E", std::uint64_t{7} << 60},
       {"9223372036854775807", ~std::uint64_t{0} >> 1}}};
  for (const auto& [text, bytes] : sizes) EXPECT_EQ(parse_size(text, "it").value(), bytes) << text;
  for (const std::string_view text : {"", "x", "-1", "1x", "1kk", "1.5", "8E",
                                      "9223372036854775808", "99999999999999999999", " 1"})
    EXPECT_FALSE(parse_size(text, "it")) << text;
}

TEST(ImgSize, is_told_in_three_digits) {
  const std::array<std::pair<std::uint64_t, std::string_view>, 7> sizes{
      {{0, "0 B"},
       {999, "999 B"},
       {1000, "0.977 KiB"},
       {200704, "196 KiB"},
       {1572864, "1.5 MiB"},
       {std::uint64_t{10} << 30, "10 GiB"},
       {std::uint64_t{1} << 60, "1 EiB"}}};
  for (const auto& [bytes, text] : sizes) EXPECT_EQ(human_size(bytes), text) << bytes;
}

TEST(ImgJson, has_a_member_to_a_line) {
  const boost::json::value value{{"a", 1}, {"b", {true, "x\n"}}, {"c", boost::json::array{}}};
  EXPECT_EQ(pretty_json(value),
            "{\n    \"a\": 1,\n    \"b\": [\n        true,\n        \"x\\n\"\n    ],\n"
            "    \"c\": [\n    ]\n}\n");
}

TEST(ImgNames, lead_from_the_folder_of_the_image) {
  EXPECT_EQ(resolve_name("a/b.qcow2", "c.raw"), "a/c.raw");
  EXPECT_EQ(resolve_name("b.qcow2", "c.raw"), "c.raw");
  EXPECT_EQ(resolve_name("a/b.qcow2", "/c.raw"), "/c.raw");
  EXPECT_EQ(resolve_name("a/b.qcow2", "file:c:d.raw"), "a/c:d.raw");
  EXPECT_EQ(resolve_name("a/b.qcow2", "nbd:host:1"), "nbd:host:1");
}

TEST(ImgZeroes, are_told_from_everything_else) {
  for (const std::size_t size : {1U, 15U, 16U, 17U, 512U, 4099U}) {
    std::vector<std::byte> bytes(size);
    EXPECT_TRUE(is_zero(bytes)) << size;
    for (const std::size_t at : {std::size_t{0}, size / 2, size - 1}) {
      bytes[at] = std::byte{1};
      EXPECT_FALSE(is_zero(bytes)) << size << " " << at;
      bytes[at] = std::byte{0};
    }
  }
}

// A disk of data up to a hole and behind it, which counts how often it is asked.
class CountedDisk final : public blockdev::BlockNode {
 public:
  CountedDisk(std::uint64_t size, std::uint64_t hole, std::uint64_t hole_end)
      : hole_(hole), hole_end_(hole_end) {
    size_bytes_.store(size);
  }
  Task<int> range_status(IoContext& /*context*/, std::uint64_t offset, std::uint64_t length,
                         blockdev::RangeStatus& status) override {
    ++asked;
    const bool is_hole = offset >= hole_ && offset < hole_end_;
    const std::uint64_t end = is_hole ? hole_end_ : offset < hole_ ? hole_ : size_bytes();
    status = {
        .kind = is_hole ? blockdev::RangeStatus::Kind::kZero : blockdev::RangeStatus::Kind::kData,
        .length_bytes = std::min(length, end - offset)};
    co_return 0;
  }
  int asked{0};

 private:
  void do_submit(blockdev::BlockRequest& request, IoContext& context) override {
    context.complete_later(request, EIO);
  }
  const std::uint64_t hole_;
  const std::uint64_t hole_end_;
};

TEST(ImgStatus, of_a_long_stretch_of_data_is_asked_for_once) {
  constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
  CountedDisk disk(300 * kMiB, 100 * kMiB, 101 * kMiB);
  StatusReader reader(&disk, kWholeChain);
  const auto context = make_context();
  ASSERT_TRUE(context) << context.error().message;
  const auto read = [&](std::uint64_t offset, std::uint64_t length) {
    ChainStatus status;
    EXPECT_EQ((*context)->run(reader.read((*context)->context(), offset, length, status)), 0);
    return status;
  };
  // From the middle, so that what lies before is not known by it.
  EXPECT_EQ(read(10 * kMiB, kMiB).length_bytes, kMiB);
  for (std::uint64_t at = 11; at < 100; ++at) {
    const ChainStatus status = read(at * kMiB, 3 * kMiB);
    EXPECT_TRUE(status.is_data && status.is_present && !status.is_zero);
    EXPECT_EQ(status.length_bytes, std::min<std::uint64_t>(3, 100 - at) * kMiB);
  }
  EXPECT_EQ(disk.asked, 1);
  EXPECT_TRUE(read(9 * kMiB, kMiB).is_data);
  EXPECT_EQ(disk.asked, 2);
  const ChainStatus hole = read(100 * kMiB, 5 * kMiB);
  EXPECT_TRUE(hole.is_zero && !hole.is_data);
  EXPECT_EQ(hole.length_bytes, kMiB);
  EXPECT_TRUE(read(101 * kMiB, kMiB).is_data);
  EXPECT_TRUE(read(299 * kMiB, kMiB).is_data);
  EXPECT_EQ(disk.asked, 4);
  EXPECT_EQ(read(299 * kMiB, kMiB).length_bytes, kMiB);
}

TEST(ImgStatus, of_nothing_is_zeroes) {
  StatusReader reader(nullptr, kWholeChain);
  const auto context = make_context();
  ASSERT_TRUE(context) << context.error().message;
  ChainStatus status;
  EXPECT_EQ((*context)->run(reader.read((*context)->context(), 5, 7, status)), 0);
  EXPECT_TRUE(status.is_zero && !status.is_data);
  EXPECT_EQ(status.length_bytes, 7U);
}

}  // namespace
}  // namespace vblk::img
