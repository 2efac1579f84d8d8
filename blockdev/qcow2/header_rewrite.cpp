#include "blockdev/qcow2/header_rewrite.h"

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/header_layout.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::IoContext;
using blockdev::Task;

namespace {

// Where the extensions of a header end, at the latest, that decode_header() has taken.
std::size_t extensions_end(std::span<const std::byte> header) {
  const auto name = load_be<std::uint64_t>(header.data() + kBackingOffsetAt);
  return name == 0 ? header.size() : std::min<std::size_t>(name, header.size());
}

std::size_t header_length_of(std::span<const std::byte> header) {
  return load_be<std::uint32_t>(header.data() + kVersionAt) >= 3
             ? load_be<std::uint32_t>(header.data() + kHeaderLengthAt)
             : kHeaderBytesV2;
}

// Fields, over those that are there.
std::size_t write_fields(const Header& header, std::size_t old_length, std::span<std::byte> bytes) {
  std::byte* const to = bytes.data();
  store_be(to + kVersionAt, header.version);
  encode_header_fields(header, bytes.first<kHeaderSectorBytes>());
  if (header.version < 3) return kHeaderBytesV2;
  const std::size_t length = std::max(old_length, kHeaderBytesWritten);
  store_be(to + kCompatibleAt, header.compatible_features);
  store_be(to + kRefcountOrderAt, std::uint32_t{header.geometry.refcount_order});
  store_be(to + kHeaderLengthAt, static_cast<std::uint32_t>(length));
  to[kCompressionTypeAt] = static_cast<std::byte>(header.compression);
  return length;
}

// Where `length` bytes can be written that the old header does not use, in sectors of their own; 0:
// nowhere.
std::size_t unused_place(std::span<const std::byte> old, std::size_t length) {
  std::size_t extensions = header_length_of(old);
  for (const std::size_t end = extensions_end(old); extensions + 8 <= end;) {
    const auto type = load_be<std::uint32_t>(old.data() + extensions);
    const auto bytes = load_be<std::uint32_t>(old.data() + extensions + 4);
    extensions += 8;
    if (type == kExtensionEnd || bytes > end - extensions) break;
    extensions += (std::size_t{bytes} + 7) / 8 * 8;
  }
  const auto name = static_cast<std::size_t>(load_be<std::uint64_t>(old.data() + kBackingOffsetAt));
  const std::size_t name_end =
      name == 0 ? 0 : name + load_be<std::uint32_t>(old.data() + kBackingSizeAt);
  const std::size_t whole =
      (length + kHeaderSectorBytes - 1) / kHeaderSectorBytes * kHeaderSectorBytes;
  for (std::size_t at = kHeaderSectorBytes; at + whole <= old.size(); at += kHeaderSectorBytes) {
    if (at >= extensions && (at >= name_end || at + whole <= name)) return at;
  }
  return 0;
}

// Of the old extensions those that are not written from `header`, which nobody here knows.
bool keep_unknown(std::span<const std::byte> old, ExtensionWriter& extensions) {
  const std::size_t end = extensions_end(old);
  for (std::size_t at = header_length_of(old); at + 8 <= end;) {
    const auto type = load_be<std::uint32_t>(old.data() + at);
    const auto length = load_be<std::uint32_t>(old.data() + at + 4);
    if (type == kExtensionEnd || length > end - at - 8) break;
    const bool is_known = type == kExtensionBackingFormat || type == kExtensionDataFile ||
                          type == kExtensionBitmaps || type == kExtensionFeatureNames;
    if (!is_known) {
      const std::span<std::byte> place = extensions.add(type, length);
      if (length > 0 && place.empty()) return false;
      std::ranges::copy(old.subspan(at + 8, length), place.begin());
    }
    at += 8 + (std::size_t{length} + 7) / 8 * 8;
  }
  return true;
}

}  // namespace

Expected<std::size_t> rewrite_header(std::span<std::byte> first_cluster, const Header& header,
                                     bool with_feature_names, std::size_t name_at) {
  if (header.backing_file.size() > kBackingNameBytesMax ||
      header.data_file.size() > kDataFileNameBytesMax)
    return no_room();
  const std::vector<std::byte> old(first_cluster.begin(), first_cluster.end());
  const std::size_t old_length = header_length_of(old);
  std::ranges::fill(first_cluster.subspan(old_length), std::byte{0});
  const std::size_t length = write_fields(header, old_length, first_cluster);
  if (length < old_length)
    std::ranges::fill(first_cluster.subspan(length, old_length - length), std::byte{0});
  ExtensionWriter extensions(first_cluster, length);
  bool fits = extensions.add_text(kExtensionBackingFormat, header.backing_format) &&
              extensions.add_text(kExtensionDataFile, header.data_file);
  if (fits && header.bitmap_directory) {
    const std::span<std::byte> place = extensions.add(kExtensionBitmaps, kBitmapsExtensionBytes);
    fits = !place.empty();
    if (fits) encode_bitmaps_extension(header, place);
  }
  const std::string& name = header.backing_file;
  // With the mark behind the last one.
  const auto has_room = [&](const ExtensionWriter& writer) {
    const std::size_t at = name_at == 0 ? writer.end() : name_at;
    return writer.end() <= at && at + name.size() <= first_cluster.size();
  };
  fits = fits && keep_unknown(old, extensions) && has_room(extensions);
  if (!fits) {
    std::ranges::copy(old, first_cluster.begin());
    return no_room();
  }
  if (with_feature_names && header.version >= 3) {
    ExtensionWriter with_names = extensions;
    add_feature_names(with_names);
    if (has_room(with_names)) {
      extensions = with_names;
    } else {
      std::ranges::fill(first_cluster.subspan(extensions.end() - 8), std::byte{0});
    }
  }
  const std::size_t at = name_at == 0 ? extensions.end() : name_at;
  store_be(first_cluster.data() + kBackingOffsetAt, std::uint64_t{name.empty() ? 0 : at});
  store_be(first_cluster.data() + kBackingSizeAt, static_cast<std::uint32_t>(name.size()));
  std::ranges::copy(std::as_bytes(std::span(name)),
                    first_cluster.begin() + static_cast<std::ptrdiff_t>(at));
  return at + name.size();
}

