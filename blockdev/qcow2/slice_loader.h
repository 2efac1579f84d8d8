// Bringing table slices into the caches.
#pragma once

#include <cstdint>

#include "blockdev/qcow2/image_state.h"
#include "blockdev/qcow2/write_back.h"

namespace vblk::qcow2 {

// Makes the slice that maps `guest_offset` present in the L2 cache; a table that does not exist
// reads as zeroes. `token` as for WaitList. It may have left again when this returns, if the cache
// is small: look under the mutex, and call again. Errors: EIO, also for a table that cannot be
// where the L1 table says.
Task<int> load_l2_slice(ImageState& state, WriteBack& write_back, IoContext& context,
                        BlockRequest& token, std::uint64_t guest_offset);

// The same for the refcount slice `index`. Its refcount block exists.
Task<int> load_refcount_slice(ImageState& state, WriteBack& write_back, IoContext& context,
                              BlockRequest& token, std::uint64_t index);

// After claim() has found no slot for the slice `index`: waits until it may find one. Errors: those
// of the write-back.
Task<int> make_room(ImageState& state, TableCache& cache, std::uint64_t index,
                    WriteBack& write_back, IoContext& context, BlockRequest& token);

}  // namespace vblk::qcow2
