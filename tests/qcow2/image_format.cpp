#include "tests/qcow2/image_format.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <zlib.h>
#include <zstd.h>

#include <fmt/core.h>

namespace vblk::qcow2::testing {

std::uint64_t get_refcount(std::span<const std::byte> block, unsigned order, std::uint64_t index) {
  if (order >= 3) {
    const unsigned bytes = 1U << (order - 3);
    return get_be(block, index * bytes, bytes);
  }
  const unsigned bits = 1U << order;
  const unsigned per_byte = 8 / bits;
  const auto value = std::to_integer<unsigned>(block[index / per_byte]);
  return (value >> (index % per_byte * bits)) & ((1U << bits) - 1);
}

void put_refcount(std::span<std::byte> block, unsigned order, std::uint64_t index,
                  std::uint64_t count) {
  if (order >= 3) {
    const unsigned bytes = 1U << (order - 3);
    return put_be(block, index * bytes, bytes, count);
  }
  const unsigned bits = 1U << order;
  const unsigned per_byte = 8 / bits;
  const unsigned shift = static_cast<unsigned>(index % per_byte) * bits;
  const auto value = std::to_integer<unsigned>(block[index / per_byte]);
  const unsigned mask = ((1U << bits) - 1) << shift;
  block[index / per_byte] =
      static_cast<std::byte>((value & ~mask) | (static_cast<unsigned>(count) << shift));
}

void fill_sector(std::span<std::byte> sector, std::uint64_t tag) {
  for (std::size_t at = 0; at < kSectorBytes; at += 8) put_be(sector, at, 8, tag);
}

std::uint64_t tag_of(std::span<const std::byte> sector) {
  // Each word is the one before it.
  if (std::memcmp(sector.data(), sector.data() + 8, kSectorBytes - 8) != 0) return kNoTag;
  return get_be(sector, 0, 8);
}

Tags tags_of(std::span<const std::byte> bytes) {
  Tags tags;
  for (std::size_t at = 0; at + kSectorBytes <= bytes.size(); at += kSectorBytes)
    tags.push_back(tag_of(bytes.subspan(at, kSectorBytes)));
  return tags;
}

Bytes bytes_of(std::span<const std::uint64_t> tags) {
  Bytes bytes(tags.size() * kSectorBytes);
  for (std::size_t i = 0; i < tags.size(); ++i)
    fill_sector(std::span(bytes).subspan(i * kSectorBytes, kSectorBytes), tags[i]);
  return bytes;
}

std::string ImageSpec::to_string() const {
  constexpr std::array kDataFiles{"", "data file, ", "raw data file, "};
  return fmt::format(
      "version {}, clusters of 2^{}, refcount order {}, {}{}{}{}size {}, backing {}, {} % mapped, "
      "of these {} % compressed{}",
      version, cluster_bits, refcount_order, extended_l2 ? "extended L2, " : "",
      snapshot ? "snapshot, " : "", kDataFiles[static_cast<std::size_t>(data_file)],
      bitmap ? "bitmap, " : "", size_bytes, backing_bytes, mapped_percent, compressed_percent,
      zstd ? " by zstd" : "");
}

namespace {

constexpr std::uint64_t kCopied = std::uint64_t{1} << 63;
constexpr std::uint64_t kCompressed = std::uint64_t{1} << 62;
// Tags of what was there before the guest wrote anything.
constexpr std::uint64_t kInitialTag = 0xd15c'0000;
constexpr std::uint64_t kBackingTag = 0xbac1'0000;
constexpr unsigned kBitmapGranularity = 16;

Bytes deflated(std::span<const std::byte> bytes) {
  z_stream stream{};
  if (deflateInit2(&stream, Z_BEST_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) != Z_OK)
    throw std::runtime_error("deflateInit2");
  Bytes out(bytes.size());
  stream.next_in =
      const_cast<Bytef*>(reinterpret_cast<const Bytef*>(bytes.data()));  // NOLINT: zlib's type
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  const int result = deflate(&stream, Z_FINISH);
  out.resize(result == Z_STREAM_END ? stream.total_out : 0);
  deflateEnd(&stream);
  return out;
}

// As QEMU makes it: a frame that does not say how long its content is.
Bytes by_zstd(std::span<const std::byte> bytes) {
  Bytes out(bytes.size());
  ZSTD_CCtx* const context = ZSTD_createCCtx();
  if (context == nullptr) throw std::runtime_error("ZSTD_createCCtx");
  ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, 0);
  const std::size_t length =
      ZSTD_compress2(context, out.data(), out.size(), bytes.data(), bytes.size());
  ZSTD_freeCCtx(context);
  out.resize(ZSTD_isError(length) != 0 ? 0 : length);
  return out;
}

class Formatter {
 public:
  Formatter(const ImageSpec& spec, std::mt19937_64& random)
      : spec_(spec), random_(random), cluster_(std::uint64_t{1} << spec.cluster_bits) {}

