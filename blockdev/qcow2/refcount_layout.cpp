#include "blockdev/qcow2/refcount_layout.h"

#include <algorithm>

namespace vblk::qcow2 {

RefcountLayout plan_refcounts(const Geometry& geometry, std::uint64_t clusters) {
  const std::uint64_t range = std::uint64_t{1} << geometry.refcount_block_bits();
  RefcountLayout layout{.first = clusters};
  for (std::uint64_t needed = 1; needed != layout.blocks;) {
    layout.blocks = needed;
    layout.table_clusters = geometry.clusters_of(layout.blocks * 8);
    needed = (layout.end() + range - 1) / range;
  }
  return layout;
}

void encode_refcounts(const Geometry& geometry, std::span<const std::uint32_t> counts,
                      std::span<std::byte> blocks) {
  std::ranges::fill(blocks, std::byte{0});
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const RefcountPlace place = refcount_place(geometry.refcount_order, i);
    std::byte* const word = blocks.data() + place.word * 8;
    store_be(word, load_be<std::uint64_t>(word) | (std::uint64_t{counts[i]} << place.shift));
  }
}

}  // namespace vblk::qcow2
