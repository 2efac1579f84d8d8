// How much memory an image of 1 MiB can make vblk take: images that ask for as much as the header,
// the extensions and the tables can, opened and used on a real file. What is counted is what the
// process has touched, in a child of its own for each image.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <malloc.h>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/image/open_image.h"
#include "blockdev/log.h"
#include "blockdev/qcow2/compression.h"
#include "blockdev/qcow2/format.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "tests/fuzz/hostile_image.h"
#include "tests/qcow2/qcow2_rig.h"
#include "tests/support/temp_dir.h"

namespace vblk::fuzz {
namespace {

using qcow2::testing::Bytes;
using qcow2::testing::put_be;

// Sanitizers have memory of their own for all of it. GCC and clang tell of them in different ways.
#ifdef __has_feature
#define VBLK_HAS_FEATURE(name) __has_feature(name)
#else
#define VBLK_HAS_FEATURE(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || \
    VBLK_HAS_FEATURE(address_sanitizer) || VBLK_HAS_FEATURE(thread_sanitizer)
constexpr bool kCanCount = false;
#else
constexpr bool kCanCount = true;
#endif

struct Greedy {
  const char* name;
  std::function<void(Bytes&)> make;
  std::size_t reads{20000};
  std::size_t reads_at_once{1};
};

// The largest header of which the rest is valid: `bits` clusters, the L1 table at the end of the
// file with as many entries as there is room for.
Bytes large_tables(unsigned bits) {
  Bytes bytes(kImageBytesMax);
  const std::uint64_t cluster = std::uint64_t{1} << bits;
  const std::uint64_t l1 = 4 * cluster;
  put_be(bytes, 0, 4, 0x514649fb);
  put_be(bytes, 4, 4, 3);
  put_be(bytes, 20, 4, bits);
  const std::uint64_t entries = (kImageBytesMax - l1) / 8;
  put_be(bytes, 24, 8, entries << (bits + bits - 3));
  put_be(bytes, 36, 4, entries);
  put_be(bytes, 40, 8, l1);
  put_be(bytes, 48, 8, cluster);
  put_be(bytes, 56, 4, 1);
  put_be(bytes, 96, 4, 4);
  put_be(bytes, 100, 4, 104);
  put_be(bytes, cluster, 8, 2 * cluster);
  for (std::uint64_t at = 2 * cluster; at < 3 * cluster; at += 2) put_be(bytes, at, 2, 1);
  return bytes;
}

// 2 GiB in clusters of 128 KiB, all of them the same few bytes, which say of themselves that they
// are as long as a cluster.
Bytes compressed_bomb(qcow2::Compression compression) {
  constexpr qcow2::Geometry kGeometry{.cluster_bits = 17};
  const std::uint64_t cluster = kGeometry.cluster_bytes();
  const std::uint64_t entries = cluster / 8;
  Bytes bytes(6 * cluster);
  put_be(bytes, 0, 4, 0x514649fb);
  put_be(bytes, 4, 4, 3);
  put_be(bytes, 20, 4, kGeometry.cluster_bits);
  put_be(bytes, 24, 8, entries * cluster);
  put_be(bytes, 36, 4, 1);
  put_be(bytes, 40, 8, cluster);
  put_be(bytes, 48, 8, 3 * cluster);
  put_be(bytes, 56, 4, 1);
  if (compression == qcow2::Compression::kZstd) put_be(bytes, 72, 8, 8);
  put_be(bytes, 96, 4, 4);
  put_be(bytes, 100, 4, 112);
  put_be(bytes, 104, 1, static_cast<std::uint64_t>(compression));
  put_be(bytes, cluster, 8, 2 * cluster | std::uint64_t{1} << 63);
  for (std::uint64_t i = 0; i < entries; ++i) {
    put_be(bytes, 2 * cluster + i * 8, 8,
           qcow2::compressed_descriptor(kGeometry, 5 * cluster, cluster));
  }
  put_be(bytes, 3 * cluster, 8, 4 * cluster);
  for (std::uint64_t i = 0; i < 5; ++i) put_be(bytes, 4 * cluster + i * 2, 2, 1);
  put_be(bytes, 4 * cluster + 10, 2, entries);
  const Bytes zeroes(cluster);
  const auto place = std::span(bytes).subspan(5 * cluster);
  EXPECT_GT(qcow2::compress(compression, zeroes, place), 0U);
  return bytes;
}

// Reads all over the disk, and writes.
void use(blockdev::BlockNode& node, std::size_t reads, std::size_t at_once) {
  qcow2::testing::Context guest(*aio::EngineSet::create({}, {}));
  std::mt19937_64 random(1);
  const std::uint64_t sectors = node.size_bytes() / 512;
  for (std::size_t done = 0; done < reads; done += at_once) {
    std::deque<blockdev::testing::TestRequest> in_flight;
    for (std::size_t i = 0; i < at_once; ++i) {
      auto& read =
          in_flight.emplace_back(blockdev::BlockOperation::kRead, random() % sectors * 512, 512);
      read.use_plain_memory();
      guest.start(node, read);
    }
    guest.drain();
    // What is read together is all there.
    for (const auto& read : in_flight) EXPECT_TRUE(read.error == 0 || at_once == 1) << read.error;
  }
  if (node.limits().read_only) return;
  for (int i = 0; i < 20; ++i) {
    blockdev::testing::TestRequest write(blockdev::BlockOperation::kWrite, random() % sectors * 512,
                                         512);
    write.use_plain_memory();
    guest.start(node, write);
    guest.drain();
  }
}

std::uint64_t resident_bytes_max() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::uint64_t>(usage.ru_maxrss) << 10;
}

// What `work` takes at most, done by a child, beyond what that has begun with.
std::uint64_t bytes_taken(const std::function<void()>& work) {
  // What lies free in the heap would be taken without being counted.
  ::malloc_trim(0);
  int result[2];
  EXPECT_EQ(::pipe(result), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const std::uint64_t before = resident_bytes_max();
    work();
    const std::uint64_t taken = resident_bytes_max() - before;
    const bool written = ::write(result[1], &taken, sizeof taken) == sizeof taken;
    ::_exit(written && !::testing::Test::HasFailure() ? 0 : 1);
  }
  std::uint64_t taken = 0;
  EXPECT_EQ(::read(result[0], &taken, sizeof taken), static_cast<ssize_t>(sizeof taken));
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0) << "the child did not end well";
  ::close(result[0]);
  ::close(result[1]);
  return taken;
}

