// A disk behind a vhost-user socket, by the driver.
#include <algorithm>
#include <bit>
#include <cerrno>
#include <deque>
#include <mutex>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/bench/noise.h"
#include "blockdev/bench/target.h"
#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::bench {

namespace {

constexpr std::size_t kBufferAlignmentBytes = 4096;
// A sector beyond what an off_t can say is no disk.
constexpr std::uint64_t kCapacitySectorsMax = std::uint64_t{1} << 54;

std::uint32_t type_of(Operation operation) {
  switch (operation) {
    case Operation::kRead:
      return virtio::kBlkTIn;
    case Operation::kWrite:
      return virtio::kBlkTOut;
    case Operation::kFlush:
      return virtio::kBlkTFlush;
    case Operation::kDiscard:
      return virtio::kBlkTDiscard;
    case Operation::kWriteZeroes:
      return virtio::kBlkTWriteZeroes;
  }
  return virtio::kBlkTIn;
}

int error_of(std::uint8_t status) {
  if (status == virtio::kBlkSOk) return 0;
  return status == virtio::kBlkSUnsupp ? EOPNOTSUPP : EIO;
}

// What the threads of several ports share.
struct SharedDriver {
  std::unique_ptr<driver::BlkDriver> driver;
  std::mutex memory_mutex;
};

class SocketPort final : public Port {
 public:
  SocketPort(SharedDriver& shared, std::uint16_t queue)
      : shared_(shared), driver_(*shared.driver), queue_(queue) {}

  Expected<Io*> make_io(std::size_t buffer_bytes) override {
    const std::lock_guard lock(shared_.memory_mutex);
    SocketIo& io = ios_.emplace_back();
    io.buffer = driver_.memory().allocate(std::max(buffer_bytes, kBufferAlignmentBytes),
                                          kBufferAlignmentBytes);
    io.segment = driver_.memory().allocate(virtio::kBlkDiscardSegmentBytes, 16);
    if (io.buffer.empty() || io.segment.empty())
      return make_error(ErrorKind::kExhausted, "no guest memory left for buffers");
    fill_with_noise(io.buffer, ios_.size());
    return &io;
  }

  bool submit(Io& asked) override {
    auto& io = static_cast<SocketIo&>(asked);
    io.blk.type = type_of(io.operation);
    io.blk.sector = 0;
    io.blk.data = {};
    if (io.operation == Operation::kRead || io.operation == Operation::kWrite) {
      io.blk.sector = io.offset_bytes / virtio::kSectorBytes;
      io.blk.data = io.buffer.first(io.length_bytes);
    } else if (io.operation != Operation::kFlush) {
      // virtio 1.2, "Device Operation": struct virtio_blk_discard_write_zeroes.
      virtio::store_le<std::uint64_t>(io.segment.data(), io.offset_bytes / virtio::kSectorBytes);
      virtio::store_le<std::uint32_t>(
          io.segment.data() + 8,
          static_cast<std::uint32_t>(io.length_bytes / virtio::kSectorBytes));
      virtio::store_le<std::uint32_t>(io.segment.data() + 12, 0);
      io.blk.data = io.segment;
    }
    io.blk.context = &io;
    io.blk.complete = [](driver::BlkIo& blk) {
      SocketIo& done = *static_cast<SocketIo*>(blk.context);
      done.error = error_of(blk.status);
      done.complete(done);
    };
    return driver_.submit(queue_, io.blk);
  }
  void kick() override { driver_.kick(queue_); }
  Expected<std::size_t> poll() override { return driver_.poll(queue_); }
  Expected<void> sleep(std::chrono::nanoseconds timeout) override {
    return driver_.sleep(queue_, timeout);
  }
  [[nodiscard]] TargetStatistics statistics() const override {
    const auto& queue = driver_.queue(queue_);
    return {.kicks = queue.kicks(), .wake_ups = queue.wake_ups()};
  }

 private:
  struct SocketIo : Io {
    driver::BlkIo blk;
    std::span<std::byte> segment;  // of a discard or write zeroes
  };

  SharedDriver& shared_;
  driver::BlkDriver& driver_;
  const std::uint16_t queue_;
  std::deque<SocketIo> ios_;
};

class SocketTarget final : public Target {
 public:
  SocketTarget(std::unique_ptr<driver::BlkDriver> driver, const SocketTargetOptions& options)
      : options_(options) {
    shared_.driver = std::move(driver);
  }

