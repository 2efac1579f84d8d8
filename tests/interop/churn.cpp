// A driver for scripts that knows what the disk must hold: seeded random requests over several
// queues, each read compared with a flat model, also after the backend was killed. Does what
// standard input says, one line each, and answers in one line each. See `kUsage`.
//
// The model. A sector's content is known by its hash (0: all zeroes). Each sector has the contents
// that a read may find now, mostly one: two while a request that changes it is in flight, and after
// a discard, which is a hint, until a read has told. It also has the contents that may be there
// after the backend was killed: what the last flush found, and whatever came since. Requests that
// change a sector never overlap in flight; reads overlap with anything, and so do flushes. A read
// that overlaps with a write may find a sector with words of the old and words of the new content:
// neither virtio nor the page cache promises more.
//
// With `connect ... keep` the driver keeps its rings and goes on with whoever listens on the socket
// next, as a virtual machine does: nothing is abandoned, every request must be answered once, and
// what was answered before the backend died must be there.
//
// One thread drives all queues: what matters is that the backend has them on several.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <fstream>
#include <iostream>
#include <memory>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk {
namespace {

constexpr const char* kUsage = R"(usage: churn
commands:
  connect SOCKET QUEUES [keep] [packed] [suspend [OTHER]]
                              again without `disconnect` after the backend was killed; keep: goes on
                              with the next backend on the socket by itself; packed: on packed rings;
                              suspend: `run` now and then stops the rings with requests in flight
                              (GET_VRING_BASE_INFLIGHT), to go on there, or with the backend on the
                              socket OTHER and the next time back
  forget                      the next backend finds nothing in flight: what is, is never answered
  disconnect
  adopt                       the disk is as it should be now: the model is made from it
  load FILE                   the model is made from a raw image
  verify                      reads the whole disk and compares; after a kill, with all that may be
                              there, and adopts what was found
  compare FILE                compares a raw image with the model
  dump FILE                   reads the whole disk into a raw image
  run SEED COUNT DEPTH CLUSTER MIX [SECONDS]
                              COUNT requests, DEPTH in flight on each queue; CLUSTER: bytes to which
                              much is aligned; MIX: any of w(rite) r(ead) d(iscard) z(eroes)
                              u(nmapping zeroes) f(lush), as often as it is to be; SECONDS: after
                              these no more are sent
  fill BYTES                  writes the whole disk in requests of this size
  flush
)";

constexpr std::size_t kIoBytesMax = std::size_t{256} << 10;
constexpr std::size_t kSectorsMax = kIoBytesMax / virtio::kSectorBytes;
constexpr std::size_t kDepthMax = 32;
constexpr std::chrono::seconds kSilence{30};
// When it is known that some requests are not answered any more.
constexpr std::chrono::seconds kSilenceOfForgotten{2};
constexpr std::chrono::milliseconds kReconnectPause{2};

using Hash = std::uint64_t;

Hash hash_of(std::span<const std::byte> sector) {
  std::uint64_t hash = 0;
  std::uint64_t any = 0;
  for (std::size_t at = 0; at < virtio::kSectorBytes; at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, &sector[at], sizeof word);
    any |= word;
    hash = (hash ^ word) * 0x9e37'79b9'7f4a'7c15U;
    hash ^= hash >> 29;
  }
  if (any == 0) return 0;
  return hash == 0 ? 1 : hash;
}

// Bytes that no other write and no other sector has; now and then zeroes.
void fill_sector(std::span<std::byte> sector, std::uint64_t stamp, std::uint64_t number) {
  for (std::size_t at = 0; at < virtio::kSectorBytes; at += 8) {
    const std::uint64_t word = (stamp << 40) ^ (number << 8) ^ at;
    std::memcpy(&sector[at], &word, sizeof word);
  }
}

// Is each word zero, or one that `fill_sector` has for this very sector?
bool is_made_here(std::span<const std::byte> sector, std::uint64_t number) {
  for (std::size_t at = 0; at < virtio::kSectorBytes; at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, &sector[at], sizeof word);
    constexpr std::uint64_t kBelowStamp = (std::uint64_t{1} << 40) - 1;
    if (word != 0 && (word & kBelowStamp) != ((number << 8 ^ at) & kBelowStamp)) return false;
  }
  return true;
}

