// What each part of the request path costs, by itself and together with others. CPU time per item:
// the time of the thread that runs the part, or where the name says so of the I/O threads.
//
//   ./dev bench parts [--benchmark_filter=REGEX]
#include <atomic>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <sys/uio.h>
#include <vector>

#include <benchmark/benchmark.h>

#include "aio/simulated_engine.h"
#include "blockdev/log.h"
#include "blockdev/virtio/blk_request.h"
#include "blockdev/virtio/little_endian.h"
#include "blockdev/virtio/virtqueue.h"
#include "tests/bench/request_path.h"
#include "threadpool/completion_queue.h"
#include "threadpool/thread_pool.h"
#include "threadpool/work_queue.h"

namespace vblk::measure {
namespace {

constexpr double kNanosecondsPerSecond = 1e9;

double seconds(std::chrono::nanoseconds time) {
  return static_cast<double>(time.count()) / kNanosecondsPerSecond;
}

// --- rings -------------------------------------------------------------------------------------

// A ring full of chains that is made available again and again: the driver's side costs one store.
class FullRing {
 public:
  explicit FullRing(Shape shape) {
    driver_.submit(0, shape, kQueueSize);
    const auto setup = driver_.setup(0);
    const virtio::GuestMemory& memory = *driver_.guest_memory();
    layout_ = {
        .descriptor_table = memory.translate_user(setup.descriptor_address,
                                                  virtio::descriptor_table_bytes(kQueueSize)),
        .avail_ring =
            memory.translate_user(setup.avail_address, virtio::avail_ring_bytes(kQueueSize)),
        .used_ring = memory.translate_user(setup.used_address, virtio::used_ring_bytes(kQueueSize)),
        .size = kQueueSize,
        .next_avail = 0,
        .event_idx = true,
        .indirect = true};
    ring_ = std::make_unique<virtio::Virtqueue>(layout_, memory);
  }
  [[nodiscard]] virtio::Virtqueue& ring() { return *ring_; }
  void make_available_again() {
    available_ = static_cast<std::uint16_t>(available_ + kQueueSize);
    virtio::store_release_le<std::uint16_t>(layout_.avail_ring + virtio::kAvailIndexOffset,
                                            available_);
  }

