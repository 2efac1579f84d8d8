// The folder of a result through crashes, damage, and other machines.
#include "blockdev/wash/store.h"

#include <chrono>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <linux/magic.h>
#include <string>
#include <sys/statfs.h>

#include <gtest/gtest.h>

#include "blockdev/wash/machine.h"
#include "blockdev/wash/run.h"
#include "blockdev/wash/scratch_folder.h"
#include "blockdev/wash/settle.h"
#include "tests/support/temp_dir.h"

namespace vblk::wash {
namespace {

class Store : public testing::Test {
 protected:
  [[nodiscard]] std::string folder() const { return dir_.file("result"); }
  [[nodiscard]] std::string runs_path() const { return folder() + "/runs.jsonl"; }
  Expected<std::unique_ptr<ResultStore>> open(bool force = false,
                                              const Identity& identity = {{"kernel", "6.1"}}) {
    return ResultStore::open(folder(), {.seed = 42, .preset = "smoke", .identity = identity},
                             force);
  }
  void fill(int count) {
    auto store = open();
    ASSERT_TRUE(store) << store.error().message;
    for (int i = 0; i < count; ++i) {
      StoredRun run{
          .cell = "core/image/randread-1", .arm = "native", .round = i, .error = "why \"not\""};
      run.record.metrics["rate"] = 1.0 / 3 + i;
      run.record.histogram = {{1234.5, 7}};
      run.record.samples = 7;
      ASSERT_TRUE((*store)->append(run));
    }
  }
  [[nodiscard]] std::string text() const {
    std::ifstream file(runs_path());
    return std::string{std::istreambuf_iterator<char>(file), {}};
  }
  void set_text(const std::string& text) const { std::ofstream(runs_path()) << text; }

