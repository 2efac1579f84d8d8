// Changes of metadata by those who have an image to themselves (image_editor.h): what they make,
// and what a power cut leaves of them.
//
// A power cut comes at each of the disk's operations in turn: all from then on fail, and of what
// was not flushed each sector is lost or kept. What is left must have no errors and the same disk,
// and be as it was or as it was to be.
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "blockdev/log.h"
#include "blockdev/private_context.h"
#include "blockdev/qcow2/bitmap_editor.h"
#include "blockdev/qcow2/bitmaps.h"
#include "blockdev/qcow2/check.h"
#include "blockdev/qcow2/header_rewrite.h"
#include "blockdev/qcow2/image_amender.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/raw_node.h"
#include "tests/qcow2/image_check.h"
#include "tests/qcow2/image_format.h"
#include "tests/support/seed.h"

namespace vblk::qcow2 {
namespace {

using aio::SimulatedDisk;
using blockdev::Task;
using testing::Bytes;
using testing::format_image;
using testing::FormattedImage;
using testing::ImageSpec;
using testing::put_be;
using testing::Tags;

// An image's file on a simulated disk, open to be changed.
class Bench {
 public:
  Bench(const Bytes& image, std::uint64_t seed, bool loses_flushes = false)
      : disk({.seed = seed, .loses_flushes = loses_flushes}, image),
        file(blockdev::ImageFile::wrap(SimulatedDisk::kBufferedFd, SimulatedDisk::kBufferedFd,
                                       image.size(), testing::kSectorBytes, false,
                                       [this](std::uint64_t size) { return resize(size); }),
             blockdev::RawNodeOptions{.name = "simulated", .holds_format = true}),
        make([this, seed] {
          return std::make_unique<blockdev::PrivateContext>(std::make_unique<aio::EngineSet>(
              *aio::SimulatedEngine::create(disk, {.seed = seed})));
        }),
        context(std::move(*make())) {
    auto read = read_header(file, make);
    if (read) header = std::move(*read);
    error = read ? "" : read.error().message;
    file.attach(context->context());
  }
  ~Bench() { file.detach(context->context()); }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;
  int run(Task<int> task) { return context->run(std::move(task)); }
  // After so many more operations the disk does nothing any more.
  void cut_after(std::uint64_t operations) {
    left_ = operations;
    disk.set_fault_plan([this](const aio::IoRequest&, std::uint64_t) {
      if (left_ == 0) is_off_ = true;
      if (is_off_) return std::optional(EIO);
      --left_;
      return std::optional<int>();
    });
  }

  SimulatedDisk disk;
  blockdev::RawNode file;
  blockdev::MakePrivateContext make;
  std::unique_ptr<blockdev::PrivateContext> context;
  Header header;
  std::string error;  // why there is no header