  FormattedImage format();

 private:
  std::uint64_t allocate(std::uint64_t clusters = 1);
  std::uint64_t allocate_data(std::uint64_t guest_cluster);
  void fill_disk();
  void map_cluster(std::uint64_t guest_cluster, std::uint64_t table);
  void map_subclusters(std::uint64_t guest_cluster, std::uint64_t entry_at);
  bool map_compressed(std::uint64_t guest_cluster, std::uint64_t entry_at);
  void write_data(std::uint64_t guest_cluster, std::uint64_t host, std::uint64_t first,
                  std::uint64_t count);
  void set_zero(std::uint64_t guest_cluster, std::uint64_t first, std::uint64_t count);
  void write_refcounts();
  void write_header();
  std::uint64_t add_extension(std::uint32_t type, std::uint64_t length);
  void add_extension(std::uint32_t type, std::string_view text);
  void write_snapshot();
  void write_bitmap();
  [[nodiscard]] unsigned percent() { return static_cast<unsigned>(random_() % 100); }
  [[nodiscard]] std::uint64_t sectors_per_cluster() const { return cluster_ / kSectorBytes; }
  [[nodiscard]] unsigned entry_bytes() const { return spec_.extended_l2 ? 16 : 8; }
  [[nodiscard]] std::uint64_t copied() const { return spec_.snapshot ? 0 : kCopied; }
  // Of everything that both the disk and the snapshot name.
  [[nodiscard]] std::uint64_t references() const { return spec_.snapshot ? 2 : 1; }
  [[nodiscard]] bool has_data_file() const { return spec_.data_file != DataFile::kNone; }
  [[nodiscard]] bool is_raw() const { return spec_.data_file == DataFile::kRaw; }
  [[nodiscard]] Bytes& data() { return has_data_file() ? image_.data_file : image_.bytes; }

