// Flushes that share a call while engines change under them: every order in which a few writes,
// flushes, polls and changes of the engines can meet on two I/O threads of a raw disk. The writes
// and the calls go to a simulated disk, which tells what a power cut would leave.
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <sys/uio.h>
#include <utility>

#include <gtest/gtest.h>

#include "aio/engine_set.h"
#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "blockdev/io_context.h"
#include "blockdev/io_loop.h"
#include "blockdev/raw_node.h"
#include "tests/support/every_order.h"

namespace vblk::blockdev {
namespace {

constexpr std::size_t kThreads = 2;
// Each writes a sector of its own.
constexpr std::size_t kWritesMax = 3;
constexpr std::size_t kFlushesMax = 3;
constexpr std::size_t kDiskBytes = kWritesMax * kSectorBytes;

// A write on the first I/O thread or on the second; a flush; a change of the engines; a poll.
constexpr std::string_view kEvents = "WVabSTAB";

// Both engines are simulated. What one has taken is done at its next poll, what the other has taken
// at one of the next three: so what is written by the one may end after what is flushed by the
// other.
Expected<std::unique_ptr<aio::Engine>> make_engine(aio::SimulatedDisk& disk, aio::EngineName name) {
  const unsigned delay = name == aio::EngineName::kThreads ? 1 : 3;
  auto engine = aio::SimulatedEngine::create(disk, {.delay_reaps_max = delay});
  if (!engine) return std::unexpected(std::move(engine.error()));
  return std::unique_ptr<aio::Engine>(std::move(*engine));
}

class World {
 public:
  explicit World(std::array<IoLoop, kThreads>& loops, bool disk_loses_flushes = false)
      : disk_({.size_bytes = kDiskBytes, .loses_flushes = disk_loses_flushes}),
        node_(ImageFile::wrap(aio::SimulatedDisk::kDirectFd, aio::SimulatedDisk::kBufferedFd,
                              kDiskBytes, kSectorBytes, false),
              {.name = "simulated"}) {
    data_.fill(std::byte{1});
    for (std::size_t i = 0; i < kThreads; ++i) {
      auto engines = aio::EngineSet::create_by({}, maker());
      contexts_[i] = std::make_unique<IoContext>(loops[i], std::move(engines.value()));
    }
    for (Request& request : requests_) {
      request.world = this;
      request.complete = [](BlockRequest& done, int error) {
        static_cast<Request&>(done).world->completed(static_cast<Request&>(done), error);
      };
    }
  }

  [[nodiscard]] bool is_possible(char event) const {
    switch (event) {
      case 'W':
      case 'V':
        return writes_ < kWritesMax;
      case 'a':
      case 'b':
        return flushes_ < kFlushesMax;
      default:
        return true;
    }
  }
  void happen(char event) {
    switch (event) {
      case 'W':
        return write(0);
      case 'V':
        return write(1);
      case 'a':
        return flush(0);
      case 'b':
        return flush(1);
      case 'S':
        return change_engines(0);
      case 'T':
        return change_engines(1);
      case 'A':
        return poll(0);
      default:
        return poll(1);
    }
  }
  void settle() {
    for (int round = 0; round < 30 && completed_ < submitted_; ++round) {
      for (std::size_t i = 0; i < kThreads; ++i) poll(i);
    }
    if (completed_ != submitted_) problem_ = "a request never completes";
    // A leader may still be on its way out of the group.
    for (const auto& context : contexts_) context->drain();
  }

  [[nodiscard]] const std::string& problem() const { return problem_; }
  [[nodiscard]] FlushStatistics statistics() const { return node_.flush_statistics(); }

 private:
  using Sectors = std::array<bool, kWritesMax>;
  struct Request : BlockRequest {
    World* world{nullptr};
    bool is_done{false};
    std::size_t sector{0};     // a write's
    Sectors written_before{};  // a flush's: what had completed when it was submitted
  };