  [[nodiscard]] std::string name() const override { return options_.socket_path; }
  [[nodiscard]] std::uint64_t size_bytes() const override {
    return shared_.driver->config().capacity_sectors * virtio::kSectorBytes;
  }
  [[nodiscard]] std::size_t transfer_bytes_max() const override {
    const auto& config = shared_.driver->config();
    return has(virtio::kBlkFSizeMax) && config.size_max_bytes != 0 ? config.size_max_bytes
                                                                   : std::size_t{1} << 30;
  }
  [[nodiscard]] bool can(Operation operation) const override {
    if (operation == Operation::kFlush) return has(virtio::kBlkFFlush);
    if (operation == Operation::kDiscard) return has(virtio::kBlkFDiscard);
    return operation != Operation::kWriteZeroes || has(virtio::kBlkFWriteZeroes);
  }
  [[nodiscard]] bool is_read_only() const override { return has(virtio::kBlkFRo); }
  [[nodiscard]] pid_t process() const override { return options_.process; }
  [[nodiscard]] bool is_in_process() const override { return false; }

  Expected<void> set_write_through(bool write_through) override {
    if (!has(virtio::kBlkFConfigWce)) {
      if (write_through && has(virtio::kBlkFFlush)) {
        return make_error(ErrorKind::kNotSupported,
                          "the backend cannot switch its write cache off (no CONFIG_WCE)");
      }
      return {};
    }
    const std::byte writeback{write_through ? std::uint8_t{0} : std::uint8_t{1}};
    auto written = shared_.driver->frontend().write_config(
        static_cast<std::uint32_t>(virtio::kBlkConfigWriteback), {&writeback, 1});
    if (!written) return written;
    const auto config = shared_.driver->read_config();
    if (!config) return std::unexpected(config.error());
    if (config->writeback == write_through) {
      return make_error(ErrorKind::kNotSupported,
                        "the backend does not switch its write cache, though it offers to");
    }
    return {};
  }

  Expected<std::unique_ptr<Port>> open_port(unsigned index) override {
    return std::make_unique<SocketPort>(shared_, static_cast<std::uint16_t>(index));
  }

 private:
  [[nodiscard]] bool has(unsigned feature) const {
    return (shared_.driver->frontend().features() & virtio::feature_bit(feature)) != 0;
  }

  const SocketTargetOptions options_;
  mutable SharedDriver shared_;
};

}  // namespace

Expected<std::unique_ptr<Target>> open_socket_target(const SocketTargetOptions& options) {
  driver::BlkDriverOptions driver_options;
  driver_options.queue_count = static_cast<std::uint16_t>(options.queue_count);
  driver_options.packed = options.packed_rings;
  // Three descriptors for each request where the backend has no indirect ones.
  const auto queue_size_min =
      std::max<std::uint16_t>(2, std::bit_ceil(static_cast<std::uint16_t>(options.depth_max)));
  driver_options.queue_size = std::max<std::uint16_t>(128, queue_size_min);
  constexpr std::size_t kRoomForRings = std::size_t{1} << 20;
  const std::size_t of_each_io = (options.block_bytes_max + kBufferAlignmentBytes) /
                                     kBufferAlignmentBytes * kBufferAlignmentBytes +
                                 kBufferAlignmentBytes;
  driver_options.memory_bytes =
      (options.queue_count *
           (std::size_t{options.runs} * options.depth_max * of_each_io + kRoomForRings) +
       kBufferAlignmentBytes - 1) /
      kBufferAlignmentBytes * kBufferAlignmentBytes;
  auto connected = driver::BlkDriver::connect(options.socket_path, driver_options);
  // A backend may take shorter rings only, and says so to nobody before.
  if (!connected && connected.error().kind == ErrorKind::kNotSupported &&
      std::exchange(driver_options.queue_size, queue_size_min) != queue_size_min)
    connected = driver::BlkDriver::connect(options.socket_path, driver_options);
  if (!connected) return std::unexpected(std::move(connected.error()));
  SocketTargetOptions known = options;
  if (known.process == 0) known.process = (*connected)->frontend().backend_process();
  if (known.process == ::getpid()) known.process = 0;
  return adopt_driver(std::move(*connected), known);
}

Expected<std::unique_ptr<Target>> adopt_driver(std::unique_ptr<driver::BlkDriver> driver,
                                               const SocketTargetOptions& options) {
  const auto& config = driver->config();
  if (config.capacity_sectors == 0 || config.capacity_sectors > kCapacitySectorsMax) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("the backend at '{}' says its disk has {} sectors",
                                  options.socket_path, config.capacity_sectors));
  }
  return std::make_unique<SocketTarget>(std::move(driver), options);
}

}  // namespace vblk::bench
