// Many tables of a cluster each, read in few and large pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "blockdev/block_io.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

// Tables are read in pieces of up to this, of which this many are in flight.
inline constexpr std::uint64_t kPieceBytesMax = std::uint64_t{2} << 20;
inline constexpr std::size_t kPiecesInFlight = 8;

// Reads tables of a cluster each at ascending offsets, in as few pieces as possible, and shows them
// to `visit(index, bytes)`.
template <typename Offset, typename Visit>
blockdev::Task<int> read_tables(blockdev::RawNode& file, blockdev::IoContext& context,
                                std::uint64_t table_bytes, std::size_t count,
                                const Offset& offset_of, const Visit& visit) {
  struct Piece {
    std::size_t first;
    std::size_t count;
    blockdev::AlignedBuffer bytes;
  };
  for (std::size_t next = 0; next < count;) {
    std::vector<Piece> pieces;
    blockdev::IoGroup group(context);
    while (next < count && pieces.size() < kPiecesInFlight) {
      std::size_t length = 1;
      while (next + length < count && (length + 1) * table_bytes <= kPieceBytesMax &&
             offset_of(next + length) == offset_of(next) + length * table_bytes)
        ++length;
      pieces.push_back({next, length, blockdev::AlignedBuffer(length * table_bytes)});
      blockdev::AlignedBuffer& bytes = pieces.back().bytes;
      group.start(file, blockdev::BlockOperation::kRead, offset_of(next),
                  {{bytes.data(), bytes.size()}});
      next += length;
    }
    const int error = co_await group;
    if (error != 0) co_return error;
    for (Piece& piece : pieces) {
      for (std::size_t i = 0; i < piece.count; ++i)
        visit(piece.first + i, piece.bytes.bytes().subspan(i * table_bytes, table_bytes));
    }
  }
  co_return 0;
}

}  // namespace vblk::qcow2
