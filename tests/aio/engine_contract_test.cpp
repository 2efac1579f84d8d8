// One contract, every engine: what aio/engine.h promises, on threads, native, io_uring and the
// simulated disk.
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <optional>
#include <poll.h>
#include <random>
#include <span>
#include <string>
#include <sys/stat.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "aio/engine_set.h"
#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "tests/support/seed.h"
#include "tests/support/temp_dir.h"

namespace vblk::aio {
namespace {

constexpr std::size_t kDiskBytes = std::size_t{1} << 20;
constexpr std::size_t kAlignment = 4096;

// Aligned memory for O_DIRECT.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t bytes)
      : bytes_((bytes + kAlignment - 1) / kAlignment * kAlignment),
        data_(
            static_cast<std::byte*>(std::aligned_alloc(kAlignment, std::max(bytes_, kAlignment)))) {
  }
  ~AlignedBuffer() { std::free(data_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  [[nodiscard]] std::byte* data() const { return data_; }

 private:
  std::size_t bytes_;
  std::byte* data_;
};

// What the suite runs on: a disk, and engines for it.
class Backing {
 public:
  virtual ~Backing() = default;
  virtual Expected<std::unique_ptr<EngineSet>> make_engines(const EngineOptions& options) = 0;
  [[nodiscard]] virtual int fd() const = 0;
  virtual std::vector<std::byte> contents() = 0;
};

class FileBacking final : public Backing {
 public:
  // What a variant changes about the options that a test asks for.
  using Adjust = std::function<void(EngineOptions&)>;
  FileBacking(EngineName engine, bool direct, Adjust adjust = {})
      : adjust_(std::move(adjust)), direct_(direct) {
    selection_.engine_of_kind.fill(engine);
    fd_ = ::open(dir_.file("disk").c_str(), O_RDWR | O_CREAT | O_CLOEXEC | (direct ? O_DIRECT : 0),
                 0600);
    if (fd_ >= 0 && ::ftruncate(fd_, kDiskBytes) != 0) throw std::runtime_error("ftruncate");
  }
  ~FileBacking() override { ::close(fd_); }
  Expected<std::unique_ptr<EngineSet>> make_engines(const EngineOptions& options) override {
    EngineOptions adjusted = options;
    if (adjust_) adjust_(adjusted);
    return EngineSet::create(selection_, adjusted);
  }
  [[nodiscard]] int fd() const override { return fd_; }
  std::vector<std::byte> contents() override {
    std::vector<std::byte> bytes(kDiskBytes);
    const int buffered = ::open(dir_.file("disk").c_str(), O_RDONLY | O_CLOEXEC);
    EXPECT_EQ(::pread(buffered, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    ::close(buffered);
    return bytes;
  }
  [[nodiscard]] bool usable() const { return fd_ >= 0 || !direct_; }

 private:
  test::TempDir dir_;
  AioSelection selection_;
  Adjust adjust_;
  bool direct_;
  int fd_{-1};
};

class SimulatedBacking final : public Backing {
 public:
  SimulatedBacking(SimulatedDiskOptions options, bool direct)
      : disk_(options), direct_(direct), seed_(options.seed) {}
  Expected<std::unique_ptr<EngineSet>> make_engines(const EngineOptions& /*options*/) override {
    auto engine = SimulatedEngine::create(disk_, {.seed = seed_});
    if (!engine) return std::unexpected(std::move(engine.error()));
    return std::make_unique<EngineSet>(std::move(*engine));
  }
  [[nodiscard]] int fd() const override {
    return direct_ ? SimulatedDisk::kDirectFd : SimulatedDisk::kBufferedFd;
  }
  std::vector<std::byte> contents() override { return disk_.current(); }

 private:
  SimulatedDisk disk_;
  bool direct_;
  std::uint64_t seed_;
};

struct Variant {
  std::string name;
  std::function<std::unique_ptr<Backing>()> make;
};

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const EngineName engine : kAllEngineNames) {
    for (const bool direct : {false, true}) {
      all.push_back({std::string(to_string(engine)) + (direct ? "_direct" : "_buffered"),
                     [engine, direct]() -> std::unique_ptr<Backing> {
                       auto backing = std::make_unique<FileBacking>(engine, direct);
                       return backing->usable() ? std::move(backing) : nullptr;
                     }});
    }
  }
  for (const threadpool::PoolKind pool : threadpool::kAllPoolKinds) {
    if (pool == threadpool::PoolKind::kAdaptive) continue;
    std::string name = fmt::format("threads_{}", threadpool::to_string(pool));
    std::ranges::replace(name, '-', '_');
    all.push_back({name, [pool] {
                     return std::make_unique<FileBacking>(
                         EngineName::kThreads, false,
                         [pool](EngineOptions& options) { options.pool = pool; });
                   }});
  }
  all.push_back({"io_uring_kernel_workers", [] {
                   return std::make_unique<FileBacking>(EngineName::kIoUring, false,
                                                        [](EngineOptions& options) {
                                                          options.io_uring.force_async = true;
                                                          options.io_uring.kernel_workers = 4;
                                                        });
                 }});
  all.push_back(
      {"inline", [] { return std::make_unique<FileBacking>(EngineName::kInline, false); }});
  all.push_back({"simulated", [] {
                   return std::make_unique<SimulatedBacking>(
                       SimulatedDiskOptions{.size_bytes = kDiskBytes,
                                            .seed = 7,
                                            .direct_alignment_bytes = kAlignment},
                       true);
                 }});
  all.push_back({"simulated_unreliable", [] {
                   return std::make_unique<SimulatedBacking>(
                       SimulatedDiskOptions{.size_bytes = kDiskBytes,
                                            .seed = 8,
                                            .direct_alignment_bytes = kAlignment,
                                            .short_transfer_probability = 0.3,
                                            .interrupt_probability = 0.2,
                                            .again_probability = 0.05},
                       false);
                 }});
  return all;
}

// A request with its buffer and its outcome.
struct TestIo : IoRequest {
  explicit TestIo(std::size_t bytes) : buffer(bytes), element{buffer.data(), bytes} {
    length_bytes = bytes;
    iov = &element;
    iov_count = 1;
    thread = std::this_thread::get_id();
    complete = [](IoRequest& request, int result_error) {
      auto& self = static_cast<TestIo&>(request);
      ++self.completions;
      self.error = result_error;
      EXPECT_FALSE(*self.inside_call) << "completed inside queue() or submit()";
      EXPECT_EQ(std::this_thread::get_id(), self.thread) << "completed on another thread";
      if (self.then) self.then();
    };
  }
  AlignedBuffer buffer;
  iovec element;
  int completions{0};
  int error{-1};
  bool* inside_call{nullptr};
  std::thread::id thread;
  std::function<void()> then;
};

class EngineContract : public testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    backing_ = GetParam().make();
    if (backing_ == nullptr) GTEST_SKIP() << "this file system has no O_DIRECT";
    make_engines({});
  }
  void TearDown() override {
    if (engines_ != nullptr) engines_->drain();
  }
  void make_engines(const EngineOptions& options) {
    if (engines_ != nullptr) engines_->drain();
    auto engines = backing_->make_engines(options);
    if (!engines && engines.error().kind == ErrorKind::kPermission)
      GTEST_SKIP() << engines.error().message;
    ASSERT_TRUE(engines) << engines.error().message;
    engines_ = std::move(*engines);
  }

