#include "blockdev/img/converter.h"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <thread>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/img/output.h"
#include "blockdev/img/zeroes.h"
#include "blockdev/qcow2/compression.h"

namespace vblk::img {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::IoGroup;
using qcow2::ImageWriter;
using qcow2::NewCluster;

namespace {

constexpr std::uint64_t kChunkBytes = std::uint64_t{1} << 20;
// Of one thread, where it is enough: while one chunk is written, the next ones are read.
constexpr unsigned kCopiersMin = 4;

}  // namespace

// One worker's.
struct Converter::Buffers {
  AlignedBuffer data;
  AlignedBuffer compressed;
  std::vector<NewCluster> clusters;
};

Converter::Converter(const ConvertPlan& plan, Progress& progress)
    : plan_(plan),
      progress_(progress),
      cluster_bytes_(plan.writer != nullptr ? plan.writer->header().geometry.cluster_bytes()
                     : fills_clusters()     ? plan.target->compressed_unit_bytes()
                                            : 0),
      chunk_bytes_(std::max(kChunkBytes, cluster_bytes_)),
      on_one_thread_(plan.one_write_at_a_time && !plan.compression),
      kernel_copies_(plan.copy_fd >= 0),
      next_write_(std::chrono::steady_clock::now()) {
  std::uint64_t begin = 0;
  for (Source* const source : plan_.sources) {
    parts_.push_back(
        {source, begin, std::make_unique<StatusReader>(source->node.get(), plan_.depth_max)});
    begin += source->size_bytes();
  }
  // Where every cluster is mapped, each has to be placed.
  may_skip_ = zeroes_need_nothing() && (plan.writer == nullptr || !plan.writer->maps_everything());
}

Expected<void> Converter::run_on(unsigned workers, unsigned threads_max) {
  std::vector<BlockNode*> nodes;
  for (Source* const source : plan_.sources) {
    if (source->node) nodes.push_back(source->node.get());
  }
  if (plan_.target != nullptr) nodes.push_back(plan_.target);
  return run_workers(workers, threads_max, nodes,
                     [this](IoContext& context) { return work(context); });
}

Expected<void> Converter::run() {
  if (on_one_thread_) {
    const unsigned copiers =
        std::max(std::min(plan_.workers_max, kCopiersMin), plan_.workers_max / 2);
    if (auto ran = run_on(copiers, 1); !ran) return ran;
    on_one_thread_ = false;
  }
  if (!error_ && next_ < plan_.size_bytes) {
    if (auto ran = run_on(plan_.workers_max, kThreadPerProcessor); !ran) return ran;
  }
  if (error_) return std::unexpected(*error_);
  if (plan_.writer != nullptr && may_skip_ && next_ > 0) {
    // What is left behind the last chunk has been skipped.
    const qcow2::Geometry& geometry = plan_.writer->header().geometry;
    plan_.writer->skip(
        geometry.clusters_of(skipped_from_),
        geometry.clusters_of(plan_.size_bytes) - geometry.clusters_of(skipped_from_));
  }
  return {};
}

bool Converter::take(Chunk& chunk) {
  const std::lock_guard lock(mutex_);
  if (failed_.load(std::memory_order_relaxed)) return false;
  if (on_one_thread_ && has_compressed_.load(std::memory_order_relaxed)) return false;
  if (may_skip_ && empty_until_ > next_) {
    const std::uint64_t whole = empty_until_ >= plan_.size_bytes
                                    ? plan_.size_bytes
                                    : empty_until_ / chunk_bytes_ * chunk_bytes_;
    if (whole > next_) {
      progress_.advance(whole - next_);
      next_ = whole;
    }
  }
  if (next_ >= plan_.size_bytes) return false;
  chunk = {.number = next_number_++,
           .skipped_from = skipped_from_,
           .begin = next_,
           .end = std::min(plan_.size_bytes, next_ + chunk_bytes_)};
  next_ = chunk.end;
  skipped_from_ = chunk.end;
  return true;
}

void Converter::note_error(const char* what, std::uint64_t offset, int error) {
  const std::lock_guard lock(mutex_);
  failed_.store(true, std::memory_order_relaxed);
  if (error_) return;
  error_ =
      Error{kind_of_errno(error), error,
            fmt::format("cannot {} at byte {}: {}", what, offset,
                        error == EFBIG ? "the image becomes too large" : describe_errno(error))};
}

Task<int> Converter::work(IoContext& context) {
  Buffers buffers{.data = AlignedBuffer(chunk_bytes_), .compressed = {}, .clusters = {}};
  if (plan_.compression && plan_.writer != nullptr)
    buffers.compressed = AlignedBuffer(chunk_bytes_);
  Chunk chunk;
  while (take(chunk)) {
    [[maybe_unused]] const int ignored = co_await convert(context, chunk, buffers);
    progress_.advance(chunk.end - chunk.begin);
  }
  co_return 0;
}

// The one that has `offset`; nullptr: beyond the last.
const Converter::Part* Converter::part_at(std::uint64_t offset) const {
  const auto next = std::ranges::upper_bound(parts_, offset, {}, &Part::begin);
  if (next == parts_.begin()) return nullptr;
  const Part& part = *std::prev(next);
  return offset - part.begin < part.source->size_bytes() ? &part : nullptr;
}

// How the chunk is stored, in pieces side by side.
Task<int> Converter::look(IoContext& context, const Chunk& chunk, std::vector<Piece>& pieces) {
  if (plan_.window) {
    pieces.push_back({chunk.begin, chunk.end, Content::kData});
    co_return 0;
  }
  int told = 0;  // once for a chunk
  for (std::uint64_t at = chunk.begin; at < chunk.end;) {
    const Part* const part = part_at(at);
    Piece piece{.begin = at, .end = plan_.size_bytes, .content = Content::kZero};
    if (part != nullptr) {
      // Further than the chunk reaches: what has nothing is passed over as a whole.
      ChainStatus status;
      const int error = co_await part->status->read(
          context, at - part->begin, part->source->size_bytes() - (at - part->begin), status);
      if (error != 0 && !plan_.salvage) co_return error;
      if (error != 0) {
        // Perhaps it can be read all the same; what comes behind it may be stored otherwise.
        if (!plan_.quiet && error != told) {
          warn("vblk img: warning: cannot find out what there is at byte {}: {}; taken as data\n",
               at, describe_errno(error));
        }
        told = error;
        status = {.is_data = true, .length_bytes = blockdev::kSectorBytes};
      }
      piece.end = at + status.length_bytes;
      if (status.is_data) {
        piece.content = Content::kData;
        if (status.is_compressed) has_compressed_.store(true, std::memory_order_relaxed);
        // A file may end within a sector.
        piece.end = (piece.end + blockdev::kSectorBytes - 1) / blockdev::kSectorBytes *
                    blockdev::kSectorBytes;
      }
      if (!status.is_data && !status.is_zero) piece.content = Content::kBacking;
    }
    if (may_skip_ && piece.content == Content::kZero && piece.end > chunk.end) {
      const std::lock_guard lock(mutex_);
      if (next_ <= piece.end && next_ >= at) empty_until_ = std::max(empty_until_, piece.end);
    }
    piece.end = std::min(piece.end, chunk.end);
    at = piece.end;
    if (!pieces.empty() && pieces.back().content == piece.content) {
      pieces.back().end = piece.end;
    } else {
      pieces.push_back(piece);
    }
  }
  co_return 0;
}

// A cluster of the target that the source has in part, and its backing file in another, is taken
// whole from the source.
void Converter::widen_to_clusters(const Chunk& chunk, std::vector<Piece>& pieces) const {
  if (plan_.writer == nullptr || plan_.depth_max == kWholeChain) return;
  const std::uint64_t mask = plan_.writer->header().geometry.cluster_mask();
  std::vector<Piece> widened;
  const auto add = [&widened](Piece piece) {
    if (piece.begin >= piece.end) return;
    if (!widened.empty() && widened.back().content == piece.content) {
      widened.back().end = piece.end;
    } else {
      widened.push_back(piece);
    }
  };
  std::size_t next = 0;
  for (std::uint64_t at = chunk.begin; at < chunk.end;) {
    while (pieces[next].end <= at) ++next;
    const std::uint64_t cluster_end = std::min(chunk.end, (at | mask) + 1);
    if (pieces[next].end >= cluster_end) {
      // One piece up to its last whole cluster, or the chunk's end.
      const std::uint64_t end =
          pieces[next].end >= chunk.end ? chunk.end : pieces[next].end & ~mask;
      add({at, end, pieces[next].content});
      at = end;
    } else {
      add({at, cluster_end, Content::kData});
      at = cluster_end;
    }
  }
  pieces = std::move(widened);
}

Task<int> Converter::read_piece(IoContext& context, std::uint64_t at, std::span<std::byte> bytes) {
  IoGroup group(context);
  if (plan_.window) {
    const auto [skip_bytes, window_bytes] = *plan_.window;
    const std::uint64_t inside =
        std::min<std::uint64_t>(bytes.size(), window_bytes - std::min(window_bytes, at));
    std::ranges::fill(bytes.subspan(inside), std::byte{0});
    bytes = bytes.first(inside);
    at += skip_bytes;
  }
  while (!bytes.empty()) {
    const Part* const part = part_at(at);
    if (part == nullptr) {
      std::ranges::fill(bytes, std::byte{0});
      break;
    }
    const std::uint64_t in_part = at - part->begin;
    const auto length = std::min<std::uint64_t>(bytes.size(), part->source->size_bytes() - in_part);
    group.start(*part->source->node, BlockOperation::kRead, in_part, {{bytes.data(), length}});
    at += length;
    bytes = bytes.subspan(length);
  }
  const int error = co_await group;
  co_return error;
}

// Sector by sector.
Task<int> Converter::salvage(IoContext& context, std::uint64_t at, std::span<std::byte> bytes) {
  for (; !bytes.empty(); bytes = bytes.subspan(blockdev::kSectorBytes)) {
    const auto sector = bytes.first(blockdev::kSectorBytes);
    const int error = co_await read_piece(context, at, sector);
    if (error != 0) {
      std::ranges::fill(sector, std::byte{0});
      if (!plan_.quiet) {
        warn("vblk img: warning: cannot read at byte {}: {}; taken as zeroes\n", at,
             describe_errno(error));
      }
    }
    at += blockdev::kSectorBytes;
  }
  co_return 0;
}

// What is not data is zeroes in the buffer.
Task<int> Converter::read(IoContext& context, const Chunk& chunk, const std::vector<Piece>& pieces,
                          Buffers& buffers) {
  const bool has_data = std::ranges::find(pieces, Content::kData, &Piece::content) != pieces.end();
  if (!has_data && plan_.sparse_bytes != 0) co_return 0;
  for (const Piece& piece : pieces) {
    const auto bytes =
        buffers.data.bytes().subspan(piece.begin - chunk.begin, piece.end - piece.begin);
    if (piece.content != Content::kData) {
      std::ranges::fill(bytes, std::byte{0});
      continue;
    }
    int error = co_await read_piece(context, piece.begin, bytes);
    if (error != 0 && plan_.salvage) error = co_await salvage(context, piece.begin, bytes);
    if (error != 0) {
      note_error("read", piece.begin, error);
      co_return error;
    }
  }
  co_return 0;
}

// Waits as long as the rate demands. What else this thread has in flight waits too: that is what a
// limit is for.
void Converter::pace(std::uint64_t bytes) {
  if (plan_.rate_bytes == 0 || bytes == 0) return;
  std::chrono::steady_clock::time_point when;
  {
    const std::lock_guard lock(mutex_);
    when = std::max(next_write_, std::chrono::steady_clock::now());
    next_write_ =
        when + std::chrono::nanoseconds(static_cast<std::int64_t>(
                   1e9 * static_cast<double>(bytes) / static_cast<double>(plan_.rate_bytes)));
  }
  std::this_thread::sleep_until(when);
}

// ---- Into a new qcow2 image.

void Converter::plan_clusters(const Chunk& chunk, const std::vector<Piece>& pieces,
                              Buffers& buffers) const {
  buffers.clusters.clear();
  std::uint64_t compressed_at = 0;
  std::size_t next = 0;
  for (std::uint64_t at = chunk.begin; at < chunk.end; at += cluster_bytes_) {
    const std::uint64_t end = std::min(at + cluster_bytes_, chunk.end);
    while (pieces[next].end <= at) ++next;
    bool has_data = pieces[next].content == Content::kData;
    for (std::size_t i = next + 1; i < pieces.size() && pieces[i].begin < end; ++i)
      has_data = has_data || pieces[i].content == Content::kData;
    const auto bytes = buffers.data.bytes().subspan(at - chunk.begin, cluster_bytes_);
    NewCluster cluster;
    if (plan_.sparse_bytes == 0 && pieces[next].content == Content::kZero) has_data = true;
    if (has_data && (plan_.sparse_bytes == 0 || !is_zero(bytes))) {
      cluster = {.content = NewCluster::Content::kData, .bytes = bytes};
    } else if (has_data || pieces[next].content == Content::kZero) {
      cluster.content = NewCluster::Content::kZero;
    }
    const bool compresses = plan_.writer != nullptr && plan_.compression;
    if (compresses && cluster.content == NewCluster::Content::kData) {
      // One byte less than a cluster: otherwise it is better off as it is.
      const auto place = buffers.compressed.bytes().subspan(compressed_at, cluster_bytes_ - 1);
      const std::size_t length = qcow2::compress(*plan_.compression, bytes, place);
      if (length > 0)
        cluster = {.content = NewCluster::Content::kCompressed, .bytes = place.first(length)};
      compressed_at += cluster_bytes_;
    }
    buffers.clusters.push_back(cluster);
  }
}

Task<int> Converter::write_clusters(IoContext& context, const Chunk& chunk, Buffers& buffers) {
  ImageWriter& writer = *plan_.writer;
  const qcow2::Geometry& geometry = writer.header().geometry;
  ImageWriter::Writes writes;
  if (chunk.skipped_from < chunk.begin) {
    writer.skip(chunk.skipped_from >> geometry.cluster_bits,
                (chunk.begin - chunk.skipped_from) >> geometry.cluster_bits);
  }
  int error = writer.place(chunk.begin >> geometry.cluster_bits, buffers.clusters, writes);
  if (plan_.in_order) turns_.pass(context);
  if (error == 0) error = co_await ImageWriter::carry_out(context, writes);
  if (error != 0) note_error("write", chunk.begin, error);
  co_return error;
}

// ---- Into a disk.

// Takes zeroes out of the data, in runs of `sparse_bytes` at multiples of that.
void Converter::split_at_zeroes(const Chunk& chunk, std::vector<Piece>& pieces,
                                Buffers& buffers) const {
  if (plan_.sparse_bytes == 0) {
    pieces = {{chunk.begin, chunk.end, Content::kData}};
    return;
  }
  std::vector<Piece> split;
  for (const Piece& piece : pieces) {
    if (piece.content != Content::kData) {
      split.push_back(piece);
      continue;
    }
    const std::size_t first = split.size();
    for (std::uint64_t at = piece.begin; at < piece.end;) {
      const std::uint64_t end =
          std::min(piece.end, at / plan_.sparse_bytes * plan_.sparse_bytes + plan_.sparse_bytes);
      const auto bytes = buffers.data.bytes().subspan(at - chunk.begin, end - at);
      const Content content = is_zero(bytes) ? Content::kZero : Content::kData;
      if (split.size() > first && split.back().content == content) {
        split.back().end = end;
      } else {
        split.push_back({at, end, content});
      }
      at = end;
    }
  }
  pieces = std::move(split);
}

Task<int> Converter::write_disk(IoContext& context, const Chunk& chunk,
                                const std::vector<Piece>& pieces, Buffers& buffers) {
  IoGroup group(context);
  for (const Piece& piece : pieces) {
    const std::uint64_t length = piece.end - piece.begin;
    if (piece.content == Content::kData) {
      if (plan_.written) plan_.written(piece.begin, length);
      group.start(*plan_.target, BlockOperation::kWrite, piece.begin,
                  {{buffers.data.data() + (piece.begin - chunk.begin), length}});
    }
  }
  if (plan_.in_order) turns_.pass(context);
  int error = co_await group;
  for (const Piece& piece : pieces) {
    if (error == 0 && piece.content == Content::kZero)
      error = co_await write_zeroes(context, piece.begin, piece.end);
  }
  if (error != 0) note_error("write", chunk.begin, error);
  co_return error;
}

Task<int> Converter::write_zeroes(IoContext& context, std::uint64_t begin, std::uint64_t end) {
  if (zeroes_need_nothing()) co_return 0;
  if (plan_.written) plan_.written(begin, end - begin);
  BlockIo zeroes(*plan_.target, context, BlockOperation::kWriteZeroes, begin, end - begin);
  zeroes.may_unmap = true;
  const int error = co_await zeroes;
  co_return error;
}

// Others compress beside it.
Task<int> Converter::write_compressed(IoContext& context, const Chunk& chunk, Buffers& buffers) {
  if (plan_.in_order) turns_.pass(context);
  int error = 0;
  std::uint64_t at = chunk.begin;
  for (const NewCluster& cluster : buffers.clusters) {
    const std::uint64_t end = std::min(at + cluster_bytes_, chunk.end);
    if (error != 0) break;
    const auto bytes = buffers.data.bytes().subspan(at - chunk.begin, cluster_bytes_);
    if (cluster.content != NewCluster::Content::kData) {
      error = co_await write_zeroes(context, at, end);
    } else if (end - at < cluster_bytes_ && end < plan_.target->size_bytes()) {
      // What the target has behind the source's end stays.
      if (plan_.written) plan_.written(at, end - at);
      error = co_await BlockIo(*plan_.target, context, BlockOperation::kWrite, at,
                               bytes.first(end - at));
    } else {
      if (plan_.written) plan_.written(at, end - at);
      error = co_await plan_.target->write_compressed(context, at, bytes);
    }
    at = end;
  }
  if (error != 0) note_error("write", chunk.begin, error);
  co_return error;
}

// ---- By the kernel, from file to file.

// As much of the beginning of a piece as lies in a file as it is. What the kernel refuses to copy
// is read and written; so is the last sector of a file that ends within it.
Task<int> Converter::copy_piece(IoContext& context, const Piece& piece,
                                std::uint64_t& copied_until) {
  std::uint64_t at = piece.begin;
  while (at < piece.end && kernel_copies_.load(std::memory_order_relaxed)) {
    const Part* const part = part_at(at);
    if (part == nullptr) break;
    const std::uint64_t in_part = at - part->begin;
    const std::uint64_t length = std::min(piece.end - at, part->source->size_bytes() - in_part);
    ChainStatus status;
    const int error = co_await chain_status(*part->source->node, context, in_part, length,
                                            plan_.depth_max, status);
    if (error != 0 && !plan_.salvage) co_return error;
    if (error != 0 || !status.is_data || !status.file_offset) break;
    if (plan_.written) plan_.written(at, status.length_bytes);
    pace(status.length_bytes);
    auto from = static_cast<off64_t>(*status.file_offset);
    auto to = static_cast<off64_t>(at);
    const auto end = static_cast<off64_t>(at + status.length_bytes);
    ssize_t count = 0;
    while (to < end) {
      count = ::copy_file_range(status.fd, &from, plan_.copy_fd, &to,
                                static_cast<std::size_t>(end - to), 0);
      if (count <= 0 && !(count < 0 && errno == EINTR)) break;
    }
    // Whatever it is: who reads and writes will be told.
    if (count < 0) kernel_copies_.store(false, std::memory_order_relaxed);
    at = static_cast<std::uint64_t>(to);
    if (to < end) break;
  }
  copied_until = std::max(piece.begin, at / blockdev::kSectorBytes * blockdev::kSectorBytes);
  co_return 0;
}

Task<int> Converter::copy_in_kernel(IoContext& context, std::vector<Piece>& pieces) {
  std::vector<Piece> left;
  int error = 0;
  for (const Piece& piece : pieces) {
    std::uint64_t copied_until = piece.begin;
    if (error == 0 && piece.content == Content::kData)
      error = co_await copy_piece(context, piece, copied_until);
    if (copied_until > piece.begin) left.push_back({piece.begin, copied_until, Content::kCopied});
    if (copied_until < piece.end) left.push_back({copied_until, piece.end, piece.content});
  }
  pieces = std::move(left);
  co_return error;
}

// Its turn is passed on in any case: others wait for it.
Task<int> Converter::convert(IoContext& context, const Chunk& chunk, Buffers& buffers) {
  std::vector<Piece> pieces;
  int error = co_await look(context, chunk, pieces);
  if (error != 0) note_error("find out what there is", chunk.begin, error);
  if (error == 0) {
    widen_to_clusters(chunk, pieces);
    if (plan_.copy_fd >= 0) error = co_await copy_in_kernel(context, pieces);
    if (error != 0) note_error("copy", chunk.begin, error);
  }
  if (error == 0) error = co_await read(context, chunk, pieces, buffers);
  if (error == 0 && fills_clusters()) {
    // The rest of the disk's last cluster.
    std::ranges::fill(buffers.data.bytes().subspan(chunk.end - chunk.begin), std::byte{0});
    plan_clusters(chunk, pieces, buffers);
  } else if (error == 0) {
    split_at_zeroes(chunk, pieces, buffers);
  }
  if (error == 0) {
    std::uint64_t data_bytes = 0;
    for (const Piece& piece : pieces) {
      if (piece.content == Content::kData) data_bytes += piece.end - piece.begin;
    }
    pace(data_bytes);
  }
  if (plan_.in_order) {
    [[maybe_unused]] const int ignored = co_await turns_.wait(context, chunk.number);
  }
  if (error != 0) {
    if (plan_.in_order) turns_.pass(context);
    co_return error;
  }
  if (plan_.writer != nullptr) {
    error = co_await write_clusters(context, chunk, buffers);
  } else if (fills_clusters()) {
    error = co_await write_compressed(context, chunk, buffers);
  } else {
    error = co_await write_disk(context, chunk, pieces, buffers);
  }
  co_return error;
}

}  // namespace vblk::img