  test::TempDir dir_;
};

TEST_F(Store, gives_back_what_was_put_in) {
  fill(2);
  const auto store = open();
  ASSERT_TRUE(store) << store.error().message;
  ASSERT_EQ((*store)->runs().size(), 2U);
  const StoredRun& run = (*store)->runs()[1];
  EXPECT_EQ(run.cell, "core/image/randread-1");
  EXPECT_EQ(run.round, 1);
  EXPECT_EQ(run.error, "why \"not\"");
  EXPECT_EQ(run.record.metrics.at("rate"), 1.0 / 3 + 1);
  EXPECT_EQ(run.record.histogram.front().second, 7U);
  EXPECT_TRUE((*store)->notes().empty());
}

TEST_F(Store, keeps_the_first_seed) {
  fill(1);
  const auto store =
      ResultStore::open(folder(), {.seed = 1, .identity = {{"kernel", "6.1"}}}, false);
  EXPECT_EQ((*store)->experiment().seed, 42U);
}

TEST_F(Store, cuts_off_a_line_that_was_torn_by_a_crash_wherever_that_was) {
  fill(2);
  const std::string whole = text();
  const std::size_t first = whole.find('\n') + 1;
  for (const std::size_t torn : {first + 1, first + 40, first + 80, whole.size() - 1}) {
    set_text(whole.substr(0, torn));
    {
      const auto store = open();
      ASSERT_TRUE(store) << store.error().message;
      EXPECT_EQ((*store)->runs().size(), 1U);
      EXPECT_EQ((*store)->notes().size(), 1U);
    }
    EXPECT_EQ(text(), whole.substr(0, first)) << torn;
  }
}

TEST_F(Store, refuses_damage_naming_file_and_line_and_changes_nothing) {
  fill(3);
  std::string damaged = text();
  damaged[damaged.find('\n') + 200] ^= 1;
  set_text(damaged);
  const auto store = open();
  ASSERT_FALSE(store);
  EXPECT_EQ(store.error().kind, ErrorKind::kCorrupt);
  EXPECT_NE(store.error().message.find("runs.jsonl' is damaged in line 2"), std::string::npos)
      << store.error().message;
  EXPECT_EQ(text(), damaged);
  const auto forced = open(true);
  ASSERT_TRUE(forced);
  EXPECT_EQ((*forced)->runs().size(), 2U);
}

TEST_F(Store, refuses_to_go_on_elsewhere_naming_the_difference_unless_forced) {
  fill(1);
  const auto store = open(false, {{"kernel", "6.9"}});
  ASSERT_FALSE(store);
  EXPECT_NE(store.error().message.find("kernel (6.1, now 6.9)"), std::string::npos)
      << store.error().message;
  const auto forced = open(true, {{"kernel", "6.9"}});
  ASSERT_TRUE(forced);
  EXPECT_EQ((*forced)->notes().size(), 1U);
  EXPECT_TRUE((*forced)->experiment().machine.contains("mixed"));
}

TEST_F(Store, refuses_to_go_on_with_less_than_it_began_with) {
  const Identity both{{"image", "/a"}, {"image:b", "/b"}, {"seed", "42"}};
  ASSERT_TRUE(open(false, both));
  const auto store = open(false, {{"image", "/a"}});
  ASSERT_FALSE(store);
  EXPECT_NE(store.error().message.find("image:b (/b, now none)"), std::string::npos)
      << store.error().message;
  EXPECT_EQ(store.error().message.find("seed"), std::string::npos) << "it need not be said again";
}

TEST_F(Store, is_read_past_damage_only_by_force) {
  fill(3);
  std::string damaged = text();
  damaged[damaged.find('\n') + 200] ^= 1;
  set_text(damaged);
  EXPECT_FALSE(ResultStore::read(folder(), false));
  const auto forced = ResultStore::read(folder(), true);
  ASSERT_TRUE(forced) << forced.error().message;
  EXPECT_EQ((*forced)->runs().size(), 2U);
  EXPECT_EQ((*forced)->notes().size(), 1U);
}

TEST(Image, is_known_by_its_size_and_by_which_file_it_is) {
  const test::TempDir dir;
  const std::string path = dir.file("a.img");
  EXPECT_NE(identity_of_image(path).find("not there"), std::string::npos);
  std::ofstream(path) << "12345678";
  const std::string first = identity_of_image(path);
  EXPECT_NE(first.find("8 bytes"), std::string::npos) << first;
  EXPECT_EQ(identity_of_image(path), first);
  std::ofstream(path, std::ios::app) << "9";
  EXPECT_NE(identity_of_image(path), first);
  std::ofstream(dir.file("b.img")) << "12345678";
  std::filesystem::rename(dir.file("b.img"), path);
  EXPECT_NE(identity_of_image(path), first) << "another file of that size";
}

TEST(Scratch, is_where_it_was_empty_and_gone) {
  const test::TempDir dir;
  std::string path;
  {
    const auto scratch = ScratchFolder::make(dir.file("."), dir.file("result"));
    ASSERT_TRUE(scratch) << scratch.error().message;
    path = (*scratch)->path();
    std::ofstream((*scratch)->path() + "/left") << "by a run that was killed";
    std::filesystem::copy(path, dir.file("kept"));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  std::filesystem::rename(dir.file("kept"), path);
  const auto again = ScratchFolder::make(dir.file("."), dir.file("result"));
  ASSERT_TRUE(again);
  EXPECT_EQ((*again)->path(), path);
  EXPECT_TRUE(std::filesystem::is_empty(path));
  EXPECT_NE((*ScratchFolder::make(dir.file("."), dir.file("other")))->path(), path);
}

TEST(Settle, leaves_no_page_of_the_image_in_the_cache) {
  const test::TempDir dir;
  const std::string path = dir.file("a.img");
  constexpr std::size_t kBytes = std::size_t{1} << 20;
  std::ofstream(path) << std::string(kBytes, 'x');
  struct statfs system{};
  ASSERT_EQ(::statfs(path.c_str(), &system), 0);
  if (system.f_type == TMPFS_MAGIC) GTEST_SKIP() << "a tmpfs has no other place for its pages";
  ASSERT_EQ(cached_bytes(path), kBytes) << "dirty ones, of the writes";
  ASSERT_TRUE(settle(path, {.sync = true, .drop_cache = false}));
  EXPECT_EQ(cached_bytes(path), kBytes);
  ASSERT_TRUE(settle(path, {.sync = true, .drop_cache = true}));
  EXPECT_EQ(cached_bytes(path), 0U);
  EXPECT_TRUE(settle(dir.file("."), {.sync = true, .drop_cache = true})) << "a folder is synced";
  const auto missing = settle(dir.file("none"), {.sync = true, .drop_cache = true});
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().kind, ErrorKind::kNotFound);
}

TEST(Run, of_a_hot_family_begins_with_all_it_reads_in_the_cache) {
  const test::TempDir dir;
  const std::string path = dir.file("a.img");
  constexpr std::size_t kBytes = std::size_t{4} << 20;
  std::ofstream(path) << std::string(2 * kBytes, 'x');
  ASSERT_TRUE(settle(path, {.sync = true, .drop_cache = true}));
  // So short that it reads next to nothing itself.
  const auto record = carry_out({.family = "hot",
                                 .levels = {{"rw", "randread"}, {"iodepth", "1"}},
                                 .arm = "threads",
                                 .image_path = path,
                                 .region_bytes = kBytes,
                                 .run_time = std::chrono::milliseconds(1)});
  ASSERT_TRUE(record) << record.error().message;
  EXPECT_GE(cached_bytes(path).value(), kBytes);
}

TEST_F(Store, is_for_one_process_at_a_time) {
  const auto store = open();
  const auto second = open();
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().kind, ErrorKind::kBusy);
}

TEST_F(Store, leaves_a_folder_of_something_else_alone) {
  std::filesystem::create_directory(folder());
  std::ofstream(folder() + "/thesis.txt") << "precious";
  const auto store = open();
  ASSERT_FALSE(store);
  EXPECT_EQ(store.error().kind, ErrorKind::kBusy);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder()), {}), 1);
}

TEST_F(Store, begins_anew_where_a_beginning_was_killed) {
  std::filesystem::create_directory(folder());
  std::ofstream(folder() + "/runs.jsonl").flush();
  EXPECT_TRUE(open());
}

TEST_F(Store, refuses_a_damaged_description) {
  fill(1);
  std::ofstream(folder() + "/experiment.json") << "{";
  const auto store = open();
  ASSERT_FALSE(store);
  EXPECT_EQ(store.error().kind, ErrorKind::kCorrupt);
}

TEST(RunSpecs, come_back_from_their_text) {
  const RunSpec spec{.family = "core",
                     .levels = {{"rw", "randread"}, {"iodepth", "8"}},
                     .arm = "native",
                     .image_path = "/x \"y\"",
                     .region_bytes = 5,
                     .run_time = std::chrono::milliseconds(7),
                     .seed = ~0ULL,
                     .spin_ns = 1.5};
  const auto back = parse_run_spec(to_json(spec));
  ASSERT_TRUE(back) << back.error().message;
  EXPECT_EQ(to_json(*back), to_json(spec));
  EXPECT_EQ(back->levels, spec.levels);
  EXPECT_FALSE(parse_run_spec("{}"));
  EXPECT_FALSE(parse_run_record("nonsense"));
}

}  // namespace
}  // namespace vblk::wash
