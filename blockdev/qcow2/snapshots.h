// The snapshot table (qcow2.txt, "Snapshots"), read entry by entry and checked as far as that can
// be done without looking elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "aio/error.h"
#include "blockdev/private_context.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

// "Snapshot extra data": version 3 wants the sizes of the machine's state and of the disk. More
// than so much is nothing anybody knows.
inline constexpr std::uint32_t kSnapshotExtraBytesV3 = 16;
inline constexpr std::uint32_t kSnapshotExtraBytesMax = 1024;

// One entry. The texts are the table's own, and any bytes.
struct SnapshotEntry {
  // What comes before the texts and the extra data.
  static constexpr std::uint64_t kFixedBytes = 40;

  Extent l1_table;
  std::string_view id;
  std::string_view name;
  std::uint32_t date_seconds{0};
  std::uint32_t date_nanoseconds{0};
  std::uint64_t vm_clock_nanoseconds{0};
  std::uint64_t vm_state_bytes{0};
  std::uint64_t disk_bytes{0};    // the disk's own size where the entry does not record one
  std::uint64_t instructions{0};  // all ones: not recorded
  std::uint32_t extra_bytes{0};   // "Snapshot extra data"
};

// What visit_snapshots() has seen.
struct SnapshotTable {
  std::uint64_t length_bytes{0};
  std::string why;  // not empty: why it ended early
};

using VisitSnapshot = std::function<bool(const SnapshotEntry& entry)>;

// Calls `visit`, which outlives the call, for each entry, in order, until it says false. `file_end`
// bounds what is read. Errors: EINVAL (the table is not whole, or `visit` said so), others of the
// file. Memory: twice the table, kSnapshotTableBytesMax at most.
blockdev::Task<int> visit_snapshots(blockdev::BlockNode& file, blockdev::IoContext& context,
                                    const Header& header, std::uint64_t file_end,
                                    const VisitSnapshot& visit, SnapshotTable& table);

// The longest reach of a table, as if the file went on for ever: beyond its end there are zeroes.
[[nodiscard]] inline std::uint64_t snapshot_table_end(const Header& header) {
  return header.snapshots_offset + kSnapshotTableBytesMax;
}

// The bytes of an entry in the table, padded; with `id` in place of the entry's.
[[nodiscard]] std::vector<std::byte> encode_snapshot(const SnapshotEntry& entry,
                                                     std::string_view id);

// The bytes of an entry as it is in the table, with no more than kSnapshotExtraBytesMax of its
// extra data.
[[nodiscard]] std::vector<std::byte> trim_snapshot(std::span<const std::byte> bytes);

// An entry that is kept.
struct Snapshot {
  SnapshotEntry entry;  // without its texts
  std::string id;
  std::string name;
};

// All of them, in order. Errors: kCorrupt, kIo.
Expected<std::vector<Snapshot>> read_snapshots(blockdev::RawNode& file, const Header& header,
                                               const blockdev::MakePrivateContext& make);

// The header of the disk as it was in the snapshot that `id_or_name` names, an ID before a name, or
// either alone or both as "snapshot.id=1,snapshot.name=x": with that one's L1 table and size. To be
// opened read-only. Errors: kNotFound, kInvalidArgument (another key), and as above.
Expected<Header> header_of_snapshot(blockdev::RawNode& file, const Header& header,
                                    std::string_view id_or_name,
                                    const blockdev::MakePrivateContext& make);

}  // namespace vblk::qcow2