  aio::EngineMaker maker() {
    return [this](aio::EngineName name) { return make_engine(disk_, name); };
  }
  Request& next_request(BlockOperation operation) {
    Request& request = requests_[submitted_++];
    request.operation = operation;
    return request;
  }
  void submit(Request& request, std::size_t thread) {
    is_submitting_ = true;
    node_.submit(request, *contexts_[thread]);
    is_submitting_ = false;
  }
  void write(std::size_t thread) {
    Request& request = next_request(BlockOperation::kWrite);
    request.sector = writes_++;
    request.offset_bytes = request.sector * kSectorBytes;
    request.length_bytes = kSectorBytes;
    request.iov = &element_;
    request.iov_count = 1;
    submit(request, thread);
  }
  void flush(std::size_t thread) {
    ++flushes_;
    Request& request = next_request(BlockOperation::kFlush);
    request.written_before = written_;
    submit(request, thread);
  }
  void poll(std::size_t thread) { contexts_[thread]->poll(); }
  // From one engine for everything to the other.
  void change_engines(std::size_t thread) {
    IoContext& context = *contexts_[thread];
    const bool is_threads = context.engines().selection() == aio::AioSelection{};
    aio::AioSelection wanted;
    wanted.engine_of_kind.fill(is_threads ? aio::EngineName::kNative : aio::EngineName::kThreads);
    auto change = context.engines().begin_change(wanted);
    if (!change.make(maker()) || !context.prepare_change(change)) problem_ = "no engine";
    context.change_engines(std::move(change), [](std::unique_ptr<aio::Engine> /*retired*/) {});
  }
  void completed(Request& request, int error) {
    if (error != 0) problem_ = "an error from nowhere";
    if (request.is_done) problem_ = "a request completes twice";
    if (is_submitting_) problem_ = "a request completes inside submit()";
    request.is_done = true;
    ++completed_;
    if (request.operation == BlockOperation::kWrite) {
      written_[request.sector] = true;
      return;
    }
    const auto durable = disk_.durable();
    for (std::size_t i = 0; i < kWritesMax; ++i) {
      if (request.written_before[i] && durable[i * kSectorBytes] != data_[0])
        problem_ = "a flush completes, and what was written before it is not stable";
    }
  }

  alignas(kSectorBytes) std::array<std::byte, kSectorBytes> data_{};
  iovec element_{data_.data(), data_.size()};
  aio::SimulatedDisk disk_;
  RawNode node_;
  std::array<std::unique_ptr<IoContext>, kThreads> contexts_;
  std::array<Request, kWritesMax + kFlushesMax> requests_;
  Sectors written_{};
  std::size_t writes_{0};
  std::size_t flushes_{0};
  std::size_t submitted_{0};
  std::size_t completed_{0};
  bool is_submitting_{false};
  std::string problem_;
};

class FlushAndEngineChange : public ::testing::Test {
 protected:
  std::array<IoLoop, kThreads> loops_;
};

TEST_F(FlushAndEngineChange, keeps_its_promise_in_every_order_of_five_events) {
  test::EveryOrder orders(kEvents, [this] { return std::make_unique<World>(loops_); });
  EXPECT_GT(orders.explore(5), 10'000U);
}

TEST_F(FlushAndEngineChange, keeps_its_promise_in_every_order_of_five_events_after_a_write) {
  test::EveryOrder orders(kEvents, [this] { return std::make_unique<World>(loops_); });
  EXPECT_GT(orders.explore(5, "WA"), 10'000U);
}

TEST_F(FlushAndEngineChange, shares_a_call_among_flushes_of_former_and_present_engines) {
  World world(loops_);
  test::tell(world, "WAAaASbA");
  EXPECT_EQ(world.statistics().begun, 1U);
}

TEST_F(FlushAndEngineChange, notices_a_disk_that_loses_flushes) {
  World world(loops_, true);
  for (const char event : std::string_view("WAAaSAA")) world.happen(event);
  world.settle();
  EXPECT_EQ(world.problem(), "a flush completes, and what was written before it is not stable");
}

}  // namespace
}  // namespace vblk::blockdev