struct Sector {
  std::vector<Hash> now;         // what a read may find
  std::vector<Hash> after_kill;  // in addition to `now`
  std::uint32_t changing{0};     // by requests in flight
  std::uint64_t changed_at{0};   // number of the last such completion
  bool is_foreign{false};        // it may have content that `fill_sector` did not make
};

void add(std::vector<Hash>& set, Hash hash) {
  if (std::ranges::find(set, hash) == set.end()) set.push_back(hash);
}

// It has turned out what the sector has now. What else it might have had may come back by a kill.
void settle(Sector& sector, Hash found) {
  for (const Hash hash : sector.now) {
    if (hash != found) add(sector.after_kill, hash);
  }
  sector.now = {found};
}

class Churn {
 public:
  std::string answer(const std::string& line);

 private:
  struct Slot {
    Churn* churn{nullptr};
    std::uint16_t queue{0};
    driver::BlkIo io;
    std::span<std::byte> buffer;
    char kind{'r'};
    std::uint64_t first{0};  // sectors
    std::uint64_t count{0};
    std::vector<Hash> hashes;               // of what is written
    std::uint64_t began{0};                 // number of completions before it was submitted
    std::vector<std::vector<Hash>> before;  // what a read may also find: contents since it began
    bool busy{false};
  };
  // A change that no flush has covered yet.
  struct Change {
    std::uint64_t first;
    std::uint64_t count;
    std::uint64_t completed;  // number of its completion
  };

  std::string connect(std::istream& words);
  std::string run(std::istream& words);
  std::string fill(std::istream& words);
  std::string load(const std::string& path, bool compare);
  std::string whole_disk(const std::string& mode, const std::string& path);

  bool prepare(Slot& slot, std::mt19937_64& random, const std::string& mix, std::uint64_t cluster);
  bool start(Slot& slot);
  void completed(Slot& slot);
  void abandon();
  void check_read(Slot& slot);
  void flushed(std::uint64_t before);
  bool drain();
  bool poll_all(bool may_sleep);
  bool reconnect();
  bool suspend();
  bool lose(std::string why);
  void complain(std::uint64_t sector, Hash found, const char* when);

  std::unique_ptr<driver::BlkDriver> driver_;
  std::string path_;
  bool keeps_{false};
  bool forgets_{false};
  std::uint64_t reconnects_{0};
  bool suspends_{false};
  std::string other_path_;
  std::uint64_t suspensions_{0};
  std::uint64_t left_in_flight_{0};  // by all of those
  std::uint16_t queue_count_{0};
  std::uint64_t long_max_{1};  // sectors of a request without data
  std::deque<Slot> slots_;
  std::vector<Sector> model_;
  std::deque<Change> changes_;
  std::uint64_t completions_{0};
  std::uint64_t stamp_{0};
  std::size_t in_flight_{0};
  std::uint64_t failed_{0};
  std::uint64_t bad_{0};
  std::string first_bad_;
  std::string lost_why_;
  bool is_lost_{false};
  bool was_killed_{false};
};

void Churn::complain(std::uint64_t sector, Hash found, const char* when) {
  ++bad_;
  if (!first_bad_.empty()) return;
  first_bad_ =
      fmt::format(" first-bad-sector={} found={:#x} when={} expected=", sector, found, when);
  for (const Hash hash : model_[sector].now) first_bad_ += fmt::format("[{:#x}]", hash);
  for (const Hash hash : model_[sector].after_kill) first_bad_ += fmt::format("({:#x})", hash);
}

// The backend was killed: what was in flight has happened or not.
void Churn::abandon() {
  was_killed_ = true;
  for (Slot& slot : slots_) {
    if (!slot.busy) continue;
    slot.busy = false;
    if (slot.hashes.empty()) continue;
    for (std::uint64_t i = 0; i < slot.count; ++i) --model_[slot.first + i].changing;
    changes_.push_back({slot.first, slot.count, completions_});
  }
}

