#include "tests/fuzz/image_patches.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "tests/fuzz/hostile_image.h"

namespace vblk::fuzz {

namespace {

using qcow2::testing::Bytes;
using qcow2::testing::get_be;
using qcow2::testing::put_be;

struct Place {
  std::uint64_t offset;
  unsigned length;
};

// "Header": the fields, by name in qcow2.txt.
constexpr std::array kHeaderFields{
    Place{4, 4},    // version
    Place{8, 8},    // backing_file_offset
    Place{16, 4},   // backing_file_size
    Place{20, 4},   // cluster_bits
    Place{24, 8},   // size
    Place{32, 4},   // crypt_method
    Place{36, 4},   // l1_size
    Place{40, 8},   // l1_table_offset
    Place{48, 8},   // refcount_table_offset
    Place{56, 4},   // refcount_table_clusters
    Place{60, 4},   // nb_snapshots
    Place{64, 8},   // snapshots_offset
    Place{72, 8},   // incompatible_features
    Place{80, 8},   // compatible_features
    Place{88, 8},   // autoclear_features
    Place{96, 4},   // refcount_order
    Place{100, 4},  // header_length
    Place{104, 1},  // compression_type
};

constexpr std::array<std::uint32_t, 7> kExtensionTypes{
    0, 0xe2792aca, 0x6803f857, 0x23852875, 0x0537be77, 0x44415441, 0x12345678};

// Where the tables of the valid image are.
struct Layout {
  explicit Layout(const Bytes& image)
      : cluster_bits(static_cast<unsigned>(get_be(image, 20, 4))),
        l1(get_be(image, 40, 8)),
        l1_entries(get_be(image, 36, 4)),
        refcount_table(get_be(image, 48, 8)),
        snapshots(get_be(image, 64, 8)),
        header_end(get_be(image, 4, 4) == 3 ? get_be(image, 100, 4) : 72) {
    refcount_block = get_be(image, refcount_table, 8);
  }
  unsigned cluster_bits;
  std::uint64_t l1;
  std::uint64_t l1_entries;
  std::uint64_t refcount_table;
  std::uint64_t refcount_block{0};
  std::uint64_t snapshots;
  std::uint64_t header_end;
};

class Patcher {
 public:
  Patcher(Input& input, Bytes& image) : input_(input), image_(image), layout_(image) {}

  void apply() {
    const unsigned count = input_.byte() % (kPatchesMax + 1);
    for (unsigned i = 0; i < count && !input_.is_empty(); ++i) patch();
  }

 private:
  void patch();
  void add_extension();
  void put(Place place);
  Place place(unsigned region);
  std::uint64_t value(std::uint64_t old);
  // A host cluster: of the file, or shortly behind its end.
  std::uint64_t pointer();

