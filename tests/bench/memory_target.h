// A disk in memory that takes its time, stalls, fails, lies or dies as a test says.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "blockdev/bench/target.h"

namespace vblk::bench {

struct MemoryDisk {
  using Clock = std::chrono::steady_clock;
  explicit MemoryDisk(std::size_t size_bytes) : bytes(size_bytes) {}

  std::vector<std::byte> bytes;
  std::mutex mutex;
  std::atomic<std::chrono::nanoseconds> service_time{std::chrono::nanoseconds{0}};
  // Nothing completes between these.
  Clock::time_point stall_begin{Clock::time_point::max()};
  Clock::time_point stall_end{Clock::time_point::max()};
  std::atomic<std::int64_t> fail_after{-1};  // requests; -1: never
  bool loses_writes{false};
  // As one that answers within a submission: a poll ends when nothing new comes.
  bool answers_at_once{false};
  std::atomic<std::uint64_t> flushes{0};
  std::atomic<std::uint64_t> writes{0};
};

// Serves its requests one after another.
class MemoryPort final : public Port {
 public:
  explicit MemoryPort(MemoryDisk& disk) : disk_(disk) {}

  Expected<Io*> make_io(std::size_t buffer_bytes) override {
    Memory& memory = ios_.emplace_back();
    memory.buffer_bytes.resize(buffer_bytes);
    memory.io.buffer = memory.buffer_bytes;
    return &memory.io;
  }
  bool submit(Io& io) override {
    const auto now = MemoryDisk::Clock::now();
    busy_until_ = std::max(busy_until_, now) + disk_.service_time.load();
    queue_.emplace_back(busy_until_, &io);
    is_kicked_ = false;
    return true;
  }
  void kick() override {
    if (!std::exchange(is_kicked_, true)) ++kicks_;
  }
  [[nodiscard]] TargetStatistics statistics() const override { return {.kicks = kicks_}; }
  Expected<std::size_t> poll() override {
    auto now = MemoryDisk::Clock::now();
    if (now >= disk_.stall_begin && now < disk_.stall_end) return 0;
    std::size_t count = 0;
    while (!queue_.empty() && queue_.front().first <= now) {
      Io& io = *queue_.front().second;
      queue_.pop_front();
      carry_out(io);
      ++count;
      io.complete(io);
      if (disk_.answers_at_once) {
        now = MemoryDisk::Clock::now();
      } else if (count == 64) {
        break;
      }
    }
    return count;
  }
  Expected<void> sleep(std::chrono::nanoseconds timeout) override {
    std::this_thread::sleep_for(
        std::min<std::chrono::nanoseconds>(timeout, std::chrono::microseconds(50)));
    return {};
  }

 private:
  struct Memory {
    Io io;
    std::vector<std::byte> buffer_bytes;
  };
  void carry_out(Io& io) {
    io.error = disk_.fail_after == 0 ? EIO : 0;
    if (disk_.fail_after >= 0) --disk_.fail_after;
    const std::lock_guard lock(disk_.mutex);
    std::byte* const place = disk_.bytes.data() + io.offset_bytes;
    if (io.operation == Operation::kRead) std::memcpy(io.buffer.data(), place, io.length_bytes);
    if (io.operation == Operation::kWrite) {
      ++disk_.writes;
      if (!disk_.loses_writes) std::memcpy(place, io.buffer.data(), io.length_bytes);
    }
    if (io.operation == Operation::kFlush) ++disk_.flushes;
  }

  MemoryDisk& disk_;
  std::deque<Memory> ios_;
  std::deque<std::pair<MemoryDisk::Clock::time_point, Io*>> queue_;
  MemoryDisk::Clock::time_point busy_until_;
  bool is_kicked_{true};
  std::uint64_t kicks_{0};
};

class MemoryTarget final : public Target {
 public:
  explicit MemoryTarget(std::size_t size_bytes = std::size_t{1} << 20) : disk(size_bytes) {}
  [[nodiscard]] std::string name() const override { return "memory"; }
  [[nodiscard]] std::uint64_t size_bytes() const override { return disk.bytes.size(); }
  [[nodiscard]] std::size_t transfer_bytes_max() const override { return 65536; }
  [[nodiscard]] bool can(Operation operation) const override {
    return operation != Operation::kDiscard;
  }
  [[nodiscard]] bool is_read_only() const override { return read_only; }
  [[nodiscard]] pid_t process() const override { return 0; }
  [[nodiscard]] bool is_in_process() const override { return false; }
  Expected<void> set_write_through(bool /*write_through*/) override { return {}; }
  Expected<std::unique_ptr<Port>> open_port(unsigned /*index*/) override {
    return std::make_unique<MemoryPort>(disk);
  }

  MemoryDisk disk;
  bool read_only{false};
};

}  // namespace vblk::bench