std::string Churn::connect(std::istream& words) {
  words >> path_ >> queue_count_;
  bool packed = false;
  keeps_ = suspends_ = false;
  other_path_.clear();
  for (std::string mode; words >> mode;) {
    if (mode.contains('/')) other_path_ = mode;
    keeps_ |= mode == "keep" || mode == "suspend";
    suspends_ |= mode == "suspend";
    packed |= mode == "packed";
  }
  forgets_ = false;
  reconnects_ = 0;
  if (driver_) abandon();
  slots_.clear();
  driver_.reset();
  driver::BlkDriverOptions options{
      .queue_count = queue_count_, .packed = packed, .inflight = keeps_};
  if (suspends_) options.frontend.protocol_features_mask = ~std::uint64_t{0};
  // No power of two, so that the ring's end is nowhere special.
  if (packed) options.queue_size = 101;
  auto driver = driver::BlkDriver::connect(path_, options);
  if (!driver) return "connect error: " + driver.error().message;
  driver_ = std::move(*driver);
  is_lost_ = false;
  in_flight_ = 0;
  const std::uint64_t sectors = driver_->config().capacity_sectors;
  if (model_.empty()) model_.resize(sectors, {.now = {0}, .after_kill = {}});
  if (model_.size() != sectors)
    return fmt::format("connect error: the disk has {} sectors, the model {}", sectors,
                       model_.size());
  long_max_ =
      std::min(driver_->config().max_discard_sectors, driver_->config().max_write_zeroes_sectors);
  long_max_ = std::max<std::uint64_t>(long_max_, 1);
  const std::size_t per_queue = std::min(kDepthMax, std::size_t{96} / queue_count_);
  for (std::uint16_t queue = 0; queue < queue_count_; ++queue) {
    for (std::size_t i = 0; i < per_queue; ++i) {
      Slot& slot = slots_.emplace_back();
      slot.churn = this;
      slot.queue = queue;
      slot.buffer = driver_->memory().allocate(kIoBytesMax, 4096);
      if (slot.buffer.empty()) return "connect error: out of memory";
      slot.io.context = &slot;
      slot.io.complete = [](driver::BlkIo& io) {
        Slot& done = *static_cast<Slot*>(io.context);
        done.churn->completed(done);
      };
    }
  }
  return fmt::format("connected sectors={} writeback={}", sectors,
                     driver_->config().writeback ? 1 : 0);
}

// Chooses a request. False: this time none, others are in its way.
bool Churn::prepare(Slot& slot, std::mt19937_64& random, const std::string& mix,
                    std::uint64_t cluster) {
  slot.kind = mix[random() % mix.size()];
  if (slot.kind == 'f') return true;
  const std::uint64_t cluster_sectors = std::max<std::uint64_t>(1, cluster / virtio::kSectorBytes);
  const std::uint64_t disk = model_.size();
  const auto shape = random() % 8;
  std::uint64_t count = 1 + random() % 8;
  if (shape == 0) count = 1 + random() % kSectorsMax;
  if (shape == 1 || shape == 2) count = cluster_sectors * (1 + random() % 4);
  if (shape == 3) count = 8 * (1 + random() % 16);
  // What moves no data may be long.
  const bool is_long = slot.kind != 'w' && slot.kind != 'r' && random() % 4 == 0;
  count = is_long ? std::min(disk / 8 + 1, cluster_sectors * (1 + random() % 16))
                  : std::min<std::uint64_t>(count, kSectorsMax);
  std::uint64_t first = random() % disk;
  if (random() % 2 == 0) first = random() % std::max<std::uint64_t>(1, disk / 16);  // a busy part
  if (shape == 1 || is_long) first -= first % cluster_sectors;
  if (shape == 3) first -= first % 8;
  if (random() % 64 == 0) first = disk - std::min(count, disk);
  slot.first = first;
  slot.count = std::min(count, disk - first);
  if (is_long) slot.count = std::min<std::uint64_t>(slot.count, long_max_);
  if (slot.kind == 'r') return true;
  return std::ranges::all_of(std::span(model_).subspan(slot.first, slot.count),
                             [](const Sector& sector) { return sector.changing == 0; });
}

