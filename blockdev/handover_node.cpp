#include "blockdev/handover_node.h"

#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include <fmt/core.h>

#include "blockdev/flush_now.h"
#include "blockdev/io_context.h"

namespace vblk::blockdev {

namespace {
constexpr std::chrono::milliseconds kQuietLook{1};
}  // namespace

HandoverNode::HandoverNode(DiskShape shape, Open open) : open_(std::move(open)) {
  size_bytes_.store(shape.size_bytes, std::memory_order_relaxed);
  limits_ = shape.limits;
  name_ = std::move(shape.name);
}

Expected<void> HandoverNode::take() {
  if (is_taken()) return {};
  auto disk = open_();
  if (!disk) return std::unexpected(std::move(disk.error()));
  if ((*disk)->limits() != limits_) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' is another disk than it was when this server started: its "
                                  "block size, or what it can do, has changed",
                                  name_));
  }
  size_bytes_.store((*disk)->size_bytes(), std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  owned_ = std::move(*disk);
  disk_.store(owned_.get());
  return {};
}

Expected<void> HandoverNode::give_up(std::span<const std::unique_ptr<IoThread>> threads) {
  if (!is_taken()) return {};
  // What the kernel could not write it forgets, and so would whoever opens the disk next: the node
  // that knows of it stays, and with it the lock.
  if (auto flushed = flush_now(*this, *threads.front()); !flushed) return flushed;
  disk_.store(nullptr);
  // Whoever found it there before is seen by its thread to be at work. A flush may have a format
  // put in order what it had kept for later.
  while (resizes_.load() != 0 || !is_quiet(threads)) std::this_thread::sleep_for(kQuietLook);
  for (const auto& thread : threads)
    thread->run_and_wait([&thread] { thread->context().forget_nodes(); });
  const std::lock_guard lock(mutex_);
  owned_.reset();
  return {};
}

FlushStatistics HandoverNode::flush_statistics() const {
  const std::lock_guard lock(mutex_);
  return owned_ == nullptr ? FlushStatistics{} : owned_->flush_statistics();
}

bool HandoverNode::has_lost_writes() const {
  const std::lock_guard lock(mutex_);
  return owned_ != nullptr && owned_->has_lost_writes();
}

void HandoverNode::attach(IoContext& context) {
  if (BlockNode* const disk = disk_.load()) disk->attach(context);
}

void HandoverNode::detach(IoContext& context) {
  if (BlockNode* const disk = disk_.load()) disk->detach(context);
}

void HandoverNode::do_submit(BlockRequest& request, IoContext& context) {
  if (BlockNode* const disk = disk_.load(std::memory_order_relaxed)) [[likely]]
    return disk->submit(request, context);
  // Nobody's requests come now, but for a last flush, which was made when it was given up.
  context.complete_later(request, request.operation == BlockOperation::kFlush ? 0 : ENOMEDIUM);
}

void HandoverNode::do_resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done) {
  BlockNode* const disk = disk_.load();
  if (disk == nullptr) {
    return done(make_error(
        ErrorKind::kBusy,
        fmt::format("no guest runs on '{}' here, so it may be in use elsewhere", name_)));
  }
  ++resizes_;
  disk->resize(size_bytes, context, [this, disk, done = std::move(done)](Expected<void> outcome) {
    size_bytes_.store(disk->size_bytes(), std::memory_order_relaxed);
    done(std::move(outcome));
    --resizes_;
  });
}

}  // namespace vblk::blockdev
