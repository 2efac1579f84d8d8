// Engines changed on several I/O threads that write, flush and look at what a power cut would
// leave.
#include "blockdev/engine_switch.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "blockdev/io_thread.h"
#include "blockdev/raw_node.h"
#include "tests/blockdev/flushing_writer.h"
#include "tests/support/seed.h"

namespace vblk::blockdev {
namespace {

using testing::FlushingWriter;

constexpr std::size_t kIoThreads = 3;
constexpr std::size_t kWritersPerThread = 4;
constexpr std::size_t kDiskBytes = std::size_t{16} << 10;

// Its descriptor is a regular file's, which nobody can wait for.
class SilentEngine final : public aio::Engine {
 public:
  ~SilentEngine() override { ::close(fd_); }
  [[nodiscard]] std::string_view name() const override { return "silent"; }
  [[nodiscard]] bool supports(aio::IoKind /*kind*/) const override { return true; }
  void queue(aio::IoRequest& request) override { accept(request); }
  void submit() override {}
  std::size_t reap() override { return 0; }
  [[nodiscard]] int completion_fd() const override { return fd_; }
  [[nodiscard]] bool prepare_to_sleep() override { return true; }
  void wake_up() override {}

 private:
  const int fd_{::memfd_create("silent", MFD_CLOEXEC)};
};

// Several I/O threads on a simulated disk.
class SwitchedThreads {
 public:
  explicit SwitchedThreads(bool loses_flushes = false)
      : disk_({.size_bytes = kDiskBytes, .seed = random_(), .loses_flushes = loses_flushes}),
        node_(ImageFile::wrap(aio::SimulatedDisk::kDirectFd, aio::SimulatedDisk::kBufferedFd,
                              kDiskBytes, kSectorBytes, false),
              {.name = "simulated"}),
        switch_({}, [this](aio::EngineName name) { return make(name); }) {
    for (std::size_t i = 0; i < kIoThreads; ++i) {
      threads_.push_back(IoThread::start("io", {}, [this] {
                           return aio::EngineSet::create_by(
                               {}, [this](aio::EngineName name) { return make(name); });
                         }).value());
      for (std::size_t j = 0; j < kWritersPerThread; ++j) {
        writers_.push_back(
            std::make_unique<FlushingWriter>(node_, disk_, *threads_.back(), writers_.size()));
      }
    }
  }
  ~SwitchedThreads() {
    // A leader may still be on its way out of the group when the last flush of another is done.
    for (const auto& thread : threads_) thread->loop().run_and_wait([] {});
  }
  SwitchedThreads(const SwitchedThreads&) = delete;
  SwitchedThreads& operator=(const SwitchedThreads&) = delete;

  void start_writing() {
    for (const auto& writer : writers_) writer->start();
  }
  // Returns how many went wrong.
  int stop_writing() {
    for (const auto& writer : writers_) writer->stop();
    int lost = 0;
    for (const auto& writer : writers_) {
      writer->wait();
      lost += writer->lost();
      rounds_ += writer->rounds();
    }
    return lost;
  }
  Expected<EngineSwitchOutcome> change(const aio::AioSelection& wanted) {
    return switch_.change(threads_, wanted);
  }
  // On one of the I/O threads.
  std::vector<std::string> chosen(std::size_t index) {
    std::vector<std::string> names;
    threads_[index]->loop().run_and_wait([&] {
      for (const auto& route : threads_[index]->context().engines().routes())
        names.push_back(route.requested);
    });
    return names;
  }
  aio::AioSelection random_selection() {
    aio::AioSelection selection;
    for (auto& name : selection.engine_of_kind)
      name = random_() % 8 == 0 ? aio::EngineName::kAuto : aio::kAllEngineNames[random_() % 3];
    return selection;
  }
  [[nodiscard]] const aio::AioSelection& selection() const { return switch_.selection(); }
  [[nodiscard]] std::uint64_t rounds() const { return rounds_; }
  // What becomes of an engine after so many more.
  enum class Fate : std::uint8_t { kRefused, kSilent };
  void after(int engines, Fate fate) {
    fate_ = fate;
    left_ = engines;
  }

