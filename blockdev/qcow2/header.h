// The header of a qcow2 image and its extensions (qcow2.txt, "Header", "Header extensions"),
// decoded once and checked: what decode_header() returns breaks no rule that can be seen without
// reading more of the file.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "aio/error.h"
#include "blockdev/qcow2/format.h"

namespace vblk::qcow2 {

// A piece of the file: table, directory, encryption header.
struct Extent {
  std::uint64_t offset{0};
  std::uint64_t length{0};
};

struct Header {
  std::uint32_t version{3};
  Geometry geometry;
  std::uint64_t size_bytes{0};  // of the virtual disk
  std::uint32_t crypt_method{0};
  std::uint32_t l1_entries{0};
  std::uint64_t l1_table_offset{0};
  std::uint64_t refcount_table_offset{0};
  std::uint32_t refcount_table_clusters{0};
  std::uint32_t snapshot_count{0};
  std::uint64_t snapshots_offset{0};
  std::uint64_t incompatible_features{0};
  std::uint64_t compatible_features{0};
  std::uint64_t autoclear_features{0};
  std::uint32_t header_length{72};
  Compression compression{Compression::kZlib};

  std::string backing_file;                // empty: none
  std::string backing_format;              // empty: not recorded
  std::string data_file;                   // empty: not recorded
  std::optional<Extent> bitmap_directory;  // only where the autoclear bit vouches for it
  std::uint32_t bitmap_count{0};           // in it
  std::optional<Extent> encryption_header;
  // "Feature name table": (kind of feature, bit) -> name.
  std::map<std::pair<unsigned, unsigned>, std::string> feature_names;

  [[nodiscard]] bool has(std::uint64_t incompatible) const {
    return (incompatible_features & incompatible) != 0;
  }
  [[nodiscard]] bool has_data_file() const { return has(kIncompatDataFile); }
  [[nodiscard]] bool data_file_is_raw() const {
    return (autoclear_features & kAutoclearRawDataFile) != 0;
  }
};

// The fields that change while an image is open all lie in its first sector, which a disk writes
// whole or not at all.
inline constexpr std::size_t kHeaderSectorBytes = 512;

// Longest part of the first cluster that is looked at.
inline constexpr std::size_t kHeaderBytesMax = std::size_t{1} << kClusterBitsMax;

// Cluster size as the first bytes of an image say, to know how much of it to read.
// Errors as decode_header().
Expected<std::uint64_t> header_cluster_bytes(std::span<const std::byte> first_bytes,
                                             std::string_view path);

// `first_cluster` is the first cluster of the file, or as much as there is. `path` is for messages.
// Errors: kInvalidArgument (not a qcow2 image), kCorrupt (breaks the specification), kNotSupported
// (a version, a feature, by its name, encryption).
Expected<Header> decode_header(std::span<const std::byte> first_cluster, std::string_view path);

// Writes the fields that can change over those of the image's first sector.
void encode_header_fields(const Header& header, std::span<std::byte, kHeaderSectorBytes> sector);

// Fills the first cluster of a new image: fields, extensions, the names of features (version 3, if
// there is room), the name of the backing file. What `header` holds without being told of, an
// encryption header, is not written. Error: kInvalidArgument: the names have no room in the
// cluster, or are longer than the specification lets them be.
Expected<void> encode_header(const Header& header, std::span<std::byte> cluster);

}  // namespace vblk::qcow2
