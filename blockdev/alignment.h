// Every question of alignment, answered in one place.
//
// O_DIRECT takes whole blocks at block offsets from aligned memory. A guest sends what it likes. A
// request that does not fit is cut into pieces that are carried out one after another:
//
//          head          body (whole blocks)           tail
//   |....#####|##########|##########|##########|####......|
//        edge          direct, bounced if the           edge
//                      guest's memory is not aligned
//
// Edges of writes go through the page cache, by a second descriptor of the file without O_DIRECT:
// the kernel writes exactly these bytes and serialises them with their neighbours, so there is no
// read-modify-write here, no lock between queues, and a file never grows to a whole block. Edges of
// reads are read directly, as whole blocks into a bounce buffer, so that reads bring nothing into
// the page cache that could go stale there. Only what lies beyond the last whole block of the file
// is read through the page cache. Why: docs/decisions/0001-edges-through-the-page-cache.md.
//
// One page of the file is either written by edges or directly, never by both. A page that an edge
// has made dirty while a direct write to its other half is in flight would later be written back
// over what that write has put on the disk; Linux notices ("Page cache invalidation failure on
// direct I/O") and fails the next flush with EIO. So blocks are counted as whole pages wherever
// there can be edges at all: disks write whole sectors (BlockRequest), which leaves only blocks
// larger than a sector, and the end of a file that is not a whole number of sectors.
#pragma once

#include <cstdint>
#include <span>
#include <sys/uio.h>

#include "blockdev/block_request.h"

namespace vblk::blockdev {

// What is fixed about a file.
struct AlignmentRules {
  std::uint32_t offset_bytes{
      1};  // granularity of direct offsets and lengths, a power of two; 1: any
  std::uint32_t memory_bytes{1};  // granularity of direct buffers, a power of two; 1: any
  std::uint64_t direct_end{0};    // from here on (the last, partial block) nothing is direct
};

enum class PieceRoute : std::uint8_t { kDirect, kEdge };

struct Piece {
  PieceRoute route;
  std::uint64_t length_bytes;
};

// The rules for a file of `size_bytes` under O_DIRECT, which demands these granularities (powers of
// two), on a machine with pages of `page_bytes`.
[[nodiscard]] AlignmentRules direct_rules(std::uint32_t offset_alignment_bytes,
                                          std::uint32_t memory_alignment_bytes,
                                          std::uint64_t size_bytes, std::uint32_t page_bytes);

// Whether all of [offset, +length) can be one direct transfer, as far as the file is concerned.
[[nodiscard]] bool fits_file(const AlignmentRules& rules, std::uint64_t offset_bytes,
                             std::uint64_t length_bytes);
// Whether all of `iov` can be transferred directly, as far as memory is concerned.
[[nodiscard]] bool fits_memory(const AlignmentRules& rules, std::span<const iovec> iov);

// The first piece of [offset_bytes, end_bytes), which is not empty.
[[nodiscard]] Piece next_piece(const AlignmentRules& rules, std::uint64_t offset_bytes,
                               std::uint64_t end_bytes);

// Whole blocks of a file.
struct BlockRange {
  std::uint64_t offset_bytes;
  std::uint64_t length_bytes;
};

// The blocks around [offset_bytes, end_bytes), which begins before direct_end: up to direct_end,
// and up to `length_bytes_max` of them, which is a multiple of a block.
[[nodiscard]] BlockRange enclosing_blocks(const AlignmentRules& rules, std::uint64_t offset_bytes,
                                          std::uint64_t end_bytes, std::uint64_t length_bytes_max);

// Walks a request's iovec array piece by piece. The array is used up on the way.
//
// Takes the next `length_bytes` of it: the span covers exactly these, its last element cut if need
// be; finish_iov() puts the cut-off rest back in place for the next piece. There must be that many
// left.
[[nodiscard]] std::span<iovec> take_iov(BlockRequest& request, std::uint64_t length_bytes);
void finish_iov(BlockRequest& request, std::span<iovec> taken);

// Copies between a span of iovecs and a flat buffer of the same total length.
void gather(std::span<const iovec> from, std::byte* to);
void scatter(const std::byte* from, std::span<const iovec> to);

}  // namespace vblk::blockdev
