// A flush that is awaited by a thread that is no I/O thread, and whether I/O threads are at rest:
// at the end of a server, in a pause, when a disk is given up.
#pragma once

#include <memory>
#include <span>

#include "aio/error.h"
#include "blockdev/block_node.h"
#include "blockdev/io_thread.h"

namespace vblk::blockdev {

// Makes stable what has been written to `node`, by `thread`; waits for it. Nothing to do for a disk
// that is read only. Error: kIo, naming the disk: what was written may be lost.
Expected<void> flush_now(BlockNode& node, IoThread& thread);

// Whether nothing is done on any disk by these threads, by formats for themselves either, twice in
// a row: work may go from one thread to another. Not from one of them.
[[nodiscard]] bool is_quiet(std::span<const std::unique_ptr<IoThread>> threads);

}  // namespace vblk::blockdev
