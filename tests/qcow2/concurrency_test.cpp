// Four I/O threads on one node, in the same clusters: with sectors of their own, which nobody else
// may disturb; or all in the same sectors, where each must look like one register.
//
// VBLK_CONCURRENCY_RUNS: how many random images in each test. VBLK_TEST_SEED repeats a run as far
// as the threads' order lets it.
#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "blockdev/image/open_image.h"
#include "blockdev/log.h"
#include "tests/qcow2/guest.h"
#include "tests/support/run_count.h"
#include "tests/support/seed.h"
#include "tests/support/temp_dir.h"

namespace vblk::qcow2 {
namespace {

using blockdev::BlockOperation;
using testing::Bytes;
using testing::check_image;
using testing::CheckedImage;
using testing::Context;
using testing::DataFile;
using testing::format_image;
using testing::FormattedImage;
using testing::Guest;
using testing::GuestModel;
using testing::ImageFiles;
using testing::ImageSpec;
using testing::kSectorBytes;
using testing::Rig;
using testing::RigOptions;
using testing::Tags;
using testing::TestRequest;
using testing::Work;

constexpr std::size_t kThreads = 4;

// Runs `work(context, thread)` on threads with contexts of their own. Each goes on, behind its
// guest's back, until all have come to rest.
template <typename MakeEngines, typename DoWork>
void on_threads(const MakeEngines& make_engines, const DoWork& work) {
  std::barrier all_done(kThreads);
  std::vector<std::thread> threads;
  for (std::size_t number = 0; number < kThreads; ++number) {
    threads.emplace_back([&, number] {
      std::vector<std::unique_ptr<Context>> contexts;
      contexts.push_back(std::make_unique<Context>(make_engines(number)));
      work(contexts, number);
      contexts.front()->drain();
      all_done.arrive_and_wait();
      contexts.clear();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

int run_count(int otherwise) { return test::run_count("VBLK_CONCURRENCY_RUNS", otherwise); }

class Concurrency : public ::testing::Test {
 protected:
  void SetUp() override { log::set_level(log::Level::kOff); }

  // An image for threads to meet in: not too large.
  static ImageSpec make_spec(std::mt19937_64& random) {
    ImageSpec spec =
        random() % 3 == 0 ? testing::spec_of_many_tables(random) : testing::random_spec(random);
    if (random() % 2 == 0)
      spec.size_bytes = std::min<std::uint64_t>(spec.size_bytes, std::uint64_t{128} << 10);
    return spec;
  }
  // Of each sector the owner. Granules from a sector to several clusters.
  static std::vector<std::size_t> deal_sectors(const ImageSpec& spec, std::mt19937_64& random) {
    const std::uint64_t cluster_sectors = (std::uint64_t{1} << spec.cluster_bits) / kSectorBytes;
    const std::array<std::uint64_t, 4> granules{1, 3, cluster_sectors, 3 * cluster_sectors};
    const std::uint64_t granule = granules[random() % granules.size()];
    std::vector<std::size_t> owners(spec.size_bytes / kSectorBytes);
    for (std::size_t i = 0; i < owners.size(); ++i)
      owners[i] = (i / granule * 0x9e37'79b9 >> 7) % kThreads;
    return owners;
  }
  // Four guests, each in its own sectors. What the disk holds in the end.
  template <typename MakeEngines>
  static Tags work_in_own_sectors(blockdev::BlockNode& node, const ImageSpec& spec,
                                  const Tags& initial, const MakeEngines& make_engines,
                                  std::uint64_t seed) {
    std::mt19937_64 random(seed);
    const std::vector<std::size_t> owners = deal_sectors(spec, random);
    Work work = testing::random_work(random);
    work.operations = 250;
    work.outlives_process = random() % 2 == 0;
    Tags disk = initial;
    on_threads(
        make_engines, [&](std::vector<std::unique_ptr<Context>>& contexts, std::size_t number) {
          std::mt19937_64 own_random(seed + number);
          GuestModel model(initial);
          auto next_tag = static_cast<std::uint32_t>(number << 24);
          Guest guest(node, contexts, model, work, own_random, next_tag);
          std::vector<bool> owned(owners.size());
          for (std::size_t i = 0; i < owners.size(); ++i) owned[i] = owners[i] == number;
          guest.set_owned(owned);
          while (guest.started() < work.operations && !::testing::Test::HasFailure())
            guest.step(true);
          while (!guest.is_idle()) guest.step(false);
          const Tags tags = testing::tags_of(contexts.front()->read(node, 0, node.size_bytes()));
          for (std::size_t i = 0; i < owners.size(); ++i) {
            if (!owned[i]) continue;
            EXPECT_TRUE(model.has_read(i, tags[i]))
                << fmt::format("thread {} finds {:#x} in sector {} in the end, after{}", number,
                               tags[i], i, model.describe(i));
            disk[i] = tags[i];
            if (::testing::Test::HasFailure()) break;
          }
        });
    return disk;
  }
  static void expect_closed_well(const ImageFiles& files, const FormattedImage& formatted,
                                 const ImageSpec& spec, const Tags& disk) {
    const CheckedImage checked = check_image(files, formatted.backing);
    EXPECT_EQ(checked.errors, std::vector<std::string>{});
    EXPECT_EQ(checked.leaks, 0U);
    EXPECT_TRUE(checked.disk == disk) << "the file holds something else";
    EXPECT_TRUE(!spec.snapshot || checked.snapshot == formatted.disk) << "the snapshot changed";
    // What is there behind the end of the disk is nobody's.
    Tags in_data_file = testing::tags_of(files.data_file);
    in_data_file.resize(disk.size());
    EXPECT_TRUE(spec.data_file != DataFile::kRaw || in_data_file == disk)
        << "the raw data file holds something else";
  }
};

TEST_F(Concurrency, of_threads_leaves_each_its_own_sectors_on_a_simulated_disk) {
  std::mt19937_64 seeds(test::test_seed());
  for (int i = 0; i < run_count(25) && !HasFailure(); ++i) {
    const std::uint64_t seed = seeds();
    std::mt19937_64 random(seed);
    const ImageSpec spec = make_spec(random);
    RigOptions options = testing::random_rig(random);
    options.context_count = 1;
    options.seed = seed;
    options.short_transfer_probability = random() % 2 == 0 ? 0.1 : 0;
    SCOPED_TRACE(fmt::format("run {}: {}", i, spec.to_string()));
    const FormattedImage formatted = format_image(spec, random);
    Rig rig(formatted.files(), formatted.backing, options);
    ASSERT_NE(rig.node, nullptr) << rig.error;
    const Tags disk = work_in_own_sectors(
        *rig.node, spec, formatted.disk,
        [&rig, seed](std::size_t number) { return rig.make_engines(seed + number); }, seed);
    rig.close();
    expect_closed_well(rig.files(), formatted, spec, disk);
  }
}

TEST_F(Concurrency, of_threads_leaves_each_its_own_sectors_in_a_file) {
  std::mt19937_64 seeds(test::test_seed());
  for (int i = 0; i < run_count(10) && !HasFailure(); ++i) {
    const std::uint64_t seed = seeds();
    std::mt19937_64 random(seed);
    const ImageSpec spec = make_spec(random);
    SCOPED_TRACE(fmt::format("run {}: {}", i, spec.to_string()));
    const FormattedImage formatted = format_image(spec, random);
    const test::TempDir dir;
    const auto save = [&dir](const std::string& name, const Bytes& bytes) {
      std::ofstream(dir.file(name), std::ios::binary)
          .write(reinterpret_cast<const char*>(bytes.data()),
                 static_cast<std::streamsize>(bytes.size()));
    };
    save("disk.qcow2", formatted.bytes);
    save("backing.raw", testing::bytes_of(formatted.backing));
    save("data.raw", formatted.data_file);
    const RigOptions options = testing::random_rig(random);
    const auto open = [&](blockdev::CacheMode cache) {
      return blockdev::open_image({.path = dir.file("disk.qcow2"),
                                   .format = blockdev::ImageFormat::kQcow2,
                                   .cache = cache,
                                   .l2_cache_bytes = options.l2_cache_bytes,
                                   .refcount_cache_bytes = options.refcount_cache_bytes});
    };
    auto node = open(options.direct ? blockdev::CacheMode::kNone : blockdev::CacheMode::kWriteback);
    if (!node) node = open(blockdev::CacheMode::kWriteback);
    ASSERT_TRUE(node) << node.error().message;
    const Tags disk = work_in_own_sectors(
        **node, spec, formatted.disk,
        [](std::size_t /*number*/) { return *aio::EngineSet::create({}, {}); }, seed);
    node->reset();
    const auto load = [&dir](const std::string& name) {
      std::ifstream file(dir.file(name), std::ios::binary);
      const std::string text{std::istreambuf_iterator<char>(file), {}};
      const auto* const begin = reinterpret_cast<const std::byte*>(text.data());
      return Bytes(begin, begin + text.size());
    };
    expect_closed_well({.image = load("disk.qcow2"), .data_file = load("data.raw")}, formatted,
                       spec, disk);
  }
}

// ---- Shared sectors.

// What was done to a sector, and when by a clock of all threads.
struct Event {
  std::uint64_t begin;
  std::uint64_t end;
  std::uint64_t tag;
  bool is_read;
  bool is_doubtful;  // a discard
};

// Whether a sector behaved like one register. Where every value is written once, there is a simple
// rule (Gibbons and Korach, "Testing shared memories"): each value has a zone, from the first end
// to the last begin of what wrote or read it, forward if that is an interval; forward zones must
// not overlap, and none may contain a zone that is not.
std::string check_register(const std::vector<Event>& events) {
  struct Zone {
    std::uint64_t first_end{std::numeric_limits<std::uint64_t>::max()};
    std::uint64_t last_begin{0};
    std::uint64_t write_begin{std::numeric_limits<std::uint64_t>::max()};
    std::uint64_t tag{0};
    bool is_read{false};
  };
  std::map<std::uint64_t, Zone> by_tag;
  for (const Event& event : events) {
    Zone& zone = by_tag[event.tag];
    zone.tag = event.tag;
    zone.first_end = std::min(zone.first_end, event.end);
    zone.last_begin = std::max(zone.last_begin, event.begin);
    zone.is_read = zone.is_read || event.is_read;
    if (!event.is_read) zone.write_begin = std::min(zone.write_begin, event.begin);
  }
  for (const auto& [tag, zone] : by_tag) {
    if (zone.write_begin > zone.first_end)
      return fmt::format("{:#x} was read before anybody wrote it", tag);
  }
  for (const auto& [tag, zone] : by_tag) {
    if (zone.first_end >= zone.last_begin) continue;
    for (const auto& [other_tag, other] : by_tag) {
      if (other_tag == tag) continue;
      const std::uint64_t low = std::min(other.first_end, other.last_begin);
      const std::uint64_t high = std::max(other.first_end, other.last_begin);
      const bool is_forward = other.first_end < other.last_begin;
      const bool is_wrong = is_forward ? low < zone.last_begin && zone.first_end < high
                                       : zone.first_end < low && high < zone.last_begin;
      if (is_wrong)
        return fmt::format("{:#x} at [{}, {}] and {:#x} at [{}, {}] cannot be put in order", tag,
                           zone.first_end, zone.last_begin, other_tag, other.first_end,
                           other.last_begin);
    }
  }
  return {};
}

// With zeroes, which many may write: each read finds what some change wrote that is not surely
// overwritten.
std::string check_reads(const std::vector<Event>& events) {
  for (const Event& read : events) {
    if (!read.is_read) continue;
    const bool is_explained = std::ranges::any_of(events, [&](const Event& write) {
      if (write.is_read || write.tag != read.tag || write.begin > read.end) return false;
      return std::ranges::none_of(events, [&](const Event& other) {
        return !other.is_read && !other.is_doubtful && write.end < other.begin &&
               other.end < read.begin;
      });
    });
    if (!is_explained)
      return fmt::format("{:#x} was read at [{}, {}] though it was not there", read.tag, read.begin,
                         read.end);
  }
  return {};
}

struct SharedRequest : TestRequest {
  using TestRequest::TestRequest;
  std::uint64_t begin{0};
  std::uint64_t tag{0};
};

void work_in_shared_sectors(blockdev::BlockNode& node, Context& context, std::size_t number,
                            std::uint64_t seed, bool zeroes, std::atomic<std::uint64_t>& clock,
                            std::vector<std::vector<Event>>& events) {
  std::mt19937_64 random(seed + number);
  const std::uint64_t sectors = events.size();
  std::vector<std::unique_ptr<SharedRequest>> in_flight;
  std::uint64_t next_tag = number << 32;
  for (int started = 0; started < 400 || !in_flight.empty();) {
    if (started < 400 && in_flight.size() < 6) {
      ++started;
      constexpr std::array kKinds{BlockOperation::kRead,    BlockOperation::kRead,
                                  BlockOperation::kRead,    BlockOperation::kWrite,
                                  BlockOperation::kWrite,   BlockOperation::kWrite,
                                  BlockOperation::kFlush,   BlockOperation::kDiscard,
                                  BlockOperation::kDiscard, BlockOperation::kWriteZeroes};
      const BlockOperation kind = kKinds[random() % (zeroes ? 10 : 7)];
      const std::uint64_t first = random() % sectors;
      const std::uint64_t count =
          1 + random() % std::min<std::uint64_t>(sectors - first, random() % 4 == 0 ? 24 : 3);
      auto request = std::make_unique<SharedRequest>(
          kind, first * kSectorBytes, kind == BlockOperation::kFlush ? 0 : count * kSectorBytes);
      if (kind == BlockOperation::kRead || kind == BlockOperation::kWrite)
        request->use_plain_memory();
      if (kind == BlockOperation::kWrite) {
        request->tag = ++next_tag;
        request->fill(testing::bytes_of(Tags(count, request->tag)));
      }
      request->write_through = kind == BlockOperation::kWrite && random() % 8 == 0;
      request->may_unmap = random() % 2 == 0;
      request->outlives_process = random() % 4 == 0;
      request->begin = ++clock;
      context.start(node, *request);
      in_flight.push_back(std::move(request));
    }
    if (context->poll() == 0) std::this_thread::yield();
    std::erase_if(in_flight, [&](const auto& request) {
      if (request->completions == 0) return false;
      EXPECT_EQ(request->error, 0);
      const std::uint64_t end = ++clock;
      const bool is_read = request->operation == BlockOperation::kRead;
      const std::uint64_t first = request->offset_bytes / kSectorBytes;
      const Tags tags = is_read ? testing::tags_of(request->bytes())
                                : Tags(request->length_bytes / kSectorBytes, request->tag);
      for (std::size_t i = 0; i < tags.size(); ++i)
        events[first + i].push_back({request->begin, end, tags[i], is_read,
                                     request->operation == BlockOperation::kDiscard});
      return true;
    });
  }
}

TEST_F(Concurrency, in_the_same_sectors_makes_each_sector_look_like_one_register) {
  std::mt19937_64 seeds(test::test_seed());
  for (int i = 0; i < run_count(25) && !HasFailure(); ++i) {
    const std::uint64_t seed = seeds();
    std::mt19937_64 random(seed);
    ImageSpec spec = make_spec(random);
    // Few sectors, so that the threads meet.
    spec.size_bytes = (32 + random() % 200) * kSectorBytes;
    RigOptions options = testing::random_rig(random);
    options.context_count = 1;
    options.seed = seed;
    const bool zeroes = random() % 2 == 0;
    SCOPED_TRACE(fmt::format("run {}{}: {}", i, zeroes ? " with zeroes" : "", spec.to_string()));
    const FormattedImage formatted = format_image(spec, random);
    Rig rig(formatted.files(), formatted.backing, options);
    ASSERT_NE(rig.node, nullptr) << rig.error;
    std::atomic<std::uint64_t> clock{1};
    std::vector<std::vector<std::vector<Event>>> events(
        kThreads, std::vector<std::vector<Event>>(formatted.disk.size()));
    on_threads([&](std::size_t number) { return rig.make_engines(seed + number); },
               [&](std::vector<std::unique_ptr<Context>>& contexts, std::size_t number) {
                 work_in_shared_sectors(*rig.node, *contexts.front(), number, seed, zeroes, clock,
                                        events[number]);
               });
    const Tags last = testing::tags_of(rig.read_all());
    for (std::size_t sector = 0; sector < formatted.disk.size() && !HasFailure(); ++sector) {
      std::vector<Event> all{{0, 0, formatted.disk[sector], false, false}};
      for (const auto& of_thread : events)
        all.insert(all.end(), of_thread[sector].begin(), of_thread[sector].end());
      all.push_back({clock + 1, clock + 2, last[sector], true, false});
      EXPECT_EQ(zeroes ? check_reads(all) : check_register(all), "") << "sector " << sector;
    }
    rig.close();
    expect_closed_well(rig.files(), formatted, spec, last);
  }
}

TEST(RegisterCheck, finds_what_no_register_does) {
  // The second read finds what the first found overwritten.
  EXPECT_NE(check_register({{0, 0, 1, false, false},
                            {1, 10, 2, false, false},
                            {2, 3, 2, true, false},
                            {4, 5, 1, true, false}}),
            "");
  EXPECT_EQ(check_register({{0, 0, 1, false, false},
                            {1, 10, 2, false, false},
                            {2, 3, 1, true, false},
                            {4, 5, 2, true, false}}),
            "");
  EXPECT_NE(check_reads({{0, 0, 1, false, false}, {1, 2, 0, false, false}, {3, 4, 1, true, false}}),
            "");
  EXPECT_EQ(check_reads({{0, 0, 1, false, false}, {1, 2, 0, false, true}, {3, 4, 1, true, false}}),
            "");
}

// One thread changes the disk's size; the others write in sectors that it always has, and beyond.
TEST_F(Concurrency, of_threads_with_a_disk_whose_size_changes_keeps_what_it_always_has) {
  std::mt19937_64 seeds(test::test_seed());
  for (int i = 0; i < run_count(8) && !HasFailure(); ++i) {
    const std::uint64_t seed = seeds();
    std::mt19937_64 random(seed);
    ImageSpec spec = make_spec(random);
    spec.version = 3;
    spec.snapshot = false;
    SCOPED_TRACE(fmt::format("run {}: {}", i, spec.to_string()));
    const FormattedImage formatted = format_image(spec, random);
    RigOptions options = testing::random_rig(random);
    options.context_count = 1;
    Rig rig(formatted.files(), formatted.backing, options);
    ASSERT_NE(rig.node, nullptr) << rig.error;
    blockdev::BlockNode& node = *rig.node;
    const std::uint64_t sectors = formatted.disk.size();
    Tags disk = formatted.disk;
    std::atomic<int> resized{0};
    const auto resize = [&](Context& context, std::uint64_t new_sectors) {
      node.resize(new_sectors * kSectorBytes, *context, [&resized](const Expected<void>& result) {
        EXPECT_TRUE(result) << result.error().message;
        resized.fetch_add(1);
      });
      context.drain();
    };
    on_threads(
        [&rig, seed](std::size_t number) { return rig.make_engines(seed + number); },
        [&](std::vector<std::unique_ptr<Context>>& contexts, std::size_t number) {
          std::mt19937_64 own(seed + number);
          Context& context = *contexts.front();
          constexpr int kRounds = 40;
          for (int round = 0; round < kRounds && !HasFailure(); ++round) {
            if (number == 0) {
              resize(context, sectors + own() % (sectors * 2));
              continue;
            }
            std::vector<std::unique_ptr<TestRequest>> batch;
            std::set<std::uint64_t> in_flight;
            for (std::uint64_t count = own() % 12; count > 0; --count) {
              // The three have every third sector each, so that clusters are everybody's.
              const std::uint64_t sector = own() % (sectors * 3) / 3 * 3 + number - 1;
              auto request = std::make_unique<TestRequest>(BlockOperation::kWrite,
                                                           sector * kSectorBytes, kSectorBytes);
              request->use_plain_memory();
              const std::uint64_t tag = number << 24 | own() % 0xffff;
              request->fill(testing::bytes_of(Tags(1, tag)));
              if (!in_flight.insert(sector).second) continue;
              if (sector < sectors) disk[sector] = tag;
              context.start(node, *request);
              batch.push_back(std::move(request));
            }
            context.drain();
            for (const auto& request : batch) {
              const bool is_always_there = request->offset_bytes < sectors * kSectorBytes;
              EXPECT_TRUE(request->error == 0 || (request->error == EINVAL && !is_always_there))
                  << request->error << " at " << request->offset_bytes;
            }
          }
        });
    EXPECT_EQ(resized.load(), 40);
    resize(*rig.contexts.front(), sectors);
    EXPECT_TRUE(testing::tags_of(rig.read_all()) == disk);
    rig.close();
    expect_closed_well(rig.files(), formatted, spec, disk);
  }
}

}  // namespace
}  // namespace vblk::qcow2
