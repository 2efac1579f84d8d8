#include "tests/qcow2/image_check.h"

#include <algorithm>
#include <set>
#include <utility>
#include <zlib.h>
#include <zstd.h>

#include <fmt/core.h>

namespace vblk::qcow2::testing {

namespace {

constexpr std::uint64_t kOffset = 0x00ff'ffff'ffff'fe00;
constexpr std::uint64_t kCopied = std::uint64_t{1} << 63;
constexpr std::uint64_t kCompressed = std::uint64_t{1} << 62;
constexpr std::uint64_t kSnapshotBytesMax = std::uint64_t{1} << 26;

bool inflate_raw(std::span<const std::byte> compressed, std::span<std::byte> out) {
  z_stream stream{};
  inflateInit2(&stream, -12);
  stream.next_in = const_cast<Bytef*>(  // NOLINT: zlib's type
      reinterpret_cast<const Bytef*>(compressed.data()));
  stream.avail_in = static_cast<uInt>(compressed.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  const int result = inflate(&stream, Z_FINISH);
  const bool is_whole =
      stream.total_out == out.size() && (result == Z_STREAM_END || result == Z_BUF_ERROR);
  inflateEnd(&stream);
  return is_whole;
}

// What follows in the last sector is others'.
bool unzstd(std::span<const std::byte> compressed, std::span<std::byte> out) {
  const std::size_t length = ZSTD_findFrameCompressedSize(compressed.data(), compressed.size());
  return ZSTD_isError(length) == 0 &&
         ZSTD_decompress(out.data(), out.size(), compressed.data(), length) == out.size();
}

class Checker {
 public:
  Checker(std::span<const std::byte> image, std::span<const std::uint64_t> backing,
          std::span<const std::byte> data_file)
      : image_(image), backing_(backing), data_file_(data_file) {}

  CheckedImage check();

 private:
  void error(std::string what) {
    if (checked_.errors.size() < 10) checked_.errors.push_back(std::move(what));
  }
  // Whether [offset, +length) begins in the file; the last cluster may be cut short.
  bool is_inside(std::uint64_t offset, std::uint64_t length, const char* what);
  void refer(std::uint64_t offset, std::uint64_t length);
  [[nodiscard]] std::uint64_t word(std::uint64_t offset) const {
    return offset + 8 <= image_.size() ? get_be(image_, offset, 8) : 0;
  }
  std::uint64_t refcount(std::uint64_t cluster);
  void check_refcount_structures();
  void check_snapshots(std::uint64_t disk_size);
  void check_bitmaps(bool is_valid);
  void own_bitmap_part(std::uint64_t offset, std::uint64_t length, bool is_valid);
  Tags check_disk(std::uint64_t l1, std::uint64_t l1_entries, std::uint64_t size, bool is_active);
  void check_copied(std::uint64_t entry, std::uint64_t host, const char* what, std::uint64_t guest);
  void check_entry(std::uint64_t entry_at, std::uint64_t guest, bool is_active, Tags& tags);
  bool check_host(std::uint64_t entry, std::uint64_t guest, bool is_active);
  void read_compressed(std::uint64_t entry, std::uint64_t guest, Tags& tags);
  void read_host(std::uint64_t host, std::uint64_t guest_sector, std::uint64_t count, Tags& tags);
  static void set(Tags& tags, std::uint64_t first, std::uint64_t count, std::uint64_t tag) {
    for (std::uint64_t i = first; i < std::min(first + count, tags.size()); ++i) tags[i] = tag;
  }

  std::span<const std::byte> image_;
  std::span<const std::uint64_t> backing_;
  std::span<const std::byte> data_file_;
  CheckedImage checked_;
  unsigned cluster_bits_{0};
  std::uint64_t cluster_{0};
  unsigned order_{4};
  bool extended_{false};
  bool has_data_file_{false};
  bool is_zstd_{false};
  std::vector<std::uint64_t> references_;
  std::set<std::uint64_t> left_behind_;  // clusters of bitmaps that nothing vouches for
};

bool Checker::is_inside(std::uint64_t offset, std::uint64_t length, const char* what) {
  const std::uint64_t end = (image_.size() + cluster_ - 1) / cluster_ * cluster_;
  if (offset < image_.size() && length <= end - offset) return true;
  error(fmt::format("{} at {:#x} lies beyond the end of the file, {:#x}", what, offset,
                    image_.size()));
  return false;
}

void Checker::refer(std::uint64_t offset, std::uint64_t length) {
  if (length == 0) return;
  for (std::uint64_t cluster = offset / cluster_; cluster <= (offset + length - 1) / cluster_;
       ++cluster) {
    if (cluster >= references_.size()) references_.resize(cluster + 1);
    ++references_[cluster];
  }
}

std::uint64_t Checker::refcount(std::uint64_t cluster) {
  const std::uint64_t per_block = cluster_ * 8 >> order_;
  const std::uint64_t table_entries = get_be(image_, 56, 4) * cluster_ / 8;
  if (cluster / per_block >= table_entries) return 0;
  const std::uint64_t block = word(get_be(image_, 48, 8) + cluster / per_block * 8) & kOffset;
  if (block == 0 || block >= image_.size()) return 0;
  // What is missing of the last cluster reads as zeroes.
  const std::uint64_t length = std::min<std::uint64_t>(cluster_, image_.size() - block);
  if ((cluster % per_block << order_) / 8 + 8 > length && length < cluster_) return 0;
  return get_refcount(image_.subspan(block, length), order_, cluster % per_block);
}

void Checker::check_refcount_structures() {
  const std::uint64_t table = get_be(image_, 48, 8);
  const std::uint64_t bytes = get_be(image_, 56, 4) * cluster_;
  if (!is_inside(table, bytes, "the refcount table")) return;
  refer(table, bytes);
  for (std::uint64_t at = table; at < table + bytes; at += 8) {
    const std::uint64_t entry = word(at);
    if (entry == 0) continue;
    if (entry % cluster_ != 0) error(fmt::format("refcount table entry {:#x}", entry));
    if (is_inside(entry, cluster_, "a refcount block")) refer(entry, cluster_);
  }
}

void Checker::check_copied(std::uint64_t entry, std::uint64_t host, const char* what,
                           std::uint64_t guest) {
  const std::uint64_t count = refcount(host / cluster_);
  if (((entry & kCopied) != 0) != (count == 1))
    error(fmt::format("COPIED is {} for {} at host {:#x} with refcount {} (guest {:#x})",
                      (entry & kCopied) != 0 ? "set" : "not set", what, host, count, guest));
}

void Checker::read_host(std::uint64_t host, std::uint64_t guest_sector, std::uint64_t count,
                        Tags& tags) {
  const std::span<const std::byte> data = has_data_file_ ? data_file_ : image_;
  for (std::uint64_t i = 0; i < count && guest_sector + i < tags.size(); ++i) {
    const std::uint64_t at = host + i * kSectorBytes;
    tags[guest_sector + i] =
        at + kSectorBytes <= data.size() ? tag_of(data.subspan(at, kSectorBytes)) : 0;
  }
}

void Checker::read_compressed(std::uint64_t entry, std::uint64_t guest, Tags& tags) {
  const unsigned shift = 62 - (cluster_bits_ - 8);
  const std::uint64_t offset = entry & ((std::uint64_t{1} << shift) - 1);
  const std::uint64_t more = (entry & ~(kCopied | kCompressed)) >> shift;
  const std::uint64_t end = (offset / 512 + more + 1) * 512;
  if ((entry & kCopied) != 0) error("COPIED is set for a compressed cluster");
  if (!is_inside(offset, 1, "compressed data")) return;
  refer(offset / 512 * 512, end - offset / 512 * 512);
  const std::uint64_t length = std::min<std::uint64_t>(end, image_.size()) - offset;
  Bytes out(cluster_);
  const std::span<const std::byte> compressed = image_.subspan(offset, length);
  if (!(is_zstd_ ? unzstd(compressed, out) : inflate_raw(compressed, out)))
    error(fmt::format("compressed data at {:#x} is damaged", offset));
  for (std::uint64_t i = 0; i < cluster_ / kSectorBytes; ++i)
    set(tags, guest / kSectorBytes + i, 1,
        tag_of(std::span(out).subspan(i * kSectorBytes, kSectorBytes)));
}

// Whether the entry of a standard cluster has space that can be read.
bool Checker::check_host(std::uint64_t entry, std::uint64_t guest, bool is_active) {
  const std::uint64_t host = entry & kOffset;
  if (has_data_file_) {
    // "Standard Cluster Descriptor": 0 is an offset like others there, if COPIED says so.
    if (host == 0 && (entry & kCopied) == 0) return false;
    if (host != guest || (entry & kCopied) == 0)
      error(fmt::format("L2 entry {:#x} for guest {:#x}, whose data is in a data file", entry,
                        guest));
    return true;
  }
  if (host == 0) {
    if ((entry & kCopied) != 0) error(fmt::format("L2 entry {:#x} for guest {:#x}", entry, guest));
    return false;
  }
  if (!is_inside(host, cluster_, "a cluster")) return false;
  refer(host, cluster_);
  if (is_active) check_copied(entry, host, "a cluster", guest);
  return true;
}

void Checker::check_entry(std::uint64_t entry_at, std::uint64_t guest, bool is_active, Tags& tags) {
  const std::uint64_t entry = word(entry_at);
  const std::uint64_t first = guest / kSectorBytes;
  if ((entry & kCompressed) != 0 && has_data_file_)
    error(fmt::format("L2 entry {:#x} for guest {:#x} is compressed", entry, guest));
  if ((entry & kCompressed) != 0) return read_compressed(entry, guest, tags);
  const std::uint64_t host = entry & kOffset;
  const std::uint64_t reserved = extended_ ? 0x3f00'0000'0000'01ff : 0x3f00'0000'0000'01fe;
  if ((entry & reserved) != 0 || host % cluster_ != 0)
    error(fmt::format("L2 entry {:#x} for guest {:#x}", entry, guest));
  const bool has_space = check_host(entry, guest, is_active);
  const std::uint64_t sectors = cluster_ / kSectorBytes;
  if (!extended_) {
    if ((entry & 1) != 0) return set(tags, first, sectors, 0);
    if (has_space) read_host(host, first, sectors, tags);
    return;
  }
  const std::uint64_t bitmap = word(entry_at + 8);
  for (unsigned i = 0; i < 32; ++i) {
    const bool allocated = ((bitmap >> i) & 1) != 0;
    const bool zero = ((bitmap >> (i + 32)) & 1) != 0;
    if (allocated && (zero || !has_space))
      error(fmt::format("subcluster bitmap {:#x} of entry {:#x}", bitmap, entry));
    const std::uint64_t part = sectors / 32;
    if (zero) set(tags, first + i * part, part, 0);
    if (allocated && has_space)
      read_host(host + i * part * kSectorBytes, first + i * part, part, tags);
  }
}

Tags Checker::check_disk(std::uint64_t l1, std::uint64_t l1_entries, std::uint64_t size,
                         bool is_active) {
  Tags tags(size / kSectorBytes, 0);
  std::ranges::copy_n(backing_.begin(),
                      static_cast<std::ptrdiff_t>(std::min(backing_.size(), tags.size())),
                      tags.begin());
  if (!is_inside(l1, l1_entries * 8, "an L1 table")) return tags;
  refer(l1, l1_entries * 8);
  const std::uint64_t entry_bytes = extended_ ? 16 : 8;
  const std::uint64_t entries = cluster_ / entry_bytes;
  for (std::uint64_t i = 0; i < l1_entries; ++i) {
    const std::uint64_t entry = word(l1 + i * 8);
    const std::uint64_t table = entry & kOffset;
    if ((entry & ~(kOffset | kCopied)) != 0 || table % cluster_ != 0)
      error(fmt::format("L1 entry {:#x}", entry));
    if (table == 0) continue;
    if (!is_inside(table, cluster_, "an L2 table")) continue;
    refer(table, cluster_);
    if (is_active) check_copied(entry, table, "an L2 table", i * entries * cluster_);
    for (std::uint64_t j = 0; j < entries; ++j)
      check_entry(table + j * entry_bytes, (i * entries + j) * cluster_, is_active, tags);
  }
  return tags;
}

void Checker::check_snapshots(std::uint64_t disk_size) {
  const std::uint64_t count = get_be(image_, 60, 4);
  if (count == 0) return;
  const std::uint64_t table = get_be(image_, 64, 8);
  std::uint64_t at = table;
  for (std::uint64_t i = 0; i < count; ++i) {
    if (at + 40 > image_.size()) return error("the snapshot table lies beyond the end of the file");
    const std::uint64_t extra_bytes = get_be(image_, at + 36, 4);
    const std::uint64_t text_bytes = get_be(image_, at + 12, 2) + get_be(image_, at + 14, 2);
    // Its own size: that of the disk may have changed since.
    const std::uint64_t size = extra_bytes >= 16 ? word(at + 48) : disk_size;
    const std::uint64_t l1_entries = get_be(image_, at + 8, 4);
    // Nothing that the tests make.
    if (size > kSnapshotBytesMax || l1_entries > image_.size() / 8)
      return error(fmt::format("snapshot {} cannot be", i));
    Tags tags = check_disk(word(at), l1_entries, size, false);
    if (i == 0) checked_.snapshot = std::move(tags);
    at += (40 + extra_bytes + text_bytes + 7) / 8 * 8;
  }
  if (is_inside(table, at - table, "the snapshot table")) refer(table, at - table);
}

// "Bitmaps extension". Without the autoclear bit it may say anything; what it names is then as it
// was left by who did not know it, and no leak here.
void Checker::check_bitmaps(bool is_valid) {
  std::uint64_t at = get_be(image_, 100, 4);
  while (at + 32 <= std::min<std::uint64_t>(cluster_, image_.size())) {
    const std::uint64_t type = get_be(image_, at, 4);
    const std::uint64_t length = get_be(image_, at + 4, 4);
    if (type == 0) return;
    at += 8;
    if (type == 0x23852875) {
      const std::uint64_t directory = word(at + 16);
      own_bitmap_part(directory, word(at + 8), is_valid);
      std::uint64_t entry = directory;
      for (std::uint64_t i = 0; i < get_be(image_, at, 4) && entry + 24 <= image_.size(); ++i) {
        const std::uint64_t table = word(entry);
        const std::uint64_t table_bytes = get_be(image_, entry + 8, 4) * 8;
        own_bitmap_part(table, table_bytes, is_valid);
        for (std::uint64_t j = table; j < table + table_bytes && j < image_.size(); j += 8) {
          if ((word(j) & kOffset) != 0) own_bitmap_part(word(j) & kOffset, cluster_, is_valid);
        }
        const bool is_in_use = (get_be(image_, entry + 12, 4) & 1) != 0;
        if (is_valid && !is_in_use) checked_.vouches_for_bitmaps = true;
        entry += (24 + get_be(image_, entry + 18, 2) + get_be(image_, entry + 20, 4) + 7) / 8 * 8;
      }
    }
    at += (length + 7) / 8 * 8;
  }
}

void Checker::own_bitmap_part(std::uint64_t offset, std::uint64_t length, bool is_valid) {
  if (is_valid) {
    if (is_inside(offset, length, "a part of a bitmap")) refer(offset, length);
    return;
  }
  for (std::uint64_t at = offset; at < std::min<std::uint64_t>(offset + length, image_.size());
       at += cluster_)
    left_behind_.insert(at / cluster_);
}

CheckedImage Checker::check() {
  if (image_.size() < 104 || get_be(image_, 0, 4) != 0x514649fb) {
    error("there is no header");
    return std::move(checked_);
  }
  cluster_bits_ = static_cast<unsigned>(get_be(image_, 20, 4));
  cluster_ = std::uint64_t{1} << cluster_bits_;
  const bool is_version_3 = get_be(image_, 4, 4) == 3;
  const std::uint64_t features = is_version_3 ? get_be(image_, 72, 8) : 0;
  if ((features & 2) != 0) error("it is marked corrupt");
  extended_ = (features & 0x10) != 0;
  has_data_file_ = (features & 4) != 0;
  is_zstd_ = (features & 8) != 0;
  order_ = is_version_3 ? static_cast<unsigned>(get_be(image_, 96, 4)) : 4;
  const std::uint64_t size = get_be(image_, 24, 8);
  references_.resize((image_.size() + cluster_ - 1) / cluster_);
  refer(0, 1);
  check_refcount_structures();
  checked_.disk = check_disk(get_be(image_, 40, 8), get_be(image_, 36, 4), size, true);
  check_snapshots(size);
  if (is_version_3) check_bitmaps((get_be(image_, 88, 8) & 1) != 0);
  for (std::uint64_t cluster = 0; cluster < references_.size(); ++cluster) {
    const std::uint64_t count = refcount(cluster);
    if (count < references_[cluster])
      error(fmt::format("cluster {:#x} has refcount {} and {} references", cluster, count,
                        references_[cluster]));
    if (count > references_[cluster] && !left_behind_.contains(cluster)) ++checked_.leaks;
  }
  // The end of the file may be lost where refcounts of what lay beyond it are not.
  const std::uint64_t per_block = cluster_ * 8 >> order_;
  const std::uint64_t blocks = get_be(image_, 56, 4) * cluster_ / 8;
  for (std::uint64_t block = references_.size() / per_block; block < blocks; ++block) {
    const std::uint64_t offset = word(get_be(image_, 48, 8) + block * 8) & kOffset;
    if (offset == 0) continue;
    const std::uint64_t first = std::max<std::uint64_t>(block * per_block, references_.size());
    const std::uint64_t per_word = 64 >> order_;
    for (std::uint64_t cluster = first; cluster < (block + 1) * per_block; ++cluster) {
      // Most of it is nothing.
      while (cluster % per_word == 0 && cluster < (block + 1) * per_block &&
             word(offset + cluster % per_block / per_word * 8) == 0)
        cluster += per_word;
      if (cluster < (block + 1) * per_block && refcount(cluster) > 0) ++checked_.leaks;
    }
  }
  return std::move(checked_);
}

}  // namespace

CheckedImage check_image(std::span<const std::byte> image, std::span<const std::uint64_t> backing,
                         std::span<const std::byte> data_file) {
  return Checker(image, backing, data_file).check();
}

}  // namespace vblk::qcow2::testing
