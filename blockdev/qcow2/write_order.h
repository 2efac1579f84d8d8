// What must be stable on the disk before a piece of metadata may be written: ordering as data.
//
//   before             must be stable
//   an L2 slice        the refcounts of the clusters that it maps, and what was copied into them
//   an L1 block        the refcounts of the L2 tables, and their first contents
//   a refcount table   the refcount blocks that it names
//   a lower refcount   the L2 slice that no longer maps the cluster (image_state.h, "Freeing")
//
// Two numbers say it. Refcounts are numbered by change; everything else by barrier: a barrier is a
// flush of the file, and what had been written when it began is stable when it has ended well.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vblk::qcow2 {

struct WriteOrder {
  std::uint64_t refcount_change{0};  // this change of refcounts, and those before it
  std::uint64_t barrier{0};          // this barrier must have ended well

  void include(const WriteOrder& other) {
    refcount_change = std::max(refcount_change, other.refcount_change);
    barrier = std::max(barrier, other.barrier);
  }
};

}  // namespace vblk::qcow2
