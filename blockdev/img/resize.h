// Another size for a disk.
#pragma once

#include <cstdint>
#include <string>

#include "aio/error.h"
#include "blockdev/qcow2/header.h"

namespace vblk::img {

// Of a qcow2 image that nobody uses; what is beyond a smaller end is lost. Errors: kInvalidArgument
// (not whole sectors, or none), kNotSupported (a disk of no bytes), as
// BlockNode::resize().
Expected<void> resize_qcow2(const std::string& path, std::uint64_t size_bytes);

// What resize_qcow2() would refuse of an image by its header, and persistent bitmaps.
Expected<void> can_resize_qcow2(const std::string& path, const qcow2::Header& header,
                                std::uint64_t size_bytes);

}  // namespace vblk::img
