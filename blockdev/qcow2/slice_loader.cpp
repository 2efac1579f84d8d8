#include "blockdev/qcow2/slice_loader.h"

#include <cerrno>

#include <fmt/core.h>

#include "blockdev/block_io.h"

namespace vblk::qcow2 {

namespace {

// Where a slice is on the disk, under the mutex; 0: its table does not exist. kNowhere: the table
// is where none can be.
constexpr std::uint64_t kNowhere = ~std::uint64_t{0};
using HostOffset = std::uint64_t (*)(const ImageState& state, std::uint64_t index);

bool can_be_table(const ImageState& state, std::uint64_t offset) {
  return (offset & state.geometry.cluster_mask()) == 0 &&
         offset + state.geometry.cluster_bytes() <= state.file_end.load(std::memory_order_relaxed);
}

std::uint64_t l2_slice_offset(const ImageState& state, std::uint64_t index) {
  const Geometry& geometry = state.geometry;
  const unsigned slices_bits = geometry.l2_bits() - geometry.l2_slice_bits();
  const std::uint64_t entry = state.l1_table[index >> slices_bits];
  const std::uint64_t table = entry & kOffsetMask;
  if ((entry & kL1ReservedMask) != 0) return kNowhere;
  if (table == 0) return 0;
  if (!can_be_table(state, table)) return kNowhere;
  return table + (index & ((std::uint64_t{1} << slices_bits) - 1)) * geometry.slice_bytes();
}

std::uint64_t refcount_slice_offset(const ImageState& state, std::uint64_t index) {
  const Geometry& geometry = state.geometry;
  const unsigned slices_bits = geometry.refcount_block_bits() - geometry.refcount_slice_bits();
  const std::uint64_t entry = state.refcount_table[index >> slices_bits];
  const std::uint64_t block = entry & kOffsetMask;
  if ((entry & kRefcountTableReservedMask) != 0 || block == 0 || !can_be_table(state, block))
    return kNowhere;
  return block + (index & ((std::uint64_t{1} << slices_bits) - 1)) * geometry.slice_bytes();
}

Task<int> load(ImageState& state, TableCache& cache, HostOffset host_offset, std::uint64_t index,
               WriteBack& write_back, IoContext& context, BlockRequest& token) {
  token.context = &context;
  std::unique_lock lock(state.mutex);
  TableCache::Slot* slot = nullptr;
  while (slot == nullptr) {
    slot = cache.find(index);
    if (slot != nullptr && slot->valid) co_return 0;
    if (slot != nullptr) {
      co_await state.slot_changed.wait(lock, token);
      slot = nullptr;
      continue;
    }
    const std::uint64_t offset = host_offset(state, index);
    if (offset == kNowhere) {
      lock.unlock();
      mark_corrupt(state, context, fmt::format("table slice {} has no place in the file", index));
      co_return EIO;
    }
    slot = cache.claim(index, offset);
    if (slot != nullptr) break;
    lock.unlock();
    const int error = co_await make_room(state, cache, index, write_back, context, token);
    if (error != 0) co_return error;
    lock.lock();
  }
  if (slot->host_offset == 0) {
    cache.loaded_zeroes(*slot);
    co_return 0;
  }
  const std::uint64_t offset = slot->host_offset;
  lock.unlock();
  blockdev::AlignedBuffer buffer(cache.slice_bytes());
  const int error = co_await blockdev::BlockIo(state.file, context, blockdev::BlockOperation::kRead,
                                               offset, buffer.bytes());
  lock.lock();
  if (error == 0) {
    cache.loaded(*slot, buffer.bytes());
  } else {
    cache.load_failed(*slot);
  }
  state.slot_changed.wake_all(context);
  co_return error;
}

}  // namespace

Task<int> make_room(ImageState& state, TableCache& cache, std::uint64_t index,
                    WriteBack& write_back, IoContext& context, BlockRequest& token) {
  token.context = &context;
  {
    std::unique_lock lock(state.mutex);
    if (cache.is_any_in_flight(index)) {
      co_await state.slot_changed.wait(lock, token);
      co_return 0;
    }
  }
  // Every slot of the set waits to be written. If that fails, so does this.
  const int error = co_await write_back.run(context, token);
  co_return error;
}

Task<int> load_l2_slice(ImageState& state, WriteBack& write_back, IoContext& context,
                        BlockRequest& token, std::uint64_t guest_offset) {
  return load(state, state.l2_cache, l2_slice_offset, state.geometry.l2_slice(guest_offset),
              write_back, context, token);
}

Task<int> load_refcount_slice(ImageState& state, WriteBack& write_back, IoContext& context,
                              BlockRequest& token, std::uint64_t index) {
  return load(state, state.refcount_cache, refcount_slice_offset, index, write_back, context,
              token);
}

}  // namespace vblk::qcow2