bool Churn::start(Slot& slot) {
  driver::BlkIo& io = slot.io;
  io.sector = slot.first;
  io.data =
      slot.buffer.first(slot.kind == 'w' || slot.kind == 'r' ? slot.count * virtio::kSectorBytes
                                                             : virtio::kBlkDiscardSegmentBytes);
  slot.hashes.clear();
  slot.began = completions_;
  switch (slot.kind) {
    case 'f':
      io.type = virtio::kBlkTFlush;
      io.sector = 0;
      io.data = {};
      break;
    case 'r':
      io.type = virtio::kBlkTIn;
      std::ranges::fill(io.data, std::byte{0xa5});
      slot.before.clear();
      for (std::uint64_t i = 0; i < slot.count; ++i)
        slot.before.push_back(model_[slot.first + i].now);
      break;
    case 'w':
      io.type = virtio::kBlkTOut;
      ++stamp_;
      for (std::uint64_t i = 0; i < slot.count; ++i) {
        const auto sector = io.data.subspan(i * virtio::kSectorBytes, virtio::kSectorBytes);
        if (stamp_ % 16 == 0) {
          std::ranges::fill(sector, std::byte{0});
        } else {
          fill_sector(sector, stamp_, slot.first + i);
        }
        slot.hashes.push_back(hash_of(sector));
      }
      break;
    default:
      io.type = slot.kind == 'd' ? virtio::kBlkTDiscard : virtio::kBlkTWriteZeroes;
      io.sector = 0;
      virtio::store_le<std::uint64_t>(io.data.data(), slot.first);
      virtio::store_le<std::uint32_t>(io.data.data() + 8, static_cast<std::uint32_t>(slot.count));
      virtio::store_le<std::uint32_t>(io.data.data() + 12,
                                      slot.kind == 'u' ? virtio::kBlkWriteZeroesFlagUnmap : 0);
      slot.hashes.assign(slot.count, 0);
      break;
  }
  if (!driver_->submit(slot.queue, io)) return false;
  ++in_flight_;
  slot.busy = true;
  for (std::uint64_t i = 0; i < slot.hashes.size(); ++i) {
    Sector& sector = model_[slot.first + i];
    ++sector.changing;
    add(sector.now, slot.hashes[i]);
    // Reads in flight may find it as well.
    for (Slot& other : slots_) {
      const std::uint64_t number = slot.first + i;
      if (other.busy && other.kind == 'r' && number >= other.first &&
          number < other.first + other.count)
        add(other.before[number - other.first], slot.hashes[i]);
    }
  }
  return true;
}

void Churn::check_read(Slot& slot) {
  for (std::uint64_t i = 0; i < slot.count; ++i) {
    const auto data = slot.io.data.subspan(i * virtio::kSectorBytes, virtio::kSectorBytes);
    const Hash found = hash_of(data);
    Sector& sector = model_[slot.first + i];
    const bool may_be_torn = sector.changing > 0 || sector.changed_at > slot.began;
    if (std::ranges::find(slot.before[i], found) == slot.before[i].end()) {
      if (!may_be_torn || !(sector.is_foreign || is_made_here(data, slot.first + i)))
        complain(slot.first + i, found, "read");
    } else if (!may_be_torn && sector.now.size() > 1) {
      // Nothing has changed it since the read began: now it is known what a discard did.
      settle(sector, found);
    }
  }
}

void Churn::completed(Slot& slot) {
  --in_flight_;
  slot.busy = false;
  ++completions_;
  const bool ok = slot.io.status == virtio::kBlkSOk;
  if (!ok) ++failed_;
  if (slot.kind == 'r') {
    if (ok) check_read(slot);
    return;
  }
  if (slot.kind == 'f') {
    if (ok) flushed(slot.began);
    return;
  }
  for (std::uint64_t i = 0; i < slot.count; ++i) {
    Sector& sector = model_[slot.first + i];
    --sector.changing;
    sector.changed_at = completions_;
    if (ok && slot.kind != 'd') settle(sector, slot.hashes[i]);  // otherwise it is either
  }
  changes_.push_back({slot.first, slot.count, completions_});
}

// A flush that was submitted when `before` requests had completed has completed. A sector that has
// not been changed since keeps what it has now.
void Churn::flushed(std::uint64_t before) {
  std::vector<Change> covered;
  while (!changes_.empty() && changes_.front().completed <= before) {
    covered.push_back(changes_.front());
    changes_.pop_front();
  }
  std::vector<std::pair<std::uint64_t, std::uint64_t>> later;
  for (const Change& change : changes_) later.emplace_back(change.first, change.count);
  for (const Slot& slot : slots_) {
    if (slot.busy && slot.kind != 'r' && slot.kind != 'f')
      later.emplace_back(slot.first, slot.count);
  }
  for (const Change& change : covered) {
    for (std::uint64_t number = change.first; number < change.first + change.count; ++number) {
      const bool changed_later = std::ranges::any_of(later, [number](const auto& range) {
        return number >= range.first && number < range.first + range.second;
      });
      if (!changed_later) model_[number].after_kill.clear();
    }
  }
}

