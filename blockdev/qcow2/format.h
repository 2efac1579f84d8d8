// The qcow2 format's numbers and entries, as native values: no I/O, no state.
//
// Source of every layout: QEMU's docs/interop/qcow2.txt; the section is named at each piece. What
// is on the disk is big-endian and is decoded here and in header.cpp, never by casting.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>

namespace vblk::qcow2 {

inline constexpr std::uint32_t kMagic = 0x514649fb;  // "QFI\xfb"; "Header"

// "Header": incompatible_features, compatible_features, autoclear_features; bit masks.
inline constexpr std::uint64_t kIncompatDirty = 1U << 0;
inline constexpr std::uint64_t kIncompatCorrupt = 1U << 1;
inline constexpr std::uint64_t kIncompatDataFile = 1U << 2;
inline constexpr std::uint64_t kIncompatCompression = 1U << 3;
inline constexpr std::uint64_t kIncompatExtendedL2 = 1U << 4;
inline constexpr std::uint64_t kIncompatKnown = kIncompatDirty | kIncompatCorrupt |
                                                kIncompatDataFile | kIncompatCompression |
                                                kIncompatExtendedL2;
inline constexpr std::uint64_t kCompatLazyRefcounts = 1U << 0;
inline constexpr std::uint64_t kAutoclearBitmaps = 1U << 0;
inline constexpr std::uint64_t kAutoclearRawDataFile = 1U << 1;

enum class Compression : std::uint8_t { kZlib = 0, kZstd = 1 };

// Limits, QEMU's own where it has one, so that an image that opens there opens here.
inline constexpr unsigned kClusterBitsMin = 9;
inline constexpr unsigned kClusterBitsMax = 21;                    // 2 MiB
inline constexpr std::uint64_t kL1BytesMax = 32U << 20;            // "Header", note at size
inline constexpr std::uint64_t kRefcountTableBytesMax = 8U << 20;  // "Host cluster management"
inline constexpr std::uint32_t kSnapshotsMax = 65536;
inline constexpr std::uint64_t kSnapshotTableBytesMax = 64U << 20;
inline constexpr std::uint64_t kHostOffsetMax = std::uint64_t{1} << 56;  // "Cluster mapping": 64 PB

// "Cluster mapping": L1 and L2 table entries; "Host cluster management": refcount table entries.
inline constexpr std::uint64_t kOffsetMask = 0x00ff'ffff'ffff'fe00;
inline constexpr std::uint64_t kL1ReservedMask = 0x7f00'0000'0000'01ff;
inline constexpr std::uint64_t kL2ReservedMask = 0x3f00'0000'0000'01fe;
inline constexpr std::uint64_t kRefcountTableReservedMask = 0x1ff;
inline constexpr std::uint64_t kFlagCopied = std::uint64_t{1} << 63;
inline constexpr std::uint64_t kFlagCompressed = std::uint64_t{1} << 62;
inline constexpr std::uint64_t kFlagZero = 1;  // not with extended L2 entries

inline constexpr unsigned kSubclusters = 32;  // of a cluster, "Extended L2 Entries"

template <typename T>
[[nodiscard]] inline T load_be(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  if constexpr (sizeof value == 8) {
    return static_cast<T>(__builtin_bswap64(value));
  } else if constexpr (sizeof value == 4) {
    return static_cast<T>(__builtin_bswap32(value));
  } else {
    return static_cast<T>(__builtin_bswap16(value));
  }
}
template <typename T>
inline void store_be(std::byte* to, T value) {
  const T swapped = load_be<T>(reinterpret_cast<const std::byte*>(&value));
  std::memcpy(to, &swapped, sizeof swapped);
}
static_assert(std::endian::native == std::endian::little, "the helpers above swap");

// What the header's numbers say of the tables. Powers of two throughout, as exponents.
struct Geometry {
  unsigned cluster_bits{16};
  unsigned refcount_order{4};
  bool extended_l2{false};

