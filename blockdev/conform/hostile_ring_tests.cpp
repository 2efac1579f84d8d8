// Rings as no driver may make them. What a driver MUST NOT do may cost it its request or its queue;
// it must not cost the backend, the disk's content, or the next frontend anything (each test ends
// with the next frontend: Probe::check_aftermath()).
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/test.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace virtio;

namespace {

constexpr std::uint64_t kTestSector = 64;
constexpr std::uint64_t kStamp = 0x4057;
// Not mapped by any region of the suite's.
constexpr std::uint64_t kNowhere = 0x7777'0000'0000;

// What a request on slot 0 is made of, in memory and ready; its descriptors are still to be
// written.
struct Parts {
  Descriptor header;
  Descriptor data;
  Descriptor status;
};

Parts prepare(Guest& guest, bool reads) {
  std::byte* const header = guest.header_of(0, 0);
  store_le<std::uint32_t>(header, reads ? kBlkTIn : kBlkTOut);
  store_le<std::uint32_t>(header + 4, 0);
  store_le<std::uint64_t>(header + 8, kTestSector);
  *guest.status_byte(0, 0) = std::byte{0xee};
  const unsigned data_flags = kDescFNext | (reads ? kDescFWrite : 0U);
  return {.header = {guest.address_of(header), kBlkRequestHeaderBytes, kDescFNext, 1},
          .data = {guest.address_of(guest.data().data()), kDefaultBlock,
                   static_cast<std::uint16_t>(data_flags), 2},
          .status = {guest.address_of(guest.status_byte(0, 0)), 1, kDescFWrite, 0}};
}

void write_all(Ring& ring, const Parts& parts) {
  ring.write_descriptor(0, parts.header);
  ring.write_descriptor(1, parts.data);
  ring.write_descriptor(2, parts.status);
}

void offer_all(Ring& ring, const Parts& parts) {
  write_all(ring, parts);
  ring.offer(0);
  ring.publish();
}

enum class MaySucceed : std::uint8_t { kNo, kYes };
using Spoiler = std::function<void(Guest&, Parts)>;

constexpr std::uint64_t kWithIndirect = kPlainFeatures | bit(kFIndirectDesc);

// `spoil` makes a request out of its parts, wrong in its own way, and publishes it. Once for a read
// and, where the disk may be written, once for a write.
void provoke(Probe& probe, MaySucceed may_succeed, const Spoiler& spoil,
             std::uint64_t features = kPlainFeatures) {
  const bool may_write = probe.options().target.may_write;
  if (may_write) {
    Guest guest(probe);
    guest.fill(kDefaultBlock, kStamp);
    guest.must_write(kTestSector, kDefaultBlock);
  }
  for (const bool reads : {true, false}) {
    if (!reads && !may_write) continue;
    Guest guest(probe, {.features = features});
    if ((features & bit(kFIndirectDesc)) != 0 && !guest.has(kFIndirectDesc))
      Probe::skip("no INDIRECT_DESC is offered");
    guest.must_read(0, kDefaultBlock);
    guest.fill(kDefaultBlock, kStamp + 1);
    spoil(guest, prepare(guest, reads));
    guest.ring().kick();
    if (!wait_for_answer(guest.ring(), kQuiet) || may_succeed == MaySucceed::kYes) continue;
    Probe::expect(guest.status_of(0, 0) != kBlkSOk,
                  fmt::format("such a {} has status 0", reads ? "read" : "write"));
  }
  if (!may_write || may_succeed == MaySucceed::kYes) return;
  Guest next(probe);
  next.must_read(kTestSector, kDefaultBlock);
  Probe::expect(!next.differs(kDefaultBlock, kStamp), "the disk's content has changed");
}

// A chain in an indirect table of its own.
void offer_indirect(Guest& guest, std::span<const Descriptor> entries, std::size_t length_bytes,
                    std::uint16_t extra_flags = 0) {
  const auto table =
      guest.allocate(std::max<std::size_t>(entries.size(), 1) * kDescriptorBytes, 16);
  for (std::size_t i = 0; i < entries.size(); ++i) Ring::write_entry(table.data(), i, entries[i]);
  guest.ring().write_descriptor(
      0, {guest.address_of(table.data()), static_cast<std::uint32_t>(length_bytes),
          static_cast<std::uint16_t>(kDescFIndirect | extra_flags), 1});
  guest.ring().offer(0);
  guest.ring().publish();
}

// ---- Chains

void chain_loops(Probe& probe) {
  provoke(probe, MaySucceed::kNo, [](Guest& guest, Parts parts) {
    parts.data.next = 0;
    offer_all(guest.ring(), parts);
  });
  provoke(probe, MaySucceed::kNo, [](Guest& guest, Parts parts) {
    parts.header.next = 0;  // to itself
    offer_all(guest.ring(), parts);
  });
}

void next_lies_beyond(Probe& probe) {
  for (const std::uint16_t next : std::to_array<std::uint16_t>({64, 65, 32768, 65535})) {
    provoke(probe, MaySucceed::kNo, [next](Guest& guest, Parts parts) {
      parts.header.next = next;
      offer_all(guest.ring(), parts);
    });
  }
}

void head_lies_beyond(Probe& probe) {
  for (const std::uint16_t head : std::to_array<std::uint16_t>({64, 1000, 65535})) {
    provoke(probe, MaySucceed::kNo, [head](Guest& guest, Parts parts) {
      write_all(guest.ring(), parts);
      guest.ring().offer(head);
      guest.ring().publish();
    });
  }
}

void addresses_lie_nowhere(Probe& probe) {
  for (const std::uint64_t address : {std::uint64_t{0}, kNowhere, ~std::uint64_t{0},
                                      ~std::uint64_t{0} - 4095, std::uint64_t{1} << 63}) {
    provoke(probe, MaySucceed::kNo, [address](Guest& guest, Parts parts) {
      parts.data.guest_address = address;
      offer_all(guest.ring(), parts);
    });
  }
  for (const std::uint64_t address : {std::uint64_t{0}, kNowhere, ~std::uint64_t{0}}) {
    provoke(probe, MaySucceed::kNo, [address](Guest& guest, Parts parts) {
      parts.header.guest_address = address;
      offer_all(guest.ring(), parts);
    });
    // What it is cannot be told, but it may be done.
    provoke(probe, MaySucceed::kYes, [address](Guest& guest, Parts parts) {
      parts.status.guest_address = address;
      offer_all(guest.ring(), parts);
    });
  }
}

void buffer_leaves_memory(Probe& probe) {
  provoke(probe, MaySucceed::kNo, [](Guest& guest, Parts parts) {
    const auto& memory = guest.memory();
    parts.data.guest_address =
        driver::DriverMemory::kGuestBase + memory.size_bytes() - kDefaultBlock / 2;
    offer_all(guest.ring(), parts);
  });
  provoke(probe, MaySucceed::kNo, [](Guest& guest, Parts parts) {
    parts.data.guest_address = driver::DriverMemory::kGuestBase - kDefaultBlock / 2;
    offer_all(guest.ring(), parts);
  });
}

void lengths_are_huge(Probe& probe) {
  for (const std::uint32_t length : {0xffff'ffffU, 0xffff'fe00U, 0x8000'0000U}) {
    provoke(probe, MaySucceed::kNo, [length](Guest& guest, Parts parts) {
      parts.data.length_bytes = length;
      offer_all(guest.ring(), parts);
    });
  }
}

void lengths_are_zero(Probe& probe) {
  provoke(probe, MaySucceed::kYes, [](Guest& guest, Parts parts) {
    parts.data.length_bytes = 0;
    offer_all(guest.ring(), parts);
  });
  provoke(probe, MaySucceed::kNo, [](Guest& guest, Parts parts) {
    parts.header.length_bytes = 0;
    offer_all(guest.ring(), parts);
  });
  provoke(probe, MaySucceed::kYes, [](Guest& guest, Parts parts) {
    parts.status.length_bytes = 0;
    offer_all(guest.ring(), parts);
  });
}

void header_is_short(Probe& probe) {
  for (const std::uint32_t length : {1U, 8U, 15U}) {
    provoke(probe, MaySucceed::kNo, [length](Guest& guest, Parts parts) {
      parts.header.length_bytes = length;
      parts.header.next = 2;  // no data behind it that could be taken for the rest
      offer_all(guest.ring(), parts);
    });
  }
}

void nothing_is_writable(Probe& probe) {
  provoke(probe, MaySucceed::kNo, [](Guest& guest, Parts parts) {
    parts.header.flags = 0;
    offer_all(guest.ring(), parts);
  });
}

void nothing_is_readable(Probe& probe) {
  provoke(probe, MaySucceed::kNo, [](Guest& guest, Parts parts) {
    write_all(guest.ring(), parts);
    guest.ring().offer(2);
    guest.ring().publish();
  });
}

void writable_comes_first(Probe& probe) {
  provoke(probe, MaySucceed::kYes, [](Guest& guest, Parts parts) {
    guest.ring().write_descriptor(0, {parts.status.guest_address, 1, kDescFWrite | kDescFNext, 1});
    guest.ring().write_descriptor(1, {parts.header.guest_address, 16, kDescFNext, 2});
    guest.ring().write_descriptor(2,
                                  {parts.data.guest_address, kDefaultBlock, parts.data.flags, 3});
    guest.ring().write_descriptor(3, {parts.status.guest_address, 1, kDescFWrite, 0});
    guest.ring().offer(0);
    guest.ring().publish();
  });
}

void buffers_overlap(Probe& probe) {
  provoke(probe, MaySucceed::kYes, [](Guest& guest, Parts parts) {
    parts.status.guest_address = parts.header.guest_address + 3;
    parts.data.guest_address = parts.header.guest_address;
    offer_all(guest.ring(), parts);
  });
}

// A read into the ring that it lies in: descriptors and the used ring change under the backend.
void data_lands_in_the_ring(Probe& probe) {
  for (const int part : {0, 1, 2}) {
    Guest guest(probe);
    if (probe.options().target.may_write) {
      for (std::size_t i = 0; i < kDefaultBlock; ++i)
        guest.data()[i] = static_cast<std::byte>(probe.random()());
      guest.must_write(kTestSector, kDefaultBlock);
    }
    Ring& ring = guest.ring();
    std::byte* const target = part == 0 ? ring.table() : (part == 1 ? ring.avail() : ring.used());
    Parts parts = prepare(guest, true);
    parts.data.guest_address = guest.address_of(target);
    parts.data.length_bytes = kSectorBytes * 2;
    offer_all(ring, parts);
    for (int i = 0; i < 20; ++i) {
      ring.kick();
      ring.publish_at(static_cast<std::uint16_t>(probe.random()()));
    }
    wait_for_answer(ring, kQuiet);
  }
}

// ---- Indirect tables

void indirect_without_feature(Probe& probe) {
  provoke(probe, MaySucceed::kNo, [](Guest& guest, Parts parts) {
    offer_indirect(guest, std::array{parts.header, parts.data, parts.status}, 3 * kDescriptorBytes);
  });
}

void indirect_lengths_are_wrong(Probe& probe) {
  for (const std::size_t length : std::to_array<std::size_t>({0, 1, 15, 17, 47})) {
    provoke(
        probe, MaySucceed::kYes,
        [length](Guest& guest, Parts parts) {
          offer_indirect(guest, std::array{parts.header, parts.data, parts.status}, length);
        },
        kWithIndirect);
  }
  for (const std::size_t length : {std::size_t{0xffff'fff0U}, std::size_t{0x8000'0000U}}) {
    provoke(
        probe, MaySucceed::kYes,
        [length](Guest& guest, Parts parts) {
          offer_indirect(guest, std::array{parts.header, parts.data, parts.status}, length);
        },
        kWithIndirect);
  }
}

void indirect_is_nested(Probe& probe) {
  provoke(
      probe, MaySucceed::kNo,
      [](Guest& guest, Parts parts) {
        const auto inner = guest.allocate(3 * kDescriptorBytes, 16);
        Ring::write_entry(inner.data(), 0, parts.header);
        Ring::write_entry(inner.data(), 1, parts.data);
        Ring::write_entry(inner.data(), 2, parts.status);
        const Descriptor nested{guest.address_of(inner.data()), 3 * kDescriptorBytes,
                                kDescFIndirect, 0};
        offer_indirect(guest, {&nested, 1}, kDescriptorBytes);
      },
      kWithIndirect);
}

void indirect_refers_to_itself(Probe& probe) {
  provoke(
      probe, MaySucceed::kNo,
      [](Guest& guest, Parts) {
        const auto table = guest.allocate(kDescriptorBytes, 16);
        const Descriptor self{guest.address_of(table.data()), kDescriptorBytes, kDescFIndirect, 0};
        Ring::write_entry(table.data(), 0, self);
        guest.ring().write_descriptor(0, self);
        guest.ring().offer(0);
        guest.ring().publish();
      },
      kWithIndirect);
}

void indirect_loops(Probe& probe) {
  provoke(
      probe, MaySucceed::kNo,
      [](Guest& guest, Parts parts) {
        parts.data.next = 0;
        offer_indirect(guest, std::array{parts.header, parts.data, parts.status},
                       3 * kDescriptorBytes);
      },
      kWithIndirect);
}

void indirect_next_lies_beyond(Probe& probe) {
  for (const std::uint16_t next : std::to_array<std::uint16_t>({3, 100, 65535})) {
    provoke(
        probe, MaySucceed::kNo,
        [next](Guest& guest, Parts parts) {
          parts.header.next = next;
          offer_indirect(guest, std::array{parts.header, parts.data, parts.status},
                         3 * kDescriptorBytes);
        },
        kWithIndirect);
  }
}

void indirect_lies_nowhere(Probe& probe) {
  for (const std::uint64_t address : {std::uint64_t{0}, kNowhere, ~std::uint64_t{0} - 15}) {
    provoke(
        probe, MaySucceed::kNo,
        [address](Guest& guest, Parts) {
          guest.ring().write_descriptor(0, {address, 3 * kDescriptorBytes, kDescFIndirect, 0});
          guest.ring().offer(0);
          guest.ring().publish();
        },
        kWithIndirect);
  }
}

void indirect_has_a_next(Probe& probe) {
  provoke(
      probe, MaySucceed::kYes,
      [](Guest& guest, Parts parts) {
        offer_indirect(guest, std::array{parts.header, parts.data, parts.status},
                       3 * kDescriptorBytes, kDescFNext);
      },
      kWithIndirect);
}

void indirect_is_very_long(Probe& probe) {
  Guest guest(probe, {.features = kWithIndirect});
  need_feature(guest, kFIndirectDesc, "INDIRECT_DESC");
  constexpr std::size_t kEntries = 32768;
  const Parts parts = prepare(guest, true);
  std::vector<Piece> pieces(kEntries, Piece{parts.data.guest_address, 1, true});
  pieces[0] = {parts.header.guest_address, kBlkRequestHeaderBytes, false};
  const auto table = guest.allocate(kEntries * kDescriptorBytes, 16);
  Ring::chain_in(table.data(), 0, pieces);
  guest.ring().write_descriptor(0, {guest.address_of(table.data()),
                                    static_cast<std::uint32_t>(table.size()), kDescFIndirect, 0});
  guest.ring().offer(0);
  guest.ring().publish();
  guest.ring().kick();
  wait_for_answer(guest.ring(), 2 * kQuiet);
}

// ---- The available ring

void avail_index_jumps(Probe& probe) {
  for (const std::uint16_t distance : std::to_array<std::uint16_t>({65, 128, 32768, 65535})) {
    Guest guest(probe);
    guest.must_read(0, kDefaultBlock);
    const Parts parts = prepare(guest, true);
    write_all(guest.ring(), parts);
    guest.ring().offer(0);
    guest.ring().publish_at(static_cast<std::uint16_t>(guest.ring().used_index() + distance));
    guest.ring().kick();
    wait_for_answer(guest.ring(), kQuiet);
    const auto returned =
        static_cast<std::uint16_t>(guest.ring().device_used_index() - guest.ring().used_index());
    Probe::expect(
        returned <= guest.ring().size(),
        fmt::format("{} buffers come back of a ring of {}", returned, guest.ring().size()));
  }
}

void head_is_offered_twice(Probe& probe) {
  Guest guest(probe);
  const Parts parts = prepare(guest, true);
  write_all(guest.ring(), parts);
  for (int i = 0; i < 40; ++i) guest.ring().offer(0);
  guest.ring().publish();
  guest.ring().kick();
  wait_for_answer(guest.ring(), kQuiet);
}

void rings_change_at_random(Probe& probe) {
  Guest guest(probe, {.features = kWithIndirect});
  Ring& ring = guest.ring();
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(1500);
  std::uint16_t index = 0;
  while (std::chrono::steady_clock::now() < end) {
    const Parts parts = prepare(guest, true);
    write_all(ring, parts);
    for (int i = 0; i < 4; ++i) {
      Descriptor entry = parts.data;
      entry.flags = static_cast<std::uint16_t>(probe.random()() % 8);
      entry.next = static_cast<std::uint16_t>(probe.random()() % 70);
      if (probe.random()() % 4 == 0) entry.guest_address = probe.random()();
      if (probe.random()() % 4 == 0)
        entry.length_bytes = static_cast<std::uint32_t>(probe.random()());
      ring.write_descriptor(probe.random()() % ring.size(), entry);
    }
    ring.offer(static_cast<std::uint16_t>(probe.random()() % 66));
    ring.publish_at(++index);
    ring.kick();
  }
}

constexpr const char* kTable = "The Virtqueue Descriptor Table";
constexpr const char* kIndirect = "Indirect Descriptors";
constexpr const char* kAvail = "The Virtqueue Available Ring";

constexpr Test robust(const char* name, const char* section, const char* text,
                      void (*run)(Probe&)) {
  return {.name = name, .statement = {kVirtio, section, Force::kRobust, text}, .run = run};
}

constexpr std::array kTests{
    robust("hostile-ring/chain-loop", kTable, "a chain that loops is survived and not done",
           chain_loops),
    robust("hostile-ring/next-beyond", kTable, "a next field beyond the table is survived",
           next_lies_beyond),
    robust("hostile-ring/head-beyond", kAvail, "a head beyond the table is survived",
           head_lies_beyond),
    robust("hostile-ring/address-nowhere", kTable,
           "an address outside guest memory is survived, and its request not done",
           addresses_lie_nowhere),
    robust("hostile-ring/buffer-leaves-memory", kTable,
           "a buffer that is in guest memory only in part is survived", buffer_leaves_memory),
    robust("hostile-ring/length-huge", kTable, "a length of up to 4 GiB is survived",
           lengths_are_huge),
    robust("hostile-ring/length-zero", kTable, "descriptors of no length are survived",
           lengths_are_zero),
    robust("hostile-ring/header-short", kTable, "a header of less than 16 bytes is survived",
           header_is_short),
    robust("hostile-ring/nothing-writable", kTable,
           "a request without a place for its status is survived", nothing_is_writable),
    robust("hostile-ring/nothing-readable", kTable, "a request without a header is survived",
           nothing_is_readable),
    robust("hostile-ring/writable-first", "Message Framing",
           "writable buffers before readable ones are survived", writable_comes_first),
    robust("hostile-ring/overlap", kTable, "buffers that overlap are survived", buffers_overlap),
    robust("hostile-ring/indirect-not-negotiated", kIndirect,
           "an indirect descriptor without the feature is not followed", indirect_without_feature),
    robust("hostile-ring/indirect-length", kIndirect,
           "an indirect table of an odd length, of none, or beyond memory is survived",
           indirect_lengths_are_wrong),
    robust("hostile-ring/indirect-nested", kIndirect,
           "an indirect table in an indirect table is survived and not done", indirect_is_nested),
    robust("hostile-ring/indirect-itself", kIndirect,
           "an indirect table that refers to itself is survived", indirect_refers_to_itself),
    robust("hostile-ring/indirect-loop", kIndirect, "an indirect chain that loops is survived",
           indirect_loops),
    robust("hostile-ring/indirect-next-beyond", kIndirect,
           "a next field beyond an indirect table is survived", indirect_next_lies_beyond),
    robust("hostile-ring/indirect-nowhere", kIndirect,
           "an indirect table outside guest memory is survived", indirect_lies_nowhere),
    robust("hostile-ring/indirect-with-next", kIndirect,
           "an indirect descriptor with the next flag is survived", indirect_has_a_next),
    robust("hostile-ring/indirect-32768", kIndirect,
           "an indirect table of 32768 entries is survived", indirect_is_very_long),
    robust("hostile-ring/avail-jump", kAvail,
           "an available index that jumps is survived, and no more comes back than a ring holds",
           avail_index_jumps),
    robust("hostile-ring/head-twice", kAvail,
           "a head that is offered again while it is in flight is survived", head_is_offered_twice),
    Test{.name = "hostile-ring/data-in-ring",
         .statement = {kVirtio, kTable, Force::kRobust,
                       "a read into the ring's own memory is survived"},
         .run = data_lands_in_the_ring},
    robust("hostile-ring/random", kTable, "descriptors that change at random are survived",
           rings_change_at_random),
};

}  // namespace

std::span<const Test> hostile_ring_tests() { return kTests; }

}  // namespace vblk::conform