  const ImageSpec spec_;
  std::mt19937_64& random_;
  const std::uint64_t cluster_;
  FormattedImage image_;
  std::vector<std::uint64_t> refcounts_;
  std::uint64_t l1_offset_{0};
  std::uint64_t l1_entries_{0};
  std::uint64_t refcount_table_{0};
  std::uint64_t refcount_table_clusters_{0};
  std::uint64_t snapshots_{0};
  std::uint64_t bitmap_directory_{0};
  std::uint64_t compressed_end_{0};
  std::uint64_t header_end_{0};
};

std::uint64_t Formatter::allocate(std::uint64_t clusters) {
  const std::uint64_t offset = image_.bytes.size();
  image_.bytes.resize(offset + clusters * cluster_);
  refcounts_.insert(refcounts_.end(), clusters, 1);
  return offset;
}

// For a guest cluster's data. In a data file it is where the guest has it.
std::uint64_t Formatter::allocate_data(std::uint64_t guest_cluster) {
  if (has_data_file()) return guest_cluster * cluster_;
  const std::uint64_t host = allocate();
  refcounts_[host / cluster_] = references();
  return host;
}

void Formatter::write_data(std::uint64_t guest_cluster, std::uint64_t host, std::uint64_t first,
                           std::uint64_t count) {
  for (std::uint64_t i = first; i < first + count; ++i) {
    const std::uint64_t sector = guest_cluster * sectors_per_cluster() + i;
    const std::uint64_t tag = (sector + 1) << 32 | kInitialTag;
    const std::uint64_t at = host + i * kSectorBytes;
    // A data file may end within a cluster, as the disk does.
    if (at < data().size()) fill_sector(std::span(data()).subspan(at, kSectorBytes), tag);
    if (sector < image_.disk.size()) image_.disk[sector] = tag;
  }
}

void Formatter::set_zero(std::uint64_t guest_cluster, std::uint64_t first, std::uint64_t count) {
  for (std::uint64_t i = first; i < first + count; ++i) {
    const std::uint64_t sector = guest_cluster * sectors_per_cluster() + i;
    if (sector < image_.disk.size()) image_.disk[sector] = 0;
  }
}

bool Formatter::map_compressed(std::uint64_t guest_cluster, std::uint64_t entry_at) {
  Bytes content(cluster_);
  Tags tags(sectors_per_cluster());
  for (std::uint64_t i = 0; i < tags.size(); ++i)
    tags[i] = (guest_cluster * sectors_per_cluster() + i + 1) << 32 | kInitialTag | 1;
  content = bytes_of(tags);
  const Bytes data = spec_.zstd ? by_zstd(content) : deflated(content);
  if (data.empty() || data.size() > cluster_ - 1) return false;
  std::uint64_t at = compressed_end_;
  const std::uint64_t refcount_max = spec_.refcount_order >= 5
                                         ? 0xffff'ffff
                                         : (std::uint64_t{1} << (1U << spec_.refcount_order)) - 1;
  const bool may_share =
      at % cluster_ != 0 && refcounts_[at / cluster_] + references() <= refcount_max;
  const bool fits = at / cluster_ == (at + data.size() - 1) / cluster_ &&
                    (at + data.size() - 1) / 512 * 512 + 512 <= (at / cluster_ + 1) * cluster_;
  const bool is_last = (at / cluster_ + 1) * cluster_ == image_.bytes.size();
  if (!may_share || (!fits && !is_last)) at = allocate();
  if (at + data.size() > image_.bytes.size()) allocate();
  std::ranges::copy(data, image_.bytes.begin() + static_cast<std::ptrdiff_t>(at));
  compressed_end_ = at + data.size();
  const std::uint64_t more_sectors = (at + data.size() - 1) / 512 - at / 512;
  const std::uint64_t first = at / cluster_;
  const std::uint64_t last = (at / 512 * 512 + (more_sectors + 1) * 512 - 1) / cluster_;
  for (std::uint64_t cluster = first; cluster <= last; ++cluster) {
    // A cluster that was made for this begins with a count of 1: the disk's.
    const bool is_new = cluster > first || at % cluster_ == 0;
    refcounts_[cluster] = (is_new ? 0 : refcounts_[cluster]) + references();
  }
  const unsigned shift = 62 - (spec_.cluster_bits - 8);
  put_be(image_.bytes, entry_at, 8, kCompressed | more_sectors << shift | at);
  for (std::uint64_t i = 0; i < tags.size(); ++i) {
    const std::uint64_t sector = guest_cluster * sectors_per_cluster() + i;
    if (sector < image_.disk.size()) image_.disk[sector] = tags[i];
  }
  return true;
}

void Formatter::map_subclusters(std::uint64_t guest_cluster, std::uint64_t entry_at) {
  const bool has_host = is_raw() || percent() < 70;
  const std::uint64_t host = has_host ? allocate_data(guest_cluster) : 0;
  std::uint64_t bitmap = 0;
  const std::uint64_t sectors = sectors_per_cluster() / 32;
  const bool all = is_raw() || percent() < 30;
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned fate = all ? 0 : percent();
    if (has_host && fate < 40) {
      bitmap |= std::uint64_t{1} << i;
      write_data(guest_cluster, host, i * sectors, sectors);
    } else if (fate < 70) {
      bitmap |= std::uint64_t{1} << (i + 32);
      set_zero(guest_cluster, i * sectors, sectors);
    }
  }
  put_be(image_.bytes, entry_at, 8, has_host ? host | copied() : 0);
  put_be(image_.bytes, entry_at + 8, 8, bitmap);
}

void Formatter::map_cluster(std::uint64_t guest_cluster, std::uint64_t table) {
  const std::uint64_t entries = cluster_ / entry_bytes();
  const std::uint64_t entry_at = table + guest_cluster % entries * entry_bytes();
  if (percent() < spec_.compressed_percent && map_compressed(guest_cluster, entry_at)) return;
  if (spec_.extended_l2) return map_subclusters(guest_cluster, entry_at);
  const unsigned fate = spec_.version == 2 || is_raw() ? 0 : percent();
  if (fate < 75) {
    const std::uint64_t host = allocate_data(guest_cluster);
    write_data(guest_cluster, host, 0, sectors_per_cluster());
    put_be(image_.bytes, entry_at, 8, host | copied());
    return;
  }
  std::uint64_t entry = 1;
  if (fate < 90) {
    const std::uint64_t host = allocate_data(guest_cluster);
    // Anything may be there.
    std::fill_n(data().begin() + static_cast<std::ptrdiff_t>(host),
                std::min(cluster_, data().size() - host), std::byte{0xee});
    entry |= host | copied();
  }
  put_be(image_.bytes, entry_at, 8, entry);
  set_zero(guest_cluster, 0, sectors_per_cluster());
}

