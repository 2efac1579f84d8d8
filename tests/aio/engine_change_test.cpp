// The engines changed while requests are in flight: each completes once, where it was or not; what
// was flushed is stable whichever engine wrote and whichever flushed.
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <optional>
#include <pthread.h>
#include <random>
#include <set>
#include <string>
#include <sys/mman.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "aio/engine_set.h"
#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "tests/support/seed.h"
#include "tests/support/temp_dir.h"

namespace vblk::aio {
namespace {

constexpr std::size_t kBlockBytes = 4096;
constexpr std::size_t kBlocks = 64;

// One block of the disk: at most one request at a time, so that what it holds is known.
struct Block : IoRequest {
  Block() : data(static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, kBlockBytes))) {
    complete = [](IoRequest& request, int result_error) {
      auto& self = static_cast<Block&>(request);
      ++self.completions;
      self.error = result_error;
    };
  }
  ~Block() { std::free(data); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  std::byte* data;
  iovec element{};
  int starts{0};
  int completions{0};
  int error{0};
  std::byte content{0};  // of the last write that completed
  std::byte writing{0};
  [[nodiscard]] bool is_busy() const { return starts != completions; }
};

// A disk, and how engines for it are made under the names that may be chosen.
class ChangingEngines : public testing::Test {
 protected:
  void use_file() {
    fd_ = ::open(dir_.file("disk").c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600);
    if (fd_ < 0) GTEST_SKIP() << "this file system has no O_DIRECT";
    ASSERT_EQ(::ftruncate(fd_, kBlocks * kBlockBytes), 0);
    maker_ = [](EngineName name) { return EngineSet::make_engine(name, {.queue_depth = 16}); };
    make_set();
  }
  void use_simulation(const SimulatedDiskOptions& options) {
    disk_ = std::make_unique<SimulatedDisk>(options);
    fd_ = SimulatedDisk::kDirectFd;
    owns_fd_ = false;
    maker_ = [this](EngineName) -> Expected<std::unique_ptr<Engine>> {
      ++made_;
      auto engine = SimulatedEngine::create(
          *disk_, {.seed = random_(), .delay_reaps_max = 1 + static_cast<unsigned>(random_() % 8)});
      if (!engine) return std::unexpected(std::move(engine.error()));
      return std::unique_ptr<Engine>(std::move(*engine));
    };
    make_set();
  }
  void make_set() {
    auto set = EngineSet::create_by({}, maker_);
    ASSERT_TRUE(set) << set.error().message;
    set_ = std::move(*set);
  }
  void TearDown() override {
    if (set_ != nullptr) set_->drain();
    set_.reset();
    if (owns_fd_ && fd_ >= 0) ::close(fd_);
  }

