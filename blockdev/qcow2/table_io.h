// Tables as they are read when an image is opened: whole, and no more of them than there is file.
#pragma once

#include <cstdint>
#include <vector>

#include "blockdev/block_node.h"
#include "blockdev/io_context.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

// Reads `entries` 64-bit numbers at `offset`. EINVAL: that is not all inside of a file of
// `file_end` bytes.
blockdev::Task<int> read_table(blockdev::BlockNode& file, blockdev::IoContext& context,
                               std::uint64_t file_end, std::uint64_t offset, std::uint64_t entries,
                               std::vector<std::uint64_t>& table);

}  // namespace vblk::qcow2
