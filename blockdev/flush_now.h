// A flush that is awaited by a thread that is no I/O thread: at the end of a server, in a pause.
#pragma once

#include "aio/error.h"
#include "blockdev/block_node.h"
#include "blockdev/io_thread.h"

namespace vblk::blockdev {

// Makes stable what has been written to `node`, by `thread`; waits for it. Nothing to do for a disk
// that is read only. Error: kIo, naming the disk: what was written may be lost.
Expected<void> flush_now(BlockNode& node, IoThread& thread);

}  // namespace vblk::blockdev
