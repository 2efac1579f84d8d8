// Opening an image: the one factory that turns the user's options into a node, backing files
// included.
#pragma once

#include <memory>

#include "aio/error.h"
#include "blockdev/block_node.h"
#include "blockdev/handover_node.h"
#include "blockdev/image.h"

namespace vblk::blockdev {

// Longest chain of backing files. Each costs a file descriptor or two and its tables.
inline constexpr std::size_t kBackingChainMax = 64;

// Opens, locks and measures the image, and what it is based on. The node holds the files and their
// locks until it is destroyed, which for qcow2 writes what is left to write; no request is in
// flight by then. Errors: kNotFound, kPermission, kBusy (locked by another process: names the
// file), kNotSupported (a directory, a character device, a file system without O_DIRECT, a feature
// of the format by its name, a backing file of unrecorded format), kInvalidArgument (empty; not of
// this format; a chain that is too long or bites its tail), kCorrupt.
Expected<std::unique_ptr<BlockNode>> open_image(const ImageOptions& options);

// What the disk of an image looks like, without a lock: somebody else may be writing it. Its
// backing files are not looked at. Errors: as open_image(), but for kBusy.
Expected<DiskShape> look_at_image(const ImageOptions& options);

}  // namespace vblk::blockdev
