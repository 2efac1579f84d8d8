#include "blockdev/bench/closed_loop.h"

#include <cassert>
#include <optional>
#include <random>
#include <utility>

#include <fmt/core.h>

#include "blockdev/bench/noise.h"
#include "blockdev/bench/process_usage.h"
#include "blockdev/bench/tracepoint_counter.h"
#include "blockdev/virtio/blk_wire.h"

namespace vblk::bench {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kCompletionTimeout{30'000};
// Requests that are made visible together, so that a backend which is awake can start on them while
// the next are prepared.
constexpr unsigned kRequestsPerKick = 8;

// Nothing is allocated while it runs.
class ClosedLoop {
 public:
  ClosedLoop(driver::BlkDriver& driver, const Workload& workload, std::uint64_t block_count,
             std::span<const std::span<std::byte>> buffers, BlockContent* content,
             std::uint64_t seed, LatencyHistogram& latencies)
      : driver_(driver),
        workload_(workload),
        content_(content),
        random_(seed),
        block_of_(0, block_count - 1),
        block_count_(block_count),
        lanes_(workload.depth),
        latencies_(latencies) {
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
      lanes_[i].loop = this;
      lanes_[i].buffer = buffers[i].first(workload.block_bytes);
      lanes_[i].io.context = &lanes_[i];
      lanes_[i].io.complete = [](driver::BlkIo& io) {
        Lane& lane = *static_cast<Lane*>(io.context);
        lane.loop->completed(lane);
      };
    }
  }

  // Keeps the depth for `time`, then lets what is in flight finish, uncounted. Returns how long it
  // counted.
  Expected<std::chrono::nanoseconds> run(std::chrono::nanoseconds time) {
    latencies_.clear();
    running_ = true;
    const auto begin = Clock::now();
    end_ = begin + time;
    for (Lane& lane : lanes_) start(lane, begin);
    kick();
    while (in_flight_ > 0) {
      if (auto count = driver_.wait(0, kCompletionTimeout); !count)
        return std::unexpected(std::move(count.error()));
      kick();
    }
    if (error_) return std::unexpected(std::move(*error_));
    return stopped_ - begin;
  }

 private:
  struct Lane {
    driver::BlkIo io;
    ClosedLoop* loop{nullptr};
    std::span<std::byte> buffer;
    std::uint64_t block{0};
    unsigned writes_since_flush{0};
    Clock::time_point begin;
  };

  std::uint64_t next_block() {
    if (workload_.random) return block_of_(random_);
    return std::exchange(sequential_, (sequential_ + 1) % block_count_);
  }

  void start(Lane& lane, Clock::time_point now) {
    const bool reads = workload_.operation == Operation::kRead;
    lane.begin = now;
    lane.block = next_block();
    lane.io.sector = lane.block * (workload_.block_bytes / virtio::kSectorBytes);
    lane.io.data = lane.buffer;
    lane.io.type = reads ? virtio::kBlkTIn : virtio::kBlkTOut;
    if (content_ != nullptr && reads) content_->before_read(lane.block, lane.buffer);
    if (content_ != nullptr && !reads) content_->before_write(lane.block, lane.buffer);
    submit(lane);
  }

  void submit(Lane& lane) {
    if (!driver_.submit(0, lane.io))
      return fail(ErrorKind::kExhausted, "the queue is too small for the depth");
    ++in_flight_;
    if (++submitted_since_kick_ == kRequestsPerKick) kick();
  }

  void kick() {
    submitted_since_kick_ = 0;
    driver_.kick(0);
  }

  void completed(Lane& lane) {
    --in_flight_;
    if (lane.io.status != virtio::kBlkSOk) {
      fail(ErrorKind::kIo, fmt::format("request type {} at sector {} failed with status {}",
                                       lane.io.type, lane.io.sector, lane.io.status));
    } else if (lane.io.type == virtio::kBlkTIn && content_ != nullptr &&
               !content_->is_right(lane.block, lane.buffer)) {
      fail(ErrorKind::kCorrupt,
           fmt::format("a read of block {} brought something else", lane.block));
    }
    if (!running_) return;
    if (lane.io.type == virtio::kBlkTOut && workload_.flush_every != 0 &&
        ++lane.writes_since_flush == workload_.flush_every) {
      lane.writes_since_flush = 0;
      lane.io.type = virtio::kBlkTFlush;
      lane.io.sector = 0;
      lane.io.data = {};
      return submit(lane);
    }
    const auto now = Clock::now();
    latencies_.add(static_cast<std::uint64_t>(std::chrono::nanoseconds(now - lane.begin).count()));
    if (now >= end_) {
      running_ = false;
      stopped_ = now;
      return;
    }
    start(lane, now);
  }

  void fail(ErrorKind kind, std::string message) {
    if (!error_) error_ = Error{.kind = kind, .message = std::move(message)};
    running_ = false;
  }

  driver::BlkDriver& driver_;
  const Workload workload_;
  BlockContent* content_;
  std::mt19937_64 random_;
  std::uniform_int_distribution<std::uint64_t> block_of_;
  std::uint64_t block_count_;
  std::uint64_t sequential_{0};
  std::vector<Lane> lanes_;
  LatencyHistogram& latencies_;
  Clock::time_point end_;
  Clock::time_point stopped_;
  std::size_t in_flight_{0};
  unsigned submitted_since_kick_{0};
  bool running_{false};
  std::optional<Error> error_;
};

}  // namespace

Expected<LoadGenerator> LoadGenerator::create(driver::BlkDriver& driver, pid_t server,
                                              std::uint64_t size_bytes, unsigned depth_max,
                                              std::size_t block_bytes_max, BlockContent* content) {
  LoadGenerator generator(driver, server, size_bytes, content);
  for (unsigned i = 0; i < depth_max; ++i) {
    const auto buffer = driver.memory().allocate(block_bytes_max, 4096);
    if (buffer.empty())
      return make_error(ErrorKind::kExhausted, "no guest memory left for buffers");
    fill_with_noise(buffer, i);
    generator.buffers_.push_back(buffer);
  }
  return generator;
}

Expected<Measurement> LoadGenerator::run(const Workload& workload, std::chrono::nanoseconds warm_up,
                                         std::chrono::nanoseconds time, std::uint64_t seed) {
  assert(workload.depth <= buffers_.size());
  Measurement measurement;
  ClosedLoop loop(driver_, workload, size_bytes_ / workload.block_bytes, buffers_, content_, seed,
                  measurement.latencies);
  if (auto warm = loop.run(warm_up); !warm) return std::unexpected(std::move(warm.error()));

  const TracepointCounter punts(server_, "io_uring/io_uring_queue_async_work");
  const ProcessUsage before = usage_of(server_);
  const auto elapsed = loop.run(time);
  if (!elapsed) return std::unexpected(elapsed.error());
  const ProcessUsage after = usage_of(server_);
  // The few operations that finished uncounted cost something too: `depth` of thousands.
  const auto count = static_cast<double>(measurement.latencies.total());
  measurement.elapsed = *elapsed;
  measurement.operations_per_second = count / std::chrono::duration<double>(*elapsed).count();
  measurement.cpu_us_per_operation =
      std::chrono::duration<double, std::micro>(after.cpu_time - before.cpu_time).count() / count;
  measurement.context_switches_per_operation =
      static_cast<double>(context_switches_between(before, after)) / count;
  measurement.punts_per_operation = punts.count().transform(
      [count](std::uint64_t value) { return static_cast<double>(value) / count; });
  return measurement;
}

}  // namespace vblk::bench
