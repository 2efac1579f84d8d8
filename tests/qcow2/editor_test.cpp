// Changes of metadata by those who have an image to themselves (image_editor.h, check.h): what they
// make, and what a power cut leaves of them.
//
// A power cut comes around each flush and at many moments between: all operations from then on
// fail, and of what was not flushed all is lost or kept, or some writes, or some sectors. What is
// left of an edit must have no errors and the same disk, and be as it was or as it was to be; what
// is left of a repair must be no worse than it was, and be repaired by the next.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <limits>
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
#include "blockdev/qcow2/snapshot_editor.h"
#include "blockdev/qcow2/snapshots.h"
#include "blockdev/raw_node.h"
#include "tests/qcow2/image_check.h"
#include "tests/qcow2/image_format.h"
#include "tests/support/run_count.h"
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
  // Notes what the disk does.
  void record(std::vector<aio::IoKind>& operations) {
    disk.set_fault_plan([&operations](const aio::IoRequest& request, std::uint64_t) {
      operations.push_back(request.kind);
      return std::optional<int>();
    });
  }
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

std::string errors_of(const Bytes& image, const FormattedImage& formatted) {
  const testing::CheckedImage checked = testing::check_image(image, formatted.backing);
  if (!checked.errors.empty()) return checked.errors.front();
  Bench bench(image, 1);
  if (!bench.error.empty()) return bench.error;
  std::string found;
  CheckResult result;
  const TellFinding tell = [&found](const std::string& line) { found += line + "\n"; };
  const int error =
      bench.run(check_image(bench.file, bench.context->context(), bench.header, tell, result));
  if (error != 0) return "it cannot be checked";
  return result.corruptions + result.check_errors == 0 ? "" : found + result.failure;
}

// What a power cut may not leave behind; empty: nothing of it is there.
std::string judge(const Bytes& image, const FormattedImage& formatted) {
  std::string errors = errors_of(image, formatted);
  if (!errors.empty()) return errors;
  const bool is_same = testing::check_image(image, formatted.backing).disk == formatted.disk;
  return is_same ? "" : "the disk has changed";
}

// Before which of these operations a power cut is tried: around each flush, and at as many others
// as keep a test short. Last comes none at all.
std::vector<std::uint64_t> moments_of(const std::vector<aio::IoKind>& operations,
                                      std::mt19937_64& random) {
  constexpr std::uint64_t kOthers = 24;
  std::vector<std::uint64_t> moments;
  for (std::uint64_t i = 0; i < operations.size(); ++i) {
    const bool is_at_flush =
        operations[i] == aio::IoKind::kFlush || (i > 0 && operations[i - 1] == aio::IoKind::kFlush);
    if (is_at_flush || random() % operations.size() < kOthers) moments.push_back(i);
  }
  moments.push_back(std::numeric_limits<std::uint64_t>::max());
  return moments;
}

// What may become of what was not flushed: torn, and one of the others.
std::array<SimulatedDisk::Unflushed, 2> some_fates(std::mt19937_64& random) {
  using enum SimulatedDisk::Unflushed;
  constexpr std::array kOthers{kLost, kKept, kByWrite};
  return {kBySector, kOthers[random() % kOthers.size()]};
}

struct PowerCuts {
  std::uint64_t count{0};
  std::string failure;  // the first one
};

// What is wrong with an image; empty: nothing.
using Judge = std::function<std::string(const Bytes&)>;

