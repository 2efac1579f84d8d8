// Another size for a disk.
#pragma once

#include <cstdint>
#include <string>

#include "aio/error.h"
#include "blockdev/qcow2/header.h"

namespace vblk::img {

// Of a qcow2 image that nobody uses, with its persistent bitmaps (kept_bitmaps.h); what is beyond a
// smaller end is lost. Errors: kInvalidArgument (not whole sectors, or none), as
// BlockNode::resize() and KeptBitmaps::take_out().
Expected<void> resize_qcow2(const std::string& path, std::uint64_t size_bytes);

// Gives a disk of no bytes, which nobody uses, its size. Errors: as above, those of raw files.
Expected<void> grow_empty_disk(const std::string& path, const std::string& format,
                               std::uint64_t size_bytes);

// What resize_qcow2() would refuse of an image by its header.
Expected<void> can_resize_qcow2(const std::string& path, const qcow2::Header& header,
                                std::uint64_t size_bytes);

}  // namespace vblk::img
