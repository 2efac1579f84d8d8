// Packed rings as no driver may make them: what hostile_ring_tests.cpp is for split ones. A list
// cannot loop, for it has no links; it can go on for ever, or into what is not available.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/packed_guest.h"
#include "blockdev/conform/test.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace vhost_user;
using namespace virtio;

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kTestSector = 64;
constexpr std::uint64_t kStamp = 0x4058;
// Not mapped by any region of the suite's.
constexpr std::uint64_t kNowhere = 0x7777'0000'0000;
constexpr std::uint64_t kIndirect = bit(kFIndirectDesc);

// The descriptors of a request, in memory and ready.
struct Parts {
  PackedDescriptor header;
  PackedDescriptor data;
  PackedDescriptor status;
};
using List = std::vector<PackedDescriptor>;
enum class MaySucceed : std::uint8_t { kNo, kYes };
using Spoiler = std::function<void(PackedGuest&, const Parts&)>;

List list_of(const Parts& parts) { return {parts.header, parts.data, parts.status}; }

Parts prepare(PackedGuest& guest, bool reads) {
  const auto data = guest.data().first(kDefaultBlock);
  const auto pieces = reads ? guest.make_request(0, kBlkTIn, kTestSector, {}, data)
                            : guest.make_request(0, kBlkTOut, kTestSector, data, {});
  const auto described = [&](std::size_t i) {
    const unsigned flags = (i < 2 ? kDescFNext : 0U) | (pieces[i].writable ? kDescFWrite : 0U);
    return PackedDescriptor{.guest_address = pieces[i].guest_address,
                            .length_bytes = pieces[i].length_bytes,
                            .id = guest.id_of(0),
                            .flags = static_cast<std::uint16_t>(flags)};
  };
  return {.header = described(0), .data = described(1), .status = described(2)};
}

// `spoil` makes a request out of its parts, wrong in its own way, and offers it. Once for a read
// and, where the disk may be written, once for a write.
void provoke(Probe& probe, MaySucceed may_succeed, const Spoiler& spoil,
             std::uint64_t features = 0) {
  const bool may_write = probe.options().target.may_write;
  if (may_write) {
    PackedGuest guest(probe);
    guest.guest().fill(kDefaultBlock, kStamp);
    guest.must_write(kTestSector, kDefaultBlock);
  }
  for (const bool reads : {true, false}) {
    if (!reads && !may_write) continue;
    PackedGuest guest(probe, {.features = features});
    guest.must_read(0, kDefaultBlock);
    guest.guest().fill(kDefaultBlock, kStamp + 1);
    spoil(guest, prepare(guest, reads));
    guest.ring().kick();
    if (!wait_for_answer(guest.ring(), kQuiet) || may_succeed == MaySucceed::kYes) continue;
    Probe::expect(guest.status_of(0) != kBlkSOk,
                  fmt::format("such a {} has status 0", reads ? "read" : "write"));
  }
  if (!may_write || may_succeed == MaySucceed::kYes) return;
  PackedGuest next(probe);
  next.must_read(kTestSector, kDefaultBlock);
  Probe::expect(!next.guest().differs(kDefaultBlock, kStamp), "the disk's content has changed");
}

// The same with a request whose one part `change` spoils.
void provoke_by(Probe& probe, MaySucceed may_succeed, const std::function<void(Parts&)>& change) {
  provoke(probe, may_succeed, [&change](PackedGuest& guest, Parts parts) {
    change(parts);
    guest.ring().offer_raw(list_of(parts));
  });
}

// ---- Lists

void list_never_ends(Probe& probe) {
  provoke(probe, MaySucceed::kNo, [](PackedGuest& guest, const Parts& parts) {
    List list = list_of(parts);
    for (PackedDescriptor& entry : list) entry.flags |= kDescFNext;
    const PackedDescriptor more = list.back();
    list.resize(guest.ring().size(), more);
    guest.ring().offer_raw(list);
  });
}

