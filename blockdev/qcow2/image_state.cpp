#include "blockdev/qcow2/image_state.h"

#include <algorithm>
#include <span>

#include "blockdev/block_io.h"
#include "blockdev/log.h"

namespace vblk::qcow2 {

namespace {

// Entries looked at in one go: what a request of 2 MiB spans with clusters of 64 KiB, and one more.
constexpr std::size_t kEntriesPerRead = 33;

// The L2 cache has room for these, however small the disk is: it may grow. 4 MiB of slices, if they
// are ever used.
constexpr std::uint64_t kSlicesForGrowth = 1024;

// A subcluster and how it is mapped, seen as the beginning of a run.
struct Piece {
  Mapping mapping;
  bool copied;
  std::uint64_t host_offset;
};

Piece piece_of(const Geometry& geometry, const L2Entry& entry, unsigned subcluster,
               std::optional<std::uint64_t> place) {
  return {.mapping = mapping_of(geometry, entry, subcluster, place),
          .copied = (entry.descriptor & kFlagCopied) != 0,
          .host_offset =
              host_offset(entry) + (std::uint64_t{subcluster} << geometry.subcluster_bits())};
}

// Whether `next` goes on where `run` ends.
bool continues(const Run& run, const Piece& next) {
  if (next.mapping != run.mapping || next.mapping == Mapping::kCompressed) return false;
  if (!has_space(next.mapping)) return true;
  return next.copied == run.copied && next.host_offset == run.host_offset + run.length;
}

// Adds what one entry maps, from `in_cluster` on. False: the run ends within it.
bool extend(const Geometry& geometry, const L2Entry& entry, std::uint64_t in_cluster,
            std::optional<std::uint64_t> place, std::uint64_t length, Run& run) {
  while (in_cluster < geometry.cluster_bytes()) {
    const auto subcluster = static_cast<unsigned>(in_cluster >> geometry.subcluster_bits());
    const std::uint64_t in_subcluster = in_cluster & (geometry.subcluster_bytes() - 1);
    const Piece piece = piece_of(geometry, entry, subcluster, place);
    if (run.length == 0) {
      run.mapping = piece.mapping;
      run.copied = piece.copied;
      run.host_offset = piece.host_offset + in_subcluster;
      run.descriptor = entry.descriptor;
    } else if (!continues(run, piece)) {
      return false;
    }
    const std::uint64_t whole = piece.mapping == Mapping::kCompressed
                                    ? geometry.cluster_bytes() - in_cluster
                                    : geometry.subcluster_bytes() - in_subcluster;
    run.length += whole;
    in_cluster += whole;
    if (run.length >= length) return false;
  }
  return true;
}

}  // namespace

ImageState::ImageState(Header image_header, blockdev::RawNode& image_file,
                       BlockNode* external_data_file, BlockNode* backing_node, bool is_read_only,
                       bool punch_holes, std::uint64_t l2_cache_bytes,
                       std::uint64_t refcount_cache_bytes)
    : name(image_file.name()),
      geometry(image_header.geometry),
      file(image_file),
      data_file(external_data_file),
      backing(backing_node),
      read_only(is_read_only),
      discard(punch_holes),
      data_file_is_raw(image_header.data_file_is_raw()),
      version(image_header.version),
      compression(image_header.compression),
      l2_cache(geometry.slice_bytes(), l2_cache_bytes,
               std::max<std::uint64_t>(kSlicesForGrowth,
                                       std::uint64_t{image_header.l1_entries}
                                           << (geometry.l2_bits() - geometry.l2_slice_bits()))),
      header(std::move(image_header)),
      refcount_cache(geometry.slice_bytes(), refcount_cache_bytes, ~std::uint64_t{0}) {}

bool ImageState::lookup(std::uint64_t guest_offset, std::uint64_t length, Run& run) const {
  run = {};
  const unsigned words = geometry.l2_entry_words();
  std::array<std::uint64_t, kEntriesPerRead * 2> buffer;
  while (run.length < length) {
    const std::uint64_t at = guest_offset + run.length;
    const std::uint64_t in_cluster = at & geometry.cluster_mask();
    const unsigned first = geometry.index_in_slice(at);
    const std::uint64_t wanted = geometry.clusters_of(in_cluster + (length - run.length));
    const auto count = static_cast<unsigned>(std::min<std::uint64_t>(
        {wanted, (1U << geometry.l2_slice_bits()) - first, kEntriesPerRead}));
    if (!l2_cache.read(geometry.l2_slice(at), std::size_t{first} * words,
                       std::span(buffer).first(std::size_t{count} * words)))
      return run.length > 0;
    for (unsigned i = 0; i < count; ++i) {
      const L2Entry entry{buffer[std::size_t{i} * words],
                          words == 2 ? buffer[std::size_t{i} * 2 + 1] : 0};
      const auto place = place_in_data_file(guest_offset + run.length);
      if (!extend(geometry, entry, i == 0 ? in_cluster : 0, place, length, run)) {
        run.length = std::min(run.length, length);
        return true;
      }
    }
  }
  return true;
}

TableCache::Slot* ImageState::l2_slot(std::uint64_t guest_offset) {
  TableCache::Slot* const slot = l2_cache.find(geometry.l2_slice(guest_offset));
  return slot != nullptr && slot->valid ? slot : nullptr;
}

L2Entry ImageState::entry(const TableCache::Slot& slot, std::uint64_t guest_offset) const {
  const std::size_t word =
      std::size_t{geometry.index_in_slice(guest_offset)} * geometry.l2_entry_words();
  return {l2_cache.word(slot, word), geometry.extended_l2 ? l2_cache.word(slot, word + 1) : 0};
}

void ImageState::set_entry(TableCache::Slot& slot, std::uint64_t guest_offset, const L2Entry& entry,
                           const WriteOrder& order) {
  const std::size_t word =
      std::size_t{geometry.index_in_slice(guest_offset)} * geometry.l2_entry_words();
  // Counted before it can be seen: who sees it and then finds is_stable() may rely on that.
  const std::uint64_t change = next_change();
  l2_cache.begin_change(slot);
  l2_cache.set_word(slot, word, entry.descriptor);
  if (geometry.extended_l2) l2_cache.set_word(slot, word + 1, entry.bitmap);
  l2_cache.end_change(slot);
  l2_cache.mark_dirty(slot, change, order);
}

Allocation* ImageState::conflict(std::uint64_t first_cluster, std::uint64_t last_cluster) const {
  for (Allocation* const allocation : allocations) {
    if (allocation->first_cluster <= last_cluster && first_cluster <= allocation->last_cluster)
      return allocation;
  }
  return nullptr;
}

void ImageState::free_entry(const L2Entry& entry) {
  if (data_file != nullptr) return;  // what is in an external data file has no refcounts
  if ((entry.descriptor & kFlagCompressed) != 0) {
    const CompressedExtent extent = compressed_extent(geometry, entry.descriptor);
    const std::uint64_t first = cluster_of(extent.offset);
    free_clusters(first, cluster_of(extent.offset + extent.length - 1) - first + 1);
  } else if (host_offset(entry) != 0) {
    free_clusters(cluster_of(host_offset(entry)), 1);
  }
}

void ImageState::free_clusters(std::uint64_t first, std::uint64_t count) {
  freed_count += count;
  if (!freed.empty() && freed.back().first + freed.back().count == first) {
    freed.back().count += count;
  } else {
    freed.push_back({.first = first, .count = count, .discard = discard});
  }
}

Task<int> write_header(ImageState& state, IoContext& context) {
  BlockRequest token;
  token.context = &context;
  blockdev::AlignedBuffer buffer(kHeaderSectorBytes);
  std::unique_lock lock(state.mutex);
  while (state.header_writing) co_await state.header_written.wait(lock, token);
  state.header_writing = true;
  encode_header_fields(state.header, std::span(state.header_sector));
  std::ranges::copy(state.header_sector, buffer.data());
  lock.unlock();
  const int error = co_await blockdev::BlockIo(state.file, context,
                                               blockdev::BlockOperation::kWrite, 0, buffer.bytes());
  lock.lock();
  state.header_writing = false;
  state.header_written.wake_all(context);
  co_return error;
}

namespace {

blockdev::Detached write_corrupt_bit(ImageState& state, IoContext& context) {
  {
    const std::lock_guard lock(state.mutex);
    state.header.incompatible_features |= kIncompatCorrupt;
  }
  int error = co_await write_header(state, context);
  // Whoever opens it after a power cut is to know as well.
  if (error == 0)
    error = co_await blockdev::BlockIo(state.file, context, blockdev::BlockOperation::kFlush, 0, 0);
  if (error != 0)
    log::error("'{}': it could not be marked corrupt: {}", state.name, describe_errno(error));
}

}  // namespace

void mark_corrupt(ImageState& state, IoContext& context, const std::string& what) {
  if (state.is_corrupt.exchange(true)) return;
  log::error(
      "'{}' is damaged: {}; it is not changed any more. When nobody uses it, run 'vblk img check' "
      "on it",
      state.name, what);
  // Version 2 has no bit for it.
  if (!state.read_only && state.version >= 3) write_corrupt_bit(state, context);
}

}  // namespace vblk::qcow2
