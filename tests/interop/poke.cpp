// A driver for scripts: does to a served disk what standard input says, one line each, and answers
// in one line each. See `kUsage`.
//
// Times are CLOCK_MONOTONIC in nanoseconds, so that they can be compared with a kernel trace's.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <fmt/core.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"

namespace vblk {
namespace {

constexpr const char* kUsage =
    R"(usage: poke SOCKET [FEATURES-REFUSED [QUEUES]]   (a number; its bits are not negotiated)
commands:
  config                      writeback, capacity in sectors, features negotiated
  writeback 0|1               writes the config field
  write SECTOR COUNT BYTE     COUNT sectors of BYTE
  read SECTOR COUNT           answers with the first byte, and whether all are the same
  flush
  discard SECTOR COUNT
  zeroes SECTOR COUNT 0|1     write zeroes, 1: may unmap
  storm DEPTH FILE            writes 4 KiB block 0, 1, ... each full of its own number until the
                              backend stops or the disk ends; appends the number of each block that
                              was acknowledged to FILE, 8 bytes each
  pulse DEPTH FILE STOP       on every queue, from a thread each: writes 4 KiB blocks, reads them
                              back, and flushes now and then, until the file STOP is there. FILE gets
                              8 bytes for each completion: its time * 64 + its queue
)";

constexpr std::size_t kStormBlockBytes = 4096;
constexpr std::chrono::milliseconds kStormSilence{1000};

std::uint64_t now_ns() {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                        std::chrono::steady_clock::now().time_since_epoch())
                                        .count());
}

// Writes until nothing comes back any more.
class Storm {
 public:
  Storm(driver::BlkDriver& driver, const std::string& acknowledged_path)
      : driver_(driver),
        acknowledged_(acknowledged_path, std::ios::binary),
        block_count_(driver.config().capacity_sectors * virtio::kSectorBytes / kStormBlockBytes) {}

  std::string run(std::size_t depth) {
    slots_.resize(depth);
    for (Slot& slot : slots_) {
      slot.storm = this;
      slot.io.data = driver_.memory().allocate(kStormBlockBytes, kStormBlockBytes);
      if (slot.io.data.empty()) return "out of memory";
      slot.io.type = virtio::kBlkTOut;
      slot.io.context = &slot;
      slot.io.complete = [](driver::BlkIo& io) {
        Slot& done = *static_cast<Slot*>(io.context);
        done.storm->completed(done);
      };
      start(slot);
    }
    driver_.kick(0);
    while (in_flight_ > 0 && driver_.wait(0, kStormSilence)) driver_.kick(0);
    acknowledged_.flush();
    return fmt::format("storm acknowledged={} failed={} unanswered={}", acknowledged_count_,
                       failed_count_, in_flight_);
  }

 private:
  struct Slot {
    Storm* storm{nullptr};
    driver::BlkIo io;
    std::uint64_t block{0};
  };

  void start(Slot& slot) {
    if (next_block_ == block_count_) return;
    slot.block = next_block_++;
    slot.io.sector = slot.block * (kStormBlockBytes / virtio::kSectorBytes);
    for (std::size_t at = 0; at < slot.io.data.size(); at += sizeof(slot.block))
      std::memcpy(&slot.io.data[at], &slot.block, sizeof(slot.block));
    if (driver_.submit(0, slot.io)) ++in_flight_;
  }

  void completed(Slot& slot) {
    --in_flight_;
    if (slot.io.status == virtio::kBlkSOk) {
      std::array<char, sizeof(slot.block)> bytes{};
      std::memcpy(bytes.data(), &slot.block, bytes.size());
      acknowledged_.write(bytes.data(), bytes.size());
      ++acknowledged_count_;
    } else {
      ++failed_count_;
    }
    start(slot);
  }

  driver::BlkDriver& driver_;
  std::ofstream acknowledged_;
  std::vector<Slot> slots_;
  std::uint64_t block_count_;
  std::uint64_t next_block_{0};
  std::uint64_t acknowledged_count_{0};
  std::uint64_t failed_count_{0};
  std::size_t in_flight_{0};
};