 private:
  int resize(std::uint64_t size_bytes) {
    if (is_off_) return EIO;
    disk.resize(size_bytes);
    return 0;
  }
  std::uint64_t left_{0};
  bool is_off_{false};
};

class Editor : public ::testing::Test {
 protected:
  // Every power cut would be told of.
  void SetUp() override { log::set_level(log::Level::kOff); }
  void TearDown() override { log::set_level(log::Level::kInfo); }
};

using Edit = std::function<int(Bench&)>;
// What of an image an edit may change, as a text.
using Look = std::function<std::string(const Bytes&)>;

// What a power cut may not leave behind; empty: nothing of it is there.
std::string judge(const Bytes& image, const FormattedImage& formatted) {
  const testing::CheckedImage checked = testing::check_image(image, formatted.backing);
  if (!checked.errors.empty()) return checked.errors.front();
  if (checked.disk != formatted.disk) return "the disk has changed";
  Bench bench(image, 1);
  if (!bench.error.empty()) return bench.error;
  std::string found;
  CheckResult result;
  const TellFinding tell = [&found](const std::string& line) { found += line + "\n"; };
  const int error =
      bench.run(check_image(bench.file, bench.context->context(), bench.header, tell, result));
  if (error != 0) return "it cannot be checked";
  return result.corruptions + result.check_errors == 0 ? "" : found;
}

struct PowerCuts {
  std::uint64_t count{0};
  std::string failure;  // the first one
};

PowerCuts cut_everywhere(const FormattedImage& formatted, const Bytes& image, const Edit& edit,
                         const Look& look, std::mt19937_64& random, bool loses_flushes = false) {
  Bench whole(image, random());
  PowerCuts cuts;
  if (edit(whole) != 0) return {0, "the edit fails by itself"};
  const std::string before = look(image);
  const std::string after = look(whole.disk.current());
  if (before == after) return {0, "the edit changes nothing"};
  if (std::string failure = judge(whole.disk.current(), formatted); !failure.empty())
    return {0, "without a power cut: " + failure};
  for (std::uint64_t operations = 0;; ++operations) {
    Bench bench(image, random(), loses_flushes);
    bench.cut_after(operations);
    const bool is_done = edit(bench) == 0;
    const Bytes left = bench.disk.after_power_cut(random());
    ++cuts.count;
    std::string failure = judge(left, formatted);
    const std::string state = failure.empty() ? look(left) : "";
    if (failure.empty() && state != before && state != after)
      failure =
          fmt::format("neither as it was nor as it was to be: {}\n{}\n{}", state, before, after);
    if (failure.empty() && is_done && state != after) failure = "it was done, and is gone";
    if (!failure.empty()) {
      cuts.failure = fmt::format("after {} operations: {}", operations, failure);
      return cuts;
    }
    if (is_done) return cuts;
  }
}

// ---- Bitmaps.

std::string look_at_bitmaps(const Bytes& image) {
  Bench bench(image, 1);
  const auto listed = read_bitmaps(bench.file, bench.header, bench.make);
  if (!listed) return listed.error().message;
  std::string text;
  for (const Bitmap& bitmap : *listed) {
    std::vector<std::byte> bits;
    const int error =
        bench.run(read_bitmap_bits(bench.file, bench.context->context(), bench.header.geometry,
                                   bench.header.size_bytes, bitmap.entry, bits));
    std::size_t sum = 0;
    for (const std::byte byte : bits) sum = sum * 31 + std::to_integer<std::size_t>(byte);
    text += fmt::format("{} {} {} {} {} {}\n", bitmap.name, bitmap.entry.flags,
                        bitmap.entry.granularity_bits, bits.size(), sum, error);
  }
  return text;
}

int edit_bitmaps(Bench& bench, const std::function<int(BitmapEditor&)>& change) {
  BitmapEditor editor(bench.file, bench.context->context(), bench.header);
  int error = bench.run(editor.load());
  if (error == 0) error = change(editor);
  if (error == 0) error = bench.run(editor.save());
  return error;
}

// With bitmaps "a", whose table says that some clusters of it are all ones, "b", which has data,
// and an empty one.
Bytes with_bitmaps(const Bytes& image, std::mt19937_64& random) {
  Bench bench(image, random());
  EXPECT_EQ(edit_bitmaps(bench,
                         [](BitmapEditor& editor) {
                           return editor.add("a", 512) | editor.add("empty", std::nullopt) |
                                  editor.add("b", 4096);
                         }),
            0);
  Bytes changed = bench.disk.current();
  Bench again(changed, random());
  const auto listed = read_bitmaps(again.file, again.header, again.make);
  for (const Bitmap& bitmap : *listed) {
    if (bitmap.name != "a") continue;
    for (std::uint64_t i = 0; i < bitmap.entry.table_entries; ++i)
      put_be(changed, bitmap.entry.table_offset + 8 * i, 8, i == 0 ? 1 : random() % 2);
  }
  Bench last(changed, random());
  EXPECT_EQ(edit_bitmaps(
                last, [&last](BitmapEditor& editor) { return last.run(editor.merge("b", "a")); }),
            0);
  return last.disk.current();
}

int change_many(Bench& bench) {
  return edit_bitmaps(bench, [&bench](BitmapEditor& editor) {
    int error = editor.add("new", 512);
    if (error == 0) error = bench.run(editor.merge("new", "b"));
    if (error == 0) error = editor.clear("b");
    if (error == 0) error = editor.enable("empty", false);
    if (error == 0) error = editor.remove("a");
    return error;
  });
}

int remove_all(Bench& bench) {
  return edit_bitmaps(bench, [](BitmapEditor& editor) {
    return editor.remove("a") | editor.remove("b") | editor.remove("empty");
  });
}

int disable_one(Bench& bench) {
  return edit_bitmaps(bench, [](BitmapEditor& editor) { return editor.enable("b", false); });
}

std::vector<ImageSpec> specs() {
  return {{.cluster_bits = 9, .mapped_percent = 40},
          {.cluster_bits = 12, .backing_bytes = 1 << 19, .snapshot = true, .mapped_percent = 60},
          {.cluster_bits = 16, .refcount_order = 6, .mapped_percent = 50, .compressed_percent = 20},
          {.cluster_bits = 14, .extended_l2 = true, .lazy_refcounts = true, .mapped_percent = 70}};
}

TEST_F(Editor, bitmaps_survive_power_cuts_as_they_were_or_as_they_are_to_be) {
  std::mt19937_64 random(test::test_seed());
  for (const ImageSpec& spec : specs()) {
    const FormattedImage formatted = format_image(spec, random);
    const Bytes image = with_bitmaps(formatted.bytes, random);
    EXPECT_EQ(judge(image, formatted), "") << spec.to_string();
    for (const Edit& edit : {Edit(change_many), Edit(remove_all), Edit(disable_one)}) {
      const PowerCuts cuts = cut_everywhere(formatted, image, edit, look_at_bitmaps, random);
      EXPECT_EQ(cuts.failure, "") << spec.to_string();
      EXPECT_GT(cuts.count, 3U);
    }
  }
}

TEST_F(Editor, power_cuts_are_noticed_on_a_disk_that_loses_flushes) {
  std::mt19937_64 random(test::test_seed());
  bool is_noticed = false;
  for (int run = 0; run < 20 && !is_noticed; ++run) {
    const FormattedImage formatted = format_image(specs()[1], random);
    const Bytes image = with_bitmaps(formatted.bytes, random);
    is_noticed = !cut_everywhere(formatted, image, change_many, look_at_bitmaps, random, true)
                      .failure.empty();
  }
  EXPECT_TRUE(is_noticed);
}

TEST_F(Editor, merges_bits_of_any_granularity_as_a_map_of_bytes_does) {
  std::mt19937_64 random(test::test_seed());
  for (int run = 0; run < 200; ++run) {
    const std::uint64_t disk_bytes = 512 * (1 + random() % 3000);
    const auto from_bits = static_cast<unsigned>(9 + random() % 12);
    const auto to_bits = static_cast<unsigned>(9 + random() % 12);
    const auto granules = [disk_bytes](unsigned bits) { return ((disk_bytes - 1) >> bits) + 1; };
    std::vector<std::byte> from(bitmap_bytes(disk_bytes, from_bits));
    std::vector<std::byte> to(bitmap_bytes(disk_bytes, to_bits));
    const auto get = [](const std::vector<std::byte>& bits, std::uint64_t i) {
      return (std::to_integer<unsigned>(bits[i / 8]) >> (i % 8) & 1U) != 0;
    };
    const auto set = [](std::vector<std::byte>& bits, std::uint64_t i) {
      bits[i / 8] |= static_cast<std::byte>(1U << (i % 8));
    };
    for (std::uint64_t i = 0; i < granules(from_bits); ++i) {
      if (random() % 3 == 0) set(from, i);
    }
    for (std::uint64_t i = 0; i < granules(to_bits); ++i) {
      if (random() % 5 == 0) set(to, i);
    }
    std::vector<std::byte> wanted = to;
    for (std::uint64_t sector = 0; sector < disk_bytes; sector += 512) {
      if (get(from, sector >> from_bits)) set(wanted, sector >> to_bits);
    }
    merge_bitmap_bits(disk_bytes, from, from_bits, to, to_bits);
    ASSERT_EQ(to, wanted) << disk_bytes << " " << from_bits << " " << to_bits;
  }
}

// ---- Properties.

std::string look_at_format(const Bytes& image) {
  Bench bench(image, 1);
  return fmt::format("{} {} {} {}", bench.header.version, bench.header.geometry.refcount_order,
                     bench.header.compatible_features & kCompatLazyRefcounts,
                     bench.header.snapshot_count) +
         look_at_bitmaps(image);
}

Edit amending(const Amendment& amendment) {
  return [amendment](Bench& bench) {
    ImageAmender amender(bench.file, bench.context->context(), bench.header);
    return bench.run(amender.amend(amendment));
  };
}

TEST_F(Editor, amendments_survive_power_cuts_as_they_were_or_as_they_are_to_be) {
  std::mt19937_64 random(test::test_seed());
  const Amendment to_v2{.version = 2};
  const Amendment to_v3{.version = 3, .lazy_refcounts = true};
  const Amendment wider{.refcount_order = 6};
  struct Case {
    ImageSpec spec;
    Amendment amendment;
  };
  const std::vector<Case> cases{
      {{.cluster_bits = 9, .mapped_percent = 60}, to_v2},
      {{.cluster_bits = 12, .backing_bytes = 1 << 19, .snapshot = true, .mapped_percent = 60},
       to_v2},
      {{.cluster_bits = 12, .snapshot = true, .mapped_percent = 60}, to_v2},
      {{.version = 2, .cluster_bits = 10, .snapshot = true, .mapped_percent = 50}, to_v3},
      {{.version = 2, .cluster_bits = 16, .mapped_percent = 50}, to_v3},
      {{.cluster_bits = 12, .refcount_order = 3, .snapshot = true, .mapped_percent = 60}, wider},
      {{.cluster_bits = 9, .refcount_order = 5, .mapped_percent = 60}, {.refcount_order = 0}}};
  for (const auto& [spec, amendment] : cases) {
    const FormattedImage formatted = format_image(spec, random);
    const Tags snapshot = testing::check_image(formatted.bytes, formatted.backing).snapshot;
    // What is in a snapshot must stay too.
    const Look look = [&](const Bytes& image) {
      const bool is_kept = testing::check_image(image, formatted.backing).snapshot == snapshot;
      return look_at_format(image) + (is_kept ? "" : " the snapshot has changed");
    };
    const PowerCuts cuts =
        cut_everywhere(formatted, formatted.bytes, amending(amendment), look, random);
    EXPECT_EQ(cuts.failure, "") << spec.to_string();
    EXPECT_GT(cuts.count, 3U);
    Bench bench(formatted.bytes, random());
    ASSERT_EQ(amending(amendment)(bench), 0);
    EXPECT_EQ(look(bench.disk.current()).find("has changed"), std::string::npos);
    EXPECT_EQ(testing::check_image(bench.disk.current(), formatted.backing).leaks, 0U);
  }
}

TEST_F(Editor, refuses_an_amendment_before_it_writes_anything) {
  std::mt19937_64 random(test::test_seed());
  const FormattedImage formatted = format_image(specs()[3], random);
  Bench bench(formatted.bytes, random());
  EXPECT_EQ(amending({.version = 2})(bench), EINVAL);
  EXPECT_EQ(amending({.data_file = "x"})(bench), EINVAL);
  EXPECT_EQ(bench.disk.current(), formatted.bytes);
  const FormattedImage shared = format_image(specs()[1], random);
  Bench narrow(shared.bytes, random());
  EXPECT_EQ(amending({.refcount_order = 0})(narrow), EINVAL);
  EXPECT_EQ(narrow.disk.current(), shared.bytes);
}

// ---- The header.

TEST(HeaderRewrite, keeps_what_nobody_here_knows) {
  Header header;
  header.geometry.cluster_bits = 12;
  header.refcount_table_offset = 4096;
  header.refcount_table_clusters = 1;
  header.backing_file = "base";
  header.backing_format = "raw";
  Bytes cluster(4096);
  ASSERT_TRUE(encode_header(header, cluster));
  // An extension of another program's, in front of the mark that ends them.
  std::size_t at = 112;
  while (testing::get_be(cluster, at, 4) != 0)
    at += 8 + (testing::get_be(cluster, at + 4, 4) + 7) / 8 * 8;
  put_be(cluster, at, 4, 0x12345678);
  put_be(cluster, at + 4, 4, 5);
  put_be(cluster, at + 8, 8, 0x6162636465000000);
  put_be(cluster, at + 16, 8, 0);
  put_be(cluster, 8, 8, at + 24);
  std::copy_n(reinterpret_cast<const std::byte*>("base"), 4,
              cluster.begin() + static_cast<std::ptrdiff_t>(at) + 24);
  auto read = decode_header(cluster, "an.qcow2");
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_EQ(read->backing_file, "base");
  read->bitmap_directory = Extent{8192, 32};
  read->bitmap_count = 1;
  read->autoclear_features = kAutoclearBitmaps;
  for (const bool with_names : {false, true}) {
    Bytes changed = cluster;
    const auto used = rewrite_header(changed, *read, with_names);
    ASSERT_TRUE(used);
    EXPECT_EQ(*used > 512, with_names);
    const auto decoded = decode_header(changed, "an.qcow2");
    ASSERT_TRUE(decoded) << decoded.error().message;
    EXPECT_EQ(decoded->backing_file, "base");
    EXPECT_EQ(decoded->backing_format, "raw");
    ASSERT_TRUE(decoded->bitmap_directory);
    EXPECT_EQ(decoded->bitmap_directory->offset, 8192U);
    EXPECT_EQ(decoded->feature_names.empty(), !with_names);
    const std::string text(reinterpret_cast<const char*>(changed.data()), changed.size());
    EXPECT_THAT(text, ::testing::HasSubstr(std::string("\x12\x34\x56\x78\0\0\0\x05"
                                                       "abcde",
                                                       13)));
  }
}

TEST(HeaderRewrite, says_when_there_is_no_room) {
  Header header;
  header.geometry.cluster_bits = 9;
  header.refcount_table_offset = 512;
  header.refcount_table_clusters = 1;
  Bytes cluster(512);
  ASSERT_TRUE(encode_header(header, cluster));
  const Bytes before = cluster;
  header.backing_file = std::string(400, 'x');
  EXPECT_FALSE(rewrite_header(cluster, header, true));
  EXPECT_EQ(cluster, before);
  header.backing_file = std::string(390, 'x');
  const auto used = rewrite_header(cluster, header, true);
  ASSERT_TRUE(used);
  EXPECT_LE(*used, 512U);
  EXPECT_EQ(decode_header(cluster, "an.qcow2")->backing_file, header.backing_file);
}

}  // namespace
}  // namespace vblk::qcow2