  bool change(const AioSelection& selection) {
    EngineChange change = set_->begin_change(selection);
    if (const auto made = change.make(maker_); !made) {
      refusal_ = made.error().message;
      set_->cancel(std::move(change));
      return false;
    }
    set_->commit(std::move(change));
    return true;
  }
  AioSelection random_selection() {
    AioSelection selection;
    selection.engine_of_kind.fill(kAllEngineNames[random_() % 3]);
    if (random_() % 2 == 0) return selection;
    for (EngineName& name : selection.engine_of_kind) name = kAllEngineNames[random_() % 3];
    return selection;
  }
  void start(Block& block, IoKind kind) {
    const auto index = static_cast<std::size_t>(&block - blocks_.data());
    block.kind = kind;
    block.fd = fd_;
    block.offset_bytes = index * kBlockBytes;
    block.length_bytes = kBlockBytes;
    block.element = {block.data, kBlockBytes};
    block.iov = &block.element;
    block.iov_count = 1;
    if (kind == IoKind::kWrite) {
      block.writing = std::byte(random_());
      std::memset(block.data, static_cast<int>(block.writing), kBlockBytes);
    }
    ++block.starts;
    set_->queue(block);
  }
  // Checks what has completed since the last call.
  void check(Block& block, int& seen) {
    ASSERT_LE(block.completions, block.starts) << "completed twice";
    if (block.completions == seen) return;
    seen = block.completions;
    ASSERT_EQ(block.error, 0);
    if (block.kind == IoKind::kWrite) block.content = block.writing;
    if (block.kind != IoKind::kRead) return;
    ASSERT_TRUE(std::all_of(block.data, block.data + kBlockBytes, [&block](std::byte byte) {
      return byte == block.content;
    })) << "wrong bytes";
  }
  // Requests on random blocks all the time, and a change now and then.
  void run_load(int changes) {
    std::array<int, kBlocks> seen{};
    while (changes > 0) {
      for (unsigned i = 0; i < 8; ++i) {
        Block& block = blocks_[random_() % kBlocks];
        if (!block.is_busy()) start(block, random_() % 2 == 0 ? IoKind::kRead : IoKind::kWrite);
      }
      if (random_() % 8 == 0) {
        ASSERT_TRUE(change(random_selection())) << refusal_;
        --changes;
      }
      set_->submit();
      set_->reap();
      while (set_->has_retired()) {
        if (set_->take_retired() == nullptr) break;
        ++retired_;
      }
      ASSERT_LE(set_->engines().size(), kAllEngineNames.size());
      for (std::size_t i = 0; i < kBlocks; ++i) ASSERT_NO_FATAL_FAILURE(check(blocks_[i], seen[i]));
    }
    set_->drain();
    for (std::size_t i = 0; i < kBlocks; ++i) {
      ASSERT_NO_FATAL_FAILURE(check(blocks_[i], seen[i]));
      ASSERT_EQ(blocks_[i].completions, blocks_[i].starts) << "lost";
    }
  }

