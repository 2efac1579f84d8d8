#include "blockdev/qcow2/header.h"

#include <algorithm>
#include <array>

#include <fmt/core.h>

#include "blockdev/qcow2/header_layout.h"

namespace vblk::qcow2 {

namespace {

class Decoder {
 public:
  Decoder(std::span<const std::byte> bytes, std::string_view path) : bytes_(bytes), path_(path) {}

  Expected<Header> decode();

 private:
  std::unexpected<Error> corrupt(std::string_view why) const {
    return make_error(
        ErrorKind::kCorrupt,
        fmt::format("'{}' is a damaged qcow2 image: {}; 'vblk img check' may say more", path_,
                    why));
  }
  std::unexpected<Error> unsupported(std::string_view what) const {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("qcow2 image '{}' uses {}", path_, what));
  }
  template <typename T>
  [[nodiscard]] T at(std::size_t offset) const {
    return load_be<T>(bytes_.data() + offset);
  }
  [[nodiscard]] std::string text(std::size_t offset, std::size_t length) const {
    return {reinterpret_cast<const char*>(bytes_.data()) + offset, length};
  }

  void decode_fields();
  Expected<void> decode_extensions();
  Expected<void> decode_extension(std::uint32_t type, std::size_t offset, std::uint32_t length);
  void decode_feature_names(std::size_t offset, std::uint32_t length);
  Expected<void> decode_backing_file();
  Expected<void> check_features() const;
  Expected<void> check_fields() const;
  [[nodiscard]] bool is_table_aligned(std::uint64_t offset) const {
    return (offset & header_.geometry.cluster_mask()) == 0 && offset < kHostOffsetMax;
  }