// One queue's part of a pulse, on a thread of its own. Each slot has blocks of its own.
class Pulse {
 public:
  Pulse(driver::BlkDriver& driver, std::uint16_t queue, std::size_t depth,
        std::uint64_t first_block, std::uint64_t block_count)
      : driver_(driver), queue_(queue), first_block_(first_block), slots_(depth) {
    blocks_per_slot_ = block_count / depth;
    for (std::size_t i = 0; i < depth; ++i) {
      Slot& slot = slots_[i];
      slot.pulse = this;
      slot.index = i;
      slot.buffer = driver.memory().allocate(kStormBlockBytes, kStormBlockBytes);
      slot.io.context = &slot;
      slot.io.complete = [](driver::BlkIo& io) {
        Slot& done = *static_cast<Slot*>(io.context);
        done.pulse->completed(done);
      };
    }
  }
  // Blocks until `stopping` and nothing is in flight, or nothing comes back any more.
  void run(const std::atomic<bool>& stopping) {
    stopping_ = &stopping;
    for (Slot& slot : slots_) start(slot);
    driver_.kick(queue_);
    while (in_flight_ > 0 && driver_.wait(queue_, kStormSilence)) driver_.kick(queue_);
  }

  std::vector<std::uint64_t> times;  // of completions, each * 64 + queue
  std::uint64_t failed{0};
  std::uint64_t wrong{0};  // reads of something else than was written
  [[nodiscard]] std::size_t unanswered() const { return in_flight_; }

 private:
  struct Slot {
    Pulse* pulse{nullptr};
    std::size_t index{0};
    std::span<std::byte> buffer;
    driver::BlkIo io;
    std::uint64_t round{0};
  };

  // In turns: a write, the read of it, and after every eighth a flush.
  void start(Slot& slot) {
    const std::uint64_t step = slot.round % 17;
    slot.io.type =
        step == 16 ? virtio::kBlkTFlush : (step % 2 == 0 ? virtio::kBlkTOut : virtio::kBlkTIn);
    slot.io.data = step == 16 ? std::span<std::byte>{} : slot.buffer;
    const std::uint64_t block =
        first_block_ + slot.index * blocks_per_slot_ + slot.round / 17 % blocks_per_slot_;
    slot.io.sector = step == 16 ? 0 : block * (kStormBlockBytes / virtio::kSectorBytes);
    if (slot.io.type == virtio::kBlkTOut) std::ranges::fill(slot.buffer, stamp(slot));
    if (slot.io.type == virtio::kBlkTIn) std::ranges::fill(slot.buffer, ~stamp(slot));
    if (driver_.submit(queue_, slot.io)) ++in_flight_;
  }
  // Of a write and of the read that follows it.
  static std::byte stamp(const Slot& slot) {
    return static_cast<std::byte>(slot.round / 17 * 31 + slot.round % 17 / 2 * 7 + slot.index);
  }
  void completed(Slot& slot) {
    --in_flight_;
    times.push_back(now_ns() * 64 + queue_);
    if (slot.io.status != virtio::kBlkSOk) ++failed;
    const bool is_read = slot.io.type == virtio::kBlkTIn;
    if (is_read && !std::ranges::all_of(slot.buffer, [&](std::byte b) { return b == stamp(slot); }))
      ++wrong;
    ++slot.round;
    if (!stopping_->load()) start(slot);
  }

  driver::BlkDriver& driver_;
  const std::uint16_t queue_;
  const std::uint64_t first_block_;
  std::uint64_t blocks_per_slot_;
  std::vector<Slot> slots_;
  const std::atomic<bool>* stopping_{nullptr};
  std::size_t in_flight_{0};
};

class Poker {
 public:
  Poker(driver::BlkDriver& driver, std::uint16_t queue_count)
      : driver_(driver), queue_count_(queue_count) {
    buffer_ = driver.memory().allocate(std::size_t{1} << 20, 4096);
  }