void Formatter::fill_disk() {
  const std::uint64_t entries = cluster_ / entry_bytes();
  const std::uint64_t clusters = (spec_.size_bytes + cluster_ - 1) / cluster_;
  for (std::uint64_t guest = 0; guest < clusters; ++guest) {
    if (percent() >= spec_.mapped_percent) continue;
    const std::uint64_t l1_at = l1_offset_ + guest / entries * 8;
    std::uint64_t table = get_be(image_.bytes, l1_at, 8) & ~kCopied;
    if (table == 0) {
      table = allocate();
      refcounts_[table / cluster_] = references();
      put_be(image_.bytes, l1_at, 8, table | copied());
    }
    map_cluster(guest, table);
  }
}

// "Snapshots": one, of the disk as it is.
void Formatter::write_snapshot() {
  const std::uint64_t l1_bytes = l1_entries_ * 8;
  const std::uint64_t l1 = allocate((l1_bytes + cluster_ - 1) / cluster_);
  std::copy_n(image_.bytes.begin() + static_cast<std::ptrdiff_t>(l1_offset_), l1_bytes,
              image_.bytes.begin() + static_cast<std::ptrdiff_t>(l1));
  snapshots_ = allocate();
  put_be(image_.bytes, snapshots_, 8, l1);
  put_be(image_.bytes, snapshots_ + 8, 4, l1_entries_);
  put_be(image_.bytes, snapshots_ + 12, 2, 1);   // length of the identifier
  put_be(image_.bytes, snapshots_ + 14, 2, 1);   // of the name
  put_be(image_.bytes, snapshots_ + 36, 4, 16);  // of the extra data
  put_be(image_.bytes, snapshots_ + 48, 8, spec_.size_bytes);
  image_.bytes[snapshots_ + 56] = std::byte{'1'};
  image_.bytes[snapshots_ + 57] = std::byte{'s'};
}

// "Bitmaps": one of 64 KiB granules, of which the first is dirty. It is right for the disk as it
// is.
void Formatter::write_bitmap() {
  bitmap_directory_ = allocate();
  const std::uint64_t table = allocate();
  const std::uint64_t bits = allocate();
  const std::span<std::byte> entry = std::span(image_.bytes).subspan(bitmap_directory_, 32);
  put_be(entry, 0, 8, table);
  put_be(entry, 8, 4, 1);                    // its length, in entries
  put_be(entry, 12, 4, 2);                   // it is to be kept up to date
  put_be(entry, 16, 1, 1);                   // a dirty bitmap
  put_be(entry, 17, 1, kBitmapGranularity);  // bits
  put_be(entry, 18, 2, 1);                   // length of the name
  entry[24] = std::byte{'b'};
  put_be(image_.bytes, table, 8, bits);
  image_.bytes[bits] = std::byte{1};
}

void Formatter::write_refcounts() {
  const std::uint64_t per_block = cluster_ * 8 >> spec_.refcount_order;
  std::uint64_t blocks = 0;
  for (;;) {
    const std::uint64_t table_clusters =
        std::max<std::uint64_t>(1, (blocks * 8 + cluster_ - 1) / cluster_);
    const std::uint64_t all = refcounts_.size() + table_clusters + blocks;
    const std::uint64_t needed = (all + per_block - 1) / per_block;
    refcount_table_clusters_ = table_clusters;
    if (needed == blocks) break;
    blocks = needed;
  }
  refcount_table_ = allocate(refcount_table_clusters_);
  const std::uint64_t first_block = allocate(blocks);
  for (std::uint64_t i = 0; i < blocks; ++i)
    put_be(image_.bytes, refcount_table_ + i * 8, 8, first_block + i * cluster_);
  for (std::uint64_t i = 0; i < refcounts_.size(); ++i) {
    const std::uint64_t block = first_block + i / per_block * cluster_;
    put_refcount(std::span(image_.bytes).subspan(block, cluster_), spec_.refcount_order,
                 i % per_block, refcounts_[i]);
  }
}

