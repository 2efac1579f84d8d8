// New refcounts for an image that was not closed while it had lazy refcounts ("dirty bit"): counted
// from everything that the file names, written beside the old ones, and put in their place by one
// write of the header. A crash on the way leaves the old ones and the dirty bit.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "blockdev/qcow2/header.h"
#include "blockdev/qcow2/image_state.h"
#include "blockdev/qcow2/write_back.h"

namespace vblk::qcow2 {

// `state` has its L1 table; `snapshot_l1_tables` and `snapshot_table` are where the header says.
// Changes the header in memory and on the disk. On an error `why` says what is wrong.
Task<int> rebuild_refcounts(ImageState& state, WriteBack& write_back, IoContext& context,
                            std::span<const Extent> snapshot_l1_tables, Extent snapshot_table,
                            std::string& why);

}  // namespace vblk::qcow2