// One look at every queue, and a short sleep if there was nothing. False: the backend has gone.
bool Churn::poll_all(bool may_sleep) {
  std::size_t count = 0;
  for (std::uint16_t queue = 0; queue < queue_count_; ++queue) {
    const auto done = driver_->poll(queue);
    if (!done) {
      is_lost_ = true;
      lost_why_ = done.error().message;
      return false;
    }
    count += *done;
  }
  if (count > 0 || !may_sleep) return true;
  for (std::uint16_t queue = 0; queue < queue_count_; ++queue) {
    if (driver_->queue(queue).in_flight() == 0) continue;
    if (const auto slept = driver_->sleep(queue, std::chrono::microseconds(300)); !slept) {
      if (keeps_) return reconnect();
      is_lost_ = true;
      lost_why_ = slept.error().message;
      return false;
    }
    break;
  }
  return true;
}

// The backend has gone: on with the next one, which may take a while to come.
bool Churn::reconnect() {
  if (forgets_) {
    const driver::InflightFile& inflight = *driver_->inflight();
    const std::vector<std::byte> nothing(inflight.description.mmap_size);
    [[maybe_unused]] const auto written =
        ::pwrite(inflight.fd.get(), nothing.data(), nothing.size(), 0);
  }
  const auto deadline = std::chrono::steady_clock::now() + kSilence;
  for (;;) {
    const auto reconnected = driver_->reconnect(path_);
    if (reconnected) break;
    if (std::chrono::steady_clock::now() > deadline) {
      is_lost_ = true;
      lost_why_ = reconnected.error().message;
      return false;
    }
    std::this_thread::sleep_for(kReconnectPause);
  }
  ++reconnects_;
  return true;
}

bool Churn::lose(std::string why) {
  is_lost_ = true;
  lost_why_ = std::move(why);
  return false;
}

// Stops all rings as they are, and has them started again, there or elsewhere.
bool Churn::suspend() {
  std::vector<std::uint32_t> bases;
  for (std::uint16_t queue = 0; queue < queue_count_; ++queue) {
    const auto base = driver_->frontend().stop_ring(queue);
    if (!base) return lose(base.error().message);
    bases.push_back(*base);
  }
  ++suspensions_;
  // What is answered is in the rings by now.
  for (std::uint16_t queue = 0; queue < queue_count_; ++queue) {
    if (const auto done = driver_->poll(queue); !done) return lose(done.error().message);
  }
  left_in_flight_ += in_flight_;
  if (!other_path_.empty()) {
    std::swap(path_, other_path_);
    return reconnect();
  }
  driver::Frontend& frontend = driver_->frontend();
  auto done = frontend.set_inflight(*driver_->inflight());
  for (std::uint16_t queue = 0; queue < queue_count_ && done; ++queue)
    done = frontend.start_ring(queue, driver_->queue(queue), bases[queue]);
  return done || lose(done.error().message);
}

bool Churn::drain() {
  auto last = std::chrono::steady_clock::now();
  std::uint64_t seen = completions_;
  while (in_flight_ > 0) {
    if (!poll_all(true)) return false;
    const auto now = std::chrono::steady_clock::now();
    if (completions_ != seen) last = now;
    seen = completions_;
    if (now - last > kSilence) {
      is_lost_ = true;
      lost_why_ = fmt::format("{} requests are not answered", in_flight_);
      return false;
    }
  }
  return true;
}

