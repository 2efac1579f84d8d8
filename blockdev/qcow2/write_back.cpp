#include "blockdev/qcow2/write_back.h"

#include <algorithm>
#include <cerrno>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "blockdev/block_io.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::IoGroup;

namespace {

// L2 slices copied in one round, to bound the memory: 1024 x 4 KiB.
constexpr std::size_t kSlicesPerRound = 1024;
// Slices of one table that lie side by side go out in one write.
constexpr std::size_t kSlicesPerWrite = 64;

}  // namespace

// One slice or block as it was when the round began.
struct WriteBack::Write {
  TableCache* cache{nullptr};  // nullptr: a block of a table that is in memory
  TableCache::Slot* slot{nullptr};
  DirtyBlocks* blocks{nullptr};
  DirtyBlocks::Block block{};
  std::uint64_t since{0};
  WriteOrder order;
  std::uint64_t host_offset{0};
  AlignedBuffer bytes;
  bool done{false};
};

struct WriteBack::Round {
  std::vector<Write> refcounts;
  std::vector<Write> refcount_table;
  std::vector<Write> mapping;
  std::uint64_t refcount_change{0};  // in the copies, with all before it
  WriteOrder order;                  // what `mapping` waits for
};

namespace {

template <typename Write>
Write copy_slice(TableCache& cache) {
  Write write;
  write.cache = &cache;
  write.bytes = AlignedBuffer(cache.slice_bytes());
  return write;
}

}  // namespace

// Whole words of a table that is in memory, as a block of it is on the disk. The table's last block
// may be longer than the table: it has the rest of a cluster.
static AlignedBuffer copy_block(const std::vector<std::uint64_t>& table, std::size_t number) {
  AlignedBuffer bytes(DirtyBlocks::kEntries * 8);
  for (std::size_t i = 0; i < DirtyBlocks::kEntries; ++i) {
    const std::size_t entry = number * DirtyBlocks::kEntries + i;
    store_be(bytes.data() + i * 8, entry < table.size() ? table[entry] : 0);
  }
  return bytes;
}

void WriteBack::collect_refcounts(Round& round) {
  round.refcount_change = state_.refcount_changes;
  TableCache& cache = state_.refcount_cache;
  while (cache.has_dirty()) {
    Write write = copy_slice<Write>(cache);
    write.slot = &cache.start_writing(write.bytes.bytes());
    write.since = write.slot->dirty_since;
    write.host_offset = write.slot->host_offset;
    round.refcounts.push_back(std::move(write));
  }
  for (const auto& block : state_.refcount_table_dirty.take()) {
    Write write;
    write.blocks = &state_.refcount_table_dirty;
    write.block = block;
    write.host_offset =
        state_.header.refcount_table_offset + block.number * DirtyBlocks::kEntries * 8;
    write.bytes = copy_block(state_.refcount_table, block.number);
    round.refcount_table.push_back(std::move(write));
  }
}

void WriteBack::collect_mapping(Round& round) {
  TableCache& cache = state_.l2_cache;
  while (cache.has_dirty() && round.mapping.size() < kSlicesPerRound) {
    Write write = copy_slice<Write>(cache);
    const TableCache::Slot& first = cache.first_dirty();
    write.order = first.order;
    write.since = first.dirty_since;
    write.slot = &cache.start_writing(write.bytes.bytes());
    write.host_offset = write.slot->host_offset;
    round.order.include(write.order);
    round.mapping.push_back(std::move(write));
  }
  for (const auto& block : state_.l1_dirty.take()) {
    Write write;
    write.blocks = &state_.l1_dirty;
    write.block = block;
    write.host_offset = state_.header.l1_table_offset + block.number * DirtyBlocks::kEntries * 8;
    write.bytes = copy_block(state_.l1_table, block.number);
    round.order.include(block.order);
    round.mapping.push_back(std::move(write));
  }
}

Task<int> WriteBack::write_all(IoContext& context, std::vector<Write>& writes) {
  std::ranges::sort(writes, {}, &Write::host_offset);
  IoGroup group(context);
  for (std::size_t first = 0; first < writes.size();) {
    std::vector<iovec> iov;
    std::uint64_t end = writes[first].host_offset;
    std::size_t next = first;
    while (next < writes.size() && writes[next].host_offset == end &&
           iov.size() < kSlicesPerWrite) {
      iov.push_back({writes[next].bytes.data(), writes[next].bytes.size()});
      end += writes[next].bytes.size();
      ++next;
    }
    group.start(state_.file, blockdev::BlockOperation::kWrite, writes[first].host_offset,
                std::move(iov));
    first = next;
  }
  const int error = co_await group;
  if (error == 0) {
    for (Write& write : writes) write.done = true;
  }
  co_return error;
}

Task<int> WriteBack::write_refcounts(IoContext& context, Round& round) {
  int error = co_await write_all(context, round.refcounts);
  if (error == 0 && !round.refcount_table.empty()) {
    error = co_await barrier(context);
    if (error == 0) error = co_await write_all(context, round.refcount_table);
  }
  if (error != 0) co_return error;
  const std::lock_guard lock(state_.mutex);
  state_.refcount_changes_written =
      std::max(state_.refcount_changes_written, round.refcount_change);
  co_return 0;
}