  std::span<const std::byte> bytes_;
  std::string_view path_;
  Header header_;
};

Expected<Header> Decoder::decode() {
  const auto cluster_bytes = header_cluster_bytes(bytes_, path_);
  if (!cluster_bytes) return std::unexpected(cluster_bytes.error());
  decode_fields();
  if (header_.version == 3 && bytes_.size() < kHeaderBytesV3)
    return corrupt("it ends within its header");
  if (header_.header_length < (header_.version == 2 ? kHeaderBytesV2 : kHeaderBytesV3) ||
      header_.header_length > bytes_.size())
    return corrupt(fmt::format("its header_length is {}", header_.header_length));
  // Extensions first: they hold the names of features.
  if (auto extensions = decode_extensions(); !extensions)
    return std::unexpected(std::move(extensions.error()));
  if (auto features = check_features(); !features)
    return std::unexpected(std::move(features.error()));
  if (auto fields = check_fields(); !fields) return std::unexpected(std::move(fields.error()));
  if (auto backing = decode_backing_file(); !backing)
    return std::unexpected(std::move(backing.error()));
  return std::move(header_);
}

void Decoder::decode_fields() {
  header_.version = at<std::uint32_t>(kVersionAt);
  header_.geometry.cluster_bits = at<std::uint32_t>(kClusterBitsAt);
  header_.size_bytes = at<std::uint64_t>(kSizeAt);
  header_.crypt_method = at<std::uint32_t>(kCryptMethodAt);
  header_.l1_entries = at<std::uint32_t>(kL1EntriesAt);
  header_.l1_table_offset = at<std::uint64_t>(kL1OffsetAt);
  header_.refcount_table_offset = at<std::uint64_t>(kRefcountTableAt);
  header_.refcount_table_clusters = at<std::uint32_t>(kRefcountClustersAt);
  header_.snapshot_count = at<std::uint32_t>(kSnapshotCountAt);
  header_.snapshots_offset = at<std::uint64_t>(kSnapshotsAt);
  if (header_.version < 3 || bytes_.size() < kHeaderBytesV3) return;
  header_.incompatible_features = at<std::uint64_t>(kIncompatibleAt);
  header_.compatible_features = at<std::uint64_t>(kCompatibleAt);
  header_.autoclear_features = at<std::uint64_t>(kAutoclearAt);
  header_.geometry.refcount_order = at<std::uint32_t>(kRefcountOrderAt);
  header_.header_length = at<std::uint32_t>(kHeaderLengthAt);
  header_.geometry.extended_l2 = header_.has(kIncompatExtendedL2);
}

Expected<void> Decoder::decode_extensions() {
  const std::uint64_t backing_offset = at<std::uint64_t>(kBackingOffsetAt);
  const std::size_t end =
      backing_offset != 0
          ? static_cast<std::size_t>(std::min<std::uint64_t>(backing_offset, bytes_.size()))
          : bytes_.size();
  std::size_t offset = header_.header_length;
  while (offset + 8 <= end) {
    const auto type = at<std::uint32_t>(offset);
    const auto length = at<std::uint32_t>(offset + 4);
    if (type == kExtensionEnd) return {};
    offset += 8;
    if (length > end - offset) return corrupt("a header extension leaves the first cluster");
    if (auto decoded = decode_extension(type, offset, length); !decoded) return decoded;
    offset += (std::size_t{length} + 7) / 8 * 8;
  }
  return {};
}

Expected<void> Decoder::decode_extension(std::uint32_t type, std::size_t offset,
                                         std::uint32_t length) {
  switch (type) {
    case kExtensionBackingFormat:
      header_.backing_format = text(offset, length);
      return {};
    case kExtensionDataFile:
      header_.data_file = text(offset, length);
      if (length > kDataFileNameBytesMax || header_.data_file.find('\0') != std::string::npos)
        return corrupt("the name of its external data file is too long or contains a zero byte");
      return {};
    case kExtensionFeatureNames:
      decode_feature_names(offset, length);
      return {};
    case kExtensionEncryption:
      if (length < 16) return corrupt("its encryption header pointer is too short");
      header_.encryption_header = {at<std::uint64_t>(offset), at<std::uint64_t>(offset + 8)};
      return {};
    case kExtensionBitmaps:
      // "Bitmaps extension": without the bit it may say anything, and its clusters may be others'.
      if ((header_.autoclear_features & kAutoclearBitmaps) == 0) return {};
      if (length != kBitmapsExtensionBytes || at<std::uint32_t>(offset + 4) != 0)
        return corrupt("its bitmaps extension has another length, or reserved bits set");
      header_.bitmap_count = at<std::uint32_t>(offset);
      header_.bitmap_directory = {at<std::uint64_t>(offset + 16), at<std::uint64_t>(offset + 8)};
      if (header_.bitmap_count == 0 || header_.bitmap_directory->length == 0)
        return corrupt("its bitmaps extension names no bitmaps");
      return {};
    default:
      return {};  // "can be safely ignored"
  }
}

void Decoder::decode_feature_names(std::size_t offset, std::uint32_t length) {
  for (std::size_t entry = 0; entry + kFeatureNameBytes <= length; entry += kFeatureNameBytes) {
    const auto type = std::to_integer<unsigned>(bytes_[offset + entry]);
    const auto bit = std::to_integer<unsigned>(bytes_[offset + entry + 1]);
    std::string name = text(offset + entry + 2, kFeatureNameBytes - 2);
    name.resize(std::min(name.find('\0'), name.size()));
    // It goes into messages: nothing that a terminal would act on.
    std::ranges::replace_if(name, [](char c) { return c < ' ' || c > '~'; }, '?');
    header_.feature_names[{type, bit}] = std::move(name);
  }
}

Expected<void> Decoder::check_features() const {
  const std::uint64_t unknown = header_.incompatible_features & ~kIncompatKnown;
  for (unsigned bit = 0; bit < 64; ++bit) {
    if (((unknown >> bit) & 1) == 0) continue;
    const auto name = header_.feature_names.find({0U, bit});
    return unsupported(
        fmt::format("the incompatible feature {} ({}), which is not known here", bit,
                    name == header_.feature_names.end() ? "without a name" : name->second));
  }
  if (header_.crypt_method == 1)
    return unsupported(
        "AES encryption, which nobody should rely on; decrypt it with 'qemu-img convert'");
  if (header_.crypt_method == 2)
    return unsupported(
        "LUKS encryption, which is not supported; decrypt it with 'qemu-img convert'");
  if (header_.crypt_method != 0)
    return unsupported(fmt::format("the unknown encryption method {}", header_.crypt_method));
  return {};
}

Expected<void> Decoder::check_fields() const {
  const Geometry& geometry = header_.geometry;
  if (geometry.refcount_order > 6)
    return corrupt(fmt::format("its refcount_order is {}", geometry.refcount_order));
  if (geometry.extended_l2 && geometry.cluster_bits < 14)
    return corrupt("it has extended L2 entries and clusters of less than 16 KiB");
  if (header_.size_bytes > (std::uint64_t{1} << 61))
    return corrupt(fmt::format("its size is {} bytes", header_.size_bytes));
  if (std::uint64_t{header_.l1_entries} * 8 > kL1BytesMax)
    return corrupt(fmt::format("its L1 table has {} entries", header_.l1_entries));
  const std::uint64_t needed =
      header_.size_bytes == 0 ? 0 : geometry.l1_index(header_.size_bytes - 1) + 1;
  if (header_.l1_entries < needed)
    return corrupt(
        fmt::format("its L1 table has {} entries instead of {}", header_.l1_entries, needed));
  if (!is_table_aligned(header_.l1_table_offset))
    return corrupt("its L1 table does not begin with a cluster");
  if (header_.refcount_table_clusters == 0 || header_.refcount_table_offset == 0)
    return corrupt("it has no refcount table");
  if (header_.refcount_table_clusters > kRefcountTableBytesMax >> geometry.cluster_bits)
    return corrupt(
        fmt::format("its refcount table has {} clusters", header_.refcount_table_clusters));
  if (!is_table_aligned(header_.refcount_table_offset))
    return corrupt("its refcount table does not begin with a cluster");
  if (header_.snapshot_count > kSnapshotsMax)
    return corrupt(fmt::format("it has {} snapshots", header_.snapshot_count));
  if (header_.snapshot_count > 0 && !is_table_aligned(header_.snapshots_offset))
    return corrupt("its snapshot table does not begin with a cluster");
  if (header_.bitmap_directory && !is_table_aligned(header_.bitmap_directory->offset))
    return corrupt("its bitmap directory does not begin with a cluster");
  const std::uint8_t compression_type =
      header_.header_length > kCompressionTypeAt
          ? std::to_integer<std::uint8_t>(bytes_[kCompressionTypeAt])
          : 0;
  if (header_.has(kIncompatCompression) != (compression_type != 0))
    return corrupt("its compression type contradicts its features");
  if (compression_type > 1)
    return unsupported(fmt::format("the unknown compression type {}", compression_type));
  if (header_.data_file_is_raw() && !header_.has_data_file())
    return corrupt("it says that its data file is raw, and has none");
  if (header_.has_data_file() && header_.snapshot_count > 0)
    return corrupt("it has an external data file and internal snapshots");
  return {};
}

Expected<void> Decoder::decode_backing_file() {
  if (header_.header_length > kCompressionTypeAt)
    header_.compression = static_cast<Compression>(bytes_[kCompressionTypeAt]);
  const auto offset = at<std::uint64_t>(kBackingOffsetAt);
  const auto length = at<std::uint32_t>(kBackingSizeAt);
  if (offset == 0) return {};
  if (length > kBackingNameBytesMax || offset > bytes_.size() || length > bytes_.size() - offset)
    return corrupt("the name of its backing file leaves the first cluster");
  header_.backing_file = text(static_cast<std::size_t>(offset), length);
  if (header_.backing_file.find('\0') != std::string::npos)
    return corrupt("the name of its backing file contains a zero byte");
  if (!header_.backing_file.empty() && header_.data_file_is_raw())
    return corrupt("it has a raw external data file and a backing file");
  return {};
}

}  // namespace