void Formatter::write_header() {
  Bytes& bytes = image_.bytes;
  put_be(bytes, 0, 4, 0x514649fb);
  put_be(bytes, 4, 4, spec_.version);
  put_be(bytes, 20, 4, spec_.cluster_bits);
  put_be(bytes, 24, 8, spec_.size_bytes);
  put_be(bytes, 36, 4, l1_entries_);
  put_be(bytes, 40, 8, l1_offset_);
  put_be(bytes, 48, 8, refcount_table_);
  put_be(bytes, 56, 4, refcount_table_clusters_);
  put_be(bytes, 60, 4, spec_.snapshot ? 1 : 0);
  put_be(bytes, 64, 8, snapshots_);
  header_end_ = 72;
  if (spec_.version == 3) {
    put_be(bytes, 72, 8,
           (spec_.extended_l2 ? 0x10 : 0) | (spec_.zstd ? 8 : 0) | (has_data_file() ? 4 : 0));
    put_be(bytes, 80, 8, spec_.lazy_refcounts ? 1 : 0);
    put_be(bytes, 88, 8, (is_raw() ? 2 : 0) | (spec_.bitmap ? 1 : 0));
    put_be(bytes, 96, 4, spec_.refcount_order);
    header_end_ = spec_.zstd ? 112 : 104;
    put_be(bytes, 100, 4, header_end_);
    if (spec_.zstd) put_be(bytes, 104, 1, 1);
  }
  if (has_data_file()) add_extension(0x44415441, "data.raw");
  if (spec_.bitmap) {
    const std::uint64_t at = add_extension(0x23852875, std::uint64_t{24});
    put_be(bytes, at, 4, 1);
    put_be(bytes, at + 8, 8, 32);
    put_be(bytes, at + 16, 8, bitmap_directory_);
  }
  if (spec_.backing_bytes == 0) return;
  add_extension(0xe2792aca, "raw");
  const std::string_view name = "backing.raw";
  const std::uint64_t name_at = header_end_ + 8;  // behind the end mark
  std::ranges::copy(std::as_bytes(std::span(name)),
                    bytes.begin() + static_cast<std::ptrdiff_t>(name_at));
  put_be(bytes, 8, 8, name_at);
  put_be(bytes, 16, 4, name.size());
}

// Where its bytes go.
std::uint64_t Formatter::add_extension(std::uint32_t type, std::uint64_t length) {
  const std::uint64_t at = header_end_ + 8;
  put_be(image_.bytes, header_end_, 4, type);
  put_be(image_.bytes, header_end_ + 4, 4, length);
  header_end_ = at + (length + 7) / 8 * 8;
  return at;
}

void Formatter::add_extension(std::uint32_t type, std::string_view text) {
  const std::uint64_t at = add_extension(type, std::uint64_t{text.size()});
  std::ranges::copy(std::as_bytes(std::span(text)),
                    image_.bytes.begin() + static_cast<std::ptrdiff_t>(at));
}

FormattedImage Formatter::format() {
  image_.disk.assign(spec_.size_bytes / kSectorBytes, 0);
  for (std::uint64_t i = 0; i < spec_.backing_bytes / kSectorBytes; ++i) {
    image_.backing.push_back((i + 1) << 32 | kBackingTag);
    if (i < image_.disk.size()) image_.disk[i] = image_.backing.back();
  }
  // Anything may be there where nothing is mapped, and behind the end of the disk, unless it is the
  // disk as it stands.
  if (is_raw()) image_.data_file.resize(spec_.size_bytes);
  if (has_data_file() && !is_raw())
    image_.data_file.assign(spec_.size_bytes + random_() % 2 * cluster_, std::byte{0xee});
  allocate();  // the header's
  const std::uint64_t reach = cluster_ / entry_bytes() * cluster_;
  l1_entries_ = (spec_.size_bytes + reach - 1) / reach;
  l1_offset_ = allocate((l1_entries_ * 8 + cluster_ - 1) / cluster_);
  fill_disk();
  if (spec_.snapshot) write_snapshot();
  if (spec_.bitmap) write_bitmap();
  write_refcounts();
  write_header();
  return std::move(image_);
}

}  // namespace

FormattedImage format_image(const ImageSpec& spec, std::mt19937_64& random) {
  return Formatter(spec, random).format();
}

}  // namespace vblk::qcow2::testing
