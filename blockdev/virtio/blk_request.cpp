#include "blockdev/virtio/blk_request.h"

#include <algorithm>
#include <cassert>
#include <climits>
#include <cstring>
#include <limits>

#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::virtio {

namespace {

BlkCommand refuse(std::uint8_t status) {
  return {.kind = BlkCommandKind::kRefused, .refusal = status};
}

// Copies the first `out.size()` bytes out of `pieces` and trims them off. The caller has checked
// that there are as many.
void take_front(std::span<iovec>& pieces, std::span<std::byte> out) {
  while (!out.empty()) {
    iovec& piece = pieces.front();
    const std::size_t bytes = std::min(piece.iov_len, out.size());
    std::memcpy(out.data(), piece.iov_base, bytes);
    out = out.subspan(bytes);
    piece.iov_base = static_cast<std::byte*>(piece.iov_base) + bytes;
    piece.iov_len -= bytes;
    if (piece.iov_len == 0) pieces = pieces.subspan(1);
  }
}

void drop_last_byte(std::span<iovec>& pieces) {
  if (--pieces.back().iov_len == 0) pieces = pieces.first(pieces.size() - 1);
}

// The parts of a chain once header and status are off.
struct Body {
  std::span<iovec> readable;
  std::uint64_t readable_bytes;
  std::span<iovec> writable;
  std::uint64_t writable_bytes;
};

bool is_in_range(std::uint64_t sector, std::uint64_t length_bytes, std::uint64_t capacity_bytes) {
  // In sectors: sector * 512 may not fit.
  const std::uint64_t capacity_sectors = capacity_bytes / kSectorBytes;
  return sector <= capacity_sectors && length_bytes / kSectorBytes <= capacity_sectors - sector;
}

// `sector` counts 512 bytes whatever blk_size says ("Device Initialization").
BlkCommand transfer(BlkCommandKind kind, std::uint64_t sector, std::span<iovec> data,
                    std::uint64_t length_bytes, const BlkRequestLimits& limits) {
  if (length_bytes % kSectorBytes != 0) return refuse(kBlkSIoErr);
  if (!is_in_range(sector, length_bytes, limits.capacity_bytes)) return refuse(kBlkSIoErr);
  // Engines take at most IOV_MAX pieces, and `len` in the used ring has 32 bits.
  if (data.size() > IOV_MAX) return refuse(kBlkSIoErr);
  if (length_bytes >= std::numeric_limits<std::uint32_t>::max()) return refuse(kBlkSIoErr);
  return {.kind = kind,
          .offset_bytes = sector * kSectorBytes,
          .length_bytes = length_bytes,
          .data = data};
}

struct WireSegment {
  std::uint64_t sector;
  std::uint32_t sector_count;
  std::uint32_t flags;
};

WireSegment take_segment(Body& body) {
  std::array<std::byte, kBlkDiscardSegmentBytes> bytes;
  take_front(body.readable, bytes);
  return {.sector = load_le<std::uint64_t>(bytes.data()),
          .sector_count = load_le<std::uint32_t>(bytes.data() + 8),
          .flags = load_le<std::uint32_t>(bytes.data() + 12)};
}

BlkCommand segments_command(BlkCommandKind kind, Body body, const BlkRequestLimits& limits,
                            std::span<BlkSegment, kBlkSegmentsMax> segments) {
  const std::uint64_t count = body.readable_bytes / kBlkDiscardSegmentBytes;
  if (count == 0 || body.readable_bytes % kBlkDiscardSegmentBytes != 0) return refuse(kBlkSIoErr);
  if (count > segments.size()) return refuse(kBlkSUnsupp);
  const std::uint32_t known_flags =
      kind == BlkCommandKind::kWriteZeroes ? kBlkWriteZeroesFlagUnmap : 0;
  bool in_range = true;
  // All are checked before any is carried out, and a flag (MUST be UNSUPP) outweighs a bad range.
  for (std::size_t i = 0; i < count; ++i) {
    const WireSegment wire = take_segment(body);
    if ((wire.flags & ~known_flags) != 0) return refuse(kBlkSUnsupp);
    const std::uint64_t length_bytes = std::uint64_t{wire.sector_count} * kSectorBytes;
    in_range = in_range && wire.sector_count <= kBlkSegmentSectorsMax &&
               is_in_range(wire.sector, length_bytes, limits.capacity_bytes);
    segments[i] = {.offset_bytes = wire.sector * kSectorBytes,
                   .length_bytes = length_bytes,
                   .may_unmap = (wire.flags & kBlkWriteZeroesFlagUnmap) != 0};
  }
  if (!in_range) return refuse(kBlkSIoErr);
  return {.kind = kind, .segment_count = count};
}

}  // namespace

BlkCommand parse_blk_request(const Chain& chain, const BlkRequestLimits& limits,
                             std::span<BlkSegment, kBlkSegmentsMax> segments) {
  assert(chain.problem == nullptr && chain.writable_bytes > 0);
  if (chain.readable_bytes < kBlkRequestHeaderBytes) return refuse(kBlkSIoErr);
  Body body{.readable = chain.readable,
            .readable_bytes = chain.readable_bytes - kBlkRequestHeaderBytes,
            .writable = chain.writable,
            .writable_bytes = chain.writable_bytes - 1};
  std::array<std::byte, kBlkRequestHeaderBytes> header;
  take_front(body.readable, header);
  drop_last_byte(body.writable);
  const auto type = load_le<std::uint32_t>(header.data());
  const auto sector = load_le<std::uint64_t>(header.data() + 8);

  switch (type) {
    case kBlkTIn:
      return transfer(BlkCommandKind::kRead, sector, body.writable, body.writable_bytes, limits);
    case kBlkTOut:
      if (limits.read_only) return refuse(kBlkSIoErr);
      return transfer(BlkCommandKind::kWrite, sector, body.readable, body.readable_bytes, limits);
    case kBlkTFlush:
      // The sector and any data are the driver's mistakes (MUST be 0, SHOULD be none), and
      // harmless.
      return {.kind = BlkCommandKind::kFlush};
    case kBlkTGetId:
      return {.kind = BlkCommandKind::kGetId,
              .length_bytes = body.writable_bytes,
              .data = body.writable};
    case kBlkTDiscard:
      if (limits.read_only) return refuse(kBlkSIoErr);
      if (!limits.can_discard) return refuse(kBlkSUnsupp);
      return segments_command(BlkCommandKind::kDiscard, body, limits, segments);
    case kBlkTWriteZeroes:
      if (limits.read_only) return refuse(kBlkSIoErr);
      if (!limits.can_write_zeroes) return refuse(kBlkSUnsupp);
      return segments_command(BlkCommandKind::kWriteZeroes, body, limits, segments);
    default:
      return refuse(kBlkSUnsupp);
  }
}

std::uint32_t used_length(std::uint64_t writable_bytes, std::uint64_t data_bytes) {
  const std::uint64_t length = data_bytes + 1 == writable_bytes ? writable_bytes : data_bytes;
  return static_cast<std::uint32_t>(
      std::min<std::uint64_t>(length, std::numeric_limits<std::uint32_t>::max()));
}

}  // namespace vblk::virtio