Expected<std::uint64_t> header_cluster_bytes(std::span<const std::byte> first_bytes,
                                             std::string_view path) {
  if (first_bytes.size() < kHeaderBytesV2 || load_be<std::uint32_t>(first_bytes.data()) != kMagic) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' is not a qcow2 image; if it is a raw one, say so (--format "
                                  "raw; of vblk img, -f raw)",
                                  path));
  }
  const auto version = load_be<std::uint32_t>(first_bytes.data() + kVersionAt);
  if (version != 2 && version != 3) {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("'{}' is a qcow image of version {}; versions 2 and 3 are supported", path,
                    version));
  }
  const auto cluster_bits = load_be<std::uint32_t>(first_bytes.data() + kClusterBitsAt);
  if (cluster_bits < kClusterBitsMin || cluster_bits > kClusterBitsMax) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("qcow2 image '{}' has clusters of 2^{} bytes; 2^9 to 2^21 are "
                                  "supported",
                                  path, cluster_bits));
  }
  return std::uint64_t{1} << cluster_bits;
}

Expected<Header> decode_header(std::span<const std::byte> first_cluster, std::string_view path) {
  return Decoder(first_cluster, path).decode();
}

void encode_header_fields(const Header& header, std::span<std::byte, kHeaderSectorBytes> sector) {
  std::byte* const to = sector.data();
  store_be(to + kSizeAt, header.size_bytes);
  store_be(to + kL1EntriesAt, header.l1_entries);
  store_be(to + kL1OffsetAt, header.l1_table_offset);
  store_be(to + kRefcountTableAt, header.refcount_table_offset);
  store_be(to + kRefcountClustersAt, header.refcount_table_clusters);
  store_be(to + kSnapshotCountAt, header.snapshot_count);
  store_be(to + kSnapshotsAt, header.snapshots_offset);
  if (header.version < 3) return;
  store_be(to + kIncompatibleAt, header.incompatible_features);
  store_be(to + kAutoclearAt, header.autoclear_features);
}

