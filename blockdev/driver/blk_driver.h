// A virtio-blk driver without a guest: block requests to a vhost-user backend.
// virtio 1.2, "Block Device", as a driver.
//
//   auto driver = BlkDriver::connect("/tmp/disk.sock", {.queue_count = 2});
//   auto buffer = driver->memory().allocate(4096, 4096);
//   (*driver)->write(0, buffer);   // one request, waited for
//
// or asynchronously: fill in a BlkIo, submit() any number of them, kick(), and poll() or wait() for
// their completions. Nothing is allocated per request. A queue is used by one thread at a time;
// different queues by different threads.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/driver/driver_memory.h"
#include "blockdev/driver/driver_queue.h"
#include "blockdev/driver/frontend.h"

namespace vblk::driver {

struct BlkDriverOptions {
  std::uint16_t queue_count{1};
  std::uint16_t queue_size{128};
  std::size_t memory_bytes{std::size_t{64} << 20};  // of each region, for rings, headers and data
  std::size_t memory_region_count{1};
  bool packed{false};   // packed rings, or an error where the backend has none
  bool indirect{true};  // use indirect descriptors where the backend has them
  bool event_idx{true};
  // Have the backend keep what is in flight, so that reconnect() loses nothing.
  bool inflight{false};
  FrontendOptions frontend;
};

// What the config space says. virtio 1.2, "Device configuration layout".
struct BlkConfig {
  std::uint64_t capacity_sectors{0};
  std::uint32_t size_max_bytes{0};
  std::uint32_t seg_max{0};
  std::uint32_t block_bytes{0};
  bool writeback{false};
  std::uint16_t queue_count{0};
  std::uint32_t max_discard_sectors{0};
  std::uint32_t max_discard_segments{0};
  std::uint32_t max_write_zeroes_sectors{0};
  bool write_zeroes_may_unmap{false};
};

// A request, owned by the caller and kept in place until `complete` runs, from poll() or wait().
struct BlkIo {
  using Completion = void (*)(BlkIo& io);
  std::uint32_t type{0};  // virtio::kBlkTIn and so on
  std::uint64_t sector{0};
  // In the driver's memory, at most BlkConfig::size_max_bytes; discard segments for kBlkTDiscard
  // and kBlkTWriteZeroes.
  std::span<std::byte> data;
  Completion complete{nullptr};
  void* context{nullptr};  // the caller's

  // The outcome, valid in `complete`.
  std::uint8_t status{0xff};
  std::uint32_t used_bytes{0};  // the used element's length
};

class BlkDriver {
 public:
  // Connects, negotiates, shares memory and starts the queues. Errors: as Frontend's;
  // kInvalidArgument if the backend has fewer queues; kNotSupported if it does not keep what is in
  // flight, or has no packed rings, where that is asked for.
  static Expected<std::unique_ptr<BlkDriver>> connect(const std::string& socket_path,
                                                      const BlkDriverOptions& options = {});
  // The same on a socket that is connected already.
  static Expected<std::unique_ptr<BlkDriver>> adopt(vhost_user::UniqueFd socket,
                                                    const BlkDriverOptions& options = {});
  // Stops the queues; a backend that does not answer is left as it is.
  ~BlkDriver();

  // Goes on with another backend of the same disk, after the one before has gone: with the memory
  // and the rings as they are, and BlkDriverOptions::inflight (asserted). Every request in flight
  // is answered in time, once, by the one or the other. Nobody else uses the driver meanwhile.
  // After an error it may be called again. Errors: as connect()'s; kNotSupported if the backend
  // offers less than the one before.
  Expected<void> reconnect(const std::string& socket_path);
  BlkDriver(const BlkDriver&) = delete;
  BlkDriver& operator=(const BlkDriver&) = delete;

  [[nodiscard]] DriverMemory& memory() { return *memory_; }
  [[nodiscard]] Frontend& frontend() { return *frontend_; }
  // The ring itself, for chains that no driver would make. Take their completions from it as well:
  // poll() and wait() know only what submit() put there.
  [[nodiscard]] DriverQueue& queue(std::uint16_t index) { return *queues_[index].ring; }
  // With BlkDriverOptions::inflight; for tests that write into it what no backend would.
  [[nodiscard]] const std::optional<InflightFile>& inflight() const { return inflight_; }
  [[nodiscard]] const BlkConfig& config() const { return config_; }
  Expected<BlkConfig> read_config();

  // Puts `io` into the ring; the device sees it after kick(). Allowed in a completion. False if the
  // queue is full.
  bool submit(std::uint16_t queue, BlkIo& io);
  void kick(std::uint16_t queue) { queues_[queue].ring->publish(); }
  // Completes what the backend has returned; how many. Error: kCorrupt for a backend that lies.
  Expected<std::size_t> poll(std::uint16_t queue);
  // Sleeps until poll() may find something, at most `timeout`; a signal ends it too. Error: kIo:
  // the backend has gone.
  Expected<void> sleep(std::uint16_t queue, std::chrono::nanoseconds timeout);
  // poll(), but sleeps until at least one is done. Errors: kBusy after `timeout`, with the number
  // in flight; kIo: the backend has gone.
  Expected<std::size_t> wait(std::uint16_t queue, std::chrono::milliseconds timeout);

  // One request on queue 0, waited for. The value is the status byte. `data` lies in memory();
  // after an error (as of wait()) the backend may still use it, but not `io`.
  Expected<std::uint8_t> run(BlkIo& io);
  Expected<std::uint8_t> read(std::uint64_t sector, std::span<std::byte> data);
  Expected<std::uint8_t> write(std::uint64_t sector, std::span<std::byte> data);
  Expected<std::uint8_t> flush();
  Expected<std::uint8_t> discard(std::uint64_t sector, std::uint32_t sector_count);
  Expected<std::uint8_t> write_zeroes(std::uint64_t sector, std::uint32_t sector_count, bool unmap);
  Expected<std::string> get_id();

 private:
  struct Queue {
    std::unique_ptr<DriverQueue> ring;
    std::span<std::byte> heads;       // one request header per chain
    std::span<std::byte> statuses;    // one status byte per chain
    std::vector<std::uint16_t> free;  // headers and statuses nobody uses
    std::vector<BlkIo*> io_of_token;
    std::vector<std::uint16_t> slot_of_token;
  };
  BlkDriver() = default;
  static Expected<std::unique_ptr<BlkDriver>> start(std::unique_ptr<Frontend> frontend,
                                                    const BlkDriverOptions& options);
  void abandon(std::uint16_t queue, const BlkIo& io);
  Expected<void> check_queue_count(std::uint16_t wanted);
  Expected<void> start_queues(const BlkDriverOptions& options);
  Expected<void> resume(Frontend& frontend);
  Expected<std::uint8_t> change_range(std::uint32_t type, std::uint64_t sector,
                                      std::uint32_t sector_count, bool unmap);

  std::unique_ptr<DriverMemory> memory_;
  std::unique_ptr<Frontend> frontend_;
  FrontendOptions frontend_options_;
  std::optional<InflightFile> inflight_;
  std::vector<Queue> queues_;
  std::span<std::byte> scratch_;  // for the synchronous calls' own data
  BlkConfig config_;
  std::chrono::milliseconds timeout_{0};
};

}  // namespace vblk::driver
