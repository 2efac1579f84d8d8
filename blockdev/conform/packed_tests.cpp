// Packed virtqueues with a well-behaved driver: laps and their counters, lists of descriptors, used
// descriptors, notifications both ways.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/packed_guest.h"
#include "blockdev/conform/test.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace vhost_user;
using namespace virtio;

namespace {

constexpr std::uint64_t kTestSector = 64;
constexpr std::uint64_t kEventIdx = bit(kFEventIdx);
constexpr std::uint64_t kIndirect = bit(kFIndirectDesc);

// ---- Laps

// A list has three descriptors, so that in a ring of eight each lap ends within another one.
void laps_are_told_apart(Probe& probe) {
  PackedGuest guest(probe, {.size = 8});
  for (int i = 0; i < 40; ++i) guest.must_read(0, kDefaultBlock);
}

void lists_go_over_the_end(Probe& probe) {
  const bool may_write = probe.options().target.may_write;
  for (const std::uint16_t size : std::to_array<std::uint16_t>({8, 5})) {
    for (const std::uint16_t before_end : std::to_array<std::uint16_t>({1, 2})) {
      for (const bool wrap : {true, false}) {
        PackedGuest guest(probe, {.size = size,
                                  .start = {.index = static_cast<std::uint16_t>(size - before_end),
                                            .wrap = wrap}});
        const std::uint64_t stamp = std::uint64_t{size} + before_end + (wrap ? 100U : 200U);
        guest.guest().fill(kDefaultBlock, stamp);
        if (may_write) guest.must_write(kTestSector, kDefaultBlock);
        std::ranges::fill(guest.data().first(kDefaultBlock), std::byte{0});
        for (int i = 0; i < size; ++i) guest.must_read(kTestSector, kDefaultBlock);
        if (!may_write) continue;
        guest.guest().expect_data(
            kDefaultBlock, stamp,
            fmt::format("what was written, by a list that begins {} descriptors before the end of "
                        "a ring of {},",
                        before_end, size));
      }
    }
  }
}

void any_size_works(Probe& probe) {
  for (const std::uint16_t size : std::to_array<std::uint16_t>({3, 4, 7, 64, 100, 128})) {
    PackedGuest guest(probe, {.size = size});
    for (int i = 0; i < size + 3; ++i) guest.must_read(0, kDefaultBlock);
  }
}

void base_is_told(Probe& probe) {
  PackedGuest guest(probe, {.size = 8});
  for (int round = 0; round < 8; ++round) {
    for (int i = 0; i <= round; ++i) guest.must_read(0, kDefaultBlock);
    const std::uint32_t base = guest.stop_ring();
    Probe::expect(base == guest.ring().base(),
                  fmt::format("GET_VRING_BASE says {:#010x} where the ring stands at {:#010x}",
                              base, guest.ring().base()));
    guest.start_ring();
  }
  guest.must_read(0, kDefaultBlock);
}

// ---- Which descriptors are the device's

// What AVAIL and USED say where nothing is available in the lap of counter w: left over, or used.
void only_available_is_taken(Probe& probe) {
  PackedGuest guest(probe, {.size = 16});
  PackedRing& ring = guest.ring();
  guest.must_read(0, kDefaultBlock);
  const PackedPosition at = ring.next_avail();
  const auto list = guest.make_request(1, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
  for (const std::uint16_t flags : {packed_used_flags(at.wrap), packed_used_flags(!at.wrap),
                                    packed_available_flags(!at.wrap)}) {
    for (std::uint16_t i = 0; i < list.size(); ++i) {
      const bool is_last = i + 1U == list.size();
      ring.write_descriptor(
          at.index + std::size_t{i},
          {.guest_address = list[i].guest_address,
           .length_bytes = list[i].length_bytes,
           .id = guest.id_of(1),
           .flags = static_cast<std::uint16_t>(flags | (is_last ? 0U : kDescFNext) |
                                               (list[i].writable ? kDescFWrite : 0U))});
    }
    ring.kick();
    ::usleep(50'000);
    Probe::expect(guest.status_of(1) == 0xee,
                  fmt::format("a descriptor is used whose flags are {:#06x} in a lap of counter {}",
                              flags, at.wrap ? 1 : 0));
  }
  ring.offer(list, guest.id_of(1));
  ring.kick();
  guest.await(1);
}

// One used descriptor for each list, in its first place; the others stay as the driver wrote them,
// and what is used stays as well.
void other_descriptors_stay(Probe& probe) {
  PackedGuest guest(probe, {.size = 64});
  PackedRing& ring = guest.ring();
  struct Left {
    PackedPosition at;
    PackedDescriptor entry;
  };
  std::vector<Left> left;
  for (int i = 0; i < 20; ++i) {
    const PackedPosition first = ring.next_avail();
    guest.post(0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
    PackedPosition at = first;
    at.advance(1, ring.size());
    for (; at != ring.next_avail(); at.advance(1, ring.size()))
      left.push_back({at, ring.descriptor(at.index)});
    ring.kick_if_wanted();
    guest.await(0);
    left.push_back({first, ring.descriptor(first.index)});
  }
  ::usleep(20'000);
  for (const auto& [at, entry] : left) {
    const PackedDescriptor now = ring.descriptor(at.index);
    Probe::expect(now.guest_address == entry.guest_address &&
                      now.length_bytes == entry.length_bytes && now.id == entry.id &&
                      now.flags == entry.flags,
                  fmt::format("descriptor {} has changed: id {}, length {}, flags {:#06x} instead "
                              "of {}, {}, {:#06x}",
                              at.index, now.id, now.length_bytes, now.flags, entry.id,
                              entry.length_bytes, entry.flags));
  }
}

void readable_buffers_stay(Probe& probe) {
  PackedGuest guest(probe);
  guest.guest().fill(kDefaultBlock, 9);
  const auto list =
      guest.make_request(0, kBlkTOut, kTestSector, guest.data().first(kDefaultBlock), {});
  std::array<std::byte, kBlkRequestHeaderBytes> header{};
  std::memcpy(header.data(), guest.guest().header_of(0, 0), header.size());
  guest.ring().offer(list, guest.id_of(0));
  guest.ring().kick();
  guest.await(0);
  Probe::expect(std::memcmp(header.data(), guest.guest().header_of(0, 0), header.size()) == 0,
                "the header has been changed");
  Probe::expect(!guest.guest().differs(kDefaultBlock, 9), "the data of a write has been changed");
}

// The driver's area is read-only, and both areas and the ring end where they end.
void areas_end_where_they_end(Probe& probe) {
  PackedGuest guest(probe, {.features = kEventIdx, .size = 16});
  PackedRing& ring = guest.ring();
  constexpr std::size_t kBehind = kRingMarginBytes - kPackedEventBytes;
  std::array<std::byte, kBehind> canary{};
  std::ranges::fill(canary, std::byte{0x5c});
  std::byte* const ends[] = {ring.ring() + ring.size() * kDescriptorBytes,
                             ring.driver_area() + kPackedEventBytes,
                             ring.device_area() + kPackedEventBytes};
  for (std::byte* const end : ends) std::memcpy(end, canary.data(), canary.size());
  const std::uint32_t event = packed_event(kPackedEventAtDescriptor, {.index = 3, .wrap = false});
  ring.set_driver_event(event);
  for (int i = 0; i < 60; ++i) guest.must_read(0, kDefaultBlock);
  Probe::expect(load_acquire_le<std::uint32_t>(ring.driver_area()) == event,
                "the Driver Event Suppression structure has been written");
  for (const std::byte* const end : ends) {
    Probe::expect(std::memcmp(end, canary.data(), canary.size()) == 0,
                  "bytes behind a part of the ring have been written");
  }
}

// ---- Buffers

// Each of these buffers is used once, and the requests of as many slots have succeeded.
void must_all_come_back(PackedGuest& guest, std::set<std::uint16_t> in_flight) {
  const auto count = static_cast<std::uint16_t>(in_flight.size());
  for (std::uint16_t i = 0; i < count; ++i) {
    const std::uint16_t id = guest.must_take().id;
    Probe::expect(in_flight.erase(id) == 1,
                  fmt::format("buffer {} comes back, which is not in flight", id));
  }
  for (std::uint16_t i = 0; i < count; ++i)
    Probe::expect(guest.status_of(i) == kBlkSOk,
                  fmt::format("request {} has status {}", i, guest.status_of(i)));
}

// Ids in an order that has nothing to do with the ring's; only the last of a list has the right
// one.
void ids_come_back(Probe& probe) {
  PackedGuest guest(probe, {.size = 48});
  PackedRing& ring = guest.ring();
  std::vector<std::uint16_t> ids(ring.size());
  for (std::uint16_t i = 0; i < ring.size(); ++i) ids[i] = i;
  for (int round = 0; round < 30; ++round) {
    std::ranges::shuffle(ids, probe.random());
    const auto count = static_cast<std::uint16_t>(1 + probe.random()() % (ring.size() / 3));
    std::set<std::uint16_t> in_flight;
    for (std::uint16_t i = 0; i < count; ++i) {
      const auto part = guest.data().subspan(i * kDefaultBlock, kDefaultBlock);
      ring.offer(guest.make_request(i, kBlkTIn, i * 8U, {}, part), ids[i]);
      in_flight.insert(ids[i]);
    }
    ring.kick_if_wanted();
    must_all_come_back(guest, std::move(in_flight));
  }
}

// Each entry of the ring taken, by lists of three or by one indirect descriptor each.
void full_ring_comes_back(Probe& probe, bool indirect) {
  PackedGuest guest(probe, {.features = indirect ? kIndirect : 0, .size = 48});
  PackedRing& ring = guest.ring();
  const auto count = static_cast<std::uint16_t>(indirect ? ring.size() : ring.size() / 3);
  const auto tables = guest.guest().allocate(count * (3 * kDescriptorBytes), 16);
  for (int round = 0; round < 10; ++round) {
    std::set<std::uint16_t> in_flight;
    for (std::uint16_t i = 0; i < count; ++i) {
      const auto part = guest.data().subspan(i * kDefaultBlock, kDefaultBlock);
      const auto list = guest.make_request(i, kBlkTIn, i * 8U, {}, part);
      in_flight.insert(guest.id_of(i));
      if (!indirect) {
        ring.offer(list, guest.id_of(i));
        continue;
      }
      std::byte* const table = tables.data() + i * (3 * kDescriptorBytes);
      for (std::size_t j = 0; j < list.size(); ++j) {
        PackedRing::write_entry(table, j,
                                {.guest_address = list[j].guest_address,
                                 .length_bytes = list[j].length_bytes,
                                 .id = 0,
                                 .flags = list[j].writable ? kDescFWrite : std::uint16_t{0}});
      }
      ring.offer(std::array{Piece{guest.guest().address_of(table), 3 * kDescriptorBytes, false,
                                  kDescFIndirect}},
                 guest.id_of(i));
    }
    ring.kick_if_wanted();
    must_all_come_back(guest, std::move(in_flight));
  }
}

void full_of_lists(Probe& probe) { full_ring_comes_back(probe, false); }
void full_of_indirect(Probe& probe) { full_ring_comes_back(probe, true); }

// ---- Used descriptors

// A request of `type`, whose used descriptor is looked at.
PackedRing::Used used_of(PackedGuest& guest, std::uint32_t type, std::size_t writable_bytes) {
  guest.post(0, type, 0, {}, guest.data().first(writable_bytes));
  guest.ring().kick_if_wanted();
  const PackedRing::Used used = guest.must_take();
  Probe::expect(guest.status_of(0) == kBlkSOk,
                fmt::format("request type {} has status {}", type, guest.status_of(0)));
  return used;
}

void used_has_the_write_flag(Probe& probe) {
  PackedGuest guest(probe);
  for (int i = 0; i < 30; ++i) {
    const PackedRing::Used read = used_of(guest, kBlkTIn, kDefaultBlock);
    Probe::expect((read.flags & kDescFWrite) != 0,
                  fmt::format("the used descriptor of a read has flags {:#06x}", read.flags));
    if (!guest.guest().has(kBlkFFlush)) continue;
    const PackedRing::Used flush = used_of(guest, kBlkTFlush, 0);
    Probe::expect((flush.flags & kDescFWrite) != 0,
                  fmt::format("the used descriptor of a flush, whose status was written, has "
                              "flags {:#06x}",
                              flush.flags));
  }
}

void used_length_is_no_more_than_written(Probe& probe) {
  PackedGuest guest(probe);
  const auto read = used_of(guest, kBlkTIn, kDefaultBlock);
  Probe::expect(
      read.length_bytes <= kDefaultBlock + 1,
      fmt::format("a read of {} bytes has the used length {}", kDefaultBlock, read.length_bytes));
  const auto id = used_of(guest, kBlkTGetId, kBlkIdBytes);
  Probe::expect(id.length_bytes <= kBlkIdBytes + 1,
                fmt::format("GET_ID has the used length {}", id.length_bytes));
  if (guest.guest().has(kBlkFFlush)) {
    const auto flush = used_of(guest, kBlkTFlush, 0);
    Probe::expect(flush.length_bytes <= 1,
                  fmt::format("a flush has the used length {}", flush.length_bytes));
  }
  if (!probe.options().target.may_write) return;
  const Answer write = guest.write(0, kDefaultBlock);
  Probe::expect(write.used_length <= 1,
                fmt::format("a write has the used length {}", write.used_length));
}

void used_length_counts(Probe& probe) {
  PackedGuest guest(probe);
  for (const std::size_t bytes : {kDefaultBlock, 4 * kDefaultBlock}) {
    const Answer read = guest.read(0, bytes);
    Probe::expect(read.used_length == bytes + 1,
                  fmt::format("a read of {} bytes and a status has the used length {}", bytes,
                              read.used_length));
  }
}

// ---- Lists

// Header, data and status cut as `readable` and `writable` say, in a chain or an indirect table.
void check_cut(Probe& probe, std::span<const std::size_t> readable,
               std::span<const std::size_t> writable, bool indirect) {
  PackedGuest guest(probe, {.features = indirect ? kIndirect : 0, .size = 16});
  guest.guest().need_segments(writable.size());
  constexpr std::uint64_t kStamp = 78;
  if (probe.options().target.may_write) {
    guest.guest().fill(kDefaultBlock, kStamp);
    guest.must_write(kTestSector, kDefaultBlock);
  }
  const auto body = guest.guest().allocate(kBlkRequestHeaderBytes + kDefaultBlock + 1);
  std::ranges::fill(body, std::byte{0xcd});
  store_le<std::uint32_t>(body.data(), kBlkTIn);
  store_le<std::uint32_t>(body.data() + 4, 0);
  store_le<std::uint64_t>(body.data() + 8, kTestSector);
  std::vector<Piece> pieces;
  std::uint64_t address = guest.guest().address_of(body.data());
  const auto cut = [&](std::span<const std::size_t> lengths, bool is_writable) {
    for (const std::size_t bytes : lengths) {
      pieces.push_back({address, static_cast<std::uint32_t>(bytes), is_writable});
      address += bytes;
    }
  };
  cut(readable, false);
  cut(writable, true);
  if (indirect) {
    const auto table = guest.guest().allocate(pieces.size() * kDescriptorBytes, 16);
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      // Every other flag and the id are reserved, and ignored.
      const auto noise = static_cast<std::uint16_t>(probe.random()() & ~std::uint64_t{kDescFWrite});
      PackedRing::write_entry(
          table.data(), i,
          {.guest_address = pieces[i].guest_address,
           .length_bytes = pieces[i].length_bytes,
           .id = static_cast<std::uint16_t>(probe.random()()),
           .flags = static_cast<std::uint16_t>(noise | (pieces[i].writable ? kDescFWrite : 0U))});
    }
    pieces.assign(1, {guest.guest().address_of(table.data()),
                      static_cast<std::uint32_t>(table.size()), false, kDescFIndirect});
  }
  guest.ring().offer(pieces, guest.id_of(0));
  guest.ring().kick_if_wanted();
  guest.must_take();
  const int status = std::to_integer<int>(body[kBlkRequestHeaderBytes + kDefaultBlock]);
  Probe::expect(status == kBlkSOk, fmt::format("the read has status {}", status));
  std::memcpy(guest.data().data(), body.data() + kBlkRequestHeaderBytes, kDefaultBlock);
  if (!probe.options().target.may_write) return;
  guest.guest().expect_data(kDefaultBlock, kStamp, "the data");
}

constexpr std::array<std::size_t, 4> kHeaderCut{1, 3, 8, 4};
constexpr std::array<std::size_t, 6> kDataCut{1, 511, 513, 7, kDefaultBlock - 1032, 1};
constexpr std::array<std::size_t, 1> kHeaderWhole{kBlkRequestHeaderBytes};
constexpr std::array<std::size_t, 1> kDataWithStatus{kDefaultBlock + 1};

void requests_may_be_cut(Probe& probe) {
  check_cut(probe, kHeaderCut, kDataCut, false);
  check_cut(probe, kHeaderWhole, kDataWithStatus, false);
}
void indirect_entries_have_one_flag(Probe& probe) {
  // What is random in it hides a fault now and then.
  for (int i = 0; i < 8; ++i) check_cut(probe, kHeaderCut, kDataCut, true);
}

constexpr std::uint64_t kIndirectStamp = 80;

// What read_indirect() is to find, where the disk may be written.
void write_for_indirect(Probe& probe, PackedGuest& guest) {
  if (!probe.options().target.may_write) return;
  guest.guest().fill(kDefaultBlock, kIndirectStamp);
  guest.must_write(kTestSector, kDefaultBlock);
}

// A read by an indirect table; `flags` of the descriptor that refers to it.
void read_indirect(Probe& probe, PackedGuest& guest, std::uint16_t flags) {
  guest.guest().fill(kDefaultBlock, kIndirectStamp + 1);
  const auto list =
      guest.make_request(0, kBlkTIn, kTestSector, {}, guest.data().first(kDefaultBlock));
  const auto table = guest.guest().allocate(list.size() * kDescriptorBytes, 16);
  for (std::size_t i = 0; i < list.size(); ++i) {
    PackedRing::write_entry(table.data(), i,
                            {.guest_address = list[i].guest_address,
                             .length_bytes = list[i].length_bytes,
                             .id = 0,
                             .flags = list[i].writable ? kDescFWrite : std::uint16_t{0}});
  }
  const Piece piece{guest.guest().address_of(table.data()),
                    static_cast<std::uint32_t>(table.size()), false,
                    static_cast<std::uint16_t>(kDescFIndirect | flags)};
  guest.ring().offer({&piece, 1}, guest.id_of(0));
  guest.ring().kick_if_wanted();
  const Answer answer = guest.await(0);
  Probe::expect(answer.status == kBlkSOk, fmt::format("the read has status {}", answer.status));
  if (!probe.options().target.may_write) return;
  guest.guest().expect_data(kDefaultBlock, kIndirectStamp, "the data");
}

void indirect_works_among_lists(Probe& probe) {
  PackedGuest guest(probe, {.features = kIndirect, .size = 8});
  write_for_indirect(probe, guest);
  for (int i = 0; i < 30; ++i) {
    read_indirect(probe, guest, 0);
    guest.must_read(0, kDefaultBlock);
  }
}

void indirect_write_flag_is_ignored(Probe& probe) {
  PackedGuest guest(probe, {.features = kIndirect});
  write_for_indirect(probe, guest);
  for (int i = 0; i < 3; ++i) read_indirect(probe, guest, kDescFWrite);
}

// ---- Notifications to the driver

void every_buffer_is_told(Probe& probe) {
  PackedGuest guest(probe, {.size = 16});
  PackedRing& ring = guest.ring();
  ring.set_driver_event(packed_event(kPackedEventEnable));
  for (int i = 0; i < 100; ++i) {
    ring.take_calls();
    guest.must_read(0, kDefaultBlock);
    Probe::expect(ring.wait_call(kPatience), fmt::format("used buffer {} is not notified", i));
  }
}

// Twenty reads after which the driver is to have heard nothing; `before` each of them.
void expect_silence(
    PackedGuest& guest, const char* where, const std::function<void()>& before = [] {}) {
  PackedRing& ring = guest.ring();
  before();
  guest.must_read(0, kDefaultBlock);  // one that may be on its way
  ::usleep(20'000);
  ring.take_calls();
  for (int i = 0; i < 20; ++i) {
    before();
    guest.must_read(0, kDefaultBlock);
  }
  ::usleep(20'000);
  // One of before may have been late, on a busy machine.
  const std::uint64_t calls = ring.take_calls();
  Probe::expect(calls <= 1, fmt::format("{} notifications of 20 buffers {}", calls, where));
}

void disabled_events_are_respected(Probe& probe) {
  PackedGuest guest(probe);
  guest.ring().set_driver_event(packed_event(kPackedEventDisable));
  expect_silence(guest, "with events disabled");
}

// The driver sleeps on the call descriptor alone, as it does in a guest, lap after lap.
void awaited_descriptor_is_told(Probe& probe) {
  PackedGuest guest(probe, {.features = kEventIdx, .size = 8});
  PackedRing& ring = guest.ring();
  for (int i = 0; i < 300; ++i) {
    ring.wait_for(ring.next_used());
    ring.take_calls();
    guest.post(0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
    ring.kick_if_wanted();
    if (!ring.wait_call(kPatience)) {
      Probe::fail(ring.has_used()
                      ? fmt::format("used buffer {} is there, and the notification that was asked "
                                    "for at its descriptor is not",
                                    i)
                      : fmt::format("request {} is not answered", i));
    }
    guest.await(0);
  }
}

// Several at once, waited for at a random one of them.
void awaited_descriptor_amid_a_batch(Probe& probe) {
  PackedGuest guest(probe, {.features = kEventIdx, .size = 50});
  PackedRing& ring = guest.ring();
  for (int round = 0; round < 200; ++round) {
    const auto count = static_cast<std::uint16_t>(1 + probe.random()() % 16);
    const auto awaited = static_cast<std::uint16_t>(probe.random()() % count);
    PackedPosition at = ring.next_used();
    at.advance(awaited * std::size_t{3}, ring.size());
    ring.wait_for(at);
    ring.take_calls();
    for (std::uint16_t i = 0; i < count; ++i)
      guest.post(i, kBlkTIn, 0, {}, guest.data().subspan(i * kDefaultBlock, kDefaultBlock));
    ring.kick_if_wanted();
    Probe::expect(
        ring.wait_call(kPatience),
        fmt::format("round {}: no notification of used buffer {} of {}", round, awaited, count));
    for (std::uint16_t i = 0; i < count; ++i) guest.must_take();
  }
}

// A descriptor that is not reached, and one that is, in another lap.
void awaited_descriptor_holds_back(Probe& probe) {
  {
    PackedGuest guest(probe, {.features = kEventIdx, .size = 128});
    PackedPosition at = guest.ring().next_used();
    at.advance(120, guest.ring().size());
    guest.ring().wait_for(at);
    expect_silence(guest, "before the descriptor that was asked for");
  }
  PackedGuest guest(probe, {.features = kEventIdx, .size = 128});
  expect_silence(guest, "at a descriptor that was asked for in another lap", [&guest] {
    const PackedPosition next = guest.ring().next_used();
    guest.ring().wait_for({.index = next.index, .wrap = !next.wrap});
  });
}

// ---- Notifications to the device

void device_event_is_valid(Probe& probe) {
  const auto check = [](PackedGuest& guest, bool event_idx) {
    for (int i = 0; i < 200; ++i) {
      guest.must_read(0, kDefaultBlock);
      const std::uint32_t event = guest.ring().device_event();
      const std::uint32_t flags = event >> 16;
      const PackedPosition at = PackedPosition::decode(static_cast<std::uint16_t>(event));
      Probe::expect(flags <= (event_idx ? kPackedEventAtDescriptor : kPackedEventDisable),
                    fmt::format("the Device Event Suppression structure has flags {:#x} {} "
                                "EVENT_IDX",
                                flags, event_idx ? "with" : "without"));
      Probe::expect(flags != kPackedEventAtDescriptor || at.index < guest.ring().size(),
                    fmt::format("the device waits for descriptor {} of a ring of {}", at.index,
                                guest.ring().size()));
    }
  };
  {
    PackedGuest guest(probe, {.size = 16});
    check(guest, false);
  }
  PackedGuest guest(probe, {.features = kEventIdx, .size = 16});
  check(guest, true);
}

// A kick only where the device asks for it, after pauses that meet it awake, falling asleep, and
// asleep.
void wakes_up(Probe& probe, std::uint64_t features) {
  PackedGuest guest(probe, {.features = features, .size = 16});
  PackedRing& ring = guest.ring();
  for (int i = 0; i < 1000; ++i) {
    if (i % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(probe.random()() % 120));
    guest.post(0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
    const bool kicked = ring.kick_if_wanted();
    if (!ring.wait_used()) {
      Probe::fail(fmt::format(
          "request {} is not answered; the device {}", i,
          kicked ? "was kicked" : "had not asked to be kicked, and does not look by itself"));
    }
    guest.await(0);
  }
}

void kicks_are_asked_for(Probe& probe) { wakes_up(probe, 0); }
void kicks_are_asked_for_with_event_idx(Probe& probe) { wakes_up(probe, kEventIdx); }

constexpr const char* kPacked = "Packed Virtqueues";
constexpr const char* kCounters = "Driver and Device Ring Wrap Counters";
constexpr const char* kChaining = "Next Flag: Descriptor Chaining";
constexpr const char* kIndirectFlag = "Indirect Flag: Scatter-Gather Support";
constexpr const char* kTable = "Packed Virtqueues / The Virtqueue Descriptor Table";
constexpr const char* kSuppression = "Driver and Device Event Suppression";
constexpr const char* kElement = "Element Address and Length";

constexpr Test stated(const char* name, const char* section, const char* text,
                      void (*run)(Probe&)) {
  return {.name = name, .statement = {kVirtio, section, Force::kStates, text}, .run = run};
}

constexpr std::array kTests{
    stated(
        "packed/laps", kCounters,
        "used descriptors have AVAIL and USED as the device's counter, which changes at the ring's "
        "end",
        laps_are_told_apart),
    stated("packed/list-over-end", kPacked, "a list may go over the end of the ring, in any lap",
           lists_go_over_the_end),
    Test{"packed/sizes",
         {kVirtio, "Structure Size and Alignment", Force::kStates,
          "rings work whose size is no power of two"},
         any_size_works},
    Test{"packed/vring-base",
         {kVhostUser82, "Vring descriptor indices for packed virtqueues", Force::kStates,
          "GET_VRING_BASE tells both indices with their counters, and a ring goes on there"},
         base_is_told},
    Test{"packed/only-available",
         {kVirtio, kTable, Force::kMust,
          "a descriptor is not used before its AVAIL bit has changed"},
         only_available_is_taken},
    stated("packed/others-untouched", kChaining,
           "one used descriptor is written for a list, and no other descriptor is changed",
           other_descriptors_stay),
    Test{.name = "packed/readable-buffers",
         .statement = {kVirtio, kTable, Force::kMust, "device-readable buffers are not written"},
         .run = readable_buffers_stay,
         .destructive = true},
    stated("packed/areas", "Structure Size and Alignment",
           "the driver's area is only read, and nothing is written behind a part of the ring",
           areas_end_where_they_end),
    stated("packed/buffer-id", kChaining,
           "a used descriptor has the id of the last descriptor in its list", ids_come_back),
    stated("packed/full", kPacked, "each buffer of a full ring comes back, once", full_of_lists),
    stated("packed/full-of-indirect", kIndirectFlag,
           "each buffer of a ring full of indirect descriptors comes back, once", full_of_indirect),
    stated("packed/write-flag", "Write Flag",
           "a used descriptor has the write flag where the buffer was written",
           used_has_the_write_flag),
    stated("packed/used-length", kElement,
           "a used descriptor's length is no more than the device may have written",
           used_length_is_no_more_than_written),
    Test{"packed/used-length-counts",
         {kVirtio, kElement, Force::kStates,
          "a used descriptor's length is the number of bytes written, the status byte included"},
         used_length_counts},
    stated("packed/message-framing", "Scatter-Gather Support",
           "nothing is assumed of how a request is cut, on a packed ring", requests_may_be_cut),
    stated("packed/indirect", "Scatter-Gather Support",
           "indirect descriptors and lists may be mixed in a ring", indirect_works_among_lists),
    stated("packed/indirect-flags", kIndirectFlag,
           "flags other than WRITE and ids are ignored in an indirect table",
           indirect_entries_have_one_flag),
    stated("packed/indirect-write-flag", kIndirectFlag,
           "the write flag of a descriptor that refers to an indirect table is ignored",
           indirect_write_flag_is_ignored),
    stated("packed/notified", kSuppression, "with events enabled each used buffer is notified",
           every_buffer_is_told),
    Test{"packed/not-notified",
         {kVirtio, kSuppression, Force::kStates, "with events disabled no used buffer is notified"},
         disabled_events_are_respected},
    stated("packed/event", kSuppression,
           "with EVENT_IDX the descriptor that the driver waits for is notified, in each lap",
           awaited_descriptor_is_told),
    stated(
        "packed/event-in-batch", kSuppression,
        "with EVENT_IDX the descriptor that the driver waits for is notified, wherever in a batch "
        "it lies",
        awaited_descriptor_amid_a_batch),
    Test{"packed/event-holds-back",
         {kVirtio, kSuppression, Force::kStates,
          "with EVENT_IDX no other descriptor is notified, nor one of another lap"},
         awaited_descriptor_holds_back},
    stated("packed/device-event", "Event Suppression Structure Format",
           "the device's events have a valid offset, no reserved flag, and 2 only with EVENT_IDX",
           device_event_is_valid),
    stated("packed/kick", kSuppression,
           "a device that has not asked to be notified looks at the ring by itself",
           kicks_are_asked_for),
    stated("packed/kick-event-idx", kSuppression,
           "with EVENT_IDX, a device that has not asked to be notified looks at the ring by itself",
           kicks_are_asked_for_with_event_idx),
};

}  // namespace

std::span<const Test> packed_tests() { return kTests; }

}  // namespace vblk::conform
