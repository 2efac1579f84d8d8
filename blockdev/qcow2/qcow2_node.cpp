#include "blockdev/qcow2/qcow2_node.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/log.h"

namespace vblk::qcow2 {

using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::Detached;

// A request that a child carries out in its own place, and what it was before.
struct Qcow2Node::ForwardedRequest {
  BlockRequest::Completion complete{nullptr};
  std::uint64_t offset_bytes{0};
  void* outer{nullptr};
  Qcow2Node* node{nullptr};
  ThreadState* thread{nullptr};
  unsigned epoch{0};
  // Change of the metadata that must be written before the request completes; 0: none.
  std::uint64_t written_first{0};
  ForwardedRequest* next_free{nullptr};
};

// One I/O thread's part of the node.
class Qcow2Node::ThreadState final : public IoContext::NodeState {
 public:
  ThreadState(Qcow2Node& node, IoContext& context) : node_(node), context_(context) {
    const std::lock_guard lock(node.state_.mutex);
    node.state_.epochs.join(participant_);
  }
  ~ThreadState() override {
    const std::lock_guard lock(node_.state_.mutex);
    node_.state_.epochs.leave_for_good(participant_);
  }

  // What is not needed any more is kept: as many as there ever were requests in flight, by the
  // block.
  [[nodiscard]] ForwardedRequest& take() {
    if (free_ == nullptr) {
      blocks_.push_back(std::make_unique<Block>());
      for (ForwardedRequest& forwarded : *blocks_.back()) put(forwarded);
    }
    return *std::exchange(free_, free_->next_free);
  }
  void put(ForwardedRequest& forwarded) { forwarded.next_free = std::exchange(free_, &forwarded); }

  [[nodiscard]] unsigned enter() { return node_.state_.epochs.enter(participant_); }
  void leave(unsigned epoch) { RequestEpochs::leave(participant_, epoch); }
  [[nodiscard]] IoContext& context() { return context_; }

 private:
  using Block = std::array<ForwardedRequest, 64>;