namespace {

// The second way: the name first, where nobody looks yet.
Task<int> replace_with_name_apart(blockdev::RawNode& file, IoContext& context, const Header& header,
                                  AlignedBuffer& old, std::size_t name_at) {
  if (!rewrite_header(old.bytes(), header, false, name_at)) co_return EINVAL;
  const std::size_t sectors =
      (header.backing_file.size() + kHeaderSectorBytes - 1) / kHeaderSectorBytes;
  int error = co_await BlockIo(file, context, BlockOperation::kWrite, name_at,
                               old.bytes().subspan(name_at, sectors * kHeaderSectorBytes));
  if (error == 0) error = co_await BlockIo(file, context, BlockOperation::kFlush, 0, 0);
  if (error == 0)
    error = co_await BlockIo(file, context, BlockOperation::kWrite, 0,
                             old.bytes().first(kHeaderSectorBytes));
  if (error == 0) error = co_await BlockIo(file, context, BlockOperation::kFlush, 0, 0);
  co_return error;
}

}  // namespace

Task<int> replace_header(blockdev::RawNode& file, IoContext& context, const Header& header,
                         std::string& why) {
  const std::uint64_t cluster_bytes = header.geometry.cluster_bytes();
  AlignedBuffer old(cluster_bytes);
  int error = co_await BlockIo(file, context, BlockOperation::kRead, 0, old.bytes());
  if (error != 0) co_return error;
  AlignedBuffer brief(cluster_bytes);
  AlignedBuffer whole(cluster_bytes);
  std::ranges::copy(old.bytes(), brief.data());
  std::ranges::copy(old.bytes(), whole.data());
  const auto brief_bytes = rewrite_header(brief.bytes(), header, false);
  const auto whole_bytes = rewrite_header(whole.bytes(), header, true);
  if (!brief_bytes || !whole_bytes) {
    why = (brief_bytes ? whole_bytes : brief_bytes).error().message;
    co_return EINVAL;
  }
  // Up to where something is used, or was.
  const auto rest_of = [](AlignedBuffer& cluster) {
    return cluster.bytes().subspan(kHeaderSectorBytes);
  };
  const std::size_t rest_bytes = *whole_bytes <= kHeaderSectorBytes
                                     ? 0
                                     : (*whole_bytes - 1) / kHeaderSectorBytes * kHeaderSectorBytes;
  const auto rest = rest_of(whole).first(rest_bytes);
  const bool rest_changes = !std::ranges::equal(rest, rest_of(old).first(rest_bytes));
  const bool is_in_steps = *brief_bytes <= kHeaderSectorBytes;
  const bool only_name_is_long = *brief_bytes - header.backing_file.size() <= kHeaderSectorBytes;
  if (rest_changes && !is_in_steps && only_name_is_long) {
    const std::size_t place = unused_place(old.bytes(), header.backing_file.size());
    if (place != 0) {
      error = co_await replace_with_name_apart(file, context, header, old, place);
      co_return error;
    }
  }
  if (rest_changes && is_in_steps) {
    error = co_await BlockIo(file, context, BlockOperation::kWrite, 0,
                             brief.bytes().first(kHeaderSectorBytes));
    if (error == 0) error = co_await BlockIo(file, context, BlockOperation::kFlush, 0, 0);
    if (error == 0)
      error = co_await BlockIo(file, context, BlockOperation::kWrite, kHeaderSectorBytes, rest);
    if (error == 0) error = co_await BlockIo(file, context, BlockOperation::kFlush, 0, 0);
    if (error != 0) co_return error;
  }
  const std::size_t last_bytes =
      kHeaderSectorBytes + (rest_changes && !is_in_steps ? rest_bytes : 0);
  error =
      co_await BlockIo(file, context, BlockOperation::kWrite, 0, whole.bytes().first(last_bytes));
  if (error == 0) error = co_await BlockIo(file, context, BlockOperation::kFlush, 0, 0);
  co_return error;
}

}  // namespace vblk::qcow2