std::string Churn::run(std::istream& words) {
  std::uint64_t seed = 0;
  std::uint64_t count = 0;
  std::size_t depth = 1;
  std::uint64_t cluster = 65536;
  std::string mix;
  double seconds = 1e6;
  words >> seed >> count >> depth >> cluster >> mix;
  if (double given = 0; words >> given) seconds = given;
  if (mix.empty() || mix.find_first_not_of("wrdzuf") != std::string::npos)
    return fmt::format("run error: '{}' is no mix", mix);
  std::mt19937_64 random(seed);
  bad_ = failed_ = 0;
  first_bad_.clear();
  const std::uint64_t until = completions_ + count;
  std::uint64_t started = completions_;
  auto last = std::chrono::steady_clock::now();
  const auto stop_at = last + std::chrono::duration<double>(seconds);
  const std::uint64_t reconnects_before = reconnects_;
  const auto silence = forgets_ ? kSilenceOfForgotten : kSilence;
  std::uint64_t seen = completions_;
  bool sends = true;
  suspensions_ = left_in_flight_ = 0;
  // A generator of its own: when rings stop depends on time, and the requests must not.
  std::mt19937_64 moments(seed + 1);
  std::uint64_t suspend_at = completions_ + moments() % 60;
  std::chrono::steady_clock::duration longest{0};
  while (completions_ < until && !is_lost_ && (sends || in_flight_ > 0)) {
    sends = std::chrono::steady_clock::now() < stop_at;
    std::vector<std::size_t> busy(queue_count_);
    for (const Slot& slot : slots_) busy[slot.queue] += slot.busy ? 1 : 0;
    for (Slot& slot : slots_) {
      if (slot.busy || busy[slot.queue] >= depth || started >= until || !sends) continue;
      bool ready = false;
      for (int attempt = 0; attempt < 4 && !ready; ++attempt)
        ready = prepare(slot, random, mix, cluster);
      if (!ready || !start(slot)) continue;
      ++started;
      ++busy[slot.queue];
    }
    for (std::uint16_t queue = 0; queue < queue_count_; ++queue) driver_->kick(queue);
    if (!poll_all(true)) break;
    if (suspends_ && sends && completions_ >= suspend_at) {
      if (!suspend()) break;
      suspend_at = completions_ + 1 + moments() % 60;
    }
    const auto now = std::chrono::steady_clock::now();
    longest = std::max(longest, now - last);
    if (completions_ != seen) last = now;
    seen = completions_;
    if (now - last > silence) {
      is_lost_ = true;
      lost_why_ = fmt::format("{} requests are not answered", in_flight_);
    }
  }
  const std::string lost = is_lost_ ? fmt::format(" why={}", lost_why_) : "";
  const auto silence_ms = std::chrono::duration_cast<std::chrono::milliseconds>(longest).count();
  return fmt::format(
      "run done={} started={} failed={} bad={} lost={} reconnects={} longest-silence-ms={} "
      "suspensions={} left-in-flight={}{}{}",
      completions_ + count - until, started + count - until, failed_, bad_, is_lost_ ? 1 : 0,
      reconnects_ - reconnects_before, silence_ms, suspensions_, left_in_flight_, first_bad_, lost);
}

std::string Churn::fill(std::istream& words) {
  std::size_t bytes = kIoBytesMax;
  words >> bytes;
  const std::uint64_t step = std::min(bytes, kIoBytesMax) / virtio::kSectorBytes;
  bad_ = failed_ = 0;
  Slot& slot = slots_.front();
  for (std::uint64_t first = 0; first < model_.size(); first += step) {
    slot.kind = 'w';
    slot.first = first;
    slot.count = std::min<std::uint64_t>(step, model_.size() - first);
    if (!start(slot)) return "fill error: the queue is full";
    driver_->kick(slot.queue);
    if (!drain()) return "fill lost=1 why=" + lost_why_;
  }
  return fmt::format("fill failed={}", failed_);
}

// Reads the whole disk: to compare it, to believe it, or to write it down.
std::string Churn::whole_disk(const std::string& mode, const std::string& path) {
  std::ofstream file;
  if (mode == "dump") file.open(path, std::ios::binary);
  bad_ = failed_ = 0;
  first_bad_.clear();
  std::uint64_t next = 0;
  const std::uint64_t disk = model_.size();
  while (next < disk) {
    std::vector<Slot*> batch;
    for (Slot& slot : slots_) {
      if (next == disk) break;
      slot.kind = 'x';
      slot.first = next;
      slot.count = std::min<std::uint64_t>(kSectorsMax, disk - next);
      slot.io.type = virtio::kBlkTIn;
      slot.io.sector = slot.first;
      slot.io.data = slot.buffer.first(slot.count * virtio::kSectorBytes);
      std::ranges::fill(slot.io.data, std::byte{0xa5});
      if (!driver_->submit(slot.queue, slot.io)) continue;
      slot.io.complete = [](driver::BlkIo& io) {
        Slot& done = *static_cast<Slot*>(io.context);
        --done.churn->in_flight_;
        ++done.churn->completions_;
        if (io.status != virtio::kBlkSOk) ++done.churn->failed_;
      };
      ++in_flight_;
      next += slot.count;
      batch.push_back(&slot);
    }
    for (std::uint16_t queue = 0; queue < queue_count_; ++queue) driver_->kick(queue);
    const bool answered = drain();
    for (Slot* const slot : batch) {
      slot->io.complete = [](driver::BlkIo& io) {
        Slot& done = *static_cast<Slot*>(io.context);
        done.churn->completed(done);
      };
    }
    if (!answered) return fmt::format("{} lost=1 why={}", mode, lost_why_);
    for (Slot* const slot : batch) {
      if (slot->io.status != virtio::kBlkSOk) continue;
      for (std::uint64_t i = 0; i < slot->count; ++i) {
        const auto data = slot->io.data.subspan(i * virtio::kSectorBytes, virtio::kSectorBytes);
        const Hash found = hash_of(data);
        Sector& sector = model_[slot->first + i];
        bool known = std::ranges::find(sector.now, found) != sector.now.end();
        if (was_killed_ && std::ranges::find(sector.after_kill, found) != sector.after_kill.end())
          known = true;
        if (mode == "verify" && !known)
          complain(slot->first + i, found, was_killed_ ? "after-a-kill" : "verify");
        if (mode == "dump") continue;
        settle(sector, found);
        if (mode == "adopt") sector.is_foreign = !is_made_here(data, slot->first + i);
        if (was_killed_ || mode == "adopt") sector.after_kill.clear();
      }
      if (mode == "dump") {
        file.seekp(static_cast<std::streamoff>(slot->first * virtio::kSectorBytes));
        file.write(reinterpret_cast<const char*>(slot->io.data.data()),
                   static_cast<std::streamsize>(slot->io.data.size()));
      }
    }
  }
  if (mode != "dump") {
    if (was_killed_ || mode == "adopt") changes_.clear();
    was_killed_ = false;
  }
  return fmt::format("{} failed={} bad={} lost=0{}", mode, failed_, bad_, first_bad_);
}