  std::string answer(const std::string& line) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    if (command == "config") return config();
    if (command == "writeback") return writeback(words);
    if (command == "storm") return storm(words);
    if (command == "pulse") return pulse(words);
    std::uint64_t sector = 0;
    std::uint32_t count = 0;
    unsigned value = 0;
    words >> sector >> count >> value;
    const auto data = buffer_.first(
        std::min(buffer_.size(), static_cast<std::size_t>(count) * virtio::kSectorBytes));
    if (command == "write") {
      std::ranges::fill(data, static_cast<std::byte>(value));
      return timed(command, [&] { return driver_.write(sector, data); });
    }
    if (command == "read") {
      const std::string text = timed(command, [&] { return driver_.read(sector, data); });
      const bool same = std::ranges::all_of(data, [&](std::byte b) { return b == data[0]; });
      return text + fmt::format(" first={} same={}", static_cast<unsigned>(data[0]), same);
    }
    if (command == "flush") return timed(command, [&] { return driver_.flush(); });
    if (command == "discard") return timed(command, [&] { return driver_.discard(sector, count); });
    if (command == "zeroes")
      return timed(command, [&] { return driver_.write_zeroes(sector, count, value != 0); });
    return "unknown command";
  }

 private:
  template <typename Function>
  static std::string timed(const std::string& command, Function request) {
    const std::uint64_t begin = now_ns();
    const auto status = request();
    const std::uint64_t end = now_ns();
    if (!status) return fmt::format("{} error: {}", command, status.error().message);
    return fmt::format("{} status={} begin={} end={}", command, *status, begin, end);
  }

  std::string config() {
    const auto config = driver_.read_config();
    if (!config) return "config error: " + config.error().message;
    return fmt::format("config writeback={} capacity={} features={:#x}", config->writeback ? 1 : 0,
                       config->capacity_sectors, driver_.frontend().features());
  }

  std::string writeback(std::istream& words) {
    unsigned value = 0;
    words >> value;
    const std::array<std::byte, 1> bytes{static_cast<std::byte>(value)};
    const auto written = driver_.frontend().write_config(virtio::kBlkConfigWriteback, bytes);
    return written ? "writeback set" : "writeback error: " + written.error().message;
  }

  std::string storm(std::istream& words) {
    std::size_t depth = 0;
    std::string path;
    words >> depth >> path;
    return Storm(driver_, path).run(depth);
  }

  std::string pulse(std::istream& words) {
    std::size_t depth = 0;
    std::string path;
    std::string stop_path;
    words >> depth >> path >> stop_path;
    const std::uint64_t blocks =
        driver_.config().capacity_sectors * virtio::kSectorBytes / kStormBlockBytes / queue_count_;
    std::vector<std::unique_ptr<Pulse>> pulses;
    for (std::uint16_t queue = 0; queue < queue_count_; ++queue)
      pulses.push_back(std::make_unique<Pulse>(driver_, queue, depth, queue * blocks, blocks));
    std::atomic<bool> stopping{false};
    {
      std::vector<std::jthread> threads;
      for (const auto& pulse : pulses) threads.emplace_back([&] { pulse->run(stopping); });
      while (!std::filesystem::exists(stop_path))
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      stopping = true;
    }
    std::ofstream file(path, std::ios::binary);
    std::uint64_t completed = 0;
    std::uint64_t failed = 0;
    std::uint64_t wrong = 0;
    std::uint64_t unanswered = 0;
    for (const auto& pulse : pulses) {
      completed += pulse->times.size();
      failed += pulse->failed;
      wrong += pulse->wrong;
      unanswered += pulse->unanswered();
      const auto bytes = std::as_bytes(std::span(pulse->times));
      file.write(reinterpret_cast<const char*>(bytes.data()),
                 static_cast<std::streamsize>(bytes.size()));
    }
    return fmt::format("pulse completed={} failed={} wrong={} unanswered={}", completed, failed,
                       wrong, unanswered);
  }

  driver::BlkDriver& driver_;
  const std::uint16_t queue_count_;
  std::span<std::byte> buffer_;
};

int run(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    fmt::print(stderr, "{}", kUsage);
    return 2;
  }
  driver::BlkDriverOptions options;
  if (argc > 2) options.frontend.features_mask = ~std::stoull(argv[2], nullptr, 0);
  if (argc > 3) options.queue_count = static_cast<std::uint16_t>(std::stoul(argv[3]));
  const auto driver = driver::BlkDriver::connect(argv[1], options);
  if (!driver) {
    fmt::print("error: {}\n", driver.error().message);
    return 1;
  }
  Poker poker(**driver, options.queue_count);
  fmt::print("connected\n");
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    fmt::print("{}\n", poker.answer(line));
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace vblk

int main(int argc, char** argv) { return vblk::run(argc, argv); }