Task<int> WriteBack::write_round(IoContext& context, Round& round) {
  int error = co_await write_refcounts(context, round);
  if (error != 0) co_return error;
  bool must_wait = false;
  {
    const std::lock_guard lock(state_.mutex);
    must_wait = round.order.refcount_change > state_.refcount_changes_stable ||
                round.order.barrier > state_.barriers_done;
  }
  if (must_wait) error = co_await barrier(context);
  if (error == 0) error = co_await write_all(context, round.mapping);
  co_return error;
}

// What was written is clean, unless it was changed meanwhile; the rest is as dirty as before.
void WriteBack::settle(Round& round, int error, IoContext& context) {
  for (auto* const writes : {&round.refcounts, &round.refcount_table, &round.mapping}) {
    for (Write& write : *writes) {
      const bool failed = error != 0 && !write.done;
      if (write.blocks != nullptr) {
        if (failed) write.blocks->add(write.block);
      } else if (failed) {
        write.cache->write_failed(*write.slot, write.since, write.order);
      } else {
        write.cache->written(*write.slot);
      }
    }
  }
  state_.slot_changed.wake_all(context);
}

Task<int> WriteBack::take_turn(IoContext& context, BlockRequest& token) {
  token.context = &context;
  std::unique_lock lock(state_.mutex);
  while (busy_) co_await idle_.wait(lock, token);
  busy_ = true;
  co_return 0;
}

void WriteBack::end_turn(IoContext& context) {
  const std::lock_guard lock(state_.mutex);
  busy_ = false;
  idle_.wake_all(context);
}

Task<int> WriteBack::write_refcounts(IoContext& context) {
  Round round;
  {
    const std::lock_guard guard(state_.mutex);
    collect_refcounts(round);
  }
  const int error = co_await write_refcounts(context, round);
  const std::lock_guard guard(state_.mutex);
  settle(round, error, context);
  co_return error;
}

Task<int> WriteBack::run(IoContext& context, BlockRequest& token) {
  if (state_.is_corrupt.load(std::memory_order_relaxed)) co_return EIO;
  co_await take_turn(context, token);
  int error = 0;
  std::unique_lock guard(state_.mutex);
  const std::uint64_t until = state_.changes.load(std::memory_order_relaxed);
  const auto has_work = [this, until] {
    return state_.refcount_cache.has_dirty_before(until) ||
           state_.l2_cache.has_dirty_before(until) ||
           state_.refcount_table_dirty.has_before(until) || state_.l1_dirty.has_before(until);
  };
  while (error == 0 && has_work()) {
    Round round;
    collect_refcounts(round);
    collect_mapping(round);
    guard.unlock();
    error = co_await write_round(context, round);
    guard.lock();
    settle(round, error, context);
  }
  // One at a time, so the numbers only grow.
  if (error == 0) state_.written_changes.store(until, std::memory_order_release);
  guard.unlock();
  end_turn(context);
  co_return error;
}

Task<int> WriteBack::barrier(IoContext& context) {
  std::uint64_t number = 0;
  std::uint64_t refcount_change = 0;
  {
    const std::lock_guard lock(state_.mutex);
    number = ++state_.barriers_begun;
    refcount_change = state_.refcount_changes_written;
  }
  int error = 0;
  if (state_.data_file != nullptr)
    error = co_await BlockIo(*state_.data_file, context, blockdev::BlockOperation::kFlush, 0, 0);
  if (error != 0) co_return error;
  error = co_await BlockIo(state_.file, context, blockdev::BlockOperation::kFlush, 0, 0);
  if (error != 0) co_return error;
  const std::lock_guard lock(state_.mutex);
  state_.barriers_done = std::max(state_.barriers_done, number);
  state_.refcount_changes_stable = std::max(state_.refcount_changes_stable, refcount_change);
  co_return 0;
}

Task<int> WriteBack::flush(IoContext& context, BlockRequest& token) {
  std::vector<FreedClusters> freed;
  std::uint64_t changes = 0;
  {
    const std::lock_guard lock(state_.mutex);
    changes = state_.changes.load(std::memory_order_relaxed);
    freed = std::exchange(state_.freed, {});
    state_.freed_count = 0;
  }
  int error = 0;
  if (!state_.read_only) error = co_await run(context, token);
  if (error == 0) error = co_await barrier(context);
  const std::lock_guard lock(state_.mutex);
  if (error != 0) {
    for (const FreedClusters& clusters : freed)
      state_.free_clusters(clusters.first, clusters.count);
    co_return error;
  }
  if (state_.stable_changes.load(std::memory_order_relaxed) < changes)
    state_.stable_changes.store(changes, std::memory_order_release);
  if (!freed.empty()) {
    const std::uint64_t epoch = state_.epochs.current();
    for (const FreedClusters& clusters : freed) state_.quarantine.push_back({clusters, epoch});
  }
  co_return 0;
}

}  // namespace vblk::qcow2