  std::unique_ptr<TestIo> make(IoKind kind, std::uint64_t offset, std::size_t bytes,
                               unsigned char fill = 0) {
    auto io = std::make_unique<TestIo>(bytes);
    io->kind = kind;
    io->fd = backing_->fd();
    io->offset_bytes = offset;
    io->inside_call = &inside_call_;
    if (kind == IoKind::kFlush || kind == IoKind::kDiscard || kind == IoKind::kWriteZeroes)
      io->iov_count = 0;
    if (kind == IoKind::kRead || kind == IoKind::kWrite)
      std::memset(io->buffer.data(), fill, bytes);
    return io;
  }
  void queue(TestIo& io) {
    inside_call_ = true;
    engines_->queue(io);
    inside_call_ = false;
  }
  void submit() {
    inside_call_ = true;
    engines_->submit();
    inside_call_ = false;
  }
  int run(TestIo& io) {
    queue(io);
    submit();
    finish();
    EXPECT_EQ(io.completions, 1);
    return io.error;
  }
  // Like a loop without anything else to do: sleeps on the descriptors whenever the engines allow
  // it.
  void finish() {
    while (engines_->in_flight() > 0) {
      submit();
      if (engines_->reap() > 0) continue;
      if (engines_->prepare_to_sleep()) {
        std::vector<pollfd> descriptors;
        for (const auto& engine : engines_->engines())
          descriptors.push_back({engine->completion_fd(), POLLIN, 0});
        ASSERT_GT(::poll(descriptors.data(), descriptors.size(), 20000), 0)
            << "a completion was not signalled";
      }
      engines_->wake_up();
    }
  }

