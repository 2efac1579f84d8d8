#include "blockdev/block_node.h"

#include <cerrno>
#include <span>
#include <utility>

#include <fmt/core.h>

#include "blockdev/io_context.h"

namespace vblk::blockdev {

namespace {

bool lengths_add_up(const BlockRequest& request) {
  // Compared at every step: a sum of hostile lengths could wrap.
  std::uint64_t left = request.length_bytes;
  for (const iovec& element : std::span(request.iov, request.iov_count)) {
    if (element.iov_len > left) return false;
    left -= element.iov_len;
  }
  return left == 0;
}

bool is_transfer(BlockOperation operation) {
  return operation == BlockOperation::kRead || operation == BlockOperation::kWrite;
}

// 0, or the errno value that the request fails with.
int check(const BlockRequest& request, std::uint64_t size_bytes, const BlockLimits& limits) {
  if (request.operation == BlockOperation::kFlush) return 0;
  if (request.operation == BlockOperation::kWriteBehind) return EOPNOTSUPP;
  if (request.operation != BlockOperation::kRead && limits.read_only) return EROFS;
  if (request.operation == BlockOperation::kDiscard && !limits.can_discard) return EOPNOTSUPP;
  if (request.operation == BlockOperation::kWriteZeroes && !limits.can_write_zeroes)
    return EOPNOTSUPP;
  // Neither sum nor difference can wrap in this form.
  if (request.offset_bytes > size_bytes || request.length_bytes > size_bytes - request.offset_bytes)
    return EINVAL;
  const bool whole_sectors = (request.offset_bytes | request.length_bytes) % kSectorBytes == 0;
  if (request.operation != BlockOperation::kRead && !whole_sectors) return EINVAL;
  if (is_transfer(request.operation) && !lengths_add_up(request)) return EINVAL;
  return 0;
}

}  // namespace

void BlockNode::submit(BlockRequest& request, IoContext& context) {
  request.node = this;
  request.context = &context;
  const int error = check(request, size_bytes(), limits_);
  const bool is_empty = request.operation != BlockOperation::kFlush && request.length_bytes == 0;
  if (error != 0 || is_empty) {
    context.complete_later(request, error);
    return;
  }
  do_submit(request, context);
}

Task<int> BlockNode::range_status(IoContext& /*context*/, std::uint64_t /*offset_bytes*/,
                                  std::uint64_t length_bytes, RangeStatus& status) {
  status = {.length_bytes = length_bytes};
  co_return 0;
}

Task<int> BlockNode::allocate(IoContext& /*context*/, std::uint64_t /*offset_bytes*/,
                              std::uint64_t /*length_bytes*/, bool /*takes_space*/) {
  co_return EOPNOTSUPP;
}

Task<int> BlockNode::write_compressed(IoContext& /*context*/, std::uint64_t /*offset_bytes*/,
                                      std::span<std::byte> /*unit*/) {
  co_return EOPNOTSUPP;
}

void BlockNode::resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done) {
  if (size_bytes == 0 || size_bytes % kSectorBytes != 0) {
    return done(make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("a disk cannot have {} bytes; give a multiple of {}", size_bytes, kSectorBytes),
        EINVAL));
  }
  if (limits_.read_only) {
    return done(make_error(ErrorKind::kPermission,
                           fmt::format("'{}' is open read-only and keeps its size", name_), EROFS));
  }
  do_resize(size_bytes, context, std::move(done));
}

// NOLINTNEXTLINE(performance-unnecessary-value-param): others keep it.
void BlockNode::do_resize(std::uint64_t /*size_bytes*/, IoContext& /*context*/, ResizeDone done) {
  done(make_error(ErrorKind::kNotSupported,
                  fmt::format("'{}' is of a kind that cannot change its size", name_), EOPNOTSUPP));
}

}  // namespace vblk::blockdev