void open_and_use(const std::string& path, bool read_only, std::size_t reads = 20000,
                  std::size_t reads_at_once = 1) {
  auto node = blockdev::open_image({.path = path,
                                    .format = blockdev::ImageFormat::kQcow2,
                                    .cache = blockdev::CacheMode::kWriteback,
                                    .read_only = read_only});
  if (node) use(**node, reads, reads_at_once);
}

class ImageMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!kCanCount) GTEST_SKIP() << "a sanitizer's own memory cannot be told from vblk's";
    log::set_level(log::Level::kOff);
  }
};

class GreedyImageMemory : public ImageMemory, public ::testing::WithParamInterface<Greedy> {};

TEST_P(GreedyImageMemory, of_a_mebibyte_stays_within_the_budget) {
  Bytes bytes(kImageBytesMax);
  GetParam().make(bytes);
  ASSERT_LE(bytes.size(), kImageBytesMax);
  const test::TempDir dir;
  const std::string path = dir.file("disk.qcow2");
  for (const bool read_only : {true, false}) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    const std::uint64_t taken = bytes_taken(
        [&] { open_and_use(path, read_only, GetParam().reads, GetParam().reads_at_once); });
    std::printf("%s, %s: %llu KiB\n", GetParam().name, read_only ? "read-only" : "for writing",
                static_cast<unsigned long long>(taken >> 10));
    EXPECT_LE(taken, qcow2::Qcow2Node::kSmallImageMemoryBytesMax);
  }
}

