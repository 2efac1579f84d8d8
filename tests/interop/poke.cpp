// A driver for scripts: does to a served disk what standard input says, one line each, and answers
// in one line each. See `kUsage`.
//
// Times are CLOCK_MONOTONIC in nanoseconds, so that they can be compared with a kernel trace's.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include <fmt/core.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"

namespace vblk {
namespace {

constexpr const char* kUsage =
    R"(usage: poke SOCKET [FEATURES-REFUSED]   (a number; its bits are not negotiated)
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

class Poker {
 public:
  explicit Poker(driver::BlkDriver& driver) : driver_(driver) {
    buffer_ = driver.memory().allocate(std::size_t{1} << 20, 4096);
  }

  std::string answer(const std::string& line) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    if (command == "config") return config();
    if (command == "writeback") return writeback(words);
    if (command == "storm") return storm(words);
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

  driver::BlkDriver& driver_;
  std::span<std::byte> buffer_;
};

int run(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    fmt::print(stderr, "{}", kUsage);
    return 2;
  }
  driver::BlkDriverOptions options;
  if (argc == 3) options.frontend.features_mask = ~std::stoull(argv[2], nullptr, 0);
  const auto driver = driver::BlkDriver::connect(argv[1], options);
  if (!driver) {
    fmt::print("error: {}\n", driver.error().message);
    return 1;
  }
  Poker poker(**driver);
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