PowerCuts cut_everywhere(const Judge& is_wrong, const Bytes& image, const Edit& edit,
                         const Look& look, std::mt19937_64& random, bool loses_flushes = false) {
  std::vector<aio::IoKind> operations;
  Bench whole(image, random());
  whole.record(operations);
  PowerCuts cuts;
  if (edit(whole) != 0) return {0, "the edit fails by itself"};
  const std::string before = look(image);
  const std::string after = look(whole.disk.current());
  if (before == after) return {0, "the edit changes nothing"};
  if (std::string failure = is_wrong(whole.disk.current()); !failure.empty())
    return {0, "without a power cut: " + failure};
  for (const std::uint64_t moment : moments_of(operations, random)) {
    Bench bench(image, random(), loses_flushes);
    bench.cut_after(moment);
    const bool is_done = edit(bench) == 0;
    for (const auto fate : some_fates(random)) {
      const Bytes left = bench.disk.after_power_cut(random(), fate);
      ++cuts.count;
      std::string failure = is_wrong(left);
      const std::string state = failure.empty() ? look(left) : "";
      if (failure.empty() && state != before && state != after)
        failure =
            fmt::format("neither as it was nor as it was to be: {}\n{}\n{}", state, before, after);
      if (failure.empty() && is_done && state != after) failure = "it was done, and is gone";
      if (!failure.empty()) {
        cuts.failure =
            fmt::format("after {} of {} operations: {}", moment, operations.size(), failure);
        return cuts;
      }
    }
  }
  return cuts;
}

