// What outlives a connection, and what must not; backends that are killed under their requests.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/packed_guest.h"
#include "blockdev/conform/test.h"
#include "blockdev/driver/blk_driver.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace vhost_user;
using namespace virtio;

namespace {

constexpr std::uint64_t kTestSector = 8192;

void frontends_come_and_go(Probe& probe) {
  for (int i = 0; i < 100; ++i) {
    if (i % 3 == 0) {
      Channel channel(probe);  // leaves without a word
      continue;
    }
    Guest guest(probe);
    guest.must_read(0, kDefaultBlock);
  }
}

void features_do_not_survive(Probe& probe) {
  for (int round = 0; round < 3; ++round) {
    {
      Guest first(probe, {.features = kPlainFeatures | bit(kFEventIdx) | bit(kFIndirectDesc)});
      first.ring().set_used_event(first.ring().used_index());
      first.must_read(0, kDefaultBlock);
    }
    Guest second(probe);
    second.ring().set_used_event(30'000);
    for (int i = 0; i < 20; ++i) {
      second.ring().take_calls();
      second.must_read(0, kDefaultBlock);
      Probe::expect(
          second.ring().wait_call(kPatience),
          "a used buffer is not notified: the EVENT_IDX of the connection before is still "
          "in force");
    }
  }
}

void writeback_does_not_survive(Probe& probe) {
  std::uint64_t initial = 0;
  {
    Guest guest(probe);
    need_feature(guest, kBlkFConfigWce, "CONFIG_WCE");
    initial = guest.config_field(kBlkConfigWriteback, 1);
    guest.channel().write_config(kBlkConfigWriteback, {static_cast<std::byte>(initial ^ 1U)});
    Probe::expect(guest.config_field(kBlkConfigWriteback, 1) == (initial ^ 1U),
                  "writeback cannot be set");
  }
  Guest next(probe);
  const std::uint64_t now = next.config_field(kBlkConfigWriteback, 1);
  Probe::expect(now == initial,
                fmt::format("writeback is {} for a new frontend because the one before has set it; "
                            "it was {} at first",
                            now, initial));
}

void rings_do_not_survive(Probe& probe) {
  Guest first(probe);
  first.must_read(0, kDefaultBlock);
  first.channel().close();
  // Once this one is served, the one before has been taken leave of.
  const Guest second(probe, {.starts_rings = false});
  first.post(0, 0, kBlkTIn, 0, {}, first.data().first(kDefaultBlock));
  first.ring().kick();
  Probe::expect(!first.ring().wait_used(kQuiet), "a ring is served whose connection has ended");
}

// Each block is what it was or what was to be written, whole.
void frontend_leaves_with_requests_in_flight(Probe& probe) {
  constexpr std::uint16_t kCount = 20;
  for (int round = 0; round < 15; ++round) {
    Guest guest(probe);
    for (std::uint16_t i = 0; i < kCount; ++i) {
      const auto part = guest.data().subspan(i * kDefaultBlock, kDefaultBlock);
      std::ranges::fill(part, static_cast<std::byte>(i + 1));
      guest.post(0, i, kBlkTOut, kTestSector + i * 8U, part, {});
    }
    guest.ring().kick();
    if (round % 2 == 0) ::usleep(static_cast<unsigned>(probe.random()() % 2000));
  }
  Guest next(probe);
  for (std::uint16_t i = 0; i < kCount; ++i) {
    next.must_read(kTestSector + i * 8U, kDefaultBlock);
    const auto block = next.data().first(kDefaultBlock);
    const bool whole = std::ranges::all_of(block, [&](std::byte b) { return b == block[0]; });
    Probe::expect(whole && (block[0] == std::byte{0} || block[0] == static_cast<std::byte>(i + 1)),
                  fmt::format("block {} is neither old nor new", i));
  }
}

void sigterm_ends_it(Probe& probe) {
  Backend& backend = probe.own_backend("the backend is ended");
  Guest guest(probe);
  guest.must_read(0, kDefaultBlock);
  probe.expect_end();
  const std::string end = backend.terminate(std::chrono::seconds(8));
  Probe::expect(end.starts_with("ended") || end.starts_with("killed by signal 15"),
                "the backend " + end);
}

// ---- Inflight I/O tracking

GuestOptions with_inflight() {
  return {.protocol_features = kPlainProtocol | bit(kProtocolFInflightShmfd),
          .starts_rings = false};
}

// What GET_INFLIGHT_FD has brought, mapped.
struct Area {
  UniqueFd fd;
  Inflight description{};
  std::byte* begin{nullptr};
  Area() = default;
  Area(Area&&) = delete;
  ~Area() {
    if (begin != nullptr) ::munmap(begin, description.mmap_size);
  }
};

void get_area(Guest& guest, Area& area) {
  need_protocol(guest.channel(), kProtocolFInflightShmfd, "INFLIGHT_SHMFD");
  Message answer = guest.channel().call(Request::kGetInflightFd,
                                        payload_of(Inflight{.mmap_size = 0,
                                                            .mmap_offset = 0,
                                                            .queue_count = 1,
                                                            .queue_size = guest.ring().size(),
                                                            .padding = 0}));
  Probe::expect(answer.payload.size() >= kInflightBytesMin && answer.fds.size() == 1,
                fmt::format("GET_INFLIGHT_FD is answered with {} bytes and {} descriptors",
                            answer.payload.size(), answer.fds.size()));
  std::memcpy(&area.description, answer.payload.data(), kInflightBytesMin);
  area.fd = std::move(answer.fds[0]);
  Probe::expect(area.description.mmap_size > 0, "the in-flight area has no size");
  void* const mapping =
      ::mmap(nullptr, area.description.mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, area.fd.get(),
             static_cast<off_t>(area.description.mmap_offset));
  Probe::expect(mapping != MAP_FAILED, "the in-flight area cannot be mapped");
  area.begin = static_cast<std::byte*>(mapping);
}

void start_with(Guest& guest, const Area& area) {
  const int fds[] = {area.fd.get()};
  guest.channel().command(Request::kSetInflightFd, payload_of(area.description), fds);
  guest.share_memory();
  guest.start_ring(0);
}

// Another connection gets what the one before has left, up to its rings.
void hand_over(Channel& next, const Area& area, const driver::DriverMemory& memory) {
  const int fds[] = {area.fd.get()};
  next.command(Request::kSetInflightFd, payload_of(area.description), fds);
  share_table(next, memory);
}

// QueueRegionSplit: version at 8, used_idx at 14, descriptors from 16, 16 bytes each, the flag
// first.
constexpr std::size_t kVersionAt = 8;
constexpr std::size_t kUsedIndexAt = 14;
constexpr std::size_t kDescAt = 16;
constexpr std::size_t kDescBytes = 16;

void area_is_kept(Probe& probe) {
  Guest guest(probe, with_inflight());
  Area area;
  get_area(guest, area);
  start_with(guest, area);
  for (int i = 0; i < 30; ++i) guest.must_read(0, kDefaultBlock);
  const auto version = load_acquire<std::uint16_t>(area.begin + kVersionAt);
  Probe::expect(version == 1, fmt::format("the region's version is {}", version));
  // The region follows the used ring, a moment later.
  std::string still;
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  do {
    still.clear();
    const auto used = load_acquire<std::uint16_t>(area.begin + kUsedIndexAt);
    if (used != guest.ring().device_used_index())
      still = fmt::format("the region's used_idx is {}, the ring's {}", used,
                          guest.ring().device_used_index());
    for (std::size_t i = 0; i < guest.ring().size(); ++i) {
      if (area.begin[kDescAt + i * kDescBytes] != std::byte{0})
        still = fmt::format("descriptor {} is marked in flight, and nothing is", i);
    }
    if (still.empty()) return;
    ::usleep(1000);
  } while (std::chrono::steady_clock::now() < deadline);
  Probe::fail(still);
}

// A driver that has requests in flight all the time, with a backend that is killed under them, or
// stops.
class Victim {
 public:
  Victim(Probe& probe, std::uint16_t queue_count, bool packed) : probe_(probe) {
    driver::FrontendOptions frontend{.timeout = kPatience};
    frontend.protocol_features_mask |= bit(kProtocolFGetVringBaseInflight);
    auto driver =
        driver::BlkDriver::connect(probe.socket_path(), {.queue_count = queue_count,
                                                         .queue_size = 64,
                                                         .memory_bytes = std::size_t{32} << 20,
                                                         .packed = packed,
                                                         .inflight = true,
                                                         .frontend = frontend});
    if (!driver && driver.error().kind == ErrorKind::kNotSupported)
      Probe::skip(driver.error().message);
    driver_ = Probe::value(std::move(driver), "connecting with INFLIGHT_SHMFD");
    const driver::BlkConfig& config = driver_->config();
    const bool has_size_max =
        (driver_->frontend().features() & bit(kBlkFSizeMax)) != 0 && config.size_max_bytes != 0;
    const std::size_t bytes = has_size_max ? std::min<std::size_t>(kBytes, config.size_max_bytes) /
                                                 kSectorBytes * kSectorBytes
                                           : kBytes;
    Probe::expect(bytes > 0, "size_max is less than a sector");
    ios_.resize(queue_count * kPerQueue);
    for (std::size_t i = 0; i < ios_.size(); ++i) {
      ios_[i].io.data = driver_->memory().allocate(bytes, 4096);
      ios_[i].io.context = &ios_[i];
      ios_[i].io.complete = [](driver::BlkIo& io) {
        ++static_cast<Slot*>(io.context)->completions;
      };
      ios_[i].io.sector = kTestSector + i * (kBytes / kSectorBytes);
    }
  }

  void submit_all(std::uint32_t type, unsigned round) {
    for (std::size_t i = 0; i < ios_.size(); ++i) {
      Slot& slot = ios_[i];
      slot.completions = 0;
      slot.io.type = type;
      slot.io.status = 0xff;
      if (type == kBlkTOut)
        std::ranges::fill(slot.io.data, static_cast<std::byte>(round * 37 + i + 1));
      else
        std::ranges::fill(slot.io.data, std::byte{0});
      const auto queue = static_cast<std::uint16_t>(i / kPerQueue);
      Probe::expect(driver_->submit(queue, slot.io), "the suite's own queue is full");
    }
    for (std::size_t queue = 0; queue * kPerQueue < ios_.size(); ++queue)
      driver_->kick(static_cast<std::uint16_t>(queue));
  }
  [[nodiscard]] bool can_suspend() const {
    return (driver_->frontend().protocol_features() & bit(kProtocolFGetVringBaseInflight)) != 0;
  }
  // Stops all rings with whatever is in flight, sees that nothing more happens, and has them
  // started again.
  void suspend() {
    std::vector<std::uint32_t> bases;
    const auto queue_count = static_cast<std::uint16_t>(ios_.size() / kPerQueue);
    bases.reserve(queue_count);
    for (std::uint16_t queue = 0; queue < queue_count; ++queue)
      bases.push_back(Probe::value(driver_->frontend().stop_ring(queue), "stopping a ring"));
    const auto take = [&] {
      std::size_t count = 0;
      for (std::uint16_t queue = 0; queue < queue_count; ++queue)
        count += Probe::value(driver_->poll(queue), "looking at a stopped ring");
      return count;
    };
    take();
    ::usleep(20'000);
    Probe::expect(take() == 0, "a request is completed though its ring has been stopped");
    Probe::value(driver_->frontend().set_inflight(*driver_->inflight()), "giving the area again");
    for (std::uint16_t queue = 0; queue < queue_count; ++queue) {
      Probe::value(driver_->frontend().start_ring(queue, driver_->queue(queue), bases[queue]),
                   "starting a ring again");
    }
  }
  void reconnect() {
    Probe::value(driver_->reconnect(probe_.socket_path()), "going on after SIGKILL");
  }
  // Until all have completed, each once.
  void await_all(const char* after_what) {
    for (std::size_t queue = 0; queue * kPerQueue < ios_.size(); ++queue) {
      while (driver_->queue(static_cast<std::uint16_t>(queue)).in_flight() > 0) {
        const auto done = driver_->wait(static_cast<std::uint16_t>(queue), kPatience);
        if (!done) Probe::fail(fmt::format("{}: {}", after_what, done.error().message));
      }
    }
    for (const Slot& slot : ios_) {
      Probe::expect(slot.completions == 1 && slot.io.status == kBlkSOk,
                    fmt::format("{}: a request is completed {} times, with status {}", after_what,
                                slot.completions, slot.io.status));
    }
  }
  void check_content(unsigned round) {
    submit_all(kBlkTIn, round);
    await_all("a read of what was written");
    for (std::size_t i = 0; i < ios_.size(); ++i) {
      const auto wanted = static_cast<std::byte>(round * 37 + i + 1);
      Probe::expect(std::ranges::all_of(ios_[i].io.data, [&](std::byte b) { return b == wanted; }),
                    "a write that was acknowledged is not there");
    }
  }

 private:
  static constexpr std::size_t kPerQueue = 16;
  static constexpr std::size_t kBytes = std::size_t{64} << 10;
  struct Slot {
    driver::BlkIo io;
    unsigned completions{0};
  };

  Probe& probe_;
  std::unique_ptr<driver::BlkDriver> driver_;
  std::vector<Slot> ios_;
};

void requests_survive_sigkill(Probe& probe, bool packed) {
  Backend& backend = probe.own_backend("the backend is killed");
  Victim victim(probe, queues_of(probe, 2), packed);
  probe.expect_end();
  for (unsigned round = 0; round < 8; ++round) {
    victim.submit_all(kBlkTOut, round);
    ::usleep(static_cast<unsigned>(round == 0 ? 0 : probe.random()() % 1500));
    backend.kill();
    Probe::value(backend.restart(), "starting it again after SIGKILL");
    victim.reconnect();
    victim.await_all("after SIGKILL and a new backend");
    victim.check_content(round);
  }
}

void split_requests_survive_sigkill(Probe& probe) { requests_survive_sigkill(probe, false); }
void packed_requests_survive_sigkill(Probe& probe) {
  need_packed(probe);
  requests_survive_sigkill(probe, true);
}

void requests_survive_stops(Probe& probe, bool packed) {
  Victim victim(probe, std::min<std::uint16_t>(queues_of(probe), 2), packed);
  if (!victim.can_suspend()) Probe::skip("no GET_VRING_BASE_INFLIGHT is offered");
  for (unsigned round = 0; round < 8; ++round) {
    victim.submit_all(kBlkTOut, round);
    ::usleep(static_cast<unsigned>(round == 0 ? 0 : probe.random()() % 1500));
    victim.suspend();
    victim.await_all("after its ring was stopped and started again");
    victim.check_content(round);
  }
}

void split_requests_survive_stops(Probe& probe) { requests_survive_stops(probe, false); }
void packed_requests_survive_stops(Probe& probe) {
  {
    Channel channel(probe);
    if ((channel.call_u64(Request::kGetFeatures) & bit(kFRingPacked)) == 0)
      Probe::skip("no RING_PACKED is offered");
  }
  requests_survive_stops(probe, true);
}

// Marks a request as one that a predecessor had in flight; the backend has to do it, though the
// ring alone says that it was taken.
void marked_request_is_done_again(Probe& probe) {
  Guest guest(probe, with_inflight());
  Area area;
  get_area(guest, area);
  start_with(guest, area);
  guest.must_read(0, kDefaultBlock);
  guest.stop_ring(0);
  // As a predecessor would have left it: taken off the ring, and not completed.
  guest.fill(kDefaultBlock, 1);
  guest.post(0, 1, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
  constexpr std::size_t kHead = 3;
  store_release<std::uint64_t>(area.begin + kDescAt + kHead * kDescBytes + 8, 1);
  store_release<std::uint8_t>(area.begin + kDescAt + kHead * kDescBytes, 1);
  guest.channel().close();

  Channel next(probe);
  next.negotiate(kPlainFeatures, kPlainProtocol | bit(kProtocolFInflightShmfd));
  Ring& ring = guest.ring();
  hand_over(next, area, guest.memory());
  start_ring(next, ring, 0, ring.used_index());
  ring.kick();
  const Answer answer = guest.await(0, 1);
  Probe::expect(answer.status == kBlkSOk,
                fmt::format("a request that was in flight has status {}", answer.status));
  ::usleep(50'000);
  Probe::expect(ring.device_used_index() == ring.used_index(),
                "a request that was in flight is completed twice");
}

// ---- Inflight I/O tracking on packed rings

// QueueRegionPacked: version at 8, desc_num 10, free_head 12, old_free_head 14, used_idx 16,
// old_used_idx 18, the wrap counters at 20 and 21, and from 32 on DescStatePacked.
constexpr std::size_t kDescNumAt = 10;
constexpr std::size_t kFreeHeadAt = 12;
constexpr std::size_t kOldFreeHeadAt = 14;
constexpr std::size_t kPackedUsedIndexAt = 16;
constexpr std::size_t kPackedOldUsedIndexAt = 18;
constexpr std::size_t kPackedWrapAt = 20;
constexpr std::size_t kPackedOldWrapAt = 21;
constexpr std::size_t kPackedDescAt = 32;
constexpr std::size_t kPackedDescBytes = 32;
// DescStatePacked.
constexpr std::size_t kInflightAt = 0;
constexpr std::size_t kNextAt = 2;
constexpr std::size_t kLastAt = 4;
constexpr std::size_t kNumAt = 6;
constexpr std::size_t kCounterAt = 8;
constexpr std::size_t kIdAt = 16;
constexpr std::size_t kFlagsAt = 18;
constexpr std::size_t kLengthAt = 20;
constexpr std::size_t kAddressAt = 24;

std::byte* packed_entry(const Area& area, std::size_t index) {
  return area.begin + kPackedDescAt + index * kPackedDescBytes;
}

PackedGuestOptions packed_with_inflight() {
  return {.protocol_features = kPlainProtocol | bit(kProtocolFInflightShmfd),
          .size = 64,
          .starts_ring = false};
}

void start_with(PackedGuest& guest, const Area& area) {
  const int fds[] = {area.fd.get()};
  guest.channel().command(Request::kSetInflightFd, payload_of(area.description), fds);
  guest.guest().share_memory();
  guest.start_ring();
}

// What contradicts the ring in the region; empty: nothing.
std::string packed_mismatch(const Area& area, const PackedRing& ring) {
  const auto half = [&](std::size_t at) { return load_acquire<std::uint16_t>(area.begin + at); };
  const PackedPosition used{.index = half(kPackedUsedIndexAt),
                            .wrap = area.begin[kPackedWrapAt] != std::byte{0}};
  const PackedPosition old_used{.index = half(kPackedOldUsedIndexAt),
                                .wrap = area.begin[kPackedOldWrapAt] != std::byte{0}};
  const auto text = [](PackedPosition at) {
    return fmt::format("{}, counter {}", at.index, at.wrap ? 1 : 0);
  };
  if (used != ring.next_used() || old_used != used) {
    return fmt::format("used_idx is {} and old_used_idx {}, where the ring stands at {}",
                       text(used), text(old_used), text(ring.next_used()));
  }
  if (half(kFreeHeadAt) != half(kOldFreeHeadAt)) {
    return fmt::format("free_head is {} and old_free_head {}, and nothing is in progress",
                       half(kFreeHeadAt), half(kOldFreeHeadAt));
  }
  for (std::size_t i = 0; i < ring.size(); ++i) {
    if (packed_entry(area, i)[kInflightAt] != std::byte{0})
      return fmt::format("entry {} is marked in flight, and nothing is", i);
  }
  // All entries are free: the list has each of them.
  std::vector<bool> is_free(ring.size());
  std::size_t count = 0;
  for (std::size_t i = half(kFreeHeadAt); i < ring.size() && !is_free[i]; ++count) {
    is_free[i] = true;
    i = load_acquire<std::uint16_t>(packed_entry(area, i) + kNextAt);
  }
  if (count != ring.size())
    return fmt::format("the list of free entries has {} of {}", count, ring.size());
  return "";
}

void packed_area_is_kept(Probe& probe) {
  PackedGuest guest(probe, packed_with_inflight());
  Area area;
  get_area(guest.guest(), area);
  start_with(guest, area);
  for (int i = 0; i < 50; ++i) guest.must_read(0, kDefaultBlock);
  const auto version = load_acquire<std::uint16_t>(area.begin + kVersionAt);
  const auto desc_num = load_acquire<std::uint16_t>(area.begin + kDescNumAt);
  Probe::expect(version == 1 && desc_num == guest.ring().size(),
                fmt::format("the region's version is {}, its desc_num {}", version, desc_num));
  // The region follows the ring, a moment later.
  std::string still;
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  do {
    still = packed_mismatch(area, guest.ring());
    if (still.empty()) return;
    ::usleep(1000);
  } while (std::chrono::steady_clock::now() < deadline);
  Probe::fail(still);
}

// Marks a list as one that a predecessor had taken off the ring, as the specification's steps do
// it: three entries from the list of free ones, the first with the length, the last and a counter.
void mark_in_flight(const Area& area, const PackedRing& ring, PackedPosition first) {
  std::uint16_t entry = load_acquire<std::uint16_t>(area.begin + kFreeHeadAt);
  std::byte* const head = packed_entry(area, entry);
  PackedPosition at = first;
  for (std::uint16_t i = 0; i < 3; ++i) {
    const PackedDescriptor copy = ring.descriptor(at.index);
    std::byte* const state = packed_entry(area, entry);
    store_release<std::uint16_t>(state + kIdAt, copy.id);
    store_release<std::uint16_t>(state + kFlagsAt, copy.flags);
    store_release<std::uint32_t>(state + kLengthAt, copy.length_bytes);
    store_release<std::uint64_t>(state + kAddressAt, copy.guest_address);
    if (i == 2) store_release<std::uint16_t>(head + kLastAt, entry);
    entry = load_acquire<std::uint16_t>(state + kNextAt);
    at.advance(1, ring.size());
  }
  store_release<std::uint16_t>(head + kNumAt, 3);
  store_release<std::uint64_t>(head + kCounterAt, 1000);
  store_release<std::uint8_t>(head + kInflightAt, 1);
  store_release<std::uint16_t>(area.begin + kFreeHeadAt, entry);
  store_release<std::uint16_t>(area.begin + kOldFreeHeadAt, entry);
}

void packed_marked_request_is_done_again(Probe& probe) {
  PackedGuest guest(probe, packed_with_inflight());
  Area area;
  get_area(guest.guest(), area);
  start_with(guest, area);
  guest.must_read(0, kDefaultBlock);
  guest.stop_ring();
  PackedRing& ring = guest.ring();
  const PackedPosition first = ring.next_avail();
  guest.post(1, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
  mark_in_flight(area, ring, first);
  guest.channel().close();

  Channel next(probe);
  next.negotiate(kPlainFeatures | bit(kFRingPacked), kPlainProtocol | bit(kProtocolFInflightShmfd));
  hand_over(next, area, guest.guest().memory());
  start_ring(next, ring, 0, ring.base());
  ring.kick();
  const Answer answer = guest.await(1);
  Probe::expect(answer.status == kBlkSOk,
                fmt::format("a request that was in flight has status {}", answer.status));
  ::usleep(50'000);
  Probe::expect(!ring.has_used(), "a request that was in flight is completed twice");
  guest.post(0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
  ring.kick();
  guest.await(0);
}

constexpr const char* kCommunication = "Communication";
constexpr const char* kInflight = "Inflight I/O tracking";
// Its protocol feature 20 is younger than the rest.
constexpr const char* kVhostUserOfQemu11 = "vhost-user.rst (QEMU 11.0)";
constexpr const char* kGetVringBase = "VHOST_USER_GET_VRING_BASE";

constexpr std::array kTests{
    Test{"reconnect/again-and-again",
         {kVhostUser, kCommunication, Force::kRobust,
          "frontends may come and go, one after another"},
         frontends_come_and_go},
    Test{"reconnect/features",
         {kVirtio, "Basic Facilities / Device Reset", Force::kRobust,
          "the features of a connection end with it"},
         features_do_not_survive},
    Test{"reconnect/writeback",
         {kVirtio, "Basic Facilities / Device Reset", Force::kRobust,
          "the writeback that a driver has set ends with its connection"},
         writeback_does_not_survive},
    Test{"reconnect/rings",
         {kVhostUser, "Ring states", Force::kMust, "each ring is initialized in a stopped state"},
         rings_do_not_survive},
    Test{"reconnect/requests-in-flight",
         {kVhostUser, kCommunication, Force::kRobust,
          "a frontend that leaves with writes in flight leaves each block old or new"},
         frontend_leaves_with_requests_in_flight,
         true},
    Test{"reconnect/sigterm",
         {kVhostUser, "Backend program conventions", Force::kMust,
          "the program ends when it gets SIGTERM, a frontend connected"},
         sigterm_ends_it},
    Test{
        "reconnect/inflight-area",
        {kVhostUser, kInflight, Force::kStates,
         "GET_INFLIGHT_FD brings a region that tells what is in flight: nothing, when all is done"},
        area_is_kept},
    Test{"reconnect/inflight-marked",
         {kVhostUser, kInflight, Force::kStates,
          "what a region has in flight is done again by the backend that gets it, once"},
         marked_request_is_done_again},
    Test{"reconnect/inflight-area-packed",
         {kVhostUser, kInflight, Force::kStates,
          "the region of a packed ring tells where the ring stands, and that all entries are free "
          "when all is done"},
         packed_area_is_kept},
    Test{"reconnect/inflight-marked-packed",
         {kVhostUser, kInflight, Force::kStates,
          "what the region of a packed ring has in flight is done again, once"},
         packed_marked_request_is_done_again},
    Test{"reconnect/inflight-stop",
         {kVhostUserOfQemu11, kGetVringBase, Force::kMust,
          "requests in flight when a ring is stopped are each completed, once, before that or when "
          "it is started again, with the in-flight area"},
         split_requests_survive_stops,
         true},
    Test{"reconnect/inflight-stop-packed",
         {kVhostUserOfQemu11, kGetVringBase, Force::kMust,
          "the same on packed rings, where they are offered"},
         packed_requests_survive_stops,
         true},
    Test{.name = "reconnect/inflight-sigkill",
         .statement =
             {kVhostUser, kInflight, Force::kStates,
              "requests in flight at SIGKILL are each completed, once, by the next backend"},
         .run = split_requests_survive_sigkill,
         .destructive = true,
         .deadline = std::chrono::seconds(40)},
    Test{.name = "reconnect/inflight-sigkill-packed",
         .statement = {kVhostUser, kInflight, Force::kStates,
                       "the same on packed rings, where they are offered"},
         .run = packed_requests_survive_sigkill,
         .destructive = true,
         .deadline = std::chrono::seconds(40)},
};

}  // namespace

std::span<const Test> reconnect_tests() { return kTests; }

}  // namespace vblk::conform