  Input& input_;
  Bytes& image_;
  const Layout layout_;
  std::uint64_t extension_end_{0};
};

std::uint64_t Patcher::pointer() {
  const std::uint8_t which = input_.byte();
  const std::array<std::uint64_t, 6> tables{
      0,
      layout_.l1,
      layout_.refcount_table,
      layout_.refcount_block,
      layout_.snapshots,
      get_be(image_, layout_.l1, 8) & 0x00ff'ffff'ffff'fe00,
  };
  if (which % 4 == 0) return tables[which / 4 % tables.size()];
  const std::uint64_t clusters = (image_.size() >> layout_.cluster_bits) + 2;
  return (input_.take<std::uint16_t>() % clusters) << layout_.cluster_bits;
}

std::uint64_t Patcher::value(std::uint64_t old) {
  switch (input_.byte() % 8) {
    case 0:
      return input_.take<std::uint64_t>();
    case 1:
      return input_.byte();
    case 2:
      return pointer();
    case 3:
      return pointer() | std::uint64_t{1} << 63;
    case 4:
      // With any of the flags and reserved bits of entries.
      return pointer() | std::uint64_t{input_.byte()} << 56 | input_.byte();
    case 5: {
      // A compressed cluster.
      const unsigned shift = 62 - (layout_.cluster_bits - 8);
      const std::uint64_t sectors = input_.byte();
      return std::uint64_t{1} << 62 | sectors << shift | (pointer() + input_.take<std::uint16_t>());
    }
    case 6:
      return old ^ std::uint64_t{1} << input_.byte() % 64;
    default:
      return ~std::uint64_t{0} >> input_.byte() % 64;
  }
}

Place Patcher::place(unsigned region) {
  const std::uint64_t index = input_.take<std::uint16_t>();
  const std::uint64_t in_cluster = index * 8 & ((std::uint64_t{1} << layout_.cluster_bits) - 1);
  switch (region) {
    case 0:
    case 1:
      return kHeaderFields[index % kHeaderFields.size()];
    case 2:
      return {layout_.header_end + index % 256, 4};
    case 3:
      return {layout_.l1 + index % (layout_.l1_entries + 1) * 8, 8};
    case 4:
    case 5: {
      const std::uint64_t entry = layout_.l1 + input_.byte() % layout_.l1_entries * 8;
      const std::uint64_t table = get_be(image_, entry, 8) & 0x00ff'ffff'ffff'fe00;
      // Mostly the entries at its beginning: the disks are small.
      return {table + (index % 4 == 0 ? in_cluster : in_cluster % 512), 8};
    }
    case 6:
      return {layout_.refcount_table + in_cluster % 64, 8};
    case 7:
      return {layout_.refcount_block + in_cluster, 8};
    case 8:
      return {layout_.snapshots + index % 128, static_cast<unsigned>(1 + index / 128 % 8)};
    default:
      return {index * 8, 8};
  }
}

void Patcher::put(Place place) {
  if (place.offset + place.length > image_.size()) return;
  const std::uint64_t old = get_be(image_, place.offset, place.length);
  put_be(image_, place.offset, place.length, value(old));
}

void Patcher::add_extension() {
  const std::uint32_t type = kExtensionTypes[input_.byte() % kExtensionTypes.size()];
  const std::uint64_t claimed = input_.flag() ? input_.take<std::uint32_t>() : 24;
  const auto content = input_.bytes(input_.byte() % 64);
  const std::uint64_t at = std::max(extension_end_, layout_.header_end);
  if (at + 8 + content.size() + 8 > std::uint64_t{1} << layout_.cluster_bits) return;
  put_be(image_, at, 4, type);
  put_be(image_, at + 4, 4, claimed);
  std::ranges::transform(content, image_.begin() + static_cast<std::ptrdiff_t>(at) + 8,
                         [](std::uint8_t byte) { return std::byte{byte}; });
  extension_end_ = at + 8 + (claimed < 256 ? (claimed + 7) / 8 * 8 : content.size());
}

void Patcher::patch() {
  const unsigned region = input_.byte() % 13;
  if (region < 10) return put(place(region));
  if (region == 10) return add_extension();
  // The file's length: any, or in whole clusters.
  std::uint64_t length = input_.take<std::uint16_t>();
  length = region == 11 ? length << layout_.cluster_bits : length * 8;
  if (length >= 512 && length <= kImageBytesMax) image_.resize(length);
}

}  // namespace

qcow2::testing::ImageSpec take_spec(Input& input) {
  qcow2::testing::ImageSpec spec;
  constexpr std::array kBits{9U, 9U, 10U, 12U, 14U, 16U};
  spec.cluster_bits = kBits[input.byte() % kBits.size()];
  const std::uint8_t flags = input.byte();
  spec.version = (flags & 1) != 0 ? 2 : 3;
  spec.refcount_order = spec.version == 2 ? 4 : input.byte() % 7U;
  spec.extended_l2 = spec.version == 3 && spec.cluster_bits >= 14 && (flags & 2) != 0;
  spec.lazy_refcounts = spec.version == 3 && (flags & 4) != 0;
  spec.snapshot = spec.refcount_order >= 2 && (flags & 8) != 0;
  const std::uint64_t bytes = std::uint64_t{8} << spec.cluster_bits;
  spec.size_bytes = std::min<std::uint64_t>(bytes * (1 + input.byte() % 16U), 128 << 10);
  if ((flags & 16) != 0) spec.backing_bytes = spec.size_bytes / 1024 * 512;
  spec.mapped_percent = input.byte() % 101U;
  spec.compressed_percent = (flags & 32) != 0 ? 40 : 0;
  return spec;
}

void apply_patches(Input& input, Bytes& image) { Patcher(input, image).apply(); }

}  // namespace vblk::fuzz
