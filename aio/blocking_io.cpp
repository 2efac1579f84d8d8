#include "aio/blocking_io.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

namespace vblk::aio {

namespace {

long discard_block_device(const IoRequest& request) {
  std::uint64_t range[2] = {request.offset_bytes, request.length_bytes};
  return ::ioctl(request.fd, BLKDISCARD, range);
}

long perform_once(const IoRequest& request) {
  const Transfer& transfer = request.transfer;
  const auto offset = static_cast<off_t>(transfer.offset_bytes());
  const auto iov_count = static_cast<int>(next_iov_count(request));
  switch (request.kind) {
    case IoKind::kRead:
      return ::preadv2(request.fd, next_iov(request), iov_count, offset, 0);
    case IoKind::kWrite:
      return ::pwritev2(request.fd, next_iov(request), iov_count, offset,
                        request.write_through ? RWF_DSYNC : 0);
    case IoKind::kFlush:
      return ::fdatasync(request.fd);
    case IoKind::kDiscard:
      if (request.on_block_device) return discard_block_device(request);
      [[fallthrough]];
    case IoKind::kWriteZeroes:
      return ::fallocate(request.fd, fallocate_mode(request), offset,
                         static_cast<off_t>(request.length_bytes));
    case IoKind::kWriteBehind:
      return ::sync_file_range(request.fd, offset, static_cast<off_t>(request.length_bytes),
                               sync_file_range_flags(request));
  }
  errno = EINVAL;
  return -1;
}

}  // namespace

bool read_from_page_cache(const IoRequest& request) noexcept {
  if (request.iov_count > IOV_MAX) return false;
  const ssize_t count = ::preadv2(request.fd, request.iov, static_cast<int>(request.iov_count),
                                  static_cast<off_t>(request.offset_bytes), RWF_NOWAIT);
  return count >= 0 && static_cast<std::uint64_t>(count) == request.length_bytes;
}

unsigned sync_file_range_flags(const IoRequest& request) {
  if (!request.until_written) return SYNC_FILE_RANGE_WRITE;
  return SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
}

int fallocate_mode(const IoRequest& request) {
  const bool punch = request.kind == IoKind::kDiscard || request.may_unmap;
  return FALLOC_FL_KEEP_SIZE | (punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
}

unsigned next_iov_count(const IoRequest& request) {
  return std::min<unsigned>(request.iov_count - request.transfer.iov_first(), IOV_MAX);
}

int perform_blocking(IoRequest& request) noexcept {
  request.transfer.begin(request);
  for (;;) {
    const long result = perform_once(request);
    if (request.transfer.advance(request, result < 0 ? -errno : result) ==
        Transfer::Next::kFinished) {
      return request.transfer.error();
    }
  }
}

}  // namespace vblk::aio