// Each image of it may take as much as one.
TEST_F(ImageMemory, of_a_chain_of_greedy_images_stays_within_the_budget_of_each) {
  constexpr std::uint64_t kImages = 4;
  const test::TempDir dir;
  for (std::uint64_t i = 0; i < kImages; ++i) {
    Bytes bytes = large_tables(9);
    if (i > 0) {
      put_be(bytes, 104, 4, 0xe2792aca);  // the backing file's format
      put_be(bytes, 108, 4, 5);
      std::memcpy(bytes.data() + 112, "qcow2", 5);
      put_be(bytes, 8, 8, 128);
      put_be(bytes, 16, 4, 1);
      put_be(bytes, 128, 1, '0' + i - 1);
    }
    std::ofstream(dir.file(std::to_string(i)), std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }
  const std::uint64_t taken =
      bytes_taken([&] { open_and_use(dir.file(std::to_string(kImages - 1)), true); });
  std::printf("a chain of %llu: %llu KiB\n", static_cast<unsigned long long>(kImages),
              static_cast<unsigned long long>(taken >> 10));
  EXPECT_GT(taken, qcow2::Qcow2Node::kSmallImageMemoryBytesMax) << "the whole chain is used";
  EXPECT_LE(taken, kImages * qcow2::Qcow2Node::kSmallImageMemoryBytesMax);
}

TEST_F(ImageMemory, is_counted) {
  constexpr std::uint64_t kTaken = std::uint64_t{20} << 20;
  const std::uint64_t counted = bytes_taken([] {
    std::vector<char> memory(kTaken, 'x');
    ASSERT_EQ(std::ranges::count(memory, 'x'), static_cast<std::ptrdiff_t>(kTaken));
  });
  EXPECT_GE(counted, kTaken / 8 * 7);
  EXPECT_LE(counted, kTaken / 8 * 9);
}

const std::vector<Greedy> greedy_images{
    {"l1_table_of_512_byte_clusters", [](Bytes& b) { b = large_tables(9); }},
    {"l1_table_of_4_kib_clusters", [](Bytes& b) { b = large_tables(12); }},
    {"l1_table_of_64_kib_clusters", [](Bytes& b) { b = large_tables(16); }},
    {"l1_table_that_is_not_there",
     [](Bytes& b) {
       b = large_tables(9);
       put_be(b, 24, 8, std::uint64_t{4} << 30);
       put_be(b, 36, 4, 4 << 20);
     }},
    {"refcount_table_that_is_not_there",
     [](Bytes& b) {
       b = large_tables(9);
       put_be(b, 56, 4, 16384);
     }},
    {"clusters_of_2_mib",
     [](Bytes& b) {
       b = large_tables(16);
       put_be(b, 20, 4, 21);
     }},
    {"snapshots_without_end",
     [](Bytes& b) {
       b = large_tables(9);
       put_be(b, 36, 4, 64);
       put_be(b, 24, 8, 1 << 20);
       put_be(b, 60, 4, 65536);
       put_be(b, 64, 8, 16384);
     }},
    {"dirty_with_snapshots_without_end",
     [](Bytes& b) {
       b = large_tables(9);
       put_be(b, 36, 4, 64);
       put_be(b, 24, 8, 1 << 20);
       put_be(b, 60, 4, 20000);
       put_be(b, 64, 8, 16384);
       put_be(b, 72, 8, 1);
     }},
    {"a_header_full_of_feature_names",
     [](Bytes& b) {
       b = large_tables(16);
       put_be(b, 20, 4, 21);
       put_be(b, 104, 4, 0x6803f857);
       put_be(b, 108, 4, kImageBytesMax - 112);
       for (std::uint64_t at = 112; at + 48 <= b.size(); at += 48) {
         put_be(b, at, 2, at / 48);
         std::memset(b.data() + at + 2, 'x', 46);
       }
     }},
    {"data_compressed_by_zlib_that_expands",
     [](Bytes& b) { b = compressed_bomb(qcow2::Compression::kZlib); }, 1024, 64},
    {"data_compressed_by_zstd_that_expands",
     [](Bytes& b) { b = compressed_bomb(qcow2::Compression::kZstd); }, 1024, 64},
    {"bitmaps_without_end",
     [](Bytes& b) {
       b = large_tables(9);
       put_be(b, 36, 4, 64);
       put_be(b, 24, 8, 1 << 20);
       put_be(b, 72, 8, 1);
       put_be(b, 104, 4, 0x23852875);
       put_be(b, 108, 4, 24);
       put_be(b, 112, 4, 43000);
       put_be(b, 120, 8, kImageBytesMax - 16384);
       put_be(b, 128, 8, 16384);
       for (std::uint64_t at = 16384; at + 24 <= b.size(); at += 24) put_be(b, at + 8, 4, 100000);
     }},
};

INSTANTIATE_TEST_SUITE_P(Images, GreedyImageMemory, ::testing::ValuesIn(greedy_images),
                         [](const auto& instance) { return std::string(instance.param.name); });

}  // namespace
}  // namespace vblk::fuzz
