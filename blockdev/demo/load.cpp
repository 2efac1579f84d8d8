#include "blockdev/demo/load.h"

#include <optional>
#include <random>
#include <utility>

#include <fmt/core.h>

#include "blockdev/demo/scratch_image.h"
#include "blockdev/virtio/blk_wire.h"

namespace vblk::demo {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kCompletionTimeout{30'000};

// One closed loop of `depth` operations. Nothing is allocated while it runs.
class ClosedLoop {
 public:
  ClosedLoop(driver::BlkDriver& driver, const Workload& workload, std::uint64_t block_count,
             std::span<const std::span<std::byte>> buffers, std::uint64_t seed,
             LatencyHistogram& latencies)
      : driver_(driver),
        operation_(workload.operation),
        random_(seed),
        block_of_(0, block_count - 1),
        latencies_(latencies) {
    for (unsigned i = 0; i < workload.depth; ++i) {
      slots_[i].loop = this;
      slots_[i].buffer = buffers[i];
      slots_[i].io.context = &slots_[i];
      slots_[i].io.complete = [](driver::BlkIo& io) {
        Slot& slot = *static_cast<Slot*>(io.context);
        slot.loop->completed(slot);
      };
    }
    depth_ = workload.depth;
  }

  // Keeps the depth for `time`, then lets what is in flight finish, uncounted. Returns how long it
  // counted.
  Expected<std::chrono::nanoseconds> run(std::chrono::nanoseconds time) {
    latencies_.clear();
    running_ = true;
    const auto begin = Clock::now();
    end_ = begin + time;
    for (unsigned i = 0; i < depth_; ++i) start(slots_[i], begin);
    driver_.kick(0);
    while (in_flight_ > 0) {
      if (auto count = driver_.wait(0, kCompletionTimeout); !count)
        return std::unexpected(std::move(count.error()));
      driver_.kick(0);
    }
    if (error_) return std::unexpected(std::move(*error_));
    return stopped_ - begin;
  }

 private:
  struct Slot {
    driver::BlkIo io;
    ClosedLoop* loop{nullptr};
    std::span<std::byte> buffer;
    std::uint64_t block{0};
    Clock::time_point begin;
  };

  void start(Slot& slot, Clock::time_point now) {
    slot.begin = now;
    slot.block = block_of_(random_);
    slot.io.sector = slot.block * (kBlockBytes / virtio::kSectorBytes);
    slot.io.data = slot.buffer;
    slot.io.type = operation_ == Operation::kRead ? virtio::kBlkTIn : virtio::kBlkTOut;
    // A read must bring the stamp with it; a write takes it along.
    stamp(slot.buffer, operation_ == Operation::kRead ? ~slot.block : slot.block);
    submit(slot);
  }

  void submit(Slot& slot) {
    if (driver_.submit(0, slot.io)) {
      ++in_flight_;
    } else {
      fail(ErrorKind::kExhausted, "the queue is too small for the depth");
    }
  }

  void completed(Slot& slot) {
    --in_flight_;
    if (slot.io.status != virtio::kBlkSOk) {
      fail(ErrorKind::kIo, fmt::format("request type {} at sector {} failed with status {}",
                                       slot.io.type, slot.io.sector, slot.io.status));
    } else if (slot.io.type == virtio::kBlkTIn && !has_stamp(slot.buffer, slot.block)) {
      fail(ErrorKind::kCorrupt,
           fmt::format("a read of block {} brought something else", slot.block));
    }
    if (!running_) return;
    if (operation_ == Operation::kWriteAndFlush && slot.io.type == virtio::kBlkTOut) {
      slot.io.type = virtio::kBlkTFlush;
      slot.io.sector = 0;
      slot.io.data = {};
      submit(slot);
      return;
    }
    const auto now = Clock::now();
    latencies_.add(static_cast<std::uint64_t>(std::chrono::nanoseconds(now - slot.begin).count()));
    if (now >= end_) {
      running_ = false;
      stopped_ = now;
      return;
    }
    start(slot, now);
  }

  void fail(ErrorKind kind, std::string message) {
    if (!error_) error_ = Error{.kind = kind, .message = std::move(message)};
    running_ = false;
  }

  driver::BlkDriver& driver_;
  Operation operation_;
  unsigned depth_{0};
  std::array<Slot, kDepthMax> slots_;
  std::mt19937_64 random_;
  std::uniform_int_distribution<std::uint64_t> block_of_;
  LatencyHistogram& latencies_;
  Clock::time_point end_;
  Clock::time_point stopped_;
  unsigned in_flight_{0};
  bool running_{false};
  std::optional<Error> error_;
};

}  // namespace

Expected<LoadGenerator> LoadGenerator::create(driver::BlkDriver& driver,
                                              const BackendProcess& server,
                                              std::uint64_t block_count) {
  LoadGenerator generator(driver, server, block_count);
  for (std::size_t i = 0; i < kDepthMax; ++i) {
    generator.buffers_[i] = driver.memory().allocate(kBlockBytes, kBlockBytes);
    if (generator.buffers_[i].empty())
      return make_error(ErrorKind::kExhausted, "no guest memory left for buffers");
    fill_with_noise(generator.buffers_[i], i);
  }
  return generator;
}

Expected<Measurement> LoadGenerator::run(const Workload& workload, std::chrono::nanoseconds time,
                                         std::uint64_t seed) {
  Measurement measurement;
  ClosedLoop loop(driver_, workload, block_count_, buffers_, seed, measurement.latencies);
  if (auto warm_up = loop.run(time / 10); !warm_up)
    return std::unexpected(std::move(warm_up.error()));

  const ProcessUsage before = server_.usage();
  const auto elapsed = loop.run(time);
  if (!elapsed) return std::unexpected(elapsed.error());
  const ProcessUsage after = server_.usage();
  // The few operations that finished uncounted cost something too: `depth` of thousands.
  const auto count = static_cast<double>(measurement.latencies.total());
  measurement.operations_per_second = count / std::chrono::duration<double>(*elapsed).count();
  measurement.cpu_us_per_operation =
      std::chrono::duration<double, std::micro>(after.cpu_time - before.cpu_time).count() / count;
  measurement.context_switches_per_operation =
      static_cast<double>(context_switches_between(before, after)) / count;
  return measurement;
}

}  // namespace vblk::demo
