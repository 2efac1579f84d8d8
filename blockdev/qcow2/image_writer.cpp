#include "blockdev/qcow2/image_writer.h"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <utility>

#include "blockdev/qcow2/refcount_layout.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::IoContext;
using blockdev::IoGroup;
using blockdev::Task;

namespace {

// The file is made longer by this much at a time, and cut off at the end.
constexpr std::uint64_t kGrowBytes = std::uint64_t{64} << 20;
// Elements of one write: far below IOV_MAX.
constexpr std::size_t kElementsMax = 256;
// Refcounts that are encoded in one go, and bytes of blocks that are written in one.
constexpr std::uint64_t kCountsPerStep = 65536;
constexpr std::uint64_t kRefcountBytesPerWrite = std::uint64_t{1} << 20;

AlignedBuffer zeroes(std::uint64_t bytes) {
  AlignedBuffer buffer(bytes);
  std::ranges::fill(buffer.bytes(), std::byte{0});
  return buffer;
}

}  // namespace

void ImageWriter::Writes::add(blockdev::BlockNode& node, std::uint64_t offset,
                              std::span<const std::byte> bytes) {
  auto* const memory = const_cast<std::byte*>(bytes.data());  // iovec is from before const
  if (!pieces_.empty()) {
    Piece& last = pieces_.back();
    const bool continues = last.node == &node && last.offset + last.length == offset;
    iovec& element = last.memory.back();
    if (continues && static_cast<std::byte*>(element.iov_base) + element.iov_len == memory) {
      element.iov_len += bytes.size();
      last.length += bytes.size();
      return;
    }
    if (continues && last.memory.size() < kElementsMax) {
      last.memory.push_back({memory, bytes.size()});
      last.length += bytes.size();
      return;
    }
  }
  pieces_.push_back({&node, offset, bytes.size(), {{memory, bytes.size()}}});
}

void ImageWriter::Writes::add_owned(blockdev::BlockNode& node, std::uint64_t offset,
                                    AlignedBuffer buffer) {
  owned_.push_back(std::move(buffer));
  add(node, offset, owned_.back().bytes());
}

ImageWriter::ImageWriter(blockdev::RawNode& file, blockdev::RawNode* data_file, Header header,
                         ImageWriterOptions options)
    : file_(file),
      data_file_(data_file),
      geometry_(header.geometry),
      options_(options),
      header_(std::move(header)) {
  const std::uint64_t entries =
      header_.size_bytes == 0 ? 0 : geometry_.l1_index(header_.size_bytes - 1) + 1;
  header_.l1_entries = static_cast<std::uint32_t>(entries);
  header_.l1_table_offset = entries == 0 ? 0 : geometry_.cluster_bytes();
  l1_table_.resize(entries);
  frontier_ = 1 + geometry_.clusters_of(entries * 8);
}

Task<int> ImageWriter::erase_header(IoContext& context) {
  AlignedBuffer cluster = zeroes(geometry_.cluster_bytes());
  int error = file_.grow(geometry_.cluster_bytes());
  if (error == 0)
    error = co_await BlockIo(file_, context, BlockOperation::kWrite, 0, cluster.bytes());
  if (error == 0) error = co_await BlockIo(file_, context, BlockOperation::kFlush, 0, 0);
  co_return error;
}

// Makes the file long enough for what has been taken.
int ImageWriter::make_room() {
  const std::uint64_t end = frontier_ << geometry_.cluster_bits;
  if (end > kHostOffsetMax) return EFBIG;
  if (end <= file_.data_bytes()) return 0;
  if (file_.is_block_device()) return ENOSPC;
  return file_.grow((end + kGrowBytes - 1) / kGrowBytes * kGrowBytes);
}

// Where the entry of a guest cluster is, in a table that is made if need be.
std::byte* ImageWriter::entry(std::uint64_t guest_cluster) {
  const std::uint64_t index = guest_cluster >> geometry_.l2_bits();
  auto found = tables_.find(index);
  if (found == tables_.end())
    found = tables_.emplace(index, zeroes(geometry_.cluster_bytes())).first;
  const std::uint64_t in_table = guest_cluster & ((std::uint64_t{1} << geometry_.l2_bits()) - 1);
  return found->second.data() + in_table * geometry_.l2_entry_words() * 8;
}

// Gives the guest cluster a host cluster with `bytes`, or with what the file has there.
void ImageWriter::map_cluster(std::uint64_t guest_cluster, std::span<const std::byte> bytes,
                              bool reads_backing, Writes& writes) {
  const std::uint64_t guest_offset = guest_cluster << geometry_.cluster_bits;
  const std::uint64_t host_offset =
      data_file_ != nullptr ? guest_offset : take_cluster() << geometry_.cluster_bits;
  std::byte* const to = entry(guest_cluster);
  store_be(to, host_offset | kFlagCopied);
  if (geometry_.extended_l2)
    store_be(to + 8, reads_backing ? std::uint64_t{0} : ~std::uint64_t{0} >> kSubclusters);
  if (bytes.empty()) return;
  if (data_file_ == nullptr) return writes.add(file_, host_offset, bytes);
  writes.add(*data_file_, host_offset,
             bytes.first(std::min<std::uint64_t>(bytes.size(), header_.size_bytes - guest_offset)));
}

