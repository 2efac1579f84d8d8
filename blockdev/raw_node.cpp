#include "blockdev/raw_node.h"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <new>
#include <span>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/io_context.h"
#include "blockdev/log.h"
#include "blockdev/write_behind.h"

namespace vblk::blockdev {

namespace {

// Source of zeroes for writes that replace what the kernel cannot do: read-only pages that are all
// the zero page, so they cost no memory.
constexpr std::size_t kZeroBufferBytes = std::size_t{1} << 20;

std::byte* zero_buffer() {
  static std::byte* const buffer = [] {
    void* const mapping =
        ::mmap(nullptr, kZeroBufferBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    return static_cast<std::byte*>(mapping);
  }();
  return buffer;
}

// What fallocate(2) and BLKDISCARD answer where the file system or the device lacks the operation.
bool is_unsupported(int error) {
  return error == EOPNOTSUPP || error == ENOSYS || error == ENOTTY || error == ENODEV;
}

// The size of a node that has no end: no sum of an offset and a length within it wraps.
constexpr std::uint64_t kNoEnd = std::uint64_t{1} << 62;

RawNode& node_of(BlockRequest& request) { return static_cast<RawNode&>(*request.node); }

BlockRequest& parent_of(aio::IoRequest& io) { return *static_cast<BlockRequest::Io&>(io).parent; }

}  // namespace

RawNode::RawNode(std::unique_ptr<ImageFile> file, RawNodeOptions options)
    : file_(std::move(file)),
      options_(std::move(options)),
      data_bytes_(file_->size_bytes()),
      flushes_([](BlockRequest& leader) { node_of(leader).queue_flush(leader); },
               options_.group_commit) {
  const std::uint64_t bytes = file_->size_bytes();
  size_bytes_.store(
      options_.holds_format ? kNoEnd : (bytes + kSectorBytes - 1) / kSectorBytes * kSectorBytes,
      std::memory_order_relaxed);
  name_ = options_.name;
  rules_ = direct_rules(file_->offset_alignment_bytes(), file_->memory_alignment_bytes(), bytes,
                        static_cast<std::uint32_t>(::sysconf(_SC_PAGESIZE)));
  set_data_bytes(bytes);
  limits_.optimal_alignment_bytes = std::max<std::uint32_t>(
      {file_->logical_block_bytes(), file_->direct() ? rules_.offset_bytes : 1, kSectorBytes});
  limits_.read_only = file_->read_only();
  limits_.can_discard = options_.discard && !file_->read_only();
  limits_.can_write_zeroes = !file_->read_only();
  limits_.write_zeroes_may_unmap = options_.discard && !file_->read_only();
}

void RawNode::set_data_bytes(std::uint64_t size_bytes) {
  const AlignmentRules rules =
      direct_rules(file_->offset_alignment_bytes(), rules_.memory_bytes, size_bytes,
                   static_cast<std::uint32_t>(::sysconf(_SC_PAGESIZE)));
  direct_end_.store(rules.direct_end, std::memory_order_relaxed);
  data_bytes_.store(size_bytes, std::memory_order_relaxed);
}

Task<int> RawNode::range_status(IoContext& /*context*/, std::uint64_t offset_bytes,
                                std::uint64_t length_bytes, RangeStatus& status) {
  status = {.length_bytes = length_bytes,
            .file_offset = offset_bytes,
            .file = &name_,
            .fd = buffered_fd()};
  const auto at = static_cast<off_t>(offset_bytes);
  const int fd = buffered_fd();
  const off_t data = ::lseek(fd, at, SEEK_DATA);
  if (data < 0) {
    // Beyond the last data; what a file system without holes says means data.
    if (errno == ENXIO && !is_block_device()) status.kind = RangeStatus::Kind::kZero;
    co_return 0;
  }
  if (data > at) {
    status.kind = RangeStatus::Kind::kZero;
    status.length_bytes = std::min(length_bytes, static_cast<std::uint64_t>(data - at));
    co_return 0;
  }
  const off_t hole = ::lseek(fd, at, SEEK_HOLE);
  if (hole > at)
    status.length_bytes = std::min(length_bytes, static_cast<std::uint64_t>(hole - at));
  co_return 0;
}

int RawNode::set_file_end(std::uint64_t size_bytes) {
  const int error = file_->resize(size_bytes);
  if (error != 0) return error;
  flushes_.note_change();
  set_data_bytes(size_bytes);
  return 0;
}

int RawNode::grow(std::uint64_t size_bytes) {
  assert(options_.holds_format);
  return size_bytes <= data_bytes() ? 0 : set_file_end(size_bytes);
}

int RawNode::shrink(std::uint64_t size_bytes) {
  assert(options_.holds_format && !is_block_device());
  set_data_bytes(size_bytes);
  flushes_.note_change();
  return file_->resize(size_bytes);
}

void RawNode::do_resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done) {
  assert(!options_.holds_format);
  const std::uint64_t old_bytes = this->size_bytes();
  if (size_bytes == old_bytes) return done({});
  if (is_block_device()) {
    return done(make_error(
        ErrorKind::kNotSupported,
        fmt::format("'{}' is a block device and has the size that it has", name_), EOPNOTSUPP));
  }
  if (size_bytes < old_bytes) {
    return done(make_error(ErrorKind::kNotSupported,
                           fmt::format("'{}' has {} bytes, and a raw disk in use can only become "
                                       "larger; stop it first, and use 'vblk img resize --shrink'",
                                       name_, old_bytes),
                           EOPNOTSUPP));
  }
  // Its last page is written through the page cache now, and directly once it is larger.
  if (file_->direct() && old_bytes != data_bytes()) {
    return done(make_error(ErrorKind::kNotSupported,
                           fmt::format("'{}' ends within a sector; stop it first, and use "
                                       "'vblk img resize'",
                                       name_),
                           EOPNOTSUPP));
  }
  if (resizing_.exchange(true)) {
    return done(make_error(ErrorKind::kBusy,
                           fmt::format("the size of '{}' is being changed already", name_), EBUSY));
  }
  run_grow(size_bytes, context, std::move(done));
}

// The guest learns of what is there for good.
Detached RawNode::run_grow(std::uint64_t size_bytes, IoContext& context, ResizeDone done) {
  int error = set_file_end(size_bytes);
  if (error == 0) error = co_await BlockIo(*this, context, BlockOperation::kFlush, 0, 0);
  if (error == 0) size_bytes_.store(size_bytes, std::memory_order_relaxed);
  resizing_.store(false);
  if (error == 0) {
    done({});
  } else {
    done(make_error(kind_of_errno(error),
                    fmt::format("cannot make '{}' larger: {}", name_, describe_errno(error)),
                    error));
  }
}

void RawNode::attach(IoContext& context) {
  for (const int fd : {file_->fd(), file_->buffered_fd()}) {
    const auto registered = context.engines().register_file(fd);
    if (!registered && log::peer_line_allowed())
      log::info("'{}': {}", name_, registered.error().message);
  }
  if (options_.write_behind_bytes == 0 || context.state_of(*this) != nullptr) return;
  context.keep(
      *this, std::make_unique<WriteBehind>(
                 context,
                 WriteBehind::Options{
                     .fd = file_->fd(),
                     .window_bytes = options_.write_behind_bytes,
                     .resubmit = [](BlockRequest& write) { node_of(write).submit_transfer(write); },
                     .failed = [this](int error) { note_write_behind_error(error); }}));
}

void RawNode::detach(IoContext& context) {
  for (const int fd : {file_->fd(), file_->buffered_fd()}) context.engines().unregister_file(fd);
}

void RawNode::do_submit(BlockRequest& request, IoContext& /*context*/) {
  request.io.parent = &request;
  if (options_.ignore_flush) request.write_through = false;
  switch (request.operation) {
    case BlockOperation::kRead:
    case BlockOperation::kWrite:
      return submit_transfer(request);
    case BlockOperation::kFlush:
      return submit_flush(request);
    case BlockOperation::kDiscard:
      return submit_discard(request);
    case BlockOperation::kWriteZeroes:
      return submit_write_zeroes(request);
    case BlockOperation::kWriteBehind:
      break;
  }
  assert(false && "the gate lets no such operation through");
}

// Fills in what is common to all kernel I/Os of a request; offset, length and iovecs are set
// already.
void RawNode::queue_io(BlockRequest& request, aio::IoKind kind, int fd,
                       aio::IoRequest::Completion complete) {
  request.io.kind = kind;
  request.io.fd = fd;
  request.io.may_be_cached = kind == aio::IoKind::kRead && !file_->direct();
  request.io.complete = complete;
  request.context->engines().queue(request.io);
}

// Nothing for a request that leaves nothing for later in the page cache.
WriteBehind* RawNode::write_behind_of(const BlockRequest& request) const {
  if (options_.write_behind_bytes == 0 || request.operation != BlockOperation::kWrite ||
      request.write_through || !write_behind_works_.load(std::memory_order_relaxed))
    return nullptr;
  return static_cast<WriteBehind*>(request.context->state_of(*this));
}

void RawNode::submit_transfer(BlockRequest& request) {
  if (WriteBehind* const behind = write_behind_of(request);
      behind != nullptr && !behind->admit(request))
    return;
  const std::span<const iovec> iov(request.iov, request.iov_count);
  const bool within_data =
      request.offset_bytes + request.length_bytes <= data_bytes_.load(std::memory_order_relaxed);
  const bool aligned =
      !file_->direct() ||
      (fits_file(rules(), request.offset_bytes, request.length_bytes) && fits_memory(rules(), iov));
  if (!within_data || !aligned) return start_pieces(request);
  request.io.write_through = request.write_through;
  request.io.offset_bytes = request.offset_bytes;
  request.io.length_bytes = request.length_bytes;
  request.io.iov = request.iov;
  request.io.iov_count = request.iov_count;
  queue_io(request, request.operation, file_->fd(), [](aio::IoRequest& io, int error) {
    BlockRequest& transfer = parent_of(io);
    RawNode& node = node_of(transfer);
    node.note_write_error(transfer, error);
    node.note_change(transfer, error);
    if (WriteBehind* const behind = node.write_behind_of(transfer); behind != nullptr)
      behind->written(transfer.offset_bytes, transfer.length_bytes);
    transfer.complete(transfer, error);
  });
}

void RawNode::submit_flush(BlockRequest& request) {
  const int earlier = flush_error_.load(std::memory_order_relaxed);
  if (earlier != 0 || options_.ignore_flush)
    return request.context->complete_later(request, earlier);
  if (options_.share_flushes) {
    flushes_.submit(request);
  } else {
    flushes_.note_alone();
    queue_flush(request);
  }
}

void RawNode::queue_flush(BlockRequest& request) {
  queue_io(request, aio::IoKind::kFlush, file_->fd(), [](aio::IoRequest& io, int error) {
    BlockRequest& flush = parent_of(io);
    RawNode& node = node_of(flush);
    if (error != 0) node.note_flush_error(error);
    // A flush on another queue may have failed meanwhile, and the kernel reports a lost write only
    // once.
    const int latched = node.flush_error_.load(std::memory_order_relaxed);
    if (!node.options_.share_flushes) return flush.complete(flush, latched);
    node.flushes_.finished(flush, latched);
  });
}

// A write-through write that succeeded is stable; anything else is the next flush's business.
void RawNode::note_change(const BlockRequest& request, int error) {
  const bool is_stable = request.write_through && error == 0;
  if (request.operation != BlockOperation::kRead && !is_stable) flushes_.note_change();
}

// After a failed fdatasync the kernel may have dropped the dirty pages and call them clean: a later
// success would say nothing about them. So the first failure stays.
void RawNode::note_flush_error(int error) {
  int none = 0;
  if (flush_error_.compare_exchange_strong(none, error)) {
    log::error(
        "'{}': a flush failed: {}; all later flushes fail too, since what was lost cannot be known",
        name_, describe_errno(error));
  }
}

// The page cache reports a failed writeback once. If a write-through write has swallowed that
// report, the flushes that would have seen it must fail all the same.
void RawNode::note_write_error(const BlockRequest& request, int error) {
  if (error == EIO && request.write_through && !file_->direct()) note_flush_error(error);
}

void RawNode::note_write_behind_error(int error) {
  if (!is_unsupported(error)) return note_flush_error(error);
  if (write_behind_works_.exchange(false)) {
    log::warning("'{}': the file system has no sync_file_range ({}); there is no write-behind",
                 name_, describe_errno(error));
  }
}

void RawNode::submit_discard(BlockRequest& request) {
  const std::uint64_t granularity = file_->logical_block_bytes();
  const std::uint64_t begin = (request.offset_bytes + granularity - 1) / granularity * granularity;
  const std::uint64_t end =
      (request.offset_bytes + request.length_bytes) / granularity * granularity;
  // A discard is a hint: what does not cover a whole block of a device has nothing to free.
  if (begin >= end || !discard_works_.load(std::memory_order_relaxed))
    return request.context->complete_later(request, 0);
  request.io.offset_bytes = begin;
  request.io.length_bytes = end - begin;
  request.io.on_block_device = file_->is_block_device();
  queue_io(request, aio::IoKind::kDiscard, file_->fd(), [](aio::IoRequest& io, int error) {
    BlockRequest& discard = parent_of(io);
    RawNode& node = node_of(discard);
    if (is_unsupported(error)) {
      if (node.discard_works_.exchange(false)) {
        log::info(
            "'{}': the storage below cannot discard ({}); discards are accepted and do nothing",
            node.name_, describe_errno(error));
      }
      error = 0;
    }
    node.note_change(discard, error);
    discard.complete(discard, error);
  });
}

void RawNode::submit_write_zeroes(BlockRequest& request) {
  if (request.only_takes_space) return submit_taking_space(request);
  request.may_unmap = request.may_unmap && limits_.write_zeroes_may_unmap &&
                      kernel_zeroes_unmap_.load(std::memory_order_relaxed);
  start_pieces(request);
}

void RawNode::submit_taking_space(BlockRequest& request) {
  // Whole pages: of a part the kernel would zero the page cache's, beside direct writes to the
  // rest.
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t begin = (request.offset_bytes + page - 1) / page * page;
  const std::uint64_t end = (request.offset_bytes + request.length_bytes) / page * page;
  // A device has its space, and would be written.
  if (begin >= end || is_block_device() || !kernel_zeroes_.load(std::memory_order_relaxed))
    return request.context->complete_later(request, 0);
  request.io.offset_bytes = begin;
  request.io.length_bytes = end - begin;
  request.io.may_unmap = false;
  queue_io(request, aio::IoKind::kWriteZeroes, file_->fd(), [](aio::IoRequest& io, int error) {
    BlockRequest& zeroes = parent_of(io);
    RawNode& node = node_of(zeroes);
    if (is_unsupported(error)) node.note_kernel_cannot_zero(false, error);
    node.note_change(zeroes, error);
    zeroes.complete(zeroes, 0);
  });
}

// ---- Piece by piece. Completion is always deferred: a request may end without any kernel I/O.

void RawNode::start_pieces(BlockRequest& request) {
  request.pieces = PieceProgress{};
  next_step(request);
}

// Starts the next piece, or finishes. Pieces that need no kernel I/O are done on the spot.
void RawNode::next_step(BlockRequest& request) {
  const std::uint64_t end = request.offset_bytes + request.length_bytes;
  while (request.pieces.done_bytes < request.length_bytes) {
    const std::uint64_t offset = request.offset_bytes + request.pieces.done_bytes;
    if (request.operation == BlockOperation::kWriteZeroes) return step_zeroes(request, offset, end);
    if (step_data(request, offset, end)) return;
  }
  const bool needs_flush =
      request.operation == BlockOperation::kWriteZeroes && request.write_through;
  if (!needs_flush) return finish_pieces(request, 0);
  queue_io(request, aio::IoKind::kFlush, file_->fd(), [](aio::IoRequest& io, int error) {
    BlockRequest& zeroes = parent_of(io);
    RawNode& node = node_of(zeroes);
    if (error != 0) node.note_flush_error(error);
    // As in submit_flush(): what another flush was told is not told again.
    node.finish_pieces(zeroes, node.flush_error_.load(std::memory_order_relaxed));
  });
}

// One piece of a read or write. False if it was done without the kernel.
bool RawNode::step_data(BlockRequest& request, std::uint64_t offset_bytes,
                        std::uint64_t end_bytes) {
  PieceProgress& pieces = request.pieces;
  if (request.operation == BlockOperation::kRead) {
    const std::uint64_t data_end = data_bytes_.load(std::memory_order_relaxed);
    if (offset_bytes >= data_end) {
      const auto beyond = take_iov(request, end_bytes - offset_bytes);
      for (const iovec& element : beyond) std::memset(element.iov_base, 0, element.iov_len);
      finish_iov(request, beyond);
      pieces.done_bytes = request.length_bytes;
      return false;
    }
    end_bytes = std::min(end_bytes, data_end);
  }
  const Piece piece = file_->direct() ? next_piece(rules(), offset_bytes, end_bytes)
                                      : Piece{PieceRoute::kEdge, end_bytes - offset_bytes};
  request.io.write_through = request.write_through;
  const std::span<const iovec> rest(request.iov + pieces.iov_first,
                                    request.iov_count - pieces.iov_first);
  const bool memory_is_unaligned =
      piece.route == PieceRoute::kDirect && !fits_memory(rules(), rest);
  const bool is_direct_read = request.operation == BlockOperation::kRead && file_->direct() &&
                              offset_bytes < rules().direct_end;
  if (is_direct_read && (piece.route == PieceRoute::kEdge || memory_is_unaligned)) {
    bounce(request, offset_bytes, end_bytes,
           enclosing_blocks(rules(), offset_bytes, end_bytes, BouncePool::kBufferBytes));
    return true;
  }
  if (memory_is_unaligned) {
    const std::uint64_t length =
        std::min<std::uint64_t>(piece.length_bytes, BouncePool::kBufferBytes);
    bounce(request, offset_bytes, offset_bytes + length, {offset_bytes, length});
    return true;
  }
  request.io.offset_bytes = offset_bytes;
  pieces.piece_bytes = piece.length_bytes;
  const auto taken = take_iov(request, piece.length_bytes);
  request.io.length_bytes = piece.length_bytes;
  request.io.iov = taken.data();
  request.io.iov_count = static_cast<std::uint32_t>(taken.size());
  const int fd = piece.route == PieceRoute::kDirect ? file_->fd() : file_->buffered_fd();
  queue_io(request, request.operation, fd, [](aio::IoRequest& io, int error) {
    BlockRequest& transfer = parent_of(io);
    finish_iov(transfer, {io.iov, io.iov_count});
    node_of(transfer).piece_done(transfer, error);
  });
  return true;
}

// Transfers `blocks` by way of a bounce buffer, once there is one. Of them [offset_bytes,
// end_bytes) is wanted, as far as they reach.
void RawNode::bounce(BlockRequest& request, std::uint64_t offset_bytes, std::uint64_t end_bytes,
                     BlockRange blocks) {
  PieceProgress& pieces = request.pieces;
  pieces.bounce_skip_bytes = offset_bytes - blocks.offset_bytes;
  pieces.piece_bytes =
      std::min(end_bytes, blocks.offset_bytes + blocks.length_bytes) - offset_bytes;
  request.io.offset_bytes = blocks.offset_bytes;
  request.io.length_bytes = blocks.length_bytes;
  BouncePool& pool = request.context->bounce_pool();
  if (std::byte* const buffer = pool.try_acquire(); buffer != nullptr)
    return start_bounce(request, buffer);
  request.bounce_waiter.parent = &request;
  request.bounce_waiter.ready = [](BouncePool::Waiter& waiter, std::byte* buffer) {
    BlockRequest& waiting = *static_cast<BlockRequest::BounceWaiter&>(waiter).parent;
    node_of(waiting).start_bounce(waiting, buffer);
  };
  pool.wait(request.bounce_waiter);
}

void RawNode::start_bounce(BlockRequest& request, std::byte* buffer) {
  PieceProgress& pieces = request.pieces;
  pieces.bounce = buffer;
  if (request.operation == BlockOperation::kWrite) {
    const auto source = take_iov(request, pieces.piece_bytes);
    gather(source, buffer);
    finish_iov(request, source);
  }
  pieces.bounce_iov = {buffer, request.io.length_bytes};
  request.io.iov = &pieces.bounce_iov;
  request.io.iov_count = 1;
  queue_io(request, request.operation, file_->fd(), [](aio::IoRequest& io, int error) {
    BlockRequest& transfer = parent_of(io);
    std::byte* const bounced = std::exchange(transfer.pieces.bounce, nullptr);
    if (transfer.operation == BlockOperation::kRead && error == 0) {
      const auto target = take_iov(transfer, transfer.pieces.piece_bytes);
      scatter(bounced + transfer.pieces.bounce_skip_bytes, target);
      finish_iov(transfer, target);
    }
    BouncePool& pool = transfer.context->bounce_pool();
    node_of(transfer).piece_done(transfer, error);
    pool.release(bounced);
  });
}

// One piece of a write zeroes: by the kernel where it can, otherwise as a write of zeroes.
void RawNode::step_zeroes(BlockRequest& request, std::uint64_t offset_bytes,
                          std::uint64_t end_bytes) {
  request.io.offset_bytes = offset_bytes;
  const std::uint64_t block_bytes = file_->logical_block_bytes();
  const std::uint64_t whole_blocks_end = end_bytes / block_bytes * block_bytes;
  const auto& works = request.may_unmap ? kernel_zeroes_unmap_ : kernel_zeroes_;
  if (works.load(std::memory_order_relaxed) && offset_bytes % block_bytes == 0 &&
      offset_bytes < whole_blocks_end) {
    zero_by_kernel(request, whole_blocks_end - offset_bytes);
  } else {
    zero_by_writing(request, offset_bytes, end_bytes);
  }
}

void RawNode::zero_by_kernel(BlockRequest& request, std::uint64_t length_bytes) {
  request.pieces.piece_bytes = length_bytes;
  request.io.length_bytes = length_bytes;
  request.io.may_unmap = request.may_unmap;
  queue_io(request, aio::IoKind::kWriteZeroes, file_->fd(), [](aio::IoRequest& io, int error) {
    BlockRequest& zeroes = parent_of(io);
    RawNode& node = node_of(zeroes);
    if (!is_unsupported(error)) return node.piece_done(zeroes, error);
    node.note_kernel_cannot_zero(zeroes.may_unmap, error);
    zeroes.may_unmap = false;  // it was a permission; the next way is the one without
    node.next_step(zeroes);    // the same piece again
  });
}

void RawNode::note_kernel_cannot_zero(bool unmapping, int error) {
  auto& works = unmapping ? kernel_zeroes_unmap_ : kernel_zeroes_;
  if (!works.exchange(false)) return;
  log::info("'{}': the storage below cannot {} ({}); {}", name_,
            unmapping ? "unmap what it zeroes" : "write zeroes by itself", describe_errno(error),
            unmapping ? "zeroes keep their space" : "they are written out");
}

void RawNode::zero_by_writing(BlockRequest& request, std::uint64_t offset_bytes,
                              std::uint64_t end_bytes) {
  PieceProgress& pieces = request.pieces;
  Piece piece = file_->direct() ? next_piece(rules(), offset_bytes, end_bytes)
                                : Piece{PieceRoute::kEdge, end_bytes - offset_bytes};
  // Inside a device's block: no further than its end, where the kernel's way begins.
  const std::uint64_t into_block = offset_bytes % file_->logical_block_bytes();
  if (into_block != 0)
    piece.length_bytes = std::min(piece.length_bytes, file_->logical_block_bytes() - into_block);
  pieces.piece_bytes = std::min<std::uint64_t>(piece.length_bytes, kZeroBufferBytes);
  pieces.bounce_iov = {zero_buffer(), pieces.piece_bytes};
  request.io.write_through = request.write_through;
  request.io.length_bytes = pieces.piece_bytes;
  request.io.iov = &pieces.bounce_iov;
  request.io.iov_count = 1;
  const bool direct = piece.route == PieceRoute::kDirect;
  queue_io(request, aio::IoKind::kWrite, direct ? file_->fd() : file_->buffered_fd(),
           [](aio::IoRequest& io, int error) {
             node_of(parent_of(io)).piece_done(parent_of(io), error);
           });
}

void RawNode::piece_done(BlockRequest& request, int error) {
  if (error != 0) {
    note_write_error(request, error);
    return finish_pieces(request, error);
  }
  request.pieces.done_bytes += request.pieces.piece_bytes;
  next_step(request);
}

void RawNode::finish_pieces(BlockRequest& request, int error) {
  note_change(request, error);
  // A write into the last, partial sector has made it whole.
  const std::uint64_t end = request.offset_bytes + request.length_bytes;
  std::uint64_t data_end = data_bytes_.load(std::memory_order_relaxed);
  if (error == 0 && request.operation == BlockOperation::kWrite) {
    while (data_end < end && !data_bytes_.compare_exchange_weak(data_end, end)) {
    }
  }
  request.context->complete_later(request, error);
}

}  // namespace vblk::blockdev
