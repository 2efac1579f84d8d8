#include "blockdev/qcow2/snapshots.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <optional>
#include <span>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;

namespace {

// "Snapshot table entry": byte offsets.
constexpr std::uint64_t kFixedBytes = SnapshotEntry::kFixedBytes;
constexpr std::size_t kL1EntriesAt = 8;
constexpr std::size_t kIdBytesAt = 12;
constexpr std::size_t kNameBytesAt = 14;
constexpr std::size_t kDateSecondsAt = 16;
constexpr std::size_t kDateNanosecondsAt = 20;
constexpr std::size_t kVmClockAt = 24;
constexpr std::size_t kVmStateBytesAt = 32;
constexpr std::size_t kExtraBytesAt = 36;
// "Snapshot extra data".
constexpr std::size_t kLargeVmStateAt = kFixedBytes;
constexpr std::size_t kDiskBytesAt = kFixedBytes + 8;
constexpr std::size_t kInstructionsAt = kFixedBytes + 16;

constexpr std::uint64_t kStepBytes = 65536;

std::uint64_t entry_bytes(const std::byte* entry) {
  return kFixedBytes + load_be<std::uint16_t>(entry + kIdBytesAt) +
         load_be<std::uint16_t>(entry + kNameBytesAt) +
         load_be<std::uint32_t>(entry + kExtraBytesAt);
}

SnapshotEntry decode(const std::byte* entry, const Header& header) {
  const auto extra_bytes = load_be<std::uint32_t>(entry + kExtraBytesAt);
  const auto id_bytes = load_be<std::uint16_t>(entry + kIdBytesAt);
  const char* const texts = reinterpret_cast<const char*>(entry) + kFixedBytes + extra_bytes;
  SnapshotEntry decoded{
      .l1_table = {load_be<std::uint64_t>(entry),
                   std::uint64_t{load_be<std::uint32_t>(entry + kL1EntriesAt)} * 8},
      .id = {texts, id_bytes},
      .name = {texts + id_bytes, load_be<std::uint16_t>(entry + kNameBytesAt)},
      .date_seconds = load_be<std::uint32_t>(entry + kDateSecondsAt),
      .date_nanoseconds = load_be<std::uint32_t>(entry + kDateNanosecondsAt),
      .vm_clock_nanoseconds = load_be<std::uint64_t>(entry + kVmClockAt),
      .vm_state_bytes = load_be<std::uint32_t>(entry + kVmStateBytesAt),
      .disk_bytes = header.size_bytes,
      .instructions = std::numeric_limits<std::uint64_t>::max(),
      .extra_bytes = extra_bytes};
  if (extra_bytes >= 8) decoded.vm_state_bytes = load_be<std::uint64_t>(entry + kLargeVmStateAt);
  if (extra_bytes >= 16) decoded.disk_bytes = load_be<std::uint64_t>(entry + kDiskBytesAt);
  if (extra_bytes >= 24) decoded.instructions = load_be<std::uint64_t>(entry + kInstructionsAt);
  return decoded;
}

}  // namespace

blockdev::Task<int> visit_snapshots(blockdev::BlockNode& file, blockdev::IoContext& context,
                                    const Header& header, std::uint64_t file_end,
                                    const VisitSnapshot& visit, SnapshotTable& table) {
  const std::uint64_t offset = header.snapshots_offset;
  std::uint64_t at = 0;
  AlignedBuffer bytes;
  for (std::uint32_t i = 0; i < header.snapshot_count; ++i) {
    std::uint64_t length = kFixedBytes;
    // First what says how long the entry is, then the entry.
    for (int pass = 0; pass < 2; ++pass) {
      const std::uint64_t end = at + length;
      if (end > kSnapshotTableBytesMax || offset > file_end || end > file_end - offset) {
        table.why = "its snapshot table lies beyond the end of the file, or is too large";
        co_return EINVAL;
      }
      if (end > bytes.size()) {
        // Twice as much each time, so that all is read but twice.
        const std::uint64_t enough = std::max(end, 2 * bytes.size());
        bytes = AlignedBuffer((enough + kStepBytes) / kStepBytes * kStepBytes);
        const int error =
            co_await BlockIo(file, context, BlockOperation::kRead, offset, bytes.bytes());
        if (error != 0) co_return error;
      }
      length = entry_bytes(bytes.data() + at);
    }
    if (!visit(decode(bytes.data() + at, header))) co_return EINVAL;
    at += (length + 7) / 8 * 8;
  }
  table.length_bytes = at;
  co_return 0;
}