// Reads as zeroes where something else would show through.
void ImageWriter::map_zero(std::uint64_t guest_cluster, Writes& writes) {
  if (header_.version < 3) {
    if (zero_cluster_.size() == 0) zero_cluster_ = zeroes(geometry_.cluster_bytes());
    return map_cluster(guest_cluster, zero_cluster_.bytes(), false, writes);
  }
  std::byte* const to = entry(guest_cluster);
  if (geometry_.extended_l2) {
    store_be(to + 8, ~std::uint64_t{0} << kSubclusters);
  } else {
    store_be(to, kFlagZero);
  }
}

void ImageWriter::place_one(std::uint64_t guest_cluster, const NewCluster& cluster,
                            Writes& writes) {
  using Content = NewCluster::Content;
  const bool has_backing = !header_.backing_file.empty();
  switch (cluster.content) {
    case Content::kNothing:
      if (options_.map_everything) map_cluster(guest_cluster, {}, has_backing, writes);
      return;
    case Content::kZero:
      if (has_backing) return map_zero(guest_cluster, writes);
      if (options_.map_everything) map_cluster(guest_cluster, {}, false, writes);
      return;
    case Content::kData:
      return map_cluster(guest_cluster, cluster.bytes, false, writes);
    case Content::kCompressed: {
      const std::uint64_t descriptor = append(cluster.bytes, writes);
      store_be(entry(guest_cluster), descriptor);
      return;
    }
  }
}

int ImageWriter::place(std::uint64_t first_cluster, std::span<const NewCluster> clusters,
                       Writes& writes) {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < clusters.size(); ++i)
    place_one(first_cluster + i, clusters[i], writes);
  mark_placed(first_cluster, clusters.size());
  emit_tables(placed_until_ >> geometry_.l2_bits(), writes);
  return make_room();
}

void ImageWriter::skip(std::uint64_t first_cluster, std::uint64_t count) {
  assert(!options_.map_everything);
  const std::lock_guard lock(mutex_);
  if (count > 0) mark_placed(first_cluster, count);
}

void ImageWriter::open_stream() {
  stream_ = zeroes(geometry_.cluster_bytes());
  stream_cluster_ = take_cluster();
  stream_fill_ = 0;
  stream_counts_.push_back({stream_cluster_, 0});
}

void ImageWriter::emit_stream(Writes& writes) {
  if (stream_cluster_ == 0) return;
  writes.add_owned(file_, stream_cluster_ << geometry_.cluster_bits, std::move(stream_));
  stream_cluster_ = 0;
}

// Adds compressed data to the stream; returns its descriptor. It may begin in one host cluster and
// end in the next, if that is still to be had. Refcounts count the data that touches a cluster, so
// a cluster is left when they are at their end.
std::uint64_t ImageWriter::append(std::span<const std::byte> bytes, Writes& writes) {
  const std::uint64_t cluster_bytes = geometry_.cluster_bytes();
  if (stream_cluster_ != 0) {
    const std::uint64_t left = cluster_bytes - stream_fill_;
    const bool is_counted_out = stream_counts_.back().count >= geometry_.refcount_max();
    const bool can_go_on = frontier_ == stream_cluster_ + 1;
    if (left == 0 || is_counted_out || (bytes.size() > left && !can_go_on)) emit_stream(writes);
  }
  if (stream_cluster_ == 0) open_stream();
  const std::uint64_t offset = (stream_cluster_ << geometry_.cluster_bits) + stream_fill_;
  const std::size_t first_part = std::min<std::size_t>(bytes.size(), cluster_bytes - stream_fill_);
  std::ranges::copy(bytes.first(first_part), stream_.data() + stream_fill_);
  stream_fill_ += first_part;
  ++stream_counts_.back().count;
  if (first_part < bytes.size()) {
    emit_stream(writes);
    open_stream();
    std::ranges::copy(bytes.subspan(first_part), stream_.data());
    stream_fill_ = bytes.size() - first_part;
    ++stream_counts_.back().count;
  }
  return compressed_descriptor(geometry_, offset, bytes.size());
}

void ImageWriter::mark_placed(std::uint64_t first_cluster, std::uint64_t count) {
  placed_ahead_.emplace(first_cluster, first_cluster + count);
  while (!placed_ahead_.empty() && placed_ahead_.begin()->first == placed_until_) {
    placed_until_ = placed_ahead_.begin()->second;
    placed_ahead_.erase(placed_ahead_.begin());
  }
}

// Tables before `end_table` are complete.
void ImageWriter::emit_tables(std::uint64_t end_table, Writes& writes) {
  while (!tables_.empty() && tables_.begin()->first < end_table) {
    const std::uint64_t offset = take_cluster() << geometry_.cluster_bits;
    l1_table_[tables_.begin()->first] = offset | kFlagCopied;
    writes.add_owned(file_, offset, std::move(tables_.begin()->second));
    tables_.erase(tables_.begin());
  }
}

