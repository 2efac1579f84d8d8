// Refcount structures that are written whole: how many clusters they take, and what is in them
// (qcow2.txt, "Host cluster management").
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "blockdev/qcow2/format.h"

namespace vblk::qcow2 {

// A refcount table, and behind it the blocks for everything up to and with themselves.
struct RefcountLayout {
  std::uint64_t first{0};  // cluster of the table
  std::uint64_t table_clusters{0};
  std::uint64_t blocks{0};

  [[nodiscard]] std::uint64_t first_block() const { return first + table_clusters; }
  [[nodiscard]] std::uint64_t end() const { return first_block() + blocks; }
  // Whether the format has so large a table.
  [[nodiscard]] bool is_possible(const Geometry& geometry) const {
    return table_clusters <= kRefcountTableBytesMax >> geometry.cluster_bits;
  }
};

// For a file whose first `clusters` clusters are used: the structures come behind them.
[[nodiscard]] RefcountLayout plan_refcounts(const Geometry& geometry, std::uint64_t clusters);

// Fills a refcount block, or several, with `counts` from their first entry on; the rest is 0.
void encode_refcounts(const Geometry& geometry, std::span<const std::uint32_t> counts,
                      std::span<std::byte> blocks);

}  // namespace vblk::qcow2