// Bytes beyond the end of the file are zeroes, as a raw image may be shorter.
std::string Churn::load(const std::string& path, bool compare) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return "error: cannot open " + path;
  file.seekg(0, std::ios::end);
  const auto bytes = static_cast<std::uint64_t>(file.tellg());
  file.seekg(0);
  bad_ = 0;
  first_bad_.clear();
  if (!compare) model_.assign((bytes + virtio::kSectorBytes - 1) / virtio::kSectorBytes, {});
  std::vector<std::byte> buffer(kIoBytesMax);
  for (std::uint64_t sector = 0; sector < model_.size();) {
    std::ranges::fill(buffer, std::byte{0});
    file.read(reinterpret_cast<char*>(buffer.data()), static_cast<std::streamsize>(buffer.size()));
    file.clear();
    for (std::size_t at = 0; at < buffer.size() && sector < model_.size(); ++sector) {
      const auto data = std::span(buffer).subspan(at, virtio::kSectorBytes);
      const Hash found = hash_of(data);
      at += virtio::kSectorBytes;
      if (!compare) {
        model_[sector].now = {found};
        model_[sector].is_foreign = !is_made_here(data, sector);
      } else if (std::ranges::find(model_[sector].now, found) == model_[sector].now.end()) {
        complain(sector, found, "compare");
      }
    }
  }
  return fmt::format("{} bad={}{}", compare ? "compare" : "load", bad_, first_bad_);
}

std::string Churn::answer(const std::string& line) {
  std::istringstream words(line);
  std::string command;
  words >> command;
  if (command == "connect") return connect(words);
  if (command == "load" || command == "compare") {
    std::string path;
    words >> path;
    return load(path, command == "compare");
  }
  if (command == "disconnect") {
    slots_.clear();
    driver_.reset();
    return "disconnected";
  }
  if (!driver_ || is_lost_) return "error: not connected";
  if (command == "forget") {
    forgets_ = keeps_;
    return keeps_ ? "forgets" : "forget error: connect with keep";
  }
  if (command == "run") return run(words);
  if (command == "fill") return fill(words);
  if (command == "flush") {
    const std::uint64_t began = completions_;
    const auto status = driver_->flush();
    if (!status) return "flush error: " + status.error().message;
    if (*status == virtio::kBlkSOk) flushed(began);
    return fmt::format("flush status={}", *status);
  }
  if (command == "adopt" || command == "verify" || command == "dump") {
    std::string path;
    words >> path;
    return whole_disk(command, path);
  }
  return "unknown command";
}

int run(int argc, char** /*argv*/) {
  if (argc != 1) {
    fmt::print(stderr, "{}", kUsage);
    return 2;
  }
  Churn churn;
  for (std::string line; std::getline(std::cin, line);) {
    fmt::print("{}\n", churn.answer(line));
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace vblk

int main(int argc, char** argv) { return vblk::run(argc, argv); }
