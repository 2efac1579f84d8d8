// Where the fields of a header lie, and its extensions as they are written (qcow2.txt, "Header",
// "Header extensions"). For what reads and writes headers; others have header.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "aio/error.h"
#include "blockdev/qcow2/header.h"

namespace vblk::qcow2 {

// "Header": byte offsets of the fields.
inline constexpr std::size_t kVersionAt = 4;
inline constexpr std::size_t kBackingOffsetAt = 8;
inline constexpr std::size_t kBackingSizeAt = 16;
inline constexpr std::size_t kClusterBitsAt = 20;
inline constexpr std::size_t kSizeAt = 24;
inline constexpr std::size_t kCryptMethodAt = 32;
inline constexpr std::size_t kL1EntriesAt = 36;
inline constexpr std::size_t kL1OffsetAt = 40;
inline constexpr std::size_t kRefcountTableAt = 48;
inline constexpr std::size_t kRefcountClustersAt = 56;
inline constexpr std::size_t kSnapshotCountAt = 60;
inline constexpr std::size_t kSnapshotsAt = 64;
inline constexpr std::size_t kIncompatibleAt = 72;
inline constexpr std::size_t kCompatibleAt = 80;
inline constexpr std::size_t kAutoclearAt = 88;
inline constexpr std::size_t kRefcountOrderAt = 96;
inline constexpr std::size_t kHeaderLengthAt = 100;
inline constexpr std::size_t kCompressionTypeAt = 104;
// With the compression type, a multiple of 8.
inline constexpr std::size_t kHeaderBytesWritten = 112;
inline constexpr std::size_t kHeaderBytesV2 = 72;
inline constexpr std::size_t kHeaderBytesV3 = 104;
inline constexpr std::uint32_t kBackingNameBytesMax = 1023;
inline constexpr std::uint32_t kDataFileNameBytesMax = 4095;  // PATH_MAX less its zero byte

// "Header extensions".
inline constexpr std::uint32_t kExtensionEnd = 0;
inline constexpr std::uint32_t kExtensionBackingFormat = 0xe2792aca;
inline constexpr std::uint32_t kExtensionFeatureNames = 0x6803f857;
inline constexpr std::uint32_t kExtensionBitmaps = 0x23852875;
inline constexpr std::uint32_t kExtensionEncryption = 0x0537be77;
inline constexpr std::uint32_t kExtensionDataFile = 0x44415441;
inline constexpr std::size_t kFeatureNameBytes = 48;
inline constexpr std::size_t kBitmapsExtensionBytes = 24;

struct FeatureName {
  std::uint8_t kind;  // 0 incompatible, 1 compatible, 2 autoclear
  std::uint8_t bit;
  std::string_view name;
};
inline constexpr std::array kFeatureNames{FeatureName{0, 0, "dirty bit"},
                                          FeatureName{0, 1, "corrupt bit"},
                                          FeatureName{0, 2, "external data file"},
                                          FeatureName{0, 3, "compression type"},
                                          FeatureName{0, 4, "extended L2 entries"},
                                          FeatureName{1, 0, "lazy refcounts"},
                                          FeatureName{2, 0, "bitmaps"},
                                          FeatureName{2, 1, "raw external data"}};

// Puts one extension after another into a cluster.
class ExtensionWriter {
 public:
  ExtensionWriter(std::span<std::byte> cluster, std::size_t at) : cluster_(cluster), at_(at) {}

  // Where its bytes go, which are zeroes; empty: there is no room.
  [[nodiscard]] std::span<std::byte> add(std::uint32_t type, std::size_t length) {
    const std::size_t padded = (length + 7) / 8 * 8;
    if (cluster_.size() - at_ < kMarkBytes || padded > cluster_.size() - at_ - kMarkBytes)
      return {};
    store_be(cluster_.data() + at_, type);
    store_be(cluster_.data() + at_ + 4, static_cast<std::uint32_t>(length));
    const std::span<std::byte> place = cluster_.subspan(at_ + kMarkBytes, length);
    at_ += kMarkBytes + padded;
    return place;
  }
  [[nodiscard]] bool add_text(std::uint32_t type, std::string_view text) {
    if (text.empty()) return true;
    const std::span<std::byte> place = add(type, text.size());
    if (place.empty()) return false;
    std::ranges::copy(std::as_bytes(std::span(text)), place.begin());
    return true;
  }
  // Behind the end mark, which is zeroes.
  [[nodiscard]] std::size_t end() const { return at_ + kMarkBytes; }
  [[nodiscard]] std::size_t room() const {
    return end() > cluster_.size() ? 0 : cluster_.size() - end();
  }

 private:
  static constexpr std::size_t kMarkBytes = 8;  // type and length
  std::span<std::byte> cluster_;
  std::size_t at_;
};

inline void add_feature_names(ExtensionWriter& extensions) {
  const std::span<std::byte> place =
      extensions.add(kExtensionFeatureNames, kFeatureNames.size() * kFeatureNameBytes);
  if (place.empty()) return;
  for (std::size_t i = 0; i < kFeatureNames.size(); ++i) {
    const auto entry = place.subspan(i * kFeatureNameBytes, kFeatureNameBytes);
    entry[0] = static_cast<std::byte>(kFeatureNames[i].kind);
    entry[1] = static_cast<std::byte>(kFeatureNames[i].bit);
    std::ranges::copy(std::as_bytes(std::span(kFeatureNames[i].name)), entry.begin() + 2);
  }
}

// "Bitmaps extension", of a header that has a bitmap directory.
inline void encode_bitmaps_extension(const Header& header, std::span<std::byte> place) {
  store_be(place.data(), header.bitmap_count);
  store_be(place.data() + 8, header.bitmap_directory->length);
  store_be(place.data() + 16, header.bitmap_directory->offset);
}

inline std::unexpected<Error> no_room() {
  return make_error(ErrorKind::kInvalidArgument,
                    "the names of its backing file and data file have no room in the first cluster "
                    "of the image; use larger clusters, or shorter names");
}

}  // namespace vblk::qcow2