std::vector<std::byte> encode_snapshot(const SnapshotEntry& entry, std::string_view id) {
  constexpr std::uint32_t kExtraBytes = 24;
  const std::size_t length = kFixedBytes + kExtraBytes + id.size() + entry.name.size();
  std::vector<std::byte> bytes((length + 7) / 8 * 8);
  std::byte* const to = bytes.data();
  store_be(to, entry.l1_table.offset);
  store_be(to + kL1EntriesAt, static_cast<std::uint32_t>(entry.l1_table.length / 8));
  store_be(to + kIdBytesAt, static_cast<std::uint16_t>(id.size()));
  store_be(to + kNameBytesAt, static_cast<std::uint16_t>(entry.name.size()));
  store_be(to + kDateSecondsAt, entry.date_seconds);
  store_be(to + kDateNanosecondsAt, entry.date_nanoseconds);
  store_be(to + kVmClockAt, entry.vm_clock_nanoseconds);
  store_be(to + kVmStateBytesAt,
           static_cast<std::uint32_t>(std::min<std::uint64_t>(entry.vm_state_bytes, 0xffff'ffffU)));
  store_be(to + kExtraBytesAt, kExtraBytes);
  store_be(to + kLargeVmStateAt, entry.vm_state_bytes);
  store_be(to + kDiskBytesAt, entry.disk_bytes);
  store_be(to + kInstructionsAt, entry.instructions);
  std::byte* const texts =
      std::ranges::copy(std::as_bytes(std::span(id)), to + kFixedBytes + kExtraBytes).out;
  std::ranges::copy(std::as_bytes(std::span(entry.name)), texts);
  return bytes;
}

std::vector<std::byte> trim_snapshot(std::span<const std::byte> bytes) {
  const auto extra_bytes = load_be<std::uint32_t>(bytes.data() + kExtraBytesAt);
  const std::uint64_t length = entry_bytes(bytes.data());
  const std::uint32_t kept_bytes = std::min(extra_bytes, kSnapshotExtraBytesMax);
  const std::uint64_t trimmed_length = length - (extra_bytes - kept_bytes);
  std::vector<std::byte> trimmed((trimmed_length + 7) / 8 * 8);
  const auto texts = bytes.subspan(kFixedBytes + extra_bytes, length - kFixedBytes - extra_bytes);
  std::ranges::copy(bytes.first(kFixedBytes + kept_bytes), trimmed.begin());
  std::ranges::copy(texts, trimmed.begin() + static_cast<std::ptrdiff_t>(kFixedBytes + kept_bytes));
  store_be(trimmed.data() + kExtraBytesAt, kept_bytes);
  return trimmed;
}

Expected<std::vector<Snapshot>> read_snapshots(blockdev::RawNode& file, const Header& header,
                                               const blockdev::MakePrivateContext& make) {
  const auto context = make();
  if (!context) return std::unexpected(context.error());
  std::vector<Snapshot> snapshots;
  SnapshotTable table;
  const int error = (*context)->run(visit_snapshots(
      file, (*context)->context(), header, file.data_bytes(),
      [&snapshots](const SnapshotEntry& entry) {
        snapshots.push_back({entry, std::string(entry.id), std::string(entry.name)});
        snapshots.back().entry.id = {};
        snapshots.back().entry.name = {};
        return true;
      },
      table));
  if (error == 0) return snapshots;
  if (!table.why.empty()) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("qcow2 image '{}' is damaged: {}", file.name(), table.why));
  }
  return make_error(
      ErrorKind::kIo,
      fmt::format("cannot read the snapshots of '{}': {}", file.name(), describe_errno(error)),
      error);
}

namespace {

struct Search {
  std::optional<std::string> id;
  std::optional<std::string> name;
  bool is_either{false};  // what is given as an ID may be a name
};

// "snapshot.id=1,snapshot.name=x" as of -o: ",," is a comma within a value, and the last one
// counts.
Expected<Search> parse_search(std::string_view text) {
  constexpr std::string_view kPrefix = "snapshot.";
  if (!text.starts_with(kPrefix)) return Search{.id = std::string(text), .is_either = true};
  Search search;
  while (!text.empty()) {
    std::string word;
    std::size_t at = 0;
    for (; at < text.size(); ++at) {
      if (text[at] == ',' && !text.substr(at + 1).starts_with(',')) break;
      if (text[at] == ',') ++at;
      word += text[at];
    }
    text.remove_prefix(std::min(at + 1, text.size()));
    const std::size_t equals = word.find('=');
    const std::string key = word.substr(0, equals);
    const std::string value = equals == std::string::npos ? "on" : word.substr(equals + 1);
    if (key == "snapshot.id") {
      search.id = value;
    } else if (key == "snapshot.name") {
      search.name = value;
    } else {
      return make_error(ErrorKind::kInvalidArgument,
                        fmt::format("a snapshot is searched for by snapshot.id and snapshot.name, "
                                    "not by '{}'",
                                    key));
    }
  }
  return search;
}

}  // namespace

Expected<Header> header_of_snapshot(blockdev::RawNode& file, const Header& header,
                                    std::string_view id_or_name,
                                    const blockdev::MakePrivateContext& make) {
  const auto snapshots = read_snapshots(file, header, make);
  if (!snapshots) return std::unexpected(snapshots.error());
  const auto search = parse_search(id_or_name);
  if (!search) return std::unexpected(search.error());
  auto found = std::ranges::find_if(*snapshots, [&search](const Snapshot& snapshot) {
    return (!search->id || *search->id == snapshot.id) &&
           (!search->name || *search->name == snapshot.name);
  });
  if (found == snapshots->end() && search->is_either)
    found = std::ranges::find(*snapshots, id_or_name, &Snapshot::name);
  if (found == snapshots->end()) {
    return make_error(ErrorKind::kNotFound,
                      fmt::format("image '{}' has no snapshot '{}'", file.name(), id_or_name));
  }
  const SnapshotEntry& entry = found->entry;
  const Geometry& geometry = header.geometry;
  const std::uint64_t l1_entries = entry.l1_table.length / 8;
  const bool fits = entry.l1_table.length <= kL1BytesMax &&
                    (entry.l1_table.offset & geometry.cluster_mask()) == 0 &&
                    entry.disk_bytes <= (std::uint64_t{1} << 61) &&
                    (entry.disk_bytes == 0 || geometry.l1_index(entry.disk_bytes - 1) < l1_entries);
  if (!fits) {
    return make_error(
        ErrorKind::kCorrupt,
        fmt::format("the L1 table of snapshot '{}' of '{}' cannot be", id_or_name, file.name()));
  }
  Header as_it_was = header;
  as_it_was.l1_table_offset = entry.l1_table.offset;
  as_it_was.l1_entries = static_cast<std::uint32_t>(l1_entries);
  as_it_was.size_bytes = entry.disk_bytes;
  return as_it_was;
}

}  // namespace vblk::qcow2