  test::TempDir dir_;
  std::mt19937_64 random_{test::test_seed()};
  std::unique_ptr<SimulatedDisk> disk_;
  int fd_{-1};
  bool owns_fd_{true};
  EngineMaker maker_;
  std::unique_ptr<EngineSet> set_;
  std::array<Block, kBlocks> blocks_;
  std::string refusal_;
  int made_{0};
  int retired_{0};
};

TEST_F(ChangingEngines, completes_each_request_once_over_five_thousand_changes_on_simulated_ones) {
  use_simulation({.size_bytes = kBlocks * kBlockBytes,
                  .seed = random_(),
                  .short_transfer_probability = 0.2,
                  .interrupt_probability = 0.2,
                  .again_probability = 0.05});
  run_load(5000);
  EXPECT_GT(retired_, 100);
  EXPECT_GT(made_, retired_);
}

TEST_F(ChangingEngines, completes_each_request_once_over_changes_of_real_engines) {
  use_file();
  if (IsSkipped()) return;
  if (!change(*AioSelection::parse("io_uring"))) GTEST_SKIP() << refusal_;
  // Each native engine that goes takes tens of milliseconds here.
  run_load(200);
  EXPECT_GT(retired_, 2);
}

TEST_F(ChangingEngines, completes_each_request_once_between_all_pairs_with_requests_in_flight) {
  use_file();
  if (IsSkipped()) return;
  if (!change(*AioSelection::parse("io_uring"))) GTEST_SKIP() << refusal_;
  for (const EngineName from : kAllEngineNames) {
    for (const EngineName to : kAllEngineNames) {
      AioSelection selection;
      selection.engine_of_kind.fill(from);
      ASSERT_TRUE(change(selection)) << refusal_;
      for (Block& block : blocks_) start(block, IoKind::kWrite);
      set_->submit();
      selection.engine_of_kind.fill(to);
      ASSERT_TRUE(change(selection)) << refusal_;
      set_->drain();
      for (Block& block : blocks_) {
        ASSERT_EQ(block.error, 0);
        ASSERT_EQ(block.completions, block.starts);
        start(block, IoKind::kRead);
      }
      set_->drain();
      for (const Block& block : blocks_) {
        ASSERT_EQ(block.error, 0);
        EXPECT_EQ(block.data[kBlockBytes - 1], block.writing);
      }
    }
  }
}

TEST_F(ChangingEngines, changes_one_kind_and_leaves_the_others_where_they_are) {
  use_simulation({.size_bytes = kBlocks * kBlockBytes});
  ASSERT_TRUE(change(*AioSelection::parse("native")));
  const auto wanted = AioSelection::parse("read=io_uring", "set-aio", set_->selection());
  ASSERT_TRUE(wanted);
  ASSERT_TRUE(change(*wanted));
  for (const auto& route : set_->routes())
    EXPECT_EQ(route.requested, route.kind == IoKind::kRead ? "io_uring" : "native");
}

// A flush on any engine covers what any other has completed before it was queued.
TEST_F(ChangingEngines, makes_a_flush_cover_what_was_written_before_the_change) {
  use_simulation({.size_bytes = kBlocks * kBlockBytes, .seed = random_()});
  IoRequest flush;
  flush.kind = IoKind::kFlush;
  flush.fd = fd_;
  flush.complete = [](IoRequest& /*request*/, int error) { EXPECT_EQ(error, 0); };
  for (int round = 0; round < 500; ++round) {
    std::set<std::size_t> written;
    for (int i = 0; i < 8; ++i) written.insert(random_() % kBlocks);
    for (const std::size_t index : written) start(blocks_[index], IoKind::kWrite);
    // Some on one engine, the rest on another.
    set_->submit();
    set_->reap();
    ASSERT_TRUE(change(random_selection()));
    set_->drain();
    // Others may be under way; they may be stable or not.
    Block& other = blocks_[random_() % kBlocks];
    const bool has_other = written.insert(static_cast<std::size_t>(&other - blocks_.data())).second;
    if (has_other) {
      start(other, IoKind::kWrite);
      set_->submit();
      ASSERT_TRUE(change(random_selection()));
      written.erase(static_cast<std::size_t>(&other - blocks_.data()));
    }
    set_->queue(flush);
    set_->drain();
    while (set_->take_retired() != nullptr) {
    }
    const auto left = disk_->after_power_cut(random_(), SimulatedDisk::Unflushed::kLost);
    for (const std::size_t index : written)
      ASSERT_EQ(left[index * kBlockBytes], blocks_[index].writing) << "lost in round " << round;
  }
}

// The canary: on a disk that loses flushes, the check above finds what is missing.
TEST_F(ChangingEngines, would_notice_a_flush_that_covers_nothing) {
  use_simulation({.size_bytes = kBlocks * kBlockBytes, .loses_flushes = true});
  for (Block& block : blocks_) start(block, IoKind::kWrite);
  set_->drain();
  IoRequest flush;
  flush.kind = IoKind::kFlush;
  flush.fd = fd_;
  flush.complete = [](IoRequest& /*request*/, int error) { EXPECT_EQ(error, 0); };
  ASSERT_TRUE(change(*AioSelection::parse("native")));
  set_->queue(flush);
  set_->drain();
  const auto left = disk_->after_power_cut(1, SimulatedDisk::Unflushed::kLost);
  std::size_t stable = 0;
  for (std::size_t i = 0; i < kBlocks; ++i) stable += left[i * kBlockBytes] == blocks_[i].writing;
  EXPECT_LT(stable, kBlocks);
}

TEST_F(ChangingEngines, leaves_everything_as_it_was_if_an_engine_cannot_be_made) {
  use_simulation({.size_bytes = kBlocks * kBlockBytes});
  ASSERT_TRUE(change(*AioSelection::parse("native")));
  const EngineMaker good = maker_;
  maker_ = [&](EngineName name) -> Expected<std::unique_ptr<Engine>> {
    if (name != EngineName::kIoUring) return good(name);
    return make_error(ErrorKind::kPermission, "io_uring is not permitted");
  };
  for (Block& block : blocks_) start(block, IoKind::kWrite);
  set_->submit();
  EXPECT_FALSE(change(*AioSelection::parse("read=io_uring,write=threads")));
  EXPECT_EQ(refusal_, "io_uring is not permitted");
  EXPECT_EQ(set_->selection().to_string(), "native");
  EXPECT_FALSE(set_->has_retired());
  set_->drain();
  for (const Block& block : blocks_) EXPECT_EQ(block.completions, 1);
}

TEST_F(ChangingEngines, lets_auto_do_without_what_cannot_be_made_and_say_so) {
  use_simulation({.size_bytes = kBlocks * kBlockBytes});
  const EngineMaker good = maker_;
  maker_ = [&](EngineName name) -> Expected<std::unique_ptr<Engine>> {
    if (name != EngineName::kIoUring) return good(name);
    return make_error(ErrorKind::kPermission, "io_uring is not permitted");
  };
  EngineChange change = set_->begin_change(*AioSelection::parse("auto"));
  ASSERT_TRUE(change.make(maker_));
  ASSERT_EQ(change.notes().size(), 1U);
  EXPECT_NE(change.notes().front().find("auto does without io_uring"), std::string::npos);
  set_->commit(std::move(change));
  EXPECT_EQ(set_->engines().size(), 2U);
  for (const auto& route : set_->routes()) EXPECT_EQ(route.requested, "auto");
  // Asked again when it can be made.
  maker_ = good;
  ASSERT_TRUE(this->change(*AioSelection::parse("auto")));
  EXPECT_EQ(set_->engines().size(), 3U);
}

TEST_F(ChangingEngines, takes_back_an_engine_that_was_about_to_leave) {
  use_simulation({.size_bytes = kBlocks * kBlockBytes});
  ASSERT_TRUE(change(*AioSelection::parse("native")));
  const int made = made_;
  ASSERT_TRUE(change(*AioSelection::parse("threads")));
  EXPECT_TRUE(set_->has_retired());
  ASSERT_TRUE(change(*AioSelection::parse("native")));
  EXPECT_FALSE(set_->has_retired());
  EXPECT_EQ(made_, made) << "nothing new was needed";
}

// What a native engine tries when it is made was left in its ring once, if the thread was
// interrupted meanwhile, and taken for a request's completion.
TEST_F(ChangingEngines, survives_interrupts_while_a_native_engine_is_made) {
  use_file();
  if (IsSkipped()) return;
  struct sigaction action{};
  action.sa_handler = [](int /*signal*/) {};
  ASSERT_EQ(::sigaction(SIGUSR1, &action, nullptr), 0);
  std::atomic<bool> done{false};
  std::thread interrupter([&done, made_by = ::pthread_self()] {
    while (!done) ::pthread_kill(made_by, SIGUSR1);
  });
  std::vector<std::unique_ptr<Engine>> engines;
  for (int i = 0; i < 100; ++i) {
    auto engine = EngineSet::make_engine(EngineName::kNative, {.queue_depth = 16});
    if (!engine) break;  // fs.aio-max-nr
    engines.push_back(std::move(*engine));
  }
  done = true;
  interrupter.join();
  EXPECT_GT(engines.size(), 10U);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  for (const auto& engine : engines) EXPECT_EQ(engine->reap(), 0U);
  std::vector<std::thread> waits;  // of io_destroy(2), together
  for (auto& engine : engines) waits.emplace_back([&engine] { engine.reset(); });
  for (std::thread& wait : waits) wait.join();
}

// An engine that notes what it is told.
class NotingEngine final : public Engine {
 public:
  explicit NotingEngine(std::multiset<int>& files, std::multiset<void*>& memory)
      : files_(files), memory_(memory) {}
  [[nodiscard]] std::string_view name() const override { return "noting"; }
  [[nodiscard]] bool supports(IoKind /*kind*/) const override { return true; }
  Expected<void> register_file(int fd) override {
    files_.insert(fd);
    return {};
  }
  void unregister_file(int fd) override { files_.erase(files_.find(fd)); }
  Expected<void> register_memory(const iovec& range) override {
    memory_.insert(range.iov_base);
    return {};
  }
  void unregister_memory(const iovec& range) override {
    memory_.erase(memory_.find(range.iov_base));
  }
  void queue(IoRequest& /*request*/) override {}
  void submit() override {}
  std::size_t reap() override { return 0; }
  [[nodiscard]] int completion_fd() const override { return -1; }
  [[nodiscard]] bool prepare_to_sleep() override { return true; }
  void wake_up() override {}