 private:
  Driver driver_{1};
  virtio::Virtqueue::Layout layout_{};
  std::unique_ptr<virtio::Virtqueue> ring_;
  std::uint16_t available_{kQueueSize};
};

void pop_and_parse(benchmark::State& state, Shape shape) {
  FullRing full(shape);
  std::vector<iovec> room(2 * kQueueSize);
  std::array<virtio::BlkSegment, virtio::kBlkSegmentsMax> segments;
  const virtio::BlkRequestLimits limits{.capacity_bytes = kDiskBytes};
  for (auto _ : state) {
    for (unsigned i = 0; i < kQueueSize; ++i) {
      virtio::Chain chain;
      if (!full.ring().peek_head() ||
          full.ring().pop(room, chain) != virtio::Virtqueue::Pop::kChain) {
        state.SkipWithError("the ring is broken");
        return;
      }
      benchmark::DoNotOptimize(virtio::parse_blk_request(chain, limits, segments));
    }
    full.make_available_again();
  }
  state.SetItemsProcessed(state.iterations() * kQueueSize);
}
BENCHMARK_CAPTURE(pop_and_parse, read_4k, Shape::kRead4k);
BENCHMARK_CAPTURE(pop_and_parse, read_64k_in_16_pieces, Shape::kRead64k);
BENCHMARK_CAPTURE(pop_and_parse, flush, Shape::kFlush);

void push_used(benchmark::State& state) {
  FullRing full(Shape::kRead4k);
  const auto batch = static_cast<std::uint16_t>(state.range(0));
  for (auto _ : state) {
    for (std::uint16_t head = 0; head < batch; ++head) full.ring().push_used(head, 4097);
    benchmark::DoNotOptimize(full.ring().publish());
  }
  state.SetItemsProcessed(state.iterations() * batch);
}
BENCHMARK(push_used)->ArgName("batch")->Arg(1)->Arg(32);

// --- dispatch ----------------------------------------------------------------------------------

// Pop, parse, submit, complete, push used, interrupt: a cycle of the loop, without its sleep. The
// driver's side of the ring is in it.
void cycle_on_null(benchmark::State& state, Shape shape) {
  const auto node = null_node();
  SteppedPath path(*node, instant_engine());
  const auto depth = static_cast<unsigned>(state.range(0));
  for (auto _ : state) {
    path.driver().submit(0, shape, depth);
    path.finish();
  }
  state.SetItemsProcessed(state.iterations() * depth);
}
BENCHMARK_CAPTURE(cycle_on_null, read_4k, Shape::kRead4k)->ArgName("depth")->Arg(1)->Arg(32);

enum class Spread : std::uint8_t {
  kOneByOne,   // one request at a time, on each queue in turn
  kAllQueues,  // 32 at a time on every queue
  kOneOfAll,   // 32 at a time on the first queue, nothing on the others
};

// From the kick to the interrupt on the null disk: CPU time of the I/O threads alone. The cost of a
// request must not depend on the number of queues.
void kick_to_interrupt(benchmark::State& state, Spread spread) {
  const auto queue_count = static_cast<std::uint16_t>(state.range(0));
  const auto node = null_node();
  ServedPath path(*node, {.queue_count = queue_count,
                          .io_thread_count = static_cast<unsigned>(state.range(1)),
                          .make_engines = [] { return instant_engine(); }});
  const unsigned depth = spread == Spread::kOneByOne ? 1 : 32;
  const std::uint16_t at_once = spread == Spread::kAllQueues ? queue_count : std::uint16_t{1};
  const bool in_turn = spread == Spread::kOneByOne;
  std::uint16_t queue = 0;
  constexpr unsigned kRequestsPerIteration = 64 * 32;
  const unsigned rounds = kRequestsPerIteration / (depth * at_once);
  for (auto _ : state) {
    const auto before = path.cpu_time();
    for (unsigned i = 0; i < rounds; ++i) {
      path.round(queue, at_once, depth, Shape::kRead4k);
      if (in_turn) queue = static_cast<std::uint16_t>((queue + 1) % queue_count);
    }
    state.SetIterationTime(seconds(path.cpu_time() - before));
  }
  state.SetItemsProcessed(state.iterations() * rounds * depth * at_once);
}
void queue_counts(benchmark::internal::Benchmark* each) {
  each->ArgNames({"queues", "io_threads"})->UseManualTime();
  for (const int threads : {1, 2}) {
    for (const int queues : {1, 4, 16, 64}) each->Args({queues, threads});
  }
}
BENCHMARK_CAPTURE(kick_to_interrupt, one_by_one, Spread::kOneByOne)->Apply(queue_counts);
BENCHMARK_CAPTURE(kick_to_interrupt, all_queues, Spread::kAllQueues)->Apply(queue_counts);
BENCHMARK_CAPTURE(kick_to_interrupt, one_of_all, Spread::kOneOfAll)->Apply(queue_counts);

// --- engines -----------------------------------------------------------------------------------

// Reads of one 4 KiB page of an image with O_DIRECT: the page cache is out of it, a disk's own
// cache is not. CPU time of the whole process, workers included; what kernel threads do is not.
void round_trips(benchmark::State& state, aio::EngineSet& engines, int fd) {
  const auto depth = static_cast<std::size_t>(state.range(0));
  constexpr std::size_t kBytes = 4096;
  const std::unique_ptr<std::byte, decltype(&std::free)> data(
      static_cast<std::byte*>(std::aligned_alloc(kBytes, kBytes)), &std::free);
  struct Read : aio::IoRequest {
    iovec piece{};
    int outcome{0};
  };
  std::vector<Read> reads(depth);
  int worst = 0;
  for (auto _ : state) {
    for (Read& read : reads) {
      read.piece = {.iov_base = data.get(), .iov_len = kBytes};
      read.fd = fd;
      read.length_bytes = kBytes;
      read.iov = &read.piece;
      read.iov_count = 1;
      read.complete = [](aio::IoRequest& done, int error) {
        static_cast<Read&>(done).outcome = error;
      };
      engines.queue(read);
    }
    engines.drain();
    for (const Read& read : reads) worst = std::max(worst, read.outcome);
  }
  if (worst != 0) state.SkipWithError("a read failed");
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

void engine_round_trip(benchmark::State& state, aio::EngineName name) {
  const ScratchFile file;
  try {
    const auto engines = engine(name);
    round_trips(state, *engines, file.fd());
  } catch (const std::exception& error) {
    state.SkipWithError(error.what());
  }
}
BENCHMARK_CAPTURE(engine_round_trip, threads, aio::EngineName::kThreads)
    ->ArgName("depth")
    ->Arg(1)
    ->Arg(32)
    ->MeasureProcessCPUTime();
BENCHMARK_CAPTURE(engine_round_trip, native, aio::EngineName::kNative)
    ->ArgName("depth")
    ->Arg(1)
    ->Arg(32)
    ->MeasureProcessCPUTime();
BENCHMARK_CAPTURE(engine_round_trip, io_uring, aio::EngineName::kIoUring)
    ->ArgName("depth")
    ->Arg(1)
    ->Arg(32)
    ->MeasureProcessCPUTime();

// The disk in memory of the tests: no system call at all. It keeps a record of every operation, so
// it is not to run for ever.
void simulated_round_trip(benchmark::State& state) {
  aio::SimulatedDisk disk({.size_bytes = kDiskBytes});
  aio::EngineSet engines(aio::SimulatedEngine::create(disk, {.delay_reaps_max = 1}).value());
  round_trips(state, engines, aio::SimulatedDisk::kDirectFd);
}
BENCHMARK(simulated_round_trip)->ArgName("depth")->Arg(1)->Iterations(64000);
BENCHMARK(simulated_round_trip)->ArgName("depth")->Arg(32)->Iterations(2000);

// --- threads -----------------------------------------------------------------------------------

struct PoolItem : threadpool::Work {
  threadpool::CompletionQueue* completions{nullptr};
};

// Works that do nothing, from submit() through a worker and the completion queue back; the waiting
// thread looks for them without sleeping. CPU time of both threads, so that looking counts as well.
void pool_hand_over(benchmark::State& state) {
  threadpool::ThreadPool pool({.max_threads = 1});
  threadpool::CompletionQueue completions;
  const auto batch = static_cast<std::size_t>(state.range(0));
  std::vector<PoolItem> items(batch);
  for (PoolItem& item : items) {
    item.completions = &completions;
    item.run = [](threadpool::Work& work) noexcept {
      static_cast<void>(static_cast<PoolItem&>(work).completions->push(work));
    };
  }
  for (auto _ : state) {
    threadpool::WorkList works;
    for (PoolItem& item : items) works.push_back(item);
    pool.submit(works);
    threadpool::WorkList done;
    while (done.size() < batch) completions.take_all(done);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(pool_hand_over)->ArgName("batch")->Arg(1)->Arg(32)->MeasureProcessCPUTime();

void completion_queue(benchmark::State& state) {
  threadpool::CompletionQueue completions;
  std::vector<threadpool::Work> works(static_cast<std::size_t>(state.range(0)));
  for (auto _ : state) {
    for (threadpool::Work& work : works) static_cast<void>(completions.push(work));
    threadpool::WorkList done;
    benchmark::DoNotOptimize(completions.take_all(done));
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(completion_queue)->ArgName("batch")->Arg(1)->Arg(32);

void work_queue(benchmark::State& state) {
  threadpool::WorkQueue queue(64);
  threadpool::Work work;
  for (auto _ : state) {
    static_cast<void>(queue.push(work));
    benchmark::DoNotOptimize(queue.pop());
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(work_queue);

}  // namespace
}  // namespace vblk::measure

BENCHMARK_MAIN();
