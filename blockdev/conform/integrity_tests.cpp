// Random requests of all kinds over several queues against a model of the disk.
//
// The model has one number per block: 0 for zeroes, a version that says what was written, or that
// the content is not known (after a discard). Requests in flight never share a block, so that each
// read has one right answer.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/probe.h"
#include "blockdev/conform/test.h"
#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace virtio;

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kBlockBytes = 4096;
constexpr std::uint32_t kBlockSectors = kBlockBytes / kSectorBytes;
constexpr std::size_t kBlocksMax = 8192;  // of the disk: more would be touched too seldom
constexpr std::size_t kBlocksPerRequestMax = 16;
constexpr std::size_t kRequestsPerQueue = 12;
constexpr std::uint16_t kQueuesMax = 4;
constexpr std::uint64_t kUnknown = ~std::uint64_t{0};

// What the driver makes use of. Packed rings: of INDIRECT_DESC and EVENT_IDX as well.
enum class Rings : std::uint8_t { kSplit, kPlain, kPacked };

class Soak {
 public:
  Soak(Probe& probe, Rings rings) : probe_(probe) {
    const std::uint16_t queues = queues_of(probe, kQueuesMax);
    const RequestLimits limits = Guest(probe, {.starts_rings = false}).limits();
    driver_ = Probe::value(
        driver::BlkDriver::connect(probe.socket_path(), {.queue_count = queues,
                                                         .queue_size = 64,
                                                         .memory_bytes = std::size_t{32} << 20,
                                                         .packed = rings == Rings::kPacked,
                                                         .indirect = rings != Rings::kPlain,
                                                         .event_idx = rings != Rings::kPlain,
                                                         .frontend = {.timeout = kPatience}}),
        "connecting");
    const driver::BlkConfig& config = driver_->config();
    const std::uint64_t blocks = config.capacity_sectors / kBlockSectors;
    versions_.assign(std::min<std::uint64_t>(blocks, kBlocksMax), kUnknown);
    busy_.assign(versions_.size(), false);
    Probe::expect(versions_.size() > 4 * kBlocksPerRequestMax,
                  "the disk is too small to be tested");
    blocks_max_ = kBlocksPerRequestMax;
    discard_blocks_max_ = limits.discard_sectors / kBlockSectors;
    write_zeroes_blocks_max_ = limits.write_zeroes_sectors / kBlockSectors;
    if (config.size_max_bytes != 0 && has(kBlkFSizeMax)) {
      blocks_max_ = std::min<std::size_t>(blocks_max_, config.size_max_bytes / kBlockBytes);
      if (blocks_max_ == 0) Probe::skip("size_max is less than 4096");
    }
    slots_.resize(queues * kRequestsPerQueue);
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      Slot& slot = slots_[i];
      slot.soak = this;
      slot.queue = static_cast<std::uint16_t>(i / kRequestsPerQueue);
      slot.room = driver_->memory().allocate(kBlocksPerRequestMax * kBlockBytes, kBlockBytes);
      slot.io.context = &slot;
      slot.io.complete = [](driver::BlkIo& io) {
        Slot& done = *static_cast<Slot*>(io.context);
        done.soak->completed(done);
      };
    }
  }

  void run(std::chrono::milliseconds duration) {
    const auto end = Clock::now() + duration;
    last_progress_ = Clock::now();
    while (Clock::now() < end) {
      for (Slot& slot : slots_) {
        if (!slot.in_flight) start_random(slot);
      }
      turn();
    }
    drain();
    check_all();
  }

 private:
  struct Slot {
    Soak* soak{nullptr};
    std::uint16_t queue{0};
    std::span<std::byte> room;
    driver::BlkIo io;
    bool in_flight{false};
    std::size_t first{0};
    std::size_t count{0};
    std::uint64_t version{0};
  };

  [[nodiscard]] bool has(unsigned feature) const {
    return (driver_->frontend().features() & bit(feature)) != 0;
  }

  static std::uint64_t word(std::size_t block, std::uint64_t version, std::size_t at) {
    if (version == 0) return 0;
    return (block * 1'000'003 + version) * 0x9e3779b97f4a7c15U + at * 0xc2b2ae3d27d4eb4fU;
  }
  static void fill(std::span<std::byte> room, std::size_t block, std::uint64_t version) {
    for (std::size_t at = 0; at < kBlockBytes; at += 8)
      store_le<std::uint64_t>(room.data() + at, word(block, version, at));
  }
  static bool is(std::span<const std::byte> room, std::size_t block, std::uint64_t version) {
    for (std::size_t at = 0; at < kBlockBytes; at += 8) {
      if (load_le<std::uint64_t>(room.data() + at) != word(block, version, at)) return false;
    }
    return true;
  }

  // Blocks that no request in flight has; false if a few tries find none.
  bool take_blocks(Slot& slot, std::size_t blocks_max) {
    for (int tries = 0; tries < 8; ++tries) {
      slot.count = 1 + probe_.random()() % blocks_max;
      slot.first = probe_.random()() % (versions_.size() - slot.count);
      const auto begin = busy_.begin() + static_cast<std::ptrdiff_t>(slot.first);
      const auto end = begin + static_cast<std::ptrdiff_t>(slot.count);
      if (std::find(begin, end, true) != end) continue;
      std::fill(begin, end, true);
      return true;
    }
    return false;
  }

  void start_random(Slot& slot) {
    const std::uint64_t die = probe_.random()() % 100;
    std::uint32_t type = die < 45 ? kBlkTOut : kBlkTIn;
    if (die >= 90 && has(kBlkFFlush)) type = kBlkTFlush;
    if (die >= 93 && has(kBlkFWriteZeroes) && write_zeroes_blocks_max_ > 0) type = kBlkTWriteZeroes;
    if (die >= 97 && has(kBlkFDiscard) && discard_blocks_max_ > 0) type = kBlkTDiscard;
    if (die == 99) type = kBlkTGetId;
    slot.io.type = type;
    slot.io.sector = 0;
    slot.count = 0;
    slot.io.data = {};
    if (type == kBlkTGetId) {
      slot.io.data = slot.room.first(kBlkIdBytes);
      std::ranges::fill(slot.io.data, std::byte{0xd5});
    }
    if (type != kBlkTFlush && type != kBlkTGetId) {
      const std::size_t most = type == kBlkTWriteZeroes ? write_zeroes_blocks_max_
                               : type == kBlkTDiscard   ? discard_blocks_max_
                                                        : blocks_max_;
      if (!take_blocks(slot, std::min(blocks_max_, most))) return;
      prepare_blocks(slot);
    }
    if (!driver_->submit(slot.queue, slot.io)) {
      release(slot);
      return;
    }
    slot.in_flight = true;
    ++in_flight_;
  }

  void prepare_blocks(Slot& slot) {
    slot.version = next_version_++;
    slot.io.sector = slot.first * kBlockSectors;
    slot.io.data = slot.room.first(slot.count * kBlockBytes);
    if (slot.io.type == kBlkTOut) {
      for (std::size_t i = 0; i < slot.count; ++i)
        fill(slot.room.subspan(i * kBlockBytes, kBlockBytes), slot.first + i, slot.version);
    } else if (slot.io.type == kBlkTIn) {
      std::ranges::fill(slot.io.data, std::byte{0xd5});
    } else {
      store_le<std::uint64_t>(slot.room.data(), slot.io.sector);
      store_le<std::uint32_t>(slot.room.data() + 8,
                              static_cast<std::uint32_t>(slot.count) * kBlockSectors);
      const bool unmap = slot.io.type == kBlkTWriteZeroes && slot.version % 2 == 0;
      store_le<std::uint32_t>(slot.room.data() + 12, unmap ? kBlkWriteZeroesFlagUnmap : 0);
      slot.io.sector = 0;
      slot.io.data = slot.room.first(kBlkDiscardSegmentBytes);
    }
  }

  void release(Slot& slot) {
    for (std::size_t i = 0; i < slot.count; ++i) busy_[slot.first + i] = false;
  }

  void completed(Slot& slot) {
    slot.in_flight = false;
    --in_flight_;
    ++completed_;
    last_progress_ = Clock::now();
    release(slot);
    // What a device needs not have.
    if (slot.io.type == kBlkTGetId && slot.io.status == kBlkSUnsupp) return;
    if (slot.io.status != kBlkSOk) {
      wrong_ = fmt::format("request {}: type {} of blocks {} to {} has status {}", completed_,
                           slot.io.type, slot.first, slot.first + slot.count, slot.io.status);
      return;
    }
    for (std::size_t i = 0; i < slot.count; ++i) {
      const std::size_t block = slot.first + i;
      if (slot.io.type == kBlkTOut) versions_[block] = slot.version;
      if (slot.io.type == kBlkTWriteZeroes) versions_[block] = 0;
      if (slot.io.type == kBlkTDiscard) versions_[block] = kUnknown;
      if (slot.io.type == kBlkTIn)
        check_block(slot.room.subspan(i * kBlockBytes, kBlockBytes), block);
    }
    if (slot.io.type == kBlkTGetId) check_id(slot.io.data);
  }

  // Whenever and on whichever queue it is asked for, it is the same.
  void check_id(std::span<const std::byte> id) {
    if (id_.empty()) id_.assign(id.begin(), id.end());
    if (std::ranges::equal(id, id_)) return;
    wrong_ = fmt::format("after {} requests GET_ID brings another ID than before", completed_);
  }

  void check_block(std::span<const std::byte> bytes, std::size_t block) {
    const std::uint64_t version = versions_[block];
    if (version == kUnknown || is(bytes, block, version)) return;
    wrong_ = fmt::format("after {} requests block {} does not read as {}", completed_, block,
                         version == 0 ? "zeroes" : fmt::format("write {} has left it", version));
  }

  // One look at all queues.
  void turn() {
    std::size_t done = 0;
    for (std::uint16_t queue = 0; queue * kRequestsPerQueue < slots_.size(); ++queue) {
      driver_->kick(queue);
      done += Probe::value(driver_->poll(queue), "on the ring");
    }
    if (!wrong_.empty()) Probe::fail(wrong_);
    if (done > 0 || in_flight_ == 0) return;
    if (Clock::now() - last_progress_ > kPatience) {
      if (const std::string dead = probe_.death(); !dead.empty()) Probe::fail(dead);
      Probe::fail(fmt::format("nothing is completed within {} ms, {} requests in flight",
                              kPatience.count(), in_flight_));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  void drain() {
    while (in_flight_ > 0) turn();
  }

  void check_all() {
    for (std::size_t block = 0; block < versions_.size();) {
      for (Slot& slot : slots_) {
        if (block >= versions_.size()) break;
        slot.first = block;
        slot.count = std::min(blocks_max_, versions_.size() - block);
        block += slot.count;
        slot.io.type = kBlkTIn;
        slot.io.sector = slot.first * kBlockSectors;
        slot.io.data = slot.room.first(slot.count * kBlockBytes);
        Probe::expect(driver_->submit(slot.queue, slot.io), "the suite's own queue is full");
        slot.in_flight = true;
        ++in_flight_;
      }
      drain();
    }
  }

  Probe& probe_;
  std::unique_ptr<driver::BlkDriver> driver_;
  std::vector<std::uint64_t> versions_;  // by block
  std::vector<bool> busy_;               // by block
  std::vector<Slot> slots_;
  std::size_t blocks_max_{0};
  std::size_t discard_blocks_max_{0};
  std::size_t write_zeroes_blocks_max_{0};
  std::vector<std::byte> id_;  // empty: not told yet
  std::size_t in_flight_{0};
  std::uint64_t completed_{0};
  std::uint64_t next_version_{1};
  std::string wrong_;
  Clock::time_point last_progress_;
};

void soak(Probe& probe, Rings rings) { Soak(probe, rings).run(probe.options().soak); }
void random_requests(Probe& probe) { soak(probe, Rings::kSplit); }
void random_requests_on_plain_rings(Probe& probe) { soak(probe, Rings::kPlain); }
void random_requests_on_packed_rings(Probe& probe) {
  need_packed(probe);
  soak(probe, Rings::kPacked);
}

constexpr std::array kTests{
    Test{"integrity/random",
         {kVirtio, "Block Device / Device Operation", Force::kStates,
          "random requests of all kinds over all queues: what is read is what was written last"},
         random_requests,
         true},
    Test{"integrity/random-plain",
         {kVirtio, "Block Device / Device Operation", Force::kStates,
          "the same without INDIRECT_DESC and EVENT_IDX"},
         random_requests_on_plain_rings,
         true},
    Test{"integrity/random-packed",
         {kVirtio, "Packed Virtqueues", Force::kStates,
          "the same on packed rings, where they are offered"},
         random_requests_on_packed_rings,
         true},
};

}  // namespace

std::span<const Test> integrity_tests() { return kTests; }

}  // namespace vblk::conform