  [[nodiscard]] std::uint64_t cluster_bytes() const { return std::uint64_t{1} << cluster_bits; }
  [[nodiscard]] std::uint64_t cluster_mask() const { return cluster_bytes() - 1; }
  [[nodiscard]] std::uint64_t clusters_of(std::uint64_t bytes) const {
    return (bytes >> cluster_bits) + ((bytes & cluster_mask()) != 0 ? 1 : 0);
  }
  // Words of 64 bits in an L2 entry: descriptor and, if extended, subcluster bitmap.
  [[nodiscard]] unsigned l2_entry_words() const { return extended_l2 ? 2 : 1; }
  // Entries in an L2 table.
  [[nodiscard]] unsigned l2_bits() const { return cluster_bits - (extended_l2 ? 4 : 3); }
  // Tables are cached and written in slices: no more than 4 KiB.
  [[nodiscard]] unsigned slice_byte_bits() const { return cluster_bits < 12 ? cluster_bits : 12; }
  [[nodiscard]] std::size_t slice_bytes() const { return std::size_t{1} << slice_byte_bits(); }
  [[nodiscard]] unsigned l2_slice_bits() const { return slice_byte_bits() - (extended_l2 ? 4 : 3); }
  [[nodiscard]] unsigned refcount_block_bits() const { return cluster_bits + 3 - refcount_order; }
  [[nodiscard]] unsigned refcount_slice_bits() const {
    return slice_byte_bits() + 3 - refcount_order;
  }
  [[nodiscard]] std::uint64_t refcount_max() const {
    return refcount_order == 6 ? ~std::uint64_t{0}
                               : (std::uint64_t{1} << (1U << refcount_order)) - 1;
  }
  [[nodiscard]] unsigned subclusters() const { return extended_l2 ? kSubclusters : 1; }
  [[nodiscard]] unsigned subcluster_bits() const { return cluster_bits - (extended_l2 ? 5 : 0); }
  [[nodiscard]] std::uint64_t subcluster_bytes() const {
    return std::uint64_t{1} << subcluster_bits();
  }