PowerCuts cut_everywhere(const FormattedImage& formatted, const Bytes& image, const Edit& edit,
                         const Look& look, std::mt19937_64& random, bool loses_flushes = false) {
  const Judge is_wrong = [&formatted](const Bytes& left) { return judge(left, formatted); };
  return cut_everywhere(is_wrong, image, edit, look, random, loses_flushes);
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

// VBLK_EDITOR_RUNS: each of them so often.
template <typename T>
std::vector<T> repeated(const std::vector<T>& all) {
  std::vector<T> repeated;
  for (int run = 0; run < test::run_count("VBLK_EDITOR_RUNS", 1); ++run)
    repeated.insert(repeated.end(), all.begin(), all.end());
  return repeated;
}

TEST_F(Editor, bitmaps_survive_power_cuts_as_they_were_or_as_they_are_to_be) {
  std::mt19937_64 random(test::test_seed());
  for (const ImageSpec& spec : repeated(specs())) {
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
  for (const auto& [spec, amendment] : repeated(cases)) {
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

// ---- Snapshots.

std::string sum_of(const Tags& tags) {
  std::uint64_t sum = tags.size();
  for (const std::uint64_t tag : tags) sum = sum * 0x100000001b3 + tag;
  return fmt::format("{:x}", sum);
}

// The disk's content, and the snapshots with that of the first one.
Look looking_at_snapshots(const FormattedImage& formatted) {
  return [&formatted](const Bytes& image) {
    const testing::CheckedImage checked = testing::check_image(image, formatted.backing);
    Bench bench(image, 1);
    std::string text = fmt::format("{} {}, first snapshot {}:", bench.header.size_bytes,
                                   sum_of(checked.disk), sum_of(checked.snapshot));
    const auto listed = read_snapshots(bench.file, bench.header, bench.make);
    if (!listed) return listed.error().message;
    for (const Snapshot& snapshot : *listed)
      text += fmt::format(" {} '{}' {}", snapshot.id, snapshot.name, snapshot.entry.disk_bytes);
    return text;
  };
}

Edit editing_snapshots(const std::function<Task<int>(SnapshotEditor&)>& edit) {
  return [edit](Bench& bench) {
    SnapshotEditor editor(bench.file, bench.context->context(), bench.header);
    return bench.run(edit(editor));
  };
}

const Edit kCreate = editing_snapshots([](SnapshotEditor& editor) { return editor.create("new"); });
const Edit kApply = editing_snapshots([](SnapshotEditor& editor) { return editor.apply("1"); });
const Edit kRemove = editing_snapshots([](SnapshotEditor& editor) { return editor.remove("s"); });
// As commit does it, when all is in the base.
const Edit kEmpty = editing_snapshots([](SnapshotEditor& editor) { return editor.empty(); });

std::vector<ImageSpec> specs_of_snapshots() {
  return {{.cluster_bits = 9, .snapshot = true, .mapped_percent = 40},
          {.cluster_bits = 12, .backing_bytes = 1 << 19, .snapshot = true, .mapped_percent = 60},
          {.version = 2, .cluster_bits = 10, .snapshot = true, .mapped_percent = 50},
          {.cluster_bits = 16,
           .refcount_order = 6,
           .snapshot = true,
           .mapped_percent = 50,
           .compressed_percent = 20},
          {.cluster_bits = 14, .extended_l2 = true, .snapshot = true, .mapped_percent = 70}};
}

TEST_F(Editor, snapshots_survive_power_cuts_as_they_were_or_as_they_are_to_be) {
  std::mt19937_64 random(test::test_seed());
  for (const ImageSpec& spec : repeated(specs_of_snapshots())) {
    const FormattedImage formatted = format_image(spec, random);
    const Judge is_wrong = [&](const Bytes& left) { return errors_of(left, formatted); };
    const Look look = looking_at_snapshots(formatted);
    // A disk that is another than that of its snapshot.
    Bench emptied(formatted.bytes, random());
    ASSERT_EQ(kEmpty(emptied), 0);
    const Bytes other = emptied.disk.current();
    struct Case {
      const Bytes& image;
      const Edit& edit;
    };
    for (const auto& [image, edit] :
         {Case{formatted.bytes, kCreate}, Case{other, kCreate}, Case{other, kApply},
          Case{formatted.bytes, kRemove}, Case{other, kRemove}, Case{formatted.bytes, kEmpty}}) {
      const PowerCuts cuts = cut_everywhere(is_wrong, image, edit, look, random);
      EXPECT_EQ(cuts.failure, "") << spec.to_string();
      EXPECT_GT(cuts.count, 12U);
      Bench bench(image, random());
      ASSERT_EQ(edit(bench), 0);
      EXPECT_EQ(testing::check_image(bench.disk.current(), formatted.backing).leaks, 0U);
    }
  }
}

// What a power cut must not leave is found where it is left.
TEST_F(Editor, snapshots_on_a_disk_that_loses_flushes_are_noticed) {
  std::mt19937_64 random(test::test_seed());
  const FormattedImage formatted = format_image(specs_of_snapshots()[1], random);
  const Judge is_wrong = [&](const Bytes& left) { return errors_of(left, formatted); };
  const Look look = looking_at_snapshots(formatted);
  bool is_noticed = false;
  for (int run = 0; run < 20 && !is_noticed; ++run)
    is_noticed =
        !cut_everywhere(is_wrong, formatted.bytes, kCreate, look, random, true).failure.empty();
  EXPECT_TRUE(is_noticed);
}

// ---- Repairs.

// Changes that take nothing from the disk or its snapshot.
using Damage = std::function<void(Bytes& image, const Header& header, std::mt19937_64& random)>;

std::uint64_t offset_in(const Bytes& image, std::uint64_t at) {
  return testing::get_be(image, at, 8) & kOffsetMask;
}

void damage_refcounts(Bytes& image, const Header& header, std::mt19937_64& random) {
  const Geometry& geometry = header.geometry;
  const std::uint64_t count_max = std::min<std::uint64_t>(geometry.refcount_max(), 9);
  for (int i = 0; i < 12; ++i) {
    const std::uint64_t cluster = random() % geometry.clusters_of(image.size());
    const std::uint64_t block = offset_in(
        image, header.refcount_table_offset + (cluster >> geometry.refcount_block_bits()) * 8);
    const std::uint64_t in_block =
        cluster & ((std::uint64_t{1} << geometry.refcount_block_bits()) - 1);
    testing::put_refcount(std::span(image).subspan(block, geometry.cluster_bytes()),
                          geometry.refcount_order, in_block, random() % (count_max + 1));
  }
}

void damage_refcount_table(Bytes& image, const Header& header, std::mt19937_64& random) {
  const std::uint64_t entry = testing::get_be(image, header.refcount_table_offset, 8);
  const std::array wrong{std::uint64_t{0}, entry ^ (header.geometry.cluster_bytes() / 2),
                         header.l1_table_offset, std::uint64_t{1} << 40};
  put_be(image, header.refcount_table_offset, 8, wrong[random() % wrong.size()]);
}

void damage_copied_flags(Bytes& image, const Header& header, std::mt19937_64& random) {
  const auto flip = [&image](std::uint64_t at) {
    put_be(image, at, 8, testing::get_be(image, at, 8) ^ kFlagCopied);
  };
  const std::size_t step = std::size_t{header.geometry.l2_entry_words()} * 8;
  for (std::uint64_t i = 0; i < header.l1_entries; ++i) {
    const std::uint64_t table = offset_in(image, header.l1_table_offset + 8 * i);
    if (table == 0) continue;
    if (random() % 3 == 0) flip(header.l1_table_offset + 8 * i);
    for (std::uint64_t at = table; at < table + header.geometry.cluster_bytes(); at += step) {
      const std::uint64_t entry = testing::get_be(image, at, 8);
      const bool has_flag = (entry & kFlagCompressed) == 0 && (entry & kOffsetMask) != 0;
      if (has_flag && random() % 3 == 0) flip(at);
    }
  }
}

// Without extra data, or with far too much of it.
void damage_snapshot_table(Bytes& image, const Header& header, std::mt19937_64& random) {
  if (header.snapshot_count == 0) return;
  const std::uint64_t at = header.snapshots_offset;
  const bool is_incomplete = random() % 2 == 0 || header.geometry.cluster_bytes() < 2048;
  const std::uint64_t extra_bytes = is_incomplete ? random() % 2 * 8 : 1600;
  std::array<std::byte, 2> texts{image[at + 56], image[at + 57]};
  put_be(image, at + 36, 4, extra_bytes);
  std::copy_n(texts.begin(), 2, image.begin() + static_cast<std::ptrdiff_t>(at + 40 + extra_bytes));
}

struct Worth {
  std::uint64_t too_low{0};  // refcounts
  std::uint64_t unknown{0};
};

Worth worth_of(const Bytes& image) {
  Bench bench(image, 1);
  Worth worth;
  CheckResult result;
  const TellFinding tell = [&worth](const std::string& line) {
    if (line.starts_with("ERROR cluster ")) ++worth.too_low;
  };
  EXPECT_EQ(
      bench.run(check_image(bench.file, bench.context->context(), bench.header, tell, result)), 0);
  worth.unknown = result.check_errors;
  return worth;
}

int repair(Bench& bench) {
  RepairResult repaired;
  const TellFinding silent = [](const std::string&) {};
  return bench.run(repair_image(bench.file, bench.context->context(), bench.header, Repair::kAll,
                                silent, repaired));
}

// A repair that is cut, and the next one after it.
std::string cut_repair(const FormattedImage& formatted, const Bytes& image, std::mt19937_64& random,
                       std::uint64_t& cuts) {
  const Tags snapshot = testing::check_image(formatted.bytes, formatted.backing).snapshot;
  const auto has_lost = [&](const Bytes& left) {
    const testing::CheckedImage checked = testing::check_image(left, formatted.backing);
    return checked.disk != formatted.disk || checked.snapshot != snapshot;
  };
  if (has_lost(image)) return "the damage itself loses something";
  const Worth before = worth_of(image);
  std::vector<aio::IoKind> operations;
  Bench whole(image, random());
  whole.record(operations);
  if (repair(whole) != 0) return "no repair by itself";
  for (const std::uint64_t moment : moments_of(operations, random)) {
    Bench bench(image, random());
    bench.cut_after(moment);
    static_cast<void>(repair(bench));
    for (const auto fate : some_fates(random)) {
      ++cuts;
      const Bytes left = bench.disk.after_power_cut(random(), fate);
      const std::string when = fmt::format("after {} of {} operations", moment, operations.size());
      if (has_lost(left)) return when + " something is lost";
      const Worth after = worth_of(left);
      const bool is_worse =
          before.unknown == 0 && (after.unknown > 0 || after.too_low > before.too_low);
      if (is_worse)
        return fmt::format("{} {} refcounts are too low, before {}", when, after.too_low,
                           before.too_low);
      Bench next(left, random());
      if (repair(next) != 0) return when + " there is no repair";
      const Bytes repaired = next.disk.current();
      const std::string errors = errors_of(repaired, formatted);
      if (!errors.empty()) return fmt::format("{} and another repair: {}", when, errors);
      if (has_lost(repaired)) return when + " the next repair loses something";
    }
  }
  return "";
}

TEST_F(Editor, repairs_survive_power_cuts_no_worse_and_the_next_goes_on) {
  std::mt19937_64 random(test::test_seed());
  std::vector<ImageSpec> all = specs_of_snapshots();
  all.push_back({.cluster_bits = 9, .refcount_order = 0, .mapped_percent = 60});
  all.push_back({.cluster_bits = 12, .mapped_percent = 30, .compressed_percent = 30});
  std::uint64_t cuts = 0;
  for (const ImageSpec& spec : repeated(all)) {
    const FormattedImage formatted = format_image(spec, random);
    const Header header = Bench(formatted.bytes, 1).header;
    const std::vector<std::vector<Damage>> damages{
        {damage_refcounts},
        {damage_refcount_table},
        {damage_copied_flags},
        {damage_snapshot_table},
        {damage_refcounts, damage_copied_flags, damage_snapshot_table},
        {damage_refcount_table, damage_copied_flags}};
    for (std::size_t i = 0; i < damages.size(); ++i) {
      // Half of them each time, so that it does not take too long.
      if (random() % 2 == 0) continue;
      Bytes image = formatted.bytes;
      for (const Damage& damage : damages[i]) damage(image, header, random);
      EXPECT_EQ(cut_repair(formatted, image, random, cuts), "")
          << spec.to_string() << ", damage " << i;
    }
  }
  EXPECT_GT(cuts, 100U);
}

// ---- The header.

// As rebase does it: from a header that reaches beyond its sector to another that does.
TEST_F(Editor, another_backing_file_survives_power_cuts_as_the_old_or_the_new_one) {
  std::mt19937_64 random(test::test_seed());
  const FormattedImage formatted =
      format_image({.cluster_bits = 12, .backing_bytes = 1 << 19, .mapped_percent = 60}, random);
  const auto renaming = [](const std::string& name, const std::string& format) {
    return [name, format](Bench& bench) {
      Header renamed = bench.header;
      renamed.backing_file = name;
      renamed.backing_format = format;
      std::string why;
      return bench.run(replace_header(bench.file, bench.context->context(), renamed, why));
    };
  };
  const Look look = [](const Bytes& image) {
    const Header header = Bench(image, 1).header;
    return fmt::format("'{}' {}", header.backing_file, header.backing_format);
  };
  Bench first(formatted.bytes, random());
  ASSERT_EQ(renaming("a name of another folder/" + std::string(90, 'a'), "qcow2")(first), 0);
  const Bytes image = first.disk.current();
  ASSERT_GT(testing::get_be(image, 8, 8), 512U);
  // Into the first sector, or too long for it.
  for (const auto& [name, format] :
       {std::pair(std::string(200, 'b'), "raw"), std::pair(std::string("c"), "qcow2"),
        std::pair(std::string(900, 'd'), "raw")}) {
    const PowerCuts cuts = cut_everywhere(formatted, image, renaming(name, format), look, random);
    EXPECT_EQ(cuts.failure, "") << name;
    EXPECT_GT(cuts.count, 8U);
  }
  // And from one that was too long to another, and back.
  Bench second(image, random());
  ASSERT_EQ(renaming(std::string(900, 'd'), "raw")(second), 0);
  const Bytes with_long_name = second.disk.current();
  for (const std::string& name : {std::string(1023, 'e'), std::string("c")}) {
    const PowerCuts cuts =
        cut_everywhere(formatted, with_long_name, renaming(name, "qcow2"), look, random);
    EXPECT_EQ(cuts.failure, "") << name;
    EXPECT_GT(cuts.count, 8U);
  }
}

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