  std::unique_ptr<Backing> backing_;
  std::unique_ptr<EngineSet> engines_;
  bool inside_call_{false};
};

TEST_P(EngineContract, writes_and_reads_back_exactly_these_bytes) {
  EXPECT_EQ(run(*make(IoKind::kWrite, 8192, 4096, 0xab)), 0);
  auto read = make(IoKind::kRead, 4096, 12288, 0xff);
  EXPECT_EQ(run(*read), 0);
  const std::byte* const bytes = read->buffer.data();
  EXPECT_TRUE(
      std::all_of(bytes, bytes + 4096, [](std::byte byte) { return byte == std::byte{0}; }));
  EXPECT_TRUE(std::all_of(bytes + 4096, bytes + 8192,
                          [](std::byte byte) { return byte == std::byte{0xab}; }));
  EXPECT_TRUE(std::all_of(bytes + 8192, bytes + 12288,
                          [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST_P(EngineContract, writes_through_flushes_zeroes_and_discards) {
  auto write = make(IoKind::kWrite, 0, 65536, 0x11);
  write->write_through = true;
  EXPECT_EQ(run(*write), 0);
  EXPECT_EQ(run(*make(IoKind::kFlush, 0, 0)), 0);
  auto keep = make(IoKind::kWriteZeroes, 4096, 8192);
  auto unmap = make(IoKind::kWriteZeroes, 16384, 4096);
  unmap->may_unmap = true;
  const int kept = run(*keep);
  const int unmapped = run(*unmap);
  const int discarded = run(*make(IoKind::kDiscard, 32768, 8192));
  if (kept == EOPNOTSUPP || unmapped == EOPNOTSUPP)
    GTEST_SKIP() << "this file system has no fallocate for it";
  EXPECT_EQ(kept, 0);
  EXPECT_EQ(unmapped, 0);
  EXPECT_EQ(discarded, 0);
  const auto bytes = backing_->contents();
  const auto all = [&bytes](std::size_t from, std::size_t to, int value) {
    return std::all_of(bytes.begin() + static_cast<std::ptrdiff_t>(from),
                       bytes.begin() + static_cast<std::ptrdiff_t>(to),
                       [value](std::byte byte) { return byte == std::byte(value); });
  };
  EXPECT_TRUE(all(0, 4096, 0x11));
  EXPECT_TRUE(all(4096, 12288, 0));
  EXPECT_TRUE(all(12288, 16384, 0x11));
  EXPECT_TRUE(all(16384, 20480, 0));
  EXPECT_TRUE(all(20480, 32768, 0x11));
  EXPECT_EQ(bytes.size(), kDiskBytes) << "the file keeps its size";
}

TEST_P(EngineContract, starts_writing_behind_and_waits_for_it) {
  EXPECT_EQ(run(*make(IoKind::kWrite, 0, 65536, 0x22)), 0);
  for (const bool until_written : {false, true}) {
    for (const std::uint64_t length :
         {std::uint64_t{8192}, std::uint64_t{0}, std::uint64_t{5} << 32}) {
      auto sync = make(IoKind::kWriteBehind, 4096, 0);
      sync->length_bytes = length;
      sync->until_written = until_written;
      EXPECT_EQ(run(*sync), 0);
    }
  }
  auto bad = make(IoKind::kWriteBehind, 0, 4096);
  bad->fd = 999'999;
  EXPECT_EQ(run(*bad), EBADF);
}

TEST_P(EngineContract, takes_scattered_buffers_with_empty_ones_among_them) {
  constexpr std::size_t kPart = kAlignment;
  AlignedBuffer memory(3 * kPart);
  for (std::size_t i = 0; i < 3; ++i)
    std::memset(memory.data() + i * kPart, static_cast<int>(i + 1), kPart);
  std::vector<iovec> iov{
      {memory.data(), 0},     {memory.data() + 2 * kPart, kPart}, {memory.data(), 0},
      {memory.data(), kPart}, {memory.data() + kPart, kPart},     {memory.data(), 0}};
  auto write = make(IoKind::kWrite, 0, 3 * kPart);
  write->iov = iov.data();
  write->iov_count = static_cast<std::uint32_t>(iov.size());
  EXPECT_EQ(run(*write), 0);
  const auto bytes = backing_->contents();
  EXPECT_EQ(bytes[0], std::byte{3});
  EXPECT_EQ(bytes[kPart], std::byte{1});
  EXPECT_EQ(bytes[2 * kPart], std::byte{2});
}

TEST_P(EngineContract, calls_a_read_beyond_the_end_no_data) {
  EXPECT_EQ(run(*make(IoKind::kRead, kDiskBytes - 4096, 8192)), ENODATA);
  EXPECT_EQ(run(*make(IoKind::kRead, 2 * kDiskBytes, 4096)), ENODATA);
}

TEST_P(EngineContract, reports_a_bad_descriptor_to_that_request_alone) {
  std::vector<std::unique_ptr<TestIo>> ios;
  for (unsigned i = 0; i < 9; ++i) {
    ios.push_back(make(IoKind::kWrite, i * 4096, 4096, static_cast<unsigned char>(i + 1)));
    if (i % 3 == 1) ios.back()->fd = 999'999;
    queue(*ios.back());
  }
  submit();
  finish();
  const auto bytes = backing_->contents();
  for (unsigned i = 0; i < 9; ++i) {
    EXPECT_EQ(ios[i]->completions, 1);
    EXPECT_EQ(ios[i]->error, i % 3 == 1 ? EBADF : 0) << "request " << i;
    EXPECT_EQ(bytes[i * 4096], std::byte(i % 3 == 1 ? 0 : i + 1));
  }
}

TEST_P(EngineContract, keeps_what_does_not_fit_its_queue_and_loses_nothing) {
  make_engines({.queue_depth = 4, .max_batch = 3, .max_threads = 2});
  if (IsSkipped()) return;
  std::vector<std::unique_ptr<TestIo>> ios;
  for (unsigned i = 0; i < 200; ++i) {
    ios.push_back(make(IoKind::kWrite, i * 4096, 4096, static_cast<unsigned char>(i)));
    queue(*ios.back());
  }
  submit();
  finish();
  const auto bytes = backing_->contents();
  for (unsigned i = 0; i < 200; ++i) {
    EXPECT_EQ(ios[i]->completions, 1);
    EXPECT_EQ(ios[i]->error, 0);
    EXPECT_EQ(bytes[i * 4096], std::byte(i));
  }
}

// A completion may queue the next request. Ten thousand in a row would overflow the stack of an
// engine that completes inside queue().
TEST_P(EngineContract, lets_a_completion_queue_the_next_request) {
  int left = 10000;
  auto io = make(IoKind::kWrite, 0, 4096, 1);
  io->then = [&] {
    if (--left > 0) engines_->queue(*io);
  };
  queue(*io);
  finish();
  EXPECT_EQ(left, 0);
  EXPECT_EQ(io->completions, 10000);
}

TEST_P(EngineContract, completes_everything_when_drained_in_the_middle) {
  std::vector<std::unique_ptr<TestIo>> ios;
  for (unsigned i = 0; i < 64; ++i) {
    ios.push_back(
        make(i % 4 == 3 ? IoKind::kFlush : IoKind::kWrite, i * 4096, i % 4 == 3 ? 0 : 4096, 1));
    queue(*ios.back());
    if (i == 20) submit();
  }
  engines_->drain();
  EXPECT_EQ(engines_->in_flight(), 0U);
  for (const auto& io : ios) EXPECT_EQ(io->completions, 1);
}

TEST_P(EngineContract, counts_what_it_does) {
  std::vector<std::unique_ptr<TestIo>> ios;
  for (unsigned i = 0; i < 16; ++i) {
    ios.push_back(make(IoKind::kWrite, i * 4096, 4096, 1));
    queue(*ios.back());
  }
  submit();
  finish();
  EngineStatistics sum;
  for (const auto& engine : engines_->engines()) {
    sum.requests += engine->statistics().requests;
    sum.completed += engine->statistics().completed;
    sum.submitted += engine->statistics().submitted;
    sum.resubmitted += engine->statistics().resubmitted;
    sum.submit_calls += engine->statistics().submit_calls;
  }
  EXPECT_EQ(sum.requests, 16U);
  EXPECT_EQ(sum.completed, 16U);
  EXPECT_EQ(sum.submitted - sum.resubmitted, 16U);
  if (sum.resubmitted == 0) {
    EXPECT_EQ(sum.submit_calls, 1U) << "one call per batch";
  }
}

// The model: a flat array. Requests in flight together do not overlap, so the order of completion
// does not matter.
TEST_P(EngineContract, agrees_with_a_flat_array_over_ten_thousand_random_operations) {
  std::mt19937_64 random(test::test_seed());
  std::vector<std::byte> model(kDiskBytes);
  constexpr std::size_t kBlocks = kDiskBytes / kAlignment;
  for (int done = 0; done < 10000;) {
    std::vector<std::unique_ptr<TestIo>> ios;
    std::vector<std::vector<std::byte>> expected;
    std::array<bool, kBlocks> busy{};
    const std::size_t batch = 1 + random() % 40;
    for (std::size_t i = 0; i < batch; ++i) {
      const std::size_t first = random() % kBlocks;
      const std::size_t count = 1 + random() % std::min<std::size_t>(8, kBlocks - first);
      if (std::any_of(busy.begin() + static_cast<std::ptrdiff_t>(first),
                      busy.begin() + static_cast<std::ptrdiff_t>(first + count),
                      [](bool is_busy) { return is_busy; })) {
        continue;
      }
      std::fill_n(busy.begin() + static_cast<std::ptrdiff_t>(first), count, true);
      const auto kind = static_cast<IoKind>(random() % kIoKindCount);
      const std::size_t offset = first * kAlignment;
      const std::size_t bytes = count * kAlignment;
      const auto place = model.begin() + static_cast<std::ptrdiff_t>(offset);
      auto io = make(kind, offset, kind == IoKind::kFlush ? 0 : bytes,
                     static_cast<unsigned char>(random()));
      expected.emplace_back();
      switch (kind) {
        case IoKind::kRead:
          expected.back().assign(place, place + static_cast<std::ptrdiff_t>(bytes));
          break;
        case IoKind::kWrite:
          io->write_through = random() % 4 == 0;
          std::copy_n(io->buffer.data(), bytes, place);
          break;
        case IoKind::kFlush:
          break;
        case IoKind::kWriteBehind:
          io->until_written = random() % 2 == 0;
          break;
        case IoKind::kWriteZeroes:
          io->may_unmap = random() % 2 == 0;
          [[fallthrough]];
        case IoKind::kDiscard:
          // A hole reads as zeroes, on files as on the simulated disk.
          std::fill_n(place, bytes, std::byte{0});
          break;
      }
      queue(*io);
      if (random() % 8 == 0) submit();
      ios.push_back(std::move(io));
    }
    submit();
    finish();
    for (std::size_t i = 0; i < ios.size(); ++i) {
      ASSERT_EQ(ios[i]->completions, 1);
      ASSERT_EQ(ios[i]->error, 0);
      if (ios[i]->kind == IoKind::kRead) {
        ASSERT_EQ(std::memcmp(ios[i]->buffer.data(), expected[i].data(), expected[i].size()), 0);
      }
    }
    done += static_cast<int>(ios.size());
  }
  EXPECT_EQ(backing_->contents(), model);
}

// The consumer sleeps whenever it may, one request at a time: a lost wake-up shows as a time-out in
// finish().
TEST_P(EngineContract, never_loses_a_wake_up) {
  for (unsigned i = 0; i < 2000; ++i)
    ASSERT_EQ(run(*make(IoKind::kWrite, (i % 64) * 4096, 4096, 1)), 0);
}

// The shorter sleep, in turns with the other one: each must find what the other has left, in an
// eventfd or fetched already.
TEST_P(EngineContract, sleeps_in_the_engine_where_it_can_and_loses_nothing) {
  using namespace std::chrono_literals;
  EXPECT_FALSE(engines_->sleep(20s)) << "nothing is in flight";
  for (unsigned i = 0; i < 1000; ++i) {
    std::vector<std::unique_ptr<TestIo>> ios;
    for (unsigned j = 0; j <= i % 3; ++j) {
      ios.push_back(make(IoKind::kWrite, ((i + j) % 64) * 4096, 4096, 1));
      queue(*ios.back());
    }
    submit();
    const auto begin = std::chrono::steady_clock::now();
    if (i % 4 != 3 && engines_->reap() == 0) static_cast<void>(engines_->sleep(20s));
    ASSERT_LT(std::chrono::steady_clock::now() - begin, 10s) << "a completion ended no sleep";
    finish();
    for (const auto& io : ios) {
      ASSERT_EQ(io->completions, 1);
      ASSERT_EQ(io->error, 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllEngines, EngineContract, testing::ValuesIn(variants()),
                         [](const testing::TestParamInfo<Variant>& variant) {
                           return variant.param.name;
                         });

// ---- Durability, on the disk that can forget.

class Durability : public testing::Test {
 protected:
  explicit Durability(SimulatedDiskOptions options = {.size_bytes = kDiskBytes, .seed = 3})
      : disk_(options) {
    engine_ = *SimulatedEngine::create(disk_);
  }
  ~Durability() override { settle(); }

  TestIo& start(IoKind kind, std::uint64_t offset, unsigned char fill = 0,
                bool write_through = false) {
    ios_.push_back(std::make_unique<TestIo>(kind == IoKind::kFlush ? 0 : 4096));
    TestIo& io = *ios_.back();
    io.kind = kind;
    io.fd = SimulatedDisk::kBufferedFd;
    io.offset_bytes = offset;
    io.write_through = write_through;
    io.inside_call = &inside_call_;
    std::memset(io.buffer.data(), fill, 4096);
    engine_->queue(io);
    engine_->submit();
    return io;
  }
  void settle() {
    while (engine_->in_flight() > 0) engine_->reap();
  }
  // Whether all of the block survives whatever a power cut does to volatile data.
  bool survives(std::uint64_t offset, unsigned char fill) {
    const auto bytes = disk_.durable();
    return std::all_of(bytes.begin() + static_cast<std::ptrdiff_t>(offset),
                       bytes.begin() + static_cast<std::ptrdiff_t>(offset + 4096),
                       [fill](std::byte byte) { return byte == std::byte{fill}; });
  }

  bool inside_call_{false};
  SimulatedDisk disk_;
  std::unique_ptr<SimulatedEngine> engine_;
  std::vector<std::unique_ptr<TestIo>> ios_;
};

TEST_F(Durability, a_write_alone_may_be_lost) {
  start(IoKind::kWrite, 0, 0x5a);
  settle();
  EXPECT_FALSE(survives(0, 0x5a));
}

TEST_F(Durability, a_flush_covers_every_write_completed_before_it) {
  for (unsigned i = 0; i < 32; ++i)
    start(IoKind::kWrite, i * 4096, static_cast<unsigned char>(i + 1));
  settle();
  start(IoKind::kFlush, 0);
  settle();
  for (unsigned i = 0; i < 32; ++i)
    EXPECT_TRUE(survives(i * 4096, static_cast<unsigned char>(i + 1)));
}

TEST_F(Durability, a_write_through_write_is_stable_when_it_completes) {
  start(IoKind::kWrite, 4096, 0x77, true);
  settle();
  EXPECT_TRUE(survives(4096, 0x77));
}

TEST_F(Durability, an_older_volatile_write_does_not_come_back_over_a_stable_one) {
  start(IoKind::kWrite, 0, 0x01);
  settle();
  start(IoKind::kWrite, 0, 0x02, true);
  settle();
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    disk_.power_cut(seed);
    EXPECT_TRUE(survives(0, 0x02));
  }
}

TEST_F(Durability, a_power_cut_tears_what_was_not_flushed_between_sectors) {
  bool lost = false;
  bool kept = false;
  bool torn = false;
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    start(IoKind::kWrite, 0, 0x00, true);
    settle();
    start(IoKind::kWrite, 0, 0xff);
    settle();
    disk_.power_cut(seed);
    const auto bytes = disk_.current();
    const auto new_bytes = std::count(bytes.begin(), bytes.begin() + 4096, std::byte{0xff});
    EXPECT_EQ(new_bytes % static_cast<std::ptrdiff_t>(SimulatedDisk::kSectorBytes), 0);
    lost |= new_bytes == 0;
    kept |= new_bytes == 4096;
    torn |= new_bytes != 0 && new_bytes != 4096;
  }
  EXPECT_TRUE(lost);
  EXPECT_TRUE(kept);
  EXPECT_TRUE(torn);
}

TEST_F(Durability, the_chosen_operation_fails_with_the_chosen_error) {
  disk_.set_fault_plan([](const IoRequest& request, std::uint64_t index) -> std::optional<int> {
    if (request.kind == IoKind::kFlush) return EIO;
    return index == 1 ? std::optional(ENOSPC) : std::nullopt;
  });
  TestIo& first = start(IoKind::kWrite, 0, 1);
  settle();
  TestIo& second = start(IoKind::kWrite, 4096, 1);
  settle();
  TestIo& flush = start(IoKind::kFlush, 0);
  settle();
  EXPECT_EQ(first.error, 0);
  EXPECT_EQ(second.error, ENOSPC);
  EXPECT_EQ(flush.error, EIO);
}

TEST_F(Durability, completions_come_in_another_order_than_submissions) {
  std::vector<unsigned> order;
  for (unsigned i = 0; i < 32; ++i) {
    TestIo& io = start(IoKind::kWrite, i * 4096, 1);
    io.then = [&order, i] { order.push_back(i); };
  }
  settle();
  EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
}

// The canaries: the checks above must fail on a disk and an engine that lie.
class LyingDisk : public Durability {
 protected:
  LyingDisk() : Durability({.size_bytes = kDiskBytes, .seed = 3, .loses_flushes = true}) {}
};

TEST_F(LyingDisk, is_found_out_by_the_flush_check) {
  start(IoKind::kWrite, 0, 0x5a);
  settle();
  start(IoKind::kFlush, 0);
  settle();
  EXPECT_FALSE(survives(0, 0x5a));
}

TEST(LyingEngine, is_found_out_by_the_completion_check) {
  SimulatedDisk disk({.size_bytes = kDiskBytes});
  auto engine =
      *SimulatedEngine::create(disk, {.delay_reaps_max = 1, .completes_inside_submit = true});
  bool inside_submit = false;
  struct Seen : IoRequest {
    bool* inside{nullptr};
    bool completed_inside{false};
  } seen;
  seen.kind = IoKind::kFlush;
  seen.fd = SimulatedDisk::kBufferedFd;
  seen.inside = &inside_submit;
  seen.complete = [](IoRequest& request, int) {
    auto& self = static_cast<Seen&>(request);
    self.completed_inside = *self.inside;
  };
  engine->queue(seen);
  inside_submit = true;
  engine->submit();
  inside_submit = false;
  EXPECT_TRUE(seen.completed_inside);
}

}  // namespace
}  // namespace vblk::aio
