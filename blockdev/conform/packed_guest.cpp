#include "blockdev/conform/packed_guest.h"

#include <algorithm>

#include <fmt/core.h>

#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace virtio;
using namespace vhost_user;

namespace {

constexpr std::byte kUntouched{0xee};

GuestOptions options_of(const PackedGuestOptions& options) {
  return {.features = kPlainFeatures | options.features | bit(kFRingPacked),
          .protocol_features = options.protocol_features,
          .starts_rings = false};
}

}  // namespace

PackedGuest::PackedGuest(Probe& probe, const PackedGuestOptions& options)
    : probe_(probe),
      guest_(probe, options_of(options)),
      ring_(guest_.memory(), options.size, options.start) {
  need_feature(guest_, kFRingPacked, "RING_PACKED");
  if ((options.features & bit(kFEventIdx)) != 0) need_feature(guest_, kFEventIdx, "EVENT_IDX");
  if ((options.features & bit(kFIndirectDesc)) != 0)
    need_feature(guest_, kFIndirectDesc, "INDIRECT_DESC");
  if (!options.starts_ring) return;
  guest_.share_memory();
  start_ring();
}

void PackedGuest::start_ring() { conform::start_ring(guest_.channel(), ring_, 0, ring_.base()); }

std::uint32_t PackedGuest::stop_ring() {
  const Message answer =
      guest_.channel().call(Request::kGetVringBase, payload_of(VringState{0, 0}));
  const auto state = decode<VringState>(answer.payload);
  if (!state || state->index != 0)
    Probe::fail(fmt::format("GET_VRING_BASE is answered with {} bytes", answer.payload.size()));
  return state->value;
}

std::vector<Piece> PackedGuest::make_request(std::uint16_t slot, std::uint32_t type,
                                             std::uint64_t sector,
                                             std::span<const std::byte> readable,
                                             std::span<std::byte> writable) {
  const std::size_t longest = std::max(readable.size(), writable.size());
  if (longest >= kDefaultBlock) guest_.need_segment_bytes(longest);
  std::byte* const header = guest_.header_of(0, slot);
  store_le<std::uint32_t>(header, type);
  store_le<std::uint32_t>(header + 4, 0);
  store_le<std::uint64_t>(header + 8, sector);
  *guest_.status_byte(0, slot) = kUntouched;
  std::vector<Piece> pieces{{guest_.address_of(header), kBlkRequestHeaderBytes, false}};
  if (!readable.empty()) {
    pieces.push_back(
        {guest_.address_of(readable.data()), static_cast<std::uint32_t>(readable.size()), false});
  }
  if (!writable.empty()) {
    pieces.push_back(
        {guest_.address_of(writable.data()), static_cast<std::uint32_t>(writable.size()), true});
  }
  pieces.push_back({guest_.address_of(guest_.status_byte(0, slot)), 1, true});
  return pieces;
}

void PackedGuest::post(std::uint16_t slot, std::uint32_t type, std::uint64_t sector,
                       std::span<const std::byte> readable, std::span<std::byte> writable) {
  ring_.offer(make_request(slot, type, sector, readable, writable), id_of(slot));
}

PackedRing::Used PackedGuest::must_take() {
  if (!ring_.wait_used()) {
    if (const std::string dead = probe_.death(); !dead.empty()) Probe::fail(dead);
    const PackedPosition at = ring_.next_used();
    Probe::fail(fmt::format(
        "no used descriptor comes at {} within {} ms: its flags are {:#06x}, and the counter is {}",
        at.index, kPatience.count(), ring_.descriptor(at.index).flags, at.wrap ? 1 : 0));
  }
  return *ring_.take();
}

Answer PackedGuest::await(std::uint16_t slot) {
  const PackedRing::Used used = must_take();
  Probe::expect(
      used.id == id_of(slot),
      fmt::format("the used descriptor names buffer {} instead of {}", used.id, id_of(slot)));
  const std::uint8_t status = status_of(slot);
  Probe::expect(status != std::to_integer<std::uint8_t>(kUntouched),
                "a request is returned with its status byte not written");
  return {.answered = true, .status = status, .used_length = used.length_bytes};
}

Answer PackedGuest::read(std::uint64_t sector, std::size_t bytes) {
  post(0, kBlkTIn, sector, {}, data().first(bytes));
  ring_.kick_if_wanted();
  return await(0);
}

Answer PackedGuest::write(std::uint64_t sector, std::size_t bytes) {
  post(0, kBlkTOut, sector, data().first(bytes), {});
  ring_.kick_if_wanted();
  return await(0);
}

void PackedGuest::must_read(std::uint64_t sector, std::size_t bytes) {
  const Answer answer = read(sector, bytes);
  Probe::expect(answer.status == kBlkSOk,
                fmt::format("a read of {} bytes has status {}", bytes, answer.status));
}

void PackedGuest::must_write(std::uint64_t sector, std::size_t bytes) {
  const Answer answer = write(sector, bytes);
  Probe::expect(answer.status == kBlkSOk,
                fmt::format("a write of {} bytes has status {}", bytes, answer.status));
}

}  // namespace vblk::conform