  // Guest offset -> where its entry is.
  [[nodiscard]] std::uint64_t l1_index(std::uint64_t guest_offset) const {
    return guest_offset >> (cluster_bits + l2_bits());
  }
  [[nodiscard]] std::uint64_t l2_slice(std::uint64_t guest_offset) const {
    return guest_offset >> (cluster_bits + l2_slice_bits());
  }
  [[nodiscard]] unsigned index_in_slice(std::uint64_t guest_offset) const {
    return static_cast<unsigned>((guest_offset >> cluster_bits) &
                                 ((std::uint64_t{1} << l2_slice_bits()) - 1));
  }
  // Guest bytes that an L2 table maps. At most 2 MiB << 18 = 2^39.
  [[nodiscard]] std::uint64_t l2_table_reach() const {
    return std::uint64_t{1} << (cluster_bits + l2_bits());
  }
};

// One L2 entry. `bitmap` is that of an extended entry, otherwise made up to say the same.
struct L2Entry {
  std::uint64_t descriptor{0};
  std::uint64_t bitmap{0};
};

// What a subcluster is, or a cluster where there are no subclusters. "with space": the entry has a
// host cluster, though not what the guest reads.
enum class Mapping : std::uint8_t {
  kUnallocated,           // reads from the backing file
  kUnallocatedWithSpace,  // extended entries only
  kZero,
  kZeroWithSpace,
  kNormal,
  kCompressed,
  kInvalid,  // breaks the specification
};

[[nodiscard]] inline bool has_space(Mapping mapping) {
  return mapping == Mapping::kNormal || mapping == Mapping::kZeroWithSpace ||
         mapping == Mapping::kUnallocatedWithSpace;
}
[[nodiscard]] inline bool reads_zero(Mapping mapping) {
  return mapping == Mapping::kZero || mapping == Mapping::kZeroWithSpace;
}

[[nodiscard]] inline std::uint64_t host_offset(const L2Entry& entry) {
  return entry.descriptor & kOffsetMask;
}

// `place`: where the cluster must be in an external data file, which is at its guest offset
// ("Header", incompatible_features, bit 2); nullopt without one. There 0 is a place like others,
// and has kFlagCopied set.
[[nodiscard]] inline Mapping mapping_of(const Geometry& geometry, const L2Entry& entry,
                                        unsigned subcluster, std::optional<std::uint64_t> place) {
  const std::uint64_t descriptor = entry.descriptor;
  if ((descriptor & kFlagCompressed) != 0)
    return place || (descriptor & kFlagCopied) != 0 ? Mapping::kInvalid : Mapping::kCompressed;
  const std::uint64_t offset = descriptor & kOffsetMask;
  const bool space = offset != 0 || (place && (descriptor & kFlagCopied) != 0);
  const std::uint64_t reserved =
      geometry.extended_l2 ? kL2ReservedMask | kFlagZero : kL2ReservedMask;
  if ((descriptor & reserved) != 0 || (offset & geometry.cluster_mask()) != 0)
    return Mapping::kInvalid;
  if (place && space && offset != *place) return Mapping::kInvalid;
  if (!geometry.extended_l2) {
    if ((descriptor & kFlagZero) != 0) return space ? Mapping::kZeroWithSpace : Mapping::kZero;
    if (space) return Mapping::kNormal;
    return descriptor == 0 ? Mapping::kUnallocated : Mapping::kInvalid;
  }
  const bool allocated = ((entry.bitmap >> subcluster) & 1) != 0;
  const bool zero = ((entry.bitmap >> (subcluster + kSubclusters)) & 1) != 0;
  if (allocated) return zero || !space ? Mapping::kInvalid : Mapping::kNormal;
  if (zero) return space ? Mapping::kZeroWithSpace : Mapping::kZero;
  return space ? Mapping::kUnallocatedWithSpace : Mapping::kUnallocated;
}

// "Compressed Clusters Descriptor".
struct CompressedExtent {
  std::uint64_t offset;
  std::uint64_t length;  // at most: the data may end earlier in the last sector
};
[[nodiscard]] inline CompressedExtent compressed_extent(const Geometry& geometry,
                                                        std::uint64_t descriptor) {
  const unsigned offset_bits = 62 - (geometry.cluster_bits - 8);
  const std::uint64_t offset = descriptor & ((std::uint64_t{1} << offset_bits) - 1);
  const std::uint64_t more_sectors = (descriptor & ~(kFlagCopied | kFlagCompressed)) >> offset_bits;
  return {offset, (more_sectors + 1) * 512 - offset % 512};
}

// The other way round. `length` is not 0 and at most a cluster.
[[nodiscard]] inline std::uint64_t compressed_descriptor(const Geometry& geometry,
                                                         std::uint64_t offset,
                                                         std::uint64_t length) {
  const unsigned offset_bits = 62 - (geometry.cluster_bits - 8);
  const std::uint64_t more_sectors = (offset + length - 1) / 512 - offset / 512;
  return kFlagCompressed | more_sectors << offset_bits | offset;
}

// "Refcount block entry": entry `index` of a slice, in the big-endian-decoded 64-bit word that
// holds it.
struct RefcountPlace {
  std::size_t word;
  unsigned shift;
  std::uint64_t mask;
};
[[nodiscard]] inline RefcountPlace refcount_place(unsigned order, std::uint64_t index) {
  const std::uint64_t bit = index << order;
  const auto bits = 1U << order;
  const unsigned in_word = static_cast<unsigned>(bit % 64);
  const std::uint64_t mask = bits == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1;
  // Whole bytes come most significant first; inside a byte the first entry is the lowest.
  const unsigned shift = bits >= 8 ? 64 - in_word - bits : (7 - in_word / 8) * 8 + in_word % 8;
  return {static_cast<std::size_t>(bit / 64), shift, mask};
}

}  // namespace vblk::qcow2