 private:
  // On any thread.
  Expected<std::unique_ptr<aio::Engine>> make(aio::EngineName /*name*/) {
    const int left = left_;
    left_ = std::max(left - 1, -1);
    if (left == 0 && fate_ == Fate::kSilent) return std::make_unique<SilentEngine>();
    if (left == 0) return make_error(ErrorKind::kExhausted, "no more engines", EAGAIN);
    auto engine = aio::SimulatedEngine::create(disk_, {.seed = next_seed_++, .delay_reaps_max = 4});
    if (!engine) return std::unexpected(std::move(engine.error()));
    return std::unique_ptr<aio::Engine>(std::move(*engine));
  }

  std::mt19937_64 random_{test::test_seed()};
  std::atomic<std::uint64_t> next_seed_{random_()};
  std::atomic<int> left_{-1};
  std::atomic<Fate> fate_{Fate::kRefused};
  aio::SimulatedDisk disk_;
  RawNode node_;
  EngineSwitch switch_;
  std::vector<std::unique_ptr<IoThread>> threads_;
  std::vector<std::unique_ptr<FlushingWriter>> writers_;
  std::uint64_t rounds_{0};
};

TEST(EngineSwitch, loses_nothing_over_two_thousand_changes_on_several_threads) {
  SwitchedThreads threads;
  threads.start_writing();
  for (int i = 0; i < 2000; ++i) {
    const auto wanted = threads.random_selection();
    const auto changed = threads.change(wanted);
    ASSERT_TRUE(changed) << changed.error().message;
    EXPECT_EQ(threads.selection(), wanted);
  }
  EXPECT_EQ(threads.stop_writing(), 0);
  EXPECT_GT(threads.rounds(), 100U);
}

TEST(EngineSwitch, would_notice_a_disk_that_loses_flushes) {
  SwitchedThreads threads(true);
  threads.start_writing();
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(threads.change(threads.random_selection()));
  EXPECT_GT(threads.stop_writing(), 0);
}

TEST(EngineSwitch, changes_every_thread) {
  SwitchedThreads threads;
  ASSERT_TRUE(threads.change(*aio::AioSelection::parse("io_uring")));
  for (std::size_t i = 0; i < kIoThreads; ++i) {
    EXPECT_EQ(threads.chosen(i), std::vector<std::string>(aio::kIoKindCount, "io_uring"))
        << "thread " << i;
  }
}

// Which thread's engine it is changes, and the error is always that.
void expect_no_change(SwitchedThreads::Fate fate, std::string_view error) {
  SwitchedThreads threads;
  threads.start_writing();
  ASSERT_TRUE(threads.change(*aio::AioSelection::parse("native")));
  for (int engines = 0; engines < static_cast<int>(kIoThreads); ++engines) {
    threads.after(engines, fate);
    const auto changed = threads.change(*aio::AioSelection::parse("io_uring"));
    ASSERT_FALSE(changed);
    EXPECT_EQ(changed.error().message, error);
    EXPECT_EQ(threads.selection().to_string(), "native");
    for (std::size_t i = 0; i < kIoThreads; ++i)
      EXPECT_EQ(threads.chosen(i), std::vector<std::string>(aio::kIoKindCount, "native"));
  }
  EXPECT_EQ(threads.stop_writing(), 0);
}

TEST(EngineSwitch, changes_no_thread_if_the_engine_of_one_cannot_be_made) {
  expect_no_change(SwitchedThreads::Fate::kRefused, "no more engines");
}

TEST(EngineSwitch, changes_no_thread_if_the_engine_of_one_could_not_wake_it) {
  expect_no_change(SwitchedThreads::Fate::kSilent,
                   "the kernel waits for no more descriptors; raise fs.epoll.max_user_watches");
}

}  // namespace
}  // namespace vblk::blockdev