void list_goes_on_in_nothing(Probe& probe) {
  provoke(probe, MaySucceed::kNo, [](PackedGuest& guest, const Parts& parts) {
    PackedRing& ring = guest.ring();
    const PackedPosition at = ring.next_avail();
    const std::array entries{parts.header, parts.data, parts.status};
    // The first alone is available.
    for (std::uint16_t i = 3; i > 0; --i) {
      PackedDescriptor entry = entries[i - 1U];
      entry.flags |= i == 1 ? packed_available_flags(at.wrap) : packed_used_flags(!at.wrap);
      ring.write_descriptor(std::size_t{at.index} + i - 1, entry);
    }
  });
}

void more_than_the_ring_is_made_available(Probe& probe) {
  PackedGuest guest(probe, {.size = 48});
  PackedRing& ring = guest.ring();
  guest.must_read(0, kDefaultBlock);
  for (int lap = 0; lap < 6; ++lap) {
    for (int i = 0; i < ring.size() / 3; ++i) {
      const Parts parts = prepare(guest, true);
      ring.offer_raw(list_of(parts));
    }
    ring.kick();
  }
  wait_for_answer(ring, kQuiet);
}

// ---- Buffer ids

void id_lies_beyond(Probe& probe) {
  for (const std::uint16_t id : std::to_array<std::uint16_t>({64, 0x7fff, 0xffff})) {
    PackedGuest guest(probe, {.size = 64});
    guest.must_read(0, kDefaultBlock);
    guest.ring().offer(guest.make_request(0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock)),
                       id);
    guest.ring().kick();
    if (!wait_for_answer(guest.ring(), kQuiet)) continue;
    const auto used = guest.ring().take();
    Probe::expect(used->id == id,
                  fmt::format("buffer {} comes back, and buffer {} was offered", used->id, id));
  }
}

void id_is_offered_twice(Probe& probe) {
  PackedGuest guest(probe);
  for (int i = 0; i < 20; ++i) guest.ring().offer_raw(list_of(prepare(guest, true)));
  guest.ring().kick();
  wait_for_answer(guest.ring(), kQuiet);
}

// ---- Addresses and lengths

void addresses_lie_nowhere(Probe& probe) {
  for (const std::uint64_t address : {std::uint64_t{0}, kNowhere, ~std::uint64_t{0} - 4095}) {
    provoke_by(probe, MaySucceed::kNo,
               [address](Parts& parts) { parts.data.guest_address = address; });
  }
  provoke_by(probe, MaySucceed::kNo, [](Parts& parts) { parts.header.guest_address = kNowhere; });
  // What it is cannot be told, but it may be done.
  provoke_by(probe, MaySucceed::kYes, [](Parts& parts) { parts.status.guest_address = kNowhere; });
}

void lengths_are_wrong(Probe& probe) {
  for (const std::uint32_t length : {0xffff'ffffU, 0x8000'0000U}) {
    provoke_by(probe, MaySucceed::kNo,
               [length](Parts& parts) { parts.data.length_bytes = length; });
  }
  provoke_by(probe, MaySucceed::kYes, [](Parts& parts) { parts.data.length_bytes = 0; });
  provoke_by(probe, MaySucceed::kNo, [](Parts& parts) { parts.header.length_bytes = 0; });
  provoke_by(probe, MaySucceed::kYes, [](Parts& parts) { parts.status.length_bytes = 0; });
}

void directions_are_wrong(Probe& probe) {
  // A request without a place for its status, one without a header, and one back to front.
  provoke(probe, MaySucceed::kNo, [](PackedGuest& guest, Parts parts) {
    parts.header.flags = 0;
    guest.ring().offer_raw({&parts.header, 1});
  });
  provoke(probe, MaySucceed::kNo, [](PackedGuest& guest, const Parts& parts) {
    guest.ring().offer_raw({&parts.status, 1});
  });
  provoke(probe, MaySucceed::kYes, [](PackedGuest& guest, Parts parts) {
    parts.status.flags |= kDescFNext;
    parts.data.flags &= static_cast<std::uint16_t>(~kDescFNext);
    guest.ring().offer_raw(std::array{parts.status, parts.header, parts.data});
  });
}