Task<int> ImageWriter::carry_out(IoContext& context, Writes& writes) {
  IoGroup group(context);
  for (Writes::Piece& piece : writes.pieces_)
    group.start(*piece.node, BlockOperation::kWrite, piece.offset, std::move(piece.memory));
  const int error = co_await group;
  writes.pieces_.clear();
  writes.owned_.clear();
  co_return error;
}

Task<int> ImageWriter::write_tables(IoContext& context) {
  Writes writes;
  emit_stream(writes);
  emit_tables(~std::uint64_t{0}, writes);
  int error = make_room();
  if (error == 0) error = co_await carry_out(context, writes);
  if (error == 0) error = co_await write_refcounts(context);
  if (error != 0 || l1_table_.empty()) co_return error;
  AlignedBuffer l1_table =
      zeroes(geometry_.clusters_of(l1_table_.size() * 8) << geometry_.cluster_bits);
  for (std::size_t i = 0; i < l1_table_.size(); ++i)
    store_be(l1_table.data() + i * 8, l1_table_[i]);
  error = co_await BlockIo(file_, context, BlockOperation::kWrite, header_.l1_table_offset,
                           l1_table.bytes());
  co_return error;
}

// The refcounts of [first, +counts.size()), called with rising `first`.
void ImageWriter::counts_of(std::uint64_t first, std::span<std::uint32_t> counts) {
  std::ranges::fill(counts, 1U);
  for (; next_count_ < stream_counts_.size(); ++next_count_) {
    const StreamCount& known = stream_counts_[next_count_];
    if (known.cluster >= first + counts.size()) return;
    counts[known.cluster - first] = static_cast<std::uint32_t>(known.count);
  }
}

Task<int> ImageWriter::write_refcounts(IoContext& context) {
  const RefcountLayout layout = plan_refcounts(geometry_, frontier_);
  if (!layout.is_possible(geometry_)) co_return EFBIG;
  frontier_ = layout.end();
  if (end_bytes() > kHostOffsetMax) co_return EFBIG;
  int error = 0;
  if (file_.is_block_device()) {
    error = end_bytes() <= file_.data_bytes() ? 0 : ENOSPC;
  } else {
    // No shorter than what has been written, no longer than what is needed.
    error = end_bytes() > file_.data_bytes() ? file_.grow(end_bytes()) : file_.shrink(end_bytes());
  }
  if (error != 0) co_return error;
  AlignedBuffer table = zeroes(layout.table_clusters << geometry_.cluster_bits);
  for (std::uint64_t i = 0; i < layout.blocks; ++i)
    store_be(table.data() + i * 8, (layout.first_block() + i) << geometry_.cluster_bits);
  error = co_await BlockIo(file_, context, BlockOperation::kWrite,
                           layout.first << geometry_.cluster_bits, table.bytes());
  const std::uint64_t range = std::uint64_t{1} << geometry_.refcount_block_bits();
  const std::uint64_t step = std::min(range, kCountsPerStep);
  const std::uint64_t step_bytes = (step << geometry_.refcount_order) / 8;
  const std::uint64_t blocks_per_write =
      std::max<std::uint64_t>(1, kRefcountBytesPerWrite >> geometry_.cluster_bits);
  std::vector<std::uint32_t> counts(step);
  for (std::uint64_t block = 0; block < layout.blocks && error == 0; block += blocks_per_write) {
    const std::uint64_t blocks = std::min(blocks_per_write, layout.blocks - block);
    AlignedBuffer bytes = zeroes(blocks << geometry_.cluster_bits);
    for (std::uint64_t at = 0; at < blocks * range; at += step) {
      const std::uint64_t first = block * range + at;
      if (first >= layout.end()) break;
      const auto some = std::span(counts).first(std::min(step, layout.end() - first));
      counts_of(first, some);
      encode_refcounts(geometry_, some,
                       bytes.bytes().subspan((at << geometry_.refcount_order) / 8, step_bytes));
    }
    error =
        co_await BlockIo(file_, context, BlockOperation::kWrite,
                         (layout.first_block() + block) << geometry_.cluster_bits, bytes.bytes());
  }
  header_.refcount_table_offset = layout.first << geometry_.cluster_bits;
  header_.refcount_table_clusters = static_cast<std::uint32_t>(layout.table_clusters);
  co_return error;
}

Task<int> ImageWriter::write_hidden_header(IoContext& context) {
  AlignedBuffer cluster(geometry_.cluster_bytes());
  if (!encode_header(header_, cluster.bytes())) co_return EINVAL;
  store_be(cluster.data(), std::uint32_t{0});
  const int error = co_await BlockIo(file_, context, BlockOperation::kWrite, 0, cluster.bytes());
  co_return error;
}

Task<int> ImageWriter::reveal_header(IoContext& context) {
  AlignedBuffer sector(kHeaderSectorBytes);
  int error = co_await BlockIo(file_, context, BlockOperation::kRead, 0, sector.bytes());
  if (error != 0) co_return error;
  store_be(sector.data(), kMagic);
  error = co_await BlockIo(file_, context, BlockOperation::kWrite, 0, sector.bytes());
  co_return error;
}

}  // namespace vblk::qcow2