  Qcow2Node& node_;
  IoContext& context_;
  RequestEpochs::Participant participant_;
  ForwardedRequest* free_{nullptr};
  std::vector<std::unique_ptr<Block>> blocks_;
};

namespace {

std::uint64_t l2_cache_bytes(const Header& header, const Qcow2Options& options) {
  if (options.l2_cache_bytes != 0) return options.l2_cache_bytes;
  const std::uint64_t whole = std::uint64_t{header.l1_entries} << header.geometry.cluster_bits;
  return std::clamp(whole, Qcow2Node::kL2CacheBytesMin, Qcow2Node::kL2CacheBytesMax);
}

std::uint64_t refcount_cache_bytes(const Header& header, const Qcow2Options& options) {
  if (options.refcount_cache_bytes != 0) return options.refcount_cache_bytes;
  return std::max(l2_cache_bytes(header, options) / 4, Qcow2Node::kRefcountCacheBytesMin);
}

}  // namespace

Qcow2Node::Qcow2Node(Qcow2Parts parts, const Qcow2Options& options,
                     blockdev::MakePrivateContext make_context)
    : parts_(std::move(parts)),
      make_context_(std::move(make_context)),
      state_(parts_.header, *parts_.file, parts_.data_file.get(), parts_.backing.get(),
             options.read_only, options.discard && !options.read_only,
             l2_cache_bytes(parts_.header, options), refcount_cache_bytes(parts_.header, options)),
      write_back_(state_),
      allocator_(state_, write_back_),
      flushes_(
          [](BlockRequest& leader) {
            static_cast<Qcow2Node&>(*leader.node).flush_as_leader(leader);
          },
          options.group_commit) {
  name_ = parts_.file->name();
  size_bytes_.store(parts_.header.size_bytes, std::memory_order_relaxed);
  limits_.optimal_alignment_bytes =
      std::max<std::uint32_t>(parts_.file->limits().optimal_alignment_bytes, 512);
  limits_.read_only = options.read_only;
  limits_.can_discard = options.discard && !options.read_only;
  limits_.can_write_zeroes = !options.read_only;
  limits_.write_zeroes_may_unmap = options.discard && !options.read_only;
}

void Qcow2Node::attach(IoContext& context) {
  parts_.file->attach(context);
  if (parts_.data_file) parts_.data_file->attach(context);
  if (parts_.backing) parts_.backing->attach(context);
  static_cast<void>(thread_state(context));
}

void Qcow2Node::detach(IoContext& context) {
  parts_.file->detach(context);
  if (parts_.data_file) parts_.data_file->detach(context);
  if (parts_.backing) parts_.backing->detach(context);
}

Qcow2Node::ThreadState& Qcow2Node::thread_state(IoContext& context) {
  if (auto* const known = context.state_of(*this); known != nullptr)
    return static_cast<ThreadState&>(*known);
  auto made = std::make_unique<ThreadState>(*this, context);
  ThreadState& state = *made;
  context.keep(*this, std::move(made));
  return state;
}

unsigned Qcow2Node::enter_epoch(IoContext& context) { return thread_state(context).enter(); }

void Qcow2Node::leave_epoch(IoContext& context, unsigned epoch) {
  thread_state(context).leave(epoch);
}

void Qcow2Node::do_submit(BlockRequest& request, IoContext& context) {
  switch (request.operation) {
    case BlockOperation::kFlush:
      return flushes_.submit(request);
    case BlockOperation::kRead:
      return submit_read(request, thread_state(context));
    case BlockOperation::kWrite:
      return submit_write(request, thread_state(context));
    default:
      break;
  }
  run_request(request, thread_state(context));
}

// The epoch is entered before the mapping is looked up, and left when the request has ended.
void Qcow2Node::submit_read(BlockRequest& request, ThreadState& thread) {
  const unsigned epoch = thread.enter();
  Run run;
  const std::uint64_t end = request.offset_bytes + request.length_bytes;
  if (!is_beyond_end(request) && state_.lookup(request.offset_bytes, request.length_bytes, run) &&
      run.length == request.length_bytes) {
    if (run.mapping == Mapping::kNormal) {
      forward(request, thread, epoch, state_.data(), run.host_offset);
      return;
    }
    const bool is_unallocated =
        run.mapping == Mapping::kUnallocated || run.mapping == Mapping::kUnallocatedWithSpace;
    if (is_unallocated && state_.backing != nullptr && end <= state_.backing->size_bytes()) {
      forward(request, thread, epoch, *state_.backing, request.offset_bytes);
      return;
    }
    if (reads_zero(run.mapping) ||
        (is_unallocated && !state_.has_backing_at(request.offset_bytes))) {
      for (const iovec& element : std::span(request.iov, request.iov_count)) {
        if (element.iov_len > 0) std::memset(element.iov_base, 0, element.iov_len);
      }
      thread.leave(epoch);
      return thread.context().complete_later(request, 0);
    }
  }
  thread.leave(epoch);
  run_request(request, thread);
}

// Metadata is never written as data; whoever is told so has the slow way find out what is wrong.
bool Qcow2Node::can_write_in_place(const Run& run, std::uint64_t length) const {
  if (run.mapping != Mapping::kNormal || !run.copied || run.length != length) return false;
  if (state_.data_file != nullptr) return true;
  const std::uint64_t end = run.host_offset + length;
  if (end > state_.file_end.load(std::memory_order_relaxed)) return false;
  for (std::uint64_t cluster = state_.cluster_of(run.host_offset);
       cluster <= state_.cluster_of(end - 1); ++cluster) {
    if (state_.metadata_map.may_contain(cluster)) return false;
  }
  return true;
}

void Qcow2Node::submit_write(BlockRequest& request, ThreadState& thread) {
  IoContext& context = thread.context();
  const std::uint64_t length = request.length_bytes;
  if (!state_.is_corrupt.load(std::memory_order_relaxed)) {
    const unsigned epoch = thread.enter();
    Run run;
    const bool is_possible = !is_beyond_end(request);
    bool is_in_place = is_possible && state_.lookup(request.offset_bytes, length, run) &&
                       can_write_in_place(run, length);
    if (is_possible && !is_in_place && !request.write_through &&
        map_zeroed(request.offset_bytes, length, context)) {
      is_in_place =
          state_.lookup(request.offset_bytes, length, run) && can_write_in_place(run, length);
    }
    // After the lookup: another thread may have changed the mapping just before it.
    if (request.write_through) is_in_place = is_in_place && state_.is_stable();
    if (is_in_place) return forward(request, thread, epoch, state_.data(), run.host_offset);
    thread.leave(epoch);
  }
  run_request(request, thread);
}

void Qcow2Node::forward(BlockRequest& request, ThreadState& thread, unsigned epoch,
                        BlockNode& child, std::uint64_t offset) {
  ForwardedRequest& forwarded = thread.take();
  forwarded.complete = request.complete;
  forwarded.offset_bytes = request.offset_bytes;
  forwarded.outer = request.forwarded;
  forwarded.node = this;
  forwarded.thread = &thread;
  forwarded.epoch = epoch;
  // The mapping was looked up before this is read, so the change that made it is counted in.
  forwarded.written_first =
      request.outlives_process ? state_.changes.load(std::memory_order_acquire) : 0;
  request.forwarded = &forwarded;
  request.offset_bytes = offset;
  request.complete = &Qcow2Node::forwarded_done;
  child.submit(request, thread.context());
}

void Qcow2Node::forwarded_done(BlockRequest& request, int error) {
  ForwardedRequest& forwarded = *static_cast<ForwardedRequest*>(request.forwarded);
  Qcow2Node& node = *forwarded.node;
  request.forwarded = forwarded.outer;
  request.offset_bytes = forwarded.offset_bytes;
  request.complete = forwarded.complete;
  request.node = &node;
  ThreadState& thread = *forwarded.thread;
  const std::uint64_t written_first = forwarded.written_first;
  thread.leave(forwarded.epoch);
  thread.put(forwarded);
  if (request.operation == BlockOperation::kWrite) {
    node.flushes_.note_change();
    if (error == 0 && !node.state_.is_written(written_first)) {
      node.finish_when_written(request, thread.context());
      return;
    }
  }
  request.complete(request, error);
}

// The data is written, and its mapping is still in memory alone: a successor of this process would
// not find what the guest had been told is done. Those who wait share a write-back.
Detached Qcow2Node::finish_when_written(BlockRequest& request, IoContext& context) {
  const int error = co_await write_back_.run(context, request);
  flushes_.note_change();
  request.complete(request, error);
}

// Maps [guest_offset, +length) to fresh clusters as far as it is unmapped and reads as zeroes, and
// says whether all of it is mapped afterwards: it may not be for want of a table, of clusters in
// the reserve, or of zeroes.
bool Qcow2Node::map_zeroed(std::uint64_t guest_offset, std::uint64_t length, IoContext& context) {
  if (state_.data_file != nullptr) return false;
  bool all = true;
  bool runs_low = false;
  {
    const std::lock_guard lock(state_.mutex);
    const std::uint64_t end = guest_offset + length;
    for (std::uint64_t at = guest_offset; at < end && all;) {
      const std::uint64_t cluster_end = std::min(end, (at | state_.geometry.cluster_mask()) + 1);
      all = map_zeroed_cluster(at, cluster_end);
      at = cluster_end;
    }
    runs_low = allocator_.runs_low();
  }
  if (runs_low) refill_if_low(context);
  return all;
}

// Under the mutex. [guest_offset, end) lies in one cluster. The mapping comes before the data:
// until that is written, the cluster reads as zeroes, which is what the guest has seen there.
bool Qcow2Node::map_zeroed_cluster(std::uint64_t guest_offset, std::uint64_t end) {
  const Geometry& geometry = state_.geometry;
  TableCache::Slot* const slot = state_.l2_slot(guest_offset);
  if (slot == nullptr || !state_.l2_table_is_ours(guest_offset)) return false;
  L2Entry entry = state_.entry(*slot, guest_offset);
  const auto first =
      static_cast<unsigned>((guest_offset & geometry.cluster_mask()) >> geometry.subcluster_bits());
  const auto last =
      static_cast<unsigned>(((end - 1) & geometry.cluster_mask()) >> geometry.subcluster_bits());
  bool is_mapped = (entry.descriptor & kFlagCopied) != 0;
  for (unsigned subcluster = first; subcluster <= last; ++subcluster) {
    const Mapping mapping = mapping_of(geometry, entry, subcluster, std::nullopt);
    if (mapping != Mapping::kNormal) is_mapped = false;
    if (mapping == Mapping::kNormal && is_mapped) continue;
    const std::uint64_t begin = (guest_offset & ~geometry.cluster_mask()) +
                                (std::uint64_t{subcluster} << geometry.subcluster_bits());
    const bool is_zero = mapping == Mapping::kZero ||
                         (mapping == Mapping::kUnallocated && !state_.has_backing_at(begin));
    if (!is_zero) return false;
  }
  if (is_mapped) return true;
  const std::uint64_t cluster = state_.cluster_of(guest_offset);
  if (host_offset(entry) != 0 || state_.conflict(cluster, cluster) != nullptr) return false;
  const auto fresh = allocator_.take(1, true);
  if (!fresh) return false;
  entry.descriptor = (fresh->first << geometry.cluster_bits) | kFlagCopied;
  if (geometry.extended_l2) {
    const std::uint64_t touched =
        ((std::uint64_t{1} << (last + 1)) - 1) & ~((std::uint64_t{1} << first) - 1);
    entry.bitmap = (entry.bitmap | touched) & ~(touched << kSubclusters);
  }
  state_.set_entry(*slot, guest_offset, entry, {.refcount_change = fresh->refcount_change});
  return true;
}

void Qcow2Node::finish(BlockRequest& request, ThreadState& thread, int error) {
  if (request.operation != BlockOperation::kRead) flushes_.note_change();
  thread.context().complete_later(request, error);
}

Detached Qcow2Node::run_request(BlockRequest& request, ThreadState& thread) {
  const unsigned epoch = thread.enter();
  const std::span<const iovec> memory(request.iov, request.iov_count);
  const std::uint64_t offset = request.offset_bytes;
  const std::uint64_t length = request.length_bytes;
  int error = 0;
  if (is_beyond_end(request)) {
    error = EINVAL;
  } else if (request.operation != BlockOperation::kRead &&
             state_.is_corrupt.load(std::memory_order_relaxed)) {
    error = EIO;
  } else if (request.operation == BlockOperation::kRead) {
    error = co_await read(request, offset, length, memory);
  } else if (request.operation == BlockOperation::kWrite) {
    error = co_await write(request, offset, length, memory, request.write_through);
  } else {
    const bool is_discard = request.operation == BlockOperation::kDiscard;
    error = co_await zero(request, offset, length, is_discard || request.may_unmap, is_discard);
  }
  if (error == 0 && request.write_through && request.operation != BlockOperation::kRead) {
    // What the write has changed in the mapping must be as stable as the data.
    flushes_.note_change();
    error = co_await BlockIo(*this, thread.context(), BlockOperation::kFlush, 0, 0);
  } else if (error == 0 && request.outlives_process && request.operation != BlockOperation::kRead &&
             !state_.is_written(state_.changes.load(std::memory_order_acquire))) {
    error = co_await write_back_.run(thread.context(), request);
  }
  if (error == 0) error = co_await flush_if_much_is_freed(thread.context());
  thread.leave(epoch);
  finish(request, thread, error);
}

Task<int> Qcow2Node::flush_if_much_is_freed(IoContext& context) {
  {
    const std::lock_guard lock(state_.mutex);
    if (state_.freed.size() <= kFreedExtentsMax) co_return 0;
  }
  flushes_.note_change();
  const int error = co_await BlockIo(*this, context, BlockOperation::kFlush, 0, 0);
  co_return error;
}

void Qcow2Node::flush_as_leader(BlockRequest& leader) { run_flush(leader); }

Detached Qcow2Node::run_flush(BlockRequest& leader) {
  IoContext& context = *leader.context;
  BlockRequest token;
  token.context = &context;
  const int error = co_await write_back_.flush(context, token);
  release_quarantine(context);
  flushes_.finished(leader, error);
}

void Qcow2Node::refill_if_low(IoContext& context) {
  {
    const std::lock_guard lock(state_.mutex);
    if (background_refill_ || !allocator_.runs_low()) return;
    background_refill_ = true;
  }
  run_refill(context);
}

Detached Qcow2Node::run_refill(IoContext& context) {
  BlockRequest token;
  token.context = &context;
  // Who needs clusters and finds none will try again, and tell.
  [[maybe_unused]] const int ignored = co_await allocator_.refill(context, token);
  const std::lock_guard lock(state_.mutex);
  background_refill_ = false;
}

void Qcow2Node::release_quarantine(IoContext& context) {
  {
    const std::lock_guard lock(state_.mutex);
    if (releasing_ || state_.quarantine.empty()) return;
    releasing_ = true;
  }
  run_release(context);
}

Detached Qcow2Node::run_release(IoContext& context) {
  BlockRequest token;
  token.context = &context;
  for (;;) {
    FreedClusters clusters;
    {
      const std::lock_guard lock(state_.mutex);
      state_.epochs.advance();
      if (state_.quarantine.empty() || !state_.epochs.is_over(state_.quarantine.front().epoch) ||
          state_.is_corrupt.load(std::memory_order_relaxed)) {
        releasing_ = false;
        co_return;
      }
      clusters = state_.quarantine.front().clusters;
      state_.quarantine.pop_front();
    }
    const int error = co_await allocator_.release(context, token, clusters);
    if (error != 0) {
      log::warning(
          "'{}': {} freed clusters could not be released: {}; 'vblk img check -r leaks' "
          "gets them back",
          name_, clusters.count, describe_errno(error));
    }
  }
}

}  // namespace vblk::qcow2
