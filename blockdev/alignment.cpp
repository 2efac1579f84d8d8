#include "blockdev/alignment.h"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace vblk::blockdev {

namespace {

constexpr std::uint64_t round_down(std::uint64_t value, std::uint64_t granularity) {
  return value & ~(granularity - 1);
}
constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t granularity) {
  return round_down(value + granularity - 1, granularity);
}

}  // namespace

AlignmentRules direct_rules(std::uint32_t offset_alignment_bytes,
                            std::uint32_t memory_alignment_bytes, std::uint64_t size_bytes,
                            std::uint32_t page_bytes) {
  const bool has_edges_inside = offset_alignment_bytes > kSectorBytes;
  const std::uint32_t offset_bytes =
      has_edges_inside ? std::max(offset_alignment_bytes, page_bytes) : kSectorBytes;
  const bool has_edge_at_end = size_bytes % offset_bytes != 0;
  return {.offset_bytes = offset_bytes,
          .memory_bytes = memory_alignment_bytes,
          .direct_end = has_edge_at_end ? round_down(size_bytes, std::max(offset_bytes, page_bytes))
                                        : size_bytes};
}

bool fits_file(const AlignmentRules& rules, std::uint64_t offset_bytes,
               std::uint64_t length_bytes) {
  return ((offset_bytes | length_bytes) & (rules.offset_bytes - 1)) == 0 &&
         offset_bytes + length_bytes <= rules.direct_end;
}

bool fits_memory(const AlignmentRules& rules, std::span<const iovec> iov) {
  if (rules.memory_bytes == 1) return true;
  // Lengths too: an element that ends off a boundary would make the next one start off it.
  std::uintptr_t bits = 0;
  for (const iovec& element : iov)
    bits |= reinterpret_cast<std::uintptr_t>(element.iov_base) | element.iov_len;
  return (bits & (rules.memory_bytes - 1)) == 0;
}

Piece next_piece(const AlignmentRules& rules, std::uint64_t offset_bytes, std::uint64_t end_bytes) {
  assert(offset_bytes < end_bytes);
  const std::uint64_t head_end = round_up(offset_bytes, rules.offset_bytes);
  if (head_end != offset_bytes)
    return {PieceRoute::kEdge, std::min(head_end, end_bytes) - offset_bytes};
  const std::uint64_t body_end =
      round_down(std::min(end_bytes, rules.direct_end), rules.offset_bytes);
  if (offset_bytes < body_end) return {PieceRoute::kDirect, body_end - offset_bytes};
  return {PieceRoute::kEdge, end_bytes - offset_bytes};
}

BlockRange enclosing_blocks(const AlignmentRules& rules, std::uint64_t offset_bytes,
                            std::uint64_t end_bytes, std::uint64_t length_bytes_max) {
  assert(offset_bytes < end_bytes && offset_bytes < rules.direct_end);
  const std::uint64_t begin = round_down(offset_bytes, rules.offset_bytes);
  const std::uint64_t end = round_up(std::min(end_bytes, rules.direct_end), rules.offset_bytes);
  return {begin, std::min(end - begin, length_bytes_max)};
}

std::span<iovec> take_iov(BlockRequest& request, std::uint64_t length_bytes) {
  PieceProgress& pieces = request.pieces;
  const std::uint32_t first = pieces.iov_first;
  std::uint32_t index = first;
  std::uint64_t left = length_bytes;
  while (left > request.iov[index].iov_len) left -= request.iov[index++].iov_len;
  iovec& last = request.iov[index];
  pieces.iov_rest = {static_cast<std::byte*>(last.iov_base) + left, last.iov_len - left};
  pieces.has_iov_rest = last.iov_len != left;
  last.iov_len = left;
  return {request.iov + first, index - first + 1};
}

void finish_iov(BlockRequest& request, std::span<iovec> taken) {
  PieceProgress& pieces = request.pieces;
  pieces.iov_first += static_cast<std::uint32_t>(taken.size());
  if (!pieces.has_iov_rest) return;
  --pieces.iov_first;
  request.iov[pieces.iov_first] = pieces.iov_rest;
  pieces.has_iov_rest = false;
}

void gather(std::span<const iovec> from, std::byte* to) {
  for (const iovec& element : from) {
    if (element.iov_len == 0) continue;
    std::memcpy(to, element.iov_base, element.iov_len);
    to += element.iov_len;
  }
}

void scatter(const std::byte* from, std::span<const iovec> to) {
  for (const iovec& element : to) {
    if (element.iov_len == 0) continue;
    std::memcpy(element.iov_base, from, element.iov_len);
    from += element.iov_len;
  }
}

}  // namespace vblk::blockdev