 private:
  std::multiset<int>& files_;
  std::multiset<void*>& memory_;
};

// Guest memory and the image come and go while an engine is being made on another thread.
TEST(EngineChange, tells_a_new_engine_what_was_registered_meanwhile) {
  std::multiset<int> files;
  std::multiset<void*> memory;
  const EngineMaker maker = [&](EngineName name) -> Expected<std::unique_ptr<Engine>> {
    if (name == EngineName::kThreads) return EngineSet::make_engine(name, {});
    return std::make_unique<NotingEngine>(files, memory);
  };
  auto set = EngineSet::create_by({}, maker);
  ASSERT_TRUE(set);
  std::array<std::byte, 4> regions{};
  const auto range = [&regions](std::size_t index) { return iovec{&regions[index], 1}; };
  ASSERT_TRUE((*set)->register_file(10));
  ASSERT_TRUE((*set)->register_file(11));
  ASSERT_TRUE((*set)->register_memory(range(0)));
  ASSERT_TRUE((*set)->register_memory(range(1)));
  EngineChange change = (*set)->begin_change(*AioSelection::parse("native"));
  ASSERT_TRUE(change.make(maker));
  EXPECT_EQ(files, (std::multiset<int>{10, 11}));
  (*set)->unregister_file(10);
  ASSERT_TRUE((*set)->register_file(12));
  (*set)->unregister_memory(range(0));
  ASSERT_TRUE((*set)->register_memory(range(2)));
  // The same address again is other memory: what was registered of the old one must not be used.
  (*set)->unregister_memory(range(1));
  ASSERT_TRUE((*set)->register_memory(range(1)));
  (*set)->commit(std::move(change));
  EXPECT_EQ(files, (std::multiset<int>{11, 12}));
  EXPECT_EQ(memory, (std::multiset<void*>{&regions[1], &regions[2]}));
  (*set)->unregister_memory(range(1));
  EXPECT_EQ(memory, (std::multiset<void*>{&regions[2]}));
}

// Registrations nest, one by one: the engines are told of the first and of the last.
TEST(EngineChange, registers_once_what_several_queues_register) {
  std::multiset<int> files;
  std::multiset<void*> memory;
  EngineSet set(std::make_unique<NotingEngine>(files, memory));
  ASSERT_TRUE(set.register_file(7));
  ASSERT_TRUE(set.register_file(7));
  EXPECT_EQ(files.size(), 1U);
  set.unregister_file(7);
  EXPECT_EQ(files.size(), 1U);
  set.unregister_file(7);
  EXPECT_TRUE(files.empty());
}

TEST(AioSelection, changes_only_the_kinds_that_are_named) {
  const auto base = AioSelection::parse("read=native,write=io_uring,flush=auto");
  ASSERT_TRUE(base) << base.error().message;
  const auto changed = AioSelection::parse("write=threads,discard=io_uring", "set-aio", *base);
  ASSERT_TRUE(changed);
  EXPECT_EQ(changed->to_string(),
            "read=native,write=threads,flush=auto,discard=io_uring,write-zeroes=io_uring,"
            "write-behind=threads");
  const auto wrong = AioSelection::parse("write=foo", "set-aio", *base);
  ASSERT_FALSE(wrong);
  EXPECT_TRUE(wrong.error().message.starts_with("set-aio: ")) << wrong.error().message;
}

}  // namespace
}  // namespace vblk::aio