// A read into the ring that it lies in: descriptors and events change under the backend.
void data_lands_in_the_ring(Probe& probe) {
  for (const int part : {0, 1, 2}) {
    PackedGuest guest(probe);
    PackedRing& ring = guest.ring();
    if (probe.options().target.may_write) {
      for (std::size_t i = 0; i < kDefaultBlock; ++i)
        guest.data()[i] = static_cast<std::byte>(probe.random()());
      guest.must_write(kTestSector, kDefaultBlock);
    }
    std::byte* const target =
        part == 0 ? ring.ring() : (part == 1 ? ring.driver_area() : ring.device_area());
    Parts parts = prepare(guest, true);
    parts.data.guest_address = guest.guest().address_of(target);
    parts.data.length_bytes = kSectorBytes * 2;
    ring.offer_raw(list_of(parts));
    for (int i = 0; i < 20; ++i) ring.kick();
    wait_for_answer(ring, kQuiet);
  }
}

// ---- Indirect tables

// The request's descriptors in a table of their own.
PackedDescriptor table_of(PackedGuest& guest, std::span<const PackedDescriptor> entries) {
  const auto table = guest.guest().allocate(entries.size() * kDescriptorBytes, 16);
  for (std::size_t i = 0; i < entries.size(); ++i)
    PackedRing::write_entry(table.data(), i, entries[i]);
  return {.guest_address = guest.guest().address_of(table.data()),
          .length_bytes = static_cast<std::uint32_t>(table.size()),
          .id = guest.id_of(0),
          .flags = kDescFIndirect};
}

void indirect_without_feature(Probe& probe) {
  provoke(probe, MaySucceed::kNo, [](PackedGuest& guest, const Parts& parts) {
    const PackedDescriptor whole = table_of(guest, list_of(parts));
    guest.ring().offer_raw({&whole, 1});
  });
}

