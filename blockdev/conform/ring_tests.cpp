// Split virtqueues with a well-behaved driver: layouts, used elements, notifications both ways.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <set>
#include <thread>
#include <unistd.h>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/test.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace vhost_user;
using namespace virtio;

namespace {

constexpr std::uint64_t kTestSector = 64;

// A read of one block laid out as `cut` says: lengths of the readable and of the writable pieces,
// which together are header, data and status.
Answer read_cut(Guest& guest, std::span<const std::size_t> readable,
                std::span<const std::size_t> writable) {
  std::size_t writable_total = 0;
  for (const std::size_t bytes : writable) writable_total += bytes;
  const auto header = guest.allocate(kBlkRequestHeaderBytes, 16);
  const auto body = guest.allocate(writable_total);
  std::ranges::fill(body, std::byte{0xcd});
  store_le<std::uint32_t>(header.data(), kBlkTIn);
  store_le<std::uint64_t>(header.data() + 8, kTestSector);
  std::vector<Piece> pieces;
  std::size_t at = 0;
  for (const std::size_t bytes : readable) {
    pieces.push_back(
        {guest.address_of(header.data()) + at, static_cast<std::uint32_t>(bytes), false});
    at += bytes;
  }
  at = 0;
  for (const std::size_t bytes : writable) {
    pieces.push_back({guest.address_of(body.data()) + at, static_cast<std::uint32_t>(bytes), true});
    at += bytes;
  }
  guest.ring().chain(0, pieces);
  guest.ring().offer(0);
  guest.ring().publish();
  guest.ring().kick_if_wanted();
  if (!guest.ring().wait_used()) Probe::fail("the request is not answered");
  const auto used = guest.ring().take();
  std::memcpy(guest.data().data(), body.data(), writable_total - 1);
  return {.answered = true,
          .status = std::to_integer<std::uint8_t>(body[writable_total - 1]),
          .used_length = used->length_bytes};
}

void check_cut(Probe& probe, std::span<const std::size_t> readable,
               std::span<const std::size_t> writable) {
  Guest guest(probe);
  guest.need_segments(writable.size());
  const std::size_t bytes = kDefaultBlock;
  constexpr std::uint64_t kStamp = 77;
  if (probe.options().target.may_write) {
    guest.fill(bytes, kStamp);
    guest.must_write(kTestSector, bytes);
  }
  const Answer answer = read_cut(guest, readable, writable);
  Probe::expect(answer.status == kBlkSOk, fmt::format("the read has status {}", answer.status));
  if (!probe.options().target.may_write) return;
  guest.expect_data(bytes, kStamp, "the data");
}

void header_in_pieces(Probe& probe) {
  check_cut(probe, std::array<std::size_t, 4>{1, 3, 8, 4},
            std::array<std::size_t, 2>{kDefaultBlock, 1});
}
void status_with_data(Probe& probe) {
  check_cut(probe, std::array<std::size_t, 1>{16}, std::array<std::size_t, 1>{kDefaultBlock + 1});
}
void data_in_odd_pieces(Probe& probe) {
  check_cut(probe, std::array<std::size_t, 1>{16},
            std::array<std::size_t, 6>{1, 511, 513, 7, kDefaultBlock - 1032, 1});
}

void header_with_data(Probe& probe) {
  Guest guest(probe);
  const auto body = guest.allocate(kBlkRequestHeaderBytes + kDefaultBlock);
  const auto status = guest.allocate(1, 1);
  store_le<std::uint32_t>(body.data(), kBlkTOut);
  store_le<std::uint64_t>(body.data() + 8, kTestSector);
  guest.fill(kDefaultBlock, 5);
  std::memcpy(body.data() + kBlkRequestHeaderBytes, guest.data().data(), kDefaultBlock);
  const std::array<Piece, 2> pieces{
      {{guest.address_of(body.data()), static_cast<std::uint32_t>(body.size()), false},
       {guest.address_of(status.data()), 1, true}}};
  status[0] = std::byte{0xcd};
  guest.ring().chain(0, pieces);
  guest.ring().offer(0);
  guest.ring().publish();
  guest.ring().kick_if_wanted();
  if (!guest.ring().wait_used()) Probe::fail("the request is not answered");
  guest.ring().take();
  Probe::expect(status[0] == std::byte{kBlkSOk},
                fmt::format("the write has status {}", std::to_integer<int>(status[0])));
  guest.must_read(kTestSector, kDefaultBlock);
  guest.expect_data(kDefaultBlock, 5, "what was written");
}

void used_length_is_no_more_than_written(Probe& probe) {
  Guest guest(probe);
  const Answer read = guest.read(0, kDefaultBlock);
  Probe::expect(
      read.used_length <= kDefaultBlock + 1,
      fmt::format("a read of {} bytes has the used length {}", kDefaultBlock, read.used_length));
  const auto id = guest.request(kBlkTGetId, 0, {}, guest.data().first(kBlkIdBytes));
  Probe::expect(id.used_length <= kBlkIdBytes + 1,
                fmt::format("GET_ID has the used length {}", id.used_length));
  if (guest.has(kBlkFFlush)) {
    const Answer flush = guest.flush();
    Probe::expect(flush.used_length <= 1,
                  fmt::format("a flush has the used length {}", flush.used_length));
  }
  if (!probe.options().target.may_write) return;
  const Answer write = guest.write(0, kDefaultBlock);
  Probe::expect(write.used_length <= 1,
                fmt::format("a write has the used length {}", write.used_length));
}

void used_length_counts(Probe& probe) {
  Guest guest(probe);
  for (const std::size_t bytes : {kDefaultBlock, 4 * kDefaultBlock}) {
    const Answer read = guest.read(0, bytes);
    Probe::expect(read.used_length == bytes + 1,
                  fmt::format("a read of {} bytes and a status has the used length {}", bytes,
                              read.used_length));
  }
}

// What a failed read left untouched must not be claimed as written.
void used_length_of_failure(Probe& probe) {
  Guest guest(probe);
  const std::uint64_t capacity = guest.capacity_sectors();
  guest.fill(kDefaultBlock, probe.random()());
  const Bytes before(guest.data().begin(), guest.data().begin() + kDefaultBlock);
  const Answer answer = guest.read(capacity, kDefaultBlock);
  Probe::expect(answer.status != kBlkSOk, "a read beyond the end has status 0");
  const std::size_t claimed = std::min<std::size_t>(answer.used_length, kDefaultBlock);
  const bool untouched = std::equal(before.begin(), before.end(), guest.data().begin());
  // Eight bytes of a random pattern do not come back by chance.
  Probe::expect(!untouched || claimed < 8,
                fmt::format("a failed read claims {} bytes and has written none of the data",
                            answer.used_length));
}

void readable_buffers_stay(Probe& probe) {
  Guest guest(probe);
  guest.fill(kDefaultBlock, 9);
  guest.post(0, 0, kBlkTOut, kTestSector, guest.data().first(kDefaultBlock), {});
  std::array<std::byte, kBlkRequestHeaderBytes> header{};
  std::memcpy(header.data(), guest.header_of(0, 0), header.size());
  guest.ring().kick();
  guest.await(0, 0);
  Probe::expect(std::memcmp(header.data(), guest.header_of(0, 0), header.size()) == 0,
                "the header has been changed");
  Probe::expect(!guest.differs(kDefaultBlock, 9), "the data of a write has been changed");
}

// Descriptors, and the available ring, are the driver's.
void descriptors_stay(Probe& probe) {
  Guest guest(probe);
  Ring& ring = guest.ring();
  const auto copy = [](const std::byte* begin, std::size_t bytes) {
    return Bytes(begin, begin + bytes);
  };
  for (int i = 0; i < 50; ++i) {
    guest.post(0, static_cast<std::uint16_t>(i % 8), kBlkTIn, 0, {},
               guest.data().first(kDefaultBlock));
    const Bytes table = copy(ring.table(), descriptor_table_bytes(ring.size()));
    const Bytes avail = copy(ring.avail(), avail_ring_bytes(ring.size()));
    ring.kick_if_wanted();
    guest.await(0, static_cast<std::uint16_t>(i % 8));
    Probe::expect(std::equal(table.begin(), table.end(), ring.table()),
                  "the descriptor table has been written");
    Probe::expect(std::equal(avail.begin(), avail.end(), ring.avail()),
                  "the available ring has been written");
  }
}

// ---- Indirect descriptors

void with_indirect(Probe& probe, std::uint16_t direct_pieces, std::uint16_t table_flags) {
  Guest guest(probe, {.features = kPlainFeatures | bit(kFIndirectDesc)});
  need_feature(guest, kFIndirectDesc, "INDIRECT_DESC");
  constexpr std::uint64_t kStamp = 79;
  const bool may_write = probe.options().target.may_write;
  if (may_write) {
    guest.fill(kDefaultBlock, kStamp);
    guest.must_write(kTestSector, kDefaultBlock);
  }
  guest.fill(kDefaultBlock, kStamp + 1);
  guest.write_request(0, 0, kBlkTIn, kTestSector, {}, guest.data().first(kDefaultBlock));
  const std::array<Piece, 3> all{{{guest.address_of(guest.header_of(0, 0)), 16, false},
                                  {guest.address_of(guest.data().data()), kDefaultBlock, true},
                                  {guest.address_of(guest.status_byte(0, 0)), 1, true}}};
  const auto table = guest.allocate(all.size() * kDescriptorBytes, 16);
  const auto in_table = std::span(all).subspan(direct_pieces);
  Ring::chain_in(table.data(), 0, in_table);
  std::vector<Piece> pieces(all.begin(), all.begin() + direct_pieces);
  pieces.push_back({guest.address_of(table.data()),
                    static_cast<std::uint32_t>(in_table.size() * kDescriptorBytes), false,
                    static_cast<std::uint16_t>(kDescFIndirect | table_flags)});
  guest.ring().chain(0, pieces);
  guest.offer(0, 0);
  guest.ring().kick_if_wanted();
  const Answer answer = guest.await(0, 0);
  Probe::expect(answer.status == kBlkSOk, fmt::format("the read has status {}", answer.status));
  if (!may_write) return;
  guest.expect_data(kDefaultBlock, kStamp, "the data");
}

void indirect_works(Probe& probe) { with_indirect(probe, 0, 0); }
void indirect_ends_a_chain(Probe& probe) {
  with_indirect(probe, 1, 0);
  with_indirect(probe, 2, 0);
}
void indirect_write_flag_is_ignored(Probe& probe) { with_indirect(probe, 0, kDescFWrite); }

// ---- Notifications to the driver

void every_buffer_is_told(Probe& probe) {
  Guest guest(probe);
  Ring& ring = guest.ring();
  for (int i = 0; i < 100; ++i) {
    ring.take_calls();
    guest.must_read(0, kDefaultBlock);
    Probe::expect(ring.wait_call(kPatience), fmt::format("used buffer {} is not notified", i));
  }
}

void used_event_is_ignored(Probe& probe) {
  Guest guest(probe);
  Ring& ring = guest.ring();
  for (const std::uint16_t event : std::to_array<std::uint16_t>({0, 1, 7, 1000, 65535})) {
    ring.set_used_event(event);
    ring.take_calls();
    guest.must_read(0, kDefaultBlock);
    Probe::expect(
        ring.wait_call(kPatience),
        fmt::format("a used buffer is not notified with {} where used_event would be", event));
  }
}

void no_interrupt_is_respected(Probe& probe) {
  Guest guest(probe);
  Ring& ring = guest.ring();
  ring.set_avail_flags(kAvailFNoInterrupt);
  guest.must_read(0, kDefaultBlock);  // one that may be on its way
  ::usleep(20'000);
  ring.take_calls();
  for (int i = 0; i < 20; ++i) guest.must_read(0, kDefaultBlock);
  ::usleep(20'000);
  // One of before may have been late, on a busy machine.
  const std::uint64_t calls = ring.take_calls();
  Probe::expect(calls <= 1, fmt::format("{} notifications of 20 buffers with flags 1", calls));
}

GuestOptions event_idx_options() { return {.features = kPlainFeatures | bit(kFEventIdx)}; }

// The driver sleeps on the call descriptor alone, as it does in a guest.
void used_event_is_told(Probe& probe) {
  GuestOptions options = event_idx_options();
  options.base = 65400;  // the index wraps under way
  Guest guest(probe, options);
  need_feature(guest, kFEventIdx, "EVENT_IDX");
  Ring& ring = guest.ring();
  for (int i = 0; i < 400; ++i) {
    ring.set_used_event(ring.used_index());
    ring.take_calls();
    guest.post(0, 0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
    ring.kick_if_wanted();
    if (!ring.wait_call(kPatience)) {
      Probe::fail(ring.device_used_index() == ring.used_index()
                      ? fmt::format("request {} is not answered", i)
                      : fmt::format("used buffer {} is there, and the notification that used_event "
                                    "asked for is not",
                                    i));
    }
    guest.await(0, 0);
  }
}

// Several at once, waited for at a random one of them.
void used_event_amid_a_batch(Probe& probe) {
  Guest guest(probe, event_idx_options());
  need_feature(guest, kFEventIdx, "EVENT_IDX");
  Ring& ring = guest.ring();
  for (int round = 0; round < 200; ++round) {
    const auto count = static_cast<std::uint16_t>(1 + probe.random()() % 16);
    const auto awaited = static_cast<std::uint16_t>(probe.random()() % count);
    ring.set_used_event(static_cast<std::uint16_t>(ring.used_index() + awaited));
    ring.take_calls();
    for (std::uint16_t i = 0; i < count; ++i)
      guest.post(0, i, kBlkTIn, 0, {}, guest.data().subspan(i * kDefaultBlock, kDefaultBlock));
    ring.kick_if_wanted();
    Probe::expect(
        ring.wait_call(kPatience),
        fmt::format("round {}: no notification of used buffer {} of {}", round, awaited, count));
    for (std::uint16_t i = 0; i < count; ++i) {
      if (!ring.wait_used())
        Probe::fail(fmt::format("round {}: buffer {} of {} does not come", round, i, count));
      ring.take();
    }
  }
}

void used_event_holds_back(Probe& probe) {
  Guest guest(probe, event_idx_options());
  need_feature(guest, kFEventIdx, "EVENT_IDX");
  Ring& ring = guest.ring();
  ring.set_used_event(30000);
  guest.must_read(0, kDefaultBlock);  // one that may be on its way
  ::usleep(20'000);
  ring.take_calls();
  for (int i = 0; i < 20; ++i) guest.must_read(0, kDefaultBlock);
  ::usleep(20'000);
  // One of before may have been late, on a busy machine.
  const std::uint64_t calls = ring.take_calls();
  Probe::expect(
      calls <= 1,
      fmt::format("{} notifications of 20 buffers that used_event has not asked for", calls));
}

void avail_flags_are_ignored_with_event_idx(Probe& probe) {
  Guest guest(probe, event_idx_options());
  need_feature(guest, kFEventIdx, "EVENT_IDX");
  Ring& ring = guest.ring();
  ring.set_avail_flags(kAvailFNoInterrupt);
  for (int i = 0; i < 20; ++i) {
    ring.set_used_event(ring.used_index());
    ring.take_calls();
    guest.must_read(0, kDefaultBlock);
    Probe::expect(ring.wait_call(kPatience),
                  "no notification with flags 1, which EVENT_IDX makes void");
  }
}

void used_flags_are_valid(Probe& probe) {
  {
    Guest guest(probe);
    for (int i = 0; i < 200; ++i) {
      guest.must_read(0, kDefaultBlock);
      const std::uint16_t flags = guest.ring().used_flags();
      Probe::expect(flags <= 1, fmt::format("the used ring's flags are {:#x}", flags));
    }
  }
  Guest guest(probe, event_idx_options());
  need_feature(guest, kFEventIdx, "EVENT_IDX");
  for (int i = 0; i < 200; ++i) {
    guest.must_read(0, kDefaultBlock);
    const std::uint16_t flags = guest.ring().used_flags();
    Probe::expect(flags == 0, fmt::format("the used ring's flags are {:#x} with EVENT_IDX", flags));
  }
}

// Behind the used ring lies what is not the device's, where EVENT_IDX is not negotiated: some
// firmware keeps other data there.
void used_ring_ends_where_it_ends(Probe& probe) {
  Guest guest(probe);
  std::byte* const behind = guest.ring().used() + used_avail_event_offset(guest.ring().size());
  std::array<std::byte, 16> canary{};
  std::ranges::fill(canary, std::byte{0x5c});
  std::memcpy(behind, canary.data(), canary.size());
  for (int i = 0; i < 100; ++i) guest.must_read(0, kDefaultBlock);
  Probe::expect(std::memcmp(behind, canary.data(), canary.size()) == 0,
                "bytes behind the used ring have been written without EVENT_IDX");
}

// ---- Notifications to the device

// A kick only where the device asks for it, after pauses that meet it awake, falling asleep, and
// asleep.
void wakes_up(Probe& probe, const GuestOptions& options) {
  Guest guest(probe, options);
  if ((options.features & bit(kFEventIdx)) != 0) need_feature(guest, kFEventIdx, "EVENT_IDX");
  Ring& ring = guest.ring();
  for (int i = 0; i < 3000; ++i) {
    if (i % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(probe.random()() % 120));
    guest.post(0, 0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
    const bool kicked = ring.kick_if_wanted();
    if (!ring.wait_used()) {
      Probe::fail(fmt::format(
          "request {} is not answered; the device {}", i,
          kicked ? "was kicked" : "had not asked to be kicked, and does not look by itself"));
    }
    guest.await(0, 0);
  }
}

void kicks_are_asked_for(Probe& probe) { wakes_up(probe, {}); }
void kicks_are_asked_for_with_event_idx(Probe& probe) { wakes_up(probe, event_idx_options()); }

void spurious_kicks_are_harmless(Probe& probe) {
  Guest guest(probe);
  for (int i = 0; i < 200; ++i) {
    guest.ring().kick();
    if (i % 10 == 0) guest.must_read(0, kDefaultBlock);
  }
  Probe::expect(guest.ring().device_used_index() == guest.ring().used_index(),
                "a kick alone has made a used element");
}

// ---- Depth and size

void full_ring_comes_back(Probe& probe) {
  Guest guest(probe, {.queue_size = 128});
  Ring& ring = guest.ring();
  for (int round = 0; round < 20; ++round) {
    std::set<std::uint32_t> heads;
    const auto count = static_cast<std::uint16_t>(ring.size() / 3);
    for (std::uint16_t i = 0; i < count; ++i) {
      guest.post(0, i, kBlkTIn, std::uint64_t{i} * 8, {},
                 guest.data().subspan(i * kDefaultBlock, kDefaultBlock));
      heads.insert(i * 3U);
    }
    ring.kick_if_wanted();
    for (std::uint16_t i = 0; i < count; ++i) {
      if (!ring.wait_used()) Probe::fail(fmt::format("{} of {} requests come back", i, count));
      const auto used = ring.take();
      Probe::expect(heads.erase(used->id) == 1,
                    fmt::format("buffer {} comes back, which is not in flight", used->id));
    }
    for (std::uint16_t i = 0; i < count; ++i)
      Probe::expect(guest.status_of(0, i) == kBlkSOk,
                    fmt::format("request {} has status {}", i, guest.status_of(0, i)));
  }
}

void sizes_work(Probe& probe) {
  for (const std::uint16_t size : std::to_array<std::uint16_t>({4, 8, 16, 32, 64, 128})) {
    Guest guest(probe, {.queue_size = size});
    for (int i = 0; i < 2 * size + 3; ++i) guest.must_read(0, kDefaultBlock);
  }
}

// Beyond what every frontend uses: taken and working, or refused.
void large_sizes_work_or_are_refused(Probe& probe) {
  for (const std::uint16_t size : std::to_array<std::uint16_t>({256, 512, 1024, 4096, 32768})) {
    {
      Guest guest(probe, {.queue_size = size, .starts_rings = false});
      guest.share_memory();
      const auto taken =
          guest.channel().try_command(Request::kSetVringNum, payload_of(VringState{0, size}));
      if (taken != Channel::Taken::kOk) return;
      if (!guest.channel().has_protocol(kProtocolFReplyAck)) return;
    }
    Guest guest(probe, {.queue_size = size});
    for (int i = 0; i < 10; ++i) guest.must_read(0, kDefaultBlock);
  }
}

constexpr const char* kFraming = "Split Virtqueues / Message Framing";
constexpr const char* kUsedRing = "The Virtqueue Used Ring";
constexpr const char* kIndirect = "Indirect Descriptors";
constexpr const char* kUsedNotify = "Used Buffer Notification Suppression";
constexpr const char* kAvailNotify = "Available Buffer Notification Suppression";

constexpr std::array kTests{
    Test{"ring/header-in-pieces",
         {kVirtio, kFraming, Force::kMust,
          "nothing is assumed of how a request is cut: a header in four descriptors"},
         header_in_pieces},
    Test{"ring/status-with-data",
         {kVirtio, kFraming, Force::kMust,
          "nothing is assumed of how a request is cut: data and status in one descriptor"},
         status_with_data},
    Test{"ring/data-in-odd-pieces",
         {kVirtio, kFraming, Force::kMust,
          "nothing is assumed of how a request is cut: data in pieces of odd lengths"},
         data_in_odd_pieces},
    Test{.name = "ring/header-with-data",
         .statement =
             {kVirtio, kFraming, Force::kMust,
              "nothing is assumed of how a request is cut: header and data in one descriptor"},
         .run = header_with_data,
         .destructive = true},
    Test{"ring/used-length",
         {kVirtio, kUsedRing, Force::kMust,
          "a used element's len is no more than the device may have written"},
         used_length_is_no_more_than_written},
    Test{"ring/used-length-counts",
         {kVirtio, kUsedRing, Force::kStates,
          "a used element's len is the number of bytes written, the status byte included"},
         used_length_counts},
    Test{"ring/used-length-of-failure",
         {kVirtio, kUsedRing, Force::kMust,
          "at least len bytes have been written, of a request that failed as well"},
         used_length_of_failure},
    Test{.name = "ring/readable-buffers",
         .statement = {kVirtio, "The Virtqueue Descriptor Table", Force::kMust,
                       "device-readable buffers are not written"},
         .run = readable_buffers_stay,
         .destructive = true},
    Test{"ring/descriptors-untouched",
         {kVirtio, "The Virtqueue Descriptor Table", Force::kMust,
          "no entry of the descriptor table is written, nor the available ring"},
         descriptors_stay},
    Test{"ring/indirect",
         {kVirtio, kIndirect, Force::kStates, "INDIRECT_DESC that is offered works"},
         indirect_works},
    Test{
        "ring/indirect-after-direct",
        {kVirtio, kIndirect, Force::kMust, "an indirect descriptor may end a chain of normal ones"},
        indirect_ends_a_chain},
    Test{"ring/indirect-write-flag",
         {kVirtio, kIndirect, Force::kMust,
          "the write flag of a descriptor that refers to an indirect table is ignored"},
         indirect_write_flag_is_ignored},
    Test{"ring/notified",
         {kVirtio, kUsedNotify, Force::kMust, "with flags 0 each used buffer is notified"},
         every_buffer_is_told},
    Test{"ring/not-notified",
         {kVirtio, kUsedNotify, Force::kShould, "with flags 1 no used buffer is notified"},
         no_interrupt_is_respected},
    Test{"ring/used-event-ignored",
         {kVirtio, kUsedNotify, Force::kMust,
          "without EVENT_IDX the value of used_event is ignored"},
         used_event_is_ignored},
    Test{"ring/used-event",
         {kVirtio, kUsedNotify, Force::kMust,
          "with EVENT_IDX the buffer at used_event is notified, each time"},
         used_event_is_told},
    Test{"ring/used-event-in-batch",
         {kVirtio, kUsedNotify, Force::kMust,
          "with EVENT_IDX the buffer at used_event is notified, wherever in a batch it lies"},
         used_event_amid_a_batch},
    Test{"ring/used-event-holds-back",
         {kVirtio, kUsedNotify, Force::kShould,
          "with EVENT_IDX no buffer before used_event is notified"},
         used_event_holds_back},
    Test{"ring/avail-flags-ignored",
         {kVirtio, kUsedNotify, Force::kMust,
          "with EVENT_IDX the lower bit of the avail ring's flags is ignored"},
         avail_flags_are_ignored_with_event_idx},
    Test{"ring/used-flags",
         {kVirtio, kAvailNotify, Force::kMust,
          "the used ring's flags are 0 or 1, and 0 with EVENT_IDX"},
         used_flags_are_valid},
    Test{"ring/used-ring-end",
         {kVirtio, kUsedRing, Force::kStates,
          "without EVENT_IDX there is no avail_event, and nothing is written there"},
         used_ring_ends_where_it_ends},
    Test{"ring/kick",
         {kVirtio, kAvailNotify, Force::kStates,
          "a device that has not asked to be notified looks at the ring by itself"},
         kicks_are_asked_for},
    Test{"ring/kick-event-idx",
         {kVirtio, kAvailNotify, Force::kStates,
          "with EVENT_IDX, a device that has not asked to be notified looks at the ring by itself"},
         kicks_are_asked_for_with_event_idx},
    Test{"ring/spurious-kicks",
         {kVirtio, kAvailNotify, Force::kMust, "spurious notifications are handled"},
         spurious_kicks_are_harmless},
    Test{"ring/full",
         {kVirtio, "Virtqueue Operation", Force::kStates,
          "each buffer of a full ring comes back, once"},
         full_ring_comes_back},
    Test{"ring/sizes",
         {kVirtio, "Split Virtqueues", Force::kRobust,
          "queues of 4 to 128 entries work: what frontends use"},
         sizes_work},
    Test{"ring/large-sizes",
         {kVirtio, "Split Virtqueues", Force::kRobust,
          "a larger queue works or is refused when its size is set"},
         large_sizes_work_or_are_refused},
};

}  // namespace

std::span<const Test> ring_tests() { return kTests; }

}  // namespace vblk::conform
