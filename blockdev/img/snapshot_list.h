// The list of an image's internal snapshots, as `info` and `snapshot -l` print it.
#pragma once

#include <vector>

#include "blockdev/qcow2/snapshots.h"

namespace vblk::img {

// Nothing where there are none.
void print_snapshots(const std::vector<qcow2::Snapshot>& snapshots);

}  // namespace vblk::img
