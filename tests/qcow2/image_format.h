// Small qcow2 images made in memory, of every geometry: the test's own formatter, which shares no
// code with what it tests.
//
// Sectors hold tags: a 64-bit number, repeated, so that what a sector holds says who wrote it. 0 is
// a sector of zeroes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace vblk::qcow2::testing {

using Bytes = std::vector<std::byte>;
using Tags = std::vector<std::uint64_t>;  // one for each sector

inline constexpr std::uint64_t kSectorBytes = 512;

inline std::uint64_t get_be(std::span<const std::byte> bytes, std::uint64_t offset,
                            unsigned length) {
  std::uint64_t value = 0;
  for (unsigned i = 0; i < length; ++i)
    value = value << 8 | std::to_integer<std::uint64_t>(bytes[offset + i]);
  return value;
}
inline void put_be(std::span<std::byte> bytes, std::uint64_t offset, unsigned length,
                   std::uint64_t value) {
  for (unsigned i = 0; i < length; ++i)
    bytes[offset + i] = static_cast<std::byte>(value >> (8 * (length - 1 - i)));
}

// A refcount as the specification describes it: bit by bit.
std::uint64_t get_refcount(std::span<const std::byte> block, unsigned order, std::uint64_t index);
void put_refcount(std::span<std::byte> block, unsigned order, std::uint64_t index,
                  std::uint64_t count);

void fill_sector(std::span<std::byte> sector, std::uint64_t tag);
// The tag of a sector, or kNoTag if it holds none.
inline constexpr std::uint64_t kNoTag = ~std::uint64_t{0};
std::uint64_t tag_of(std::span<const std::byte> sector);
Tags tags_of(std::span<const std::byte> bytes);
Bytes bytes_of(std::span<const std::uint64_t> tags);

// Where an image has its data ("Header", bit 2 of incompatible_features and bit 1 of
// autoclear_features).
enum class DataFile : std::uint8_t { kNone, kMapped, kRaw };

struct ImageSpec {
  unsigned version{3};
  unsigned cluster_bits{16};
  unsigned refcount_order{4};
  bool extended_l2{false};
  bool lazy_refcounts{false};
  std::uint64_t size_bytes{std::uint64_t{1} << 20};
  std::uint64_t backing_bytes{0};  // 0: no backing file
  bool snapshot{false};            // all that is mapped is shared with an internal snapshot
  // Version 3, nothing compressed, no snapshot; raw: no backing file, and no zero flags either.
  DataFile data_file{DataFile::kNone};
  bool bitmap{false};  // there is a persistent one, which says something of the disk; version 3
  bool zstd{false};    // what is compressed is so by zstd; version 3
  // Guest clusters that are mapped at all, and of those that are compressed, in percent.
  unsigned mapped_percent{0};
  unsigned compressed_percent{0};

  [[nodiscard]] std::string to_string() const;
  // Whether the data file must read as the disk does, whatever has happened: it always does where
  // no mapping has to be written before the disk shows what was written to the data file.
  [[nodiscard]] bool data_file_is_the_disk() const {
    return data_file == DataFile::kRaw && mapped_percent == 100;
  }
};

// The files of an image, as they are at one moment.
struct ImageFiles {
  Bytes image;
  Bytes data_file;  // empty: none
};

struct FormattedImage {
  Bytes bytes;
  Bytes data_file;  // empty: none
  [[nodiscard]] ImageFiles files() const { return {.image = bytes, .data_file = data_file}; }
  Tags disk;     // what the guest sees
  Tags backing;  // of the backing file
};

FormattedImage format_image(const ImageSpec& spec, std::mt19937_64& random);

}  // namespace vblk::qcow2::testing