Expected<void> encode_header(const Header& header, std::span<std::byte> cluster) {
  std::ranges::fill(cluster, std::byte{0});
  std::byte* const to = cluster.data();
  const bool is_v3 = header.version >= 3;
  store_be(to, kMagic);
  store_be(to + kVersionAt, header.version);
  store_be(to + kClusterBitsAt, std::uint32_t{header.geometry.cluster_bits});
  store_be(to + kSizeAt, header.size_bytes);
  store_be(to + kCryptMethodAt, std::uint32_t{0});
  store_be(to + kL1EntriesAt, header.l1_entries);
  store_be(to + kL1OffsetAt, header.l1_table_offset);
  store_be(to + kRefcountTableAt, header.refcount_table_offset);
  store_be(to + kRefcountClustersAt, header.refcount_table_clusters);
  store_be(to + kSnapshotCountAt, header.snapshot_count);
  store_be(to + kSnapshotsAt, header.snapshots_offset);
  if (is_v3) {
    store_be(to + kIncompatibleAt, header.incompatible_features);
    store_be(to + kCompatibleAt, header.compatible_features);
    store_be(to + kAutoclearAt, header.autoclear_features);
    store_be(to + kRefcountOrderAt, std::uint32_t{header.geometry.refcount_order});
    store_be(to + kHeaderLengthAt, static_cast<std::uint32_t>(kHeaderBytesWritten));
    to[kCompressionTypeAt] = static_cast<std::byte>(header.compression);
  }
  if (header.backing_file.size() > kBackingNameBytesMax ||
      header.data_file.size() > kDataFileNameBytesMax)
    return no_room();
  ExtensionWriter extensions(cluster, is_v3 ? kHeaderBytesWritten : kHeaderBytesV2);
  if (!extensions.add_text(kExtensionBackingFormat, header.backing_format) ||
      !extensions.add_text(kExtensionDataFile, header.data_file))
    return no_room();
  if (header.bitmap_directory) {
    const std::span<std::byte> place = extensions.add(kExtensionBitmaps, kBitmapsExtensionBytes);
    if (place.empty()) return no_room();
    encode_bitmaps_extension(header, place);
  }
  if (extensions.room() < header.backing_file.size()) return no_room();
  ExtensionWriter with_names = extensions;
  if (is_v3) add_feature_names(with_names);
  // The names of features are for people; they make way for what is needed.
  if (with_names.room() >= header.backing_file.size()) {
    extensions = with_names;
  } else {
    std::ranges::fill(cluster.subspan(extensions.end() - 8), std::byte{0});
  }
  if (header.backing_file.empty()) return {};
  const std::size_t at = extensions.end();
  store_be(to + kBackingOffsetAt, std::uint64_t{at});
  store_be(to + kBackingSizeAt, static_cast<std::uint32_t>(header.backing_file.size()));
  std::ranges::copy(std::as_bytes(std::span(header.backing_file)),
                    cluster.begin() + static_cast<std::ptrdiff_t>(at));
  return {};
}

}  // namespace vblk::qcow2
