// Image locks that QEMU understands, so that two programs never write one image.
//
// QEMU marks what it does with an image, and what it does not tolerate from others, by shared OFD
// locks on single bytes of the file (fcntl(2), "Open file description locks"); a conflict is found
// by asking whether anybody holds the opposite byte. The bytes and their meaning are QEMU's image
// locking (RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE): 100 + n "I do n", 200 + n "nobody else may do
// n".
//
//   n   permission
//   0   consistent read
//   1   write
//   2   write unchanged (data that does not change what is read)
//   3   resize
//
// The locks live as long as the open file description, which a ring of io_uring keeps for a while
// after the last descriptor is closed, and even after the process has ended: so they are given back
// by unlock_image(). Those of a killed process are not.
#pragma once

#include <string>

#include "aio/error.h"

namespace vblk::blockdev {

// How long a conflict is waited out before the image is refused. The lock of a killed process lives
// until its last request in the kernel is done, which takes a disk's latency: milliseconds, rarely
// more than a few hundred.
inline constexpr int kLockAttempts = 20;
inline constexpr int kLockRetryMilliseconds = 50;  // 20 x 50 ms: one second

// Locks the image behind `fd` for reading, or for reading and writing; nobody else may write or
// resize it. Errors: kBusy, naming `path` and what to do. A file system without OFD locks is logged
// and accepted.
Expected<void> lock_image(int fd, const std::string& path, bool read_only);

// Gives back what lock_image() took for `fd`.
void unlock_image(int fd);

// For who destroys what is at `path`. Error: kBusy for a block device that the kernel itself uses,
// mounted, as swap or as a part of another device, whole or a partition of it. Whatever else is
// wrong with the path is left to its open.
Expected<void> check_is_not_mounted(const std::string& path);

}  // namespace vblk::blockdev