void indirect_tables_are_wrong(Probe& probe) {
  for (const std::uint32_t length : {0U, 15U, 17U, 0xffff'fff0U}) {
    provoke(
        probe, MaySucceed::kYes,
        [length](PackedGuest& guest, const Parts& parts) {
          PackedDescriptor whole = table_of(guest, list_of(parts));
          whole.length_bytes = length;
          guest.ring().offer_raw({&whole, 1});
        },
        kIndirect);
  }
  for (const std::uint64_t address : {kNowhere, ~std::uint64_t{0} - 15}) {
    provoke(
        probe, MaySucceed::kNo,
        [address](PackedGuest& guest, const Parts& parts) {
          PackedDescriptor whole = table_of(guest, list_of(parts));
          whole.guest_address = address;
          guest.ring().offer_raw({&whole, 1});
        },
        kIndirect);
  }
}

// "Each list only contains descriptors of a given type."
void indirect_is_in_a_list(Probe& probe) {
  provoke(
      probe, MaySucceed::kYes,
      [](PackedGuest& guest, const Parts& parts) {
        const PackedDescriptor rest = table_of(guest, std::array{parts.data, parts.status});
        guest.ring().offer_raw(std::array{parts.header, rest});
      },
      kIndirect);
}

void indirect_refers_to_itself(Probe& probe) {
  provoke(
      probe, MaySucceed::kNo,
      [](PackedGuest& guest, const Parts& parts) {
        PackedDescriptor self = table_of(guest, list_of(parts));
        self.length_bytes = kDescriptorBytes;
        PackedRing::write_entry(guest.guest().memory().begin() +
                                    (self.guest_address - driver::DriverMemory::kGuestBase),
                                0, self);
        guest.ring().offer_raw({&self, 1});
      },
      kIndirect);
}

void indirect_is_very_long(Probe& probe) {
  PackedGuest guest(probe, {.features = kIndirect});
  const Parts parts = prepare(guest, true);
  PackedDescriptor one = parts.data;
  one.length_bytes = 1;
  List entries(32768, one);
  entries[0] = parts.header;
  const PackedDescriptor whole = table_of(guest, entries);
  guest.ring().offer_raw({&whole, 1});
  guest.ring().kick();
  wait_for_answer(guest.ring(), kQuiet);
}

// ---- Events, bases, sizes

// What the driver says of its notifications costs it these at most.
void driver_event_makes_no_sense(Probe& probe) {
  for (const std::uint64_t features : {std::uint64_t{0}, bit(kFEventIdx)}) {
    PackedGuest guest(probe, {.features = features, .size = 16});
    for (const std::uint32_t event :
         {packed_event(3), packed_event(kPackedEventAtDescriptor, {.index = 16, .wrap = true}),
          packed_event(kPackedEventAtDescriptor, {.index = 0x7fff, .wrap = false}), 0xffff'ffffU,
          0xfffc'0000U}) {
      guest.ring().set_driver_event(event);
      for (int i = 0; i < 10; ++i) guest.must_read(0, kDefaultBlock);
    }
  }
}

void bases_lie_beyond(Probe& probe) {
  for (const std::uint32_t base : {0x8040'8040U, 0x8000'ffffU, 0xffff'8000U, 0xffff'ffffU, 0U}) {
    PackedGuest guest(probe, {.starts_ring = false});
    guest.guest().share_memory();
    PackedRing& ring = guest.ring();
    const RingStart start{.size = ring.size(), .base = base, .addresses = ring.addresses(0)};
    if (!try_start_ring(guest.channel(), ring, start)) continue;
    ring.offer_raw(list_of(prepare(guest, true)));
    ring.kick();
    ring.wait_used(std::chrono::milliseconds(20));
  }
}

void sizes_are_wrong(Probe& probe) {
  for (const std::uint32_t size : {0U, 32769U, 65535U, 65536U, 0xffff'ffffU}) {
    PackedGuest guest(probe, {.starts_ring = false});
    guest.guest().share_memory();
    PackedRing& ring = guest.ring();
    const RingStart start{.size = size, .base = ring.base(), .addresses = ring.addresses(0)};
    if (!try_start_ring(guest.channel(), ring, start)) continue;
    ring.offer_raw(list_of(prepare(guest, true)));
    ring.kick();
    ring.wait_used(std::chrono::milliseconds(20));
  }
}

// One ring, until it is given up.
void change_at_random(Probe& probe, Clock::time_point end) {
  PackedGuest guest(probe, {.features = kIndirect});
  PackedRing& ring = guest.ring();
  while (Clock::now() < end && !ring.has_error()) {
    List list = list_of(prepare(guest, true));
    if (probe.random()() % 2 == 0) {
      PackedDescriptor& entry = list[probe.random()() % list.size()];
      entry.flags = static_cast<std::uint16_t>(probe.random()());
      entry.id = static_cast<std::uint16_t>(probe.random()() % 70);
      if (probe.random()() % 4 == 0) entry.guest_address = probe.random()();
      if (probe.random()() % 4 == 0)
        entry.length_bytes = static_cast<std::uint32_t>(probe.random()());
    }
    ring.offer_raw(list);
    ring.set_flags(probe.random()() % ring.size(), static_cast<std::uint16_t>(probe.random()()));
    ring.set_driver_event(static_cast<std::uint32_t>(probe.random()()));
    ring.kick();
  }
}

void rings_change_at_random(Probe& probe) {
  const auto end = Clock::now() + std::chrono::milliseconds(800);
  while (Clock::now() < end) change_at_random(probe, end);
}

// A region that says of buffers in flight what cannot be.
void inflight_region_is_garbage(Probe& probe) {
  for (int round = 0; round < 8; ++round) {
    PackedGuest guest(probe, {.protocol_features = kPlainProtocol | bit(kProtocolFInflightShmfd),
                              .starts_ring = false});
    Channel& channel = guest.channel();
    need_protocol(channel, kProtocolFInflightShmfd, "INFLIGHT_SHMFD");
    constexpr std::size_t kBytes = std::size_t{1} << 16;
    const UniqueFd file(::memfd_create("vblk-conform-inflight", MFD_CLOEXEC));
    Bytes garbage(kBytes);
    for (std::byte& byte : garbage) byte = static_cast<std::byte>(probe.random()() % 4);
    // So that it is looked into: version 1, of as many descriptors as the ring has.
    store_le<std::uint64_t>(garbage.data(), 0);
    store_le<std::uint16_t>(garbage.data() + 8, 1);
    store_le<std::uint16_t>(garbage.data() + 10, guest.ring().size());
    if (::write(file.get(), garbage.data(), kBytes) != static_cast<ssize_t>(kBytes))
      Probe::fail("the suite itself: no memory");
    const int fds[] = {file.get()};
    const Inflight description{.mmap_size = kBytes,
                               .mmap_offset = 0,
                               .queue_count = 1,
                               .queue_size = guest.ring().size(),
                               .padding = 0};
    if (channel.try_command(Request::kSetInflightFd, payload_of(description), fds) ==
        Channel::Taken::kClosed)
      continue;
    guest.guest().share_memory();
    const RingStart start{.size = guest.ring().size(),
                          .base = guest.ring().base(),
                          .addresses = guest.ring().addresses(0)};
    if (!try_start_ring(channel, guest.ring(), start)) continue;
    guest.ring().offer_raw(list_of(prepare(guest, true)));
    guest.ring().kick();
    guest.ring().wait_used(std::chrono::milliseconds(20));
  }
}

constexpr const char* kPacked = "Packed Virtqueues";
constexpr const char* kChaining = "Next Flag: Descriptor Chaining";
constexpr const char* kIndirectFlag = "Indirect Flag: Scatter-Gather Support";
constexpr const char* kElement = "Element Address and Length";

constexpr Test robust(const char* name, const char* section, const char* text, void (*run)(Probe&),
                      const char* document = kVirtio) {
  return {.name = name, .statement = {document, section, Force::kRobust, text}, .run = run};
}

constexpr std::array kTests{
    robust("hostile-packed/list-endless", kChaining,
           "a list that takes the whole ring and does not end is survived and not done",
           list_never_ends),
    robust("hostile-packed/list-into-nothing", kChaining,
           "a list that goes on in what is not available is survived and not done",
           list_goes_on_in_nothing),
    robust("hostile-packed/avail-flags-jump", kPacked,
           "more descriptors made available than the ring has are survived",
           more_than_the_ring_is_made_available),
    robust("hostile-packed/id-beyond", kChaining,
           "a buffer id beyond the ring's size is survived, and no other comes back for it",
           id_lies_beyond),
    robust("hostile-packed/id-twice", kChaining,
           "an id that is offered again while it is in flight is survived", id_is_offered_twice),
    robust("hostile-packed/address-nowhere", kElement,
           "an address outside guest memory is survived, and its request not done",
           addresses_lie_nowhere),
    robust("hostile-packed/length", kElement, "lengths of 0 and of up to 4 GiB are survived",
           lengths_are_wrong),
    robust("hostile-packed/direction", "Write Flag",
           "a request without header, without status, or back to front is survived",
           directions_are_wrong),
    robust("hostile-packed/indirect-not-negotiated", kIndirectFlag,
           "an indirect descriptor without the feature is not followed", indirect_without_feature),
    robust("hostile-packed/indirect-table", kIndirectFlag,
           "an indirect table of an odd length, of none, or beyond memory is survived",
           indirect_tables_are_wrong),
    robust("hostile-packed/indirect-in-list", "Scatter-Gather Support",
           "an indirect descriptor in a list of others is survived", indirect_is_in_a_list),
    robust("hostile-packed/indirect-itself", kIndirectFlag,
           "an indirect table that refers to itself is survived and not done",
           indirect_refers_to_itself),
    robust("hostile-packed/indirect-32768", kIndirectFlag,
           "an indirect table of 32768 entries is survived", indirect_is_very_long),
    robust("hostile-packed/driver-event", "Driver and Device Event Suppression",
           "reserved flags and offsets beyond the ring cost the driver no more than notifications",
           driver_event_makes_no_sense),
    robust("hostile-packed/base", "Vring descriptor indices for packed virtqueues",
           "bases beyond the ring are survived", bases_lie_beyond, kVhostUser82),
    robust("hostile-packed/ring-size", kPacked, "sizes that no packed ring has are survived",
           sizes_are_wrong),
    robust("hostile-packed/data-in-ring", kPacked, "a read into the ring's own memory is survived",
           data_lands_in_the_ring),
    robust("hostile-packed/random", kPacked, "descriptors that change at random are survived",
           rings_change_at_random),
    robust("hostile-packed/inflight", "Inflight I/O tracking",
           "an in-flight region that contradicts itself is survived", inflight_region_is_garbage,
           kVhostUser),
};

}  // namespace

std::span<const Test> hostile_packed_tests() { return kTests; }

}  // namespace vblk::conform
