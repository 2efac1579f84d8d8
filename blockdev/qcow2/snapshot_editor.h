// Internal snapshots of an image that nobody uses: made, taken back to, removed (qcow2.txt,
// "Snapshots"); and the disk emptied, which is the same kind of change.
//
// The image is surveyed first (check.h), and refused if it has errors, so that the references that
// were counted are what refcounts ought to be; leaks end with the change. Nothing that the image
// uses is changed in place: what is new (L1 and L2 tables of the disk, snapshot table, refcount
// table and blocks) is written behind the end of the file, flushed, and put in place by one write
// of the header, whose first sector has all that changes. An interruption leaves the image as it
// was or as it is to be.
//
//            the disk's tables                                  the snapshot's
//   create   copies, without COPIED flags for what is shared    those that the disk had
//   apply    copies of the snapshot's, the same                 stay
//   remove   those in which flags change are written anew       become free
//   empty    an L1 table that names nothing                     stay
//
// COPIED flags in tables of snapshots say nothing ("L2 table entry": only accurate for the active
// L1 table), so they may stay as they are.
//
// Memory: that of a survey, the snapshot table, an L1 table or two, and 8 MiB of L2 tables.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "blockdev/qcow2/check.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

class SnapshotEditor {
 public:
  // `file` is open for writing and holds the image of `header`.
  SnapshotEditor(blockdev::RawNode& file, blockdev::IoContext& context, Header header)
      : file_(file), context_(context), header_(std::move(header)), geometry_(header_.geometry) {}

  // Each once, on a fresh editor. 0, or an errno value with `why` said, unless the file failed:
  //   EINVAL   the image has errors
  //   ENOENT   there is no such snapshot
  //   EFBIG    refcounts, tables or the file would be too large
  blockdev::Task<int> create(std::string_view name);
  // By ID or else by name.
  blockdev::Task<int> apply(std::string_view id_or_name);
  // The first of this name.
  blockdev::Task<int> remove(std::string_view name);
  // The disk has nothing of its own any more, and reads as its backing file, or zeroes. Snapshots
  // keep what they have.
  blockdev::Task<int> empty();
  [[nodiscard]] const std::string& why() const { return why_; }

 private:
  // An entry of the snapshot table: its bytes, padding included, and what they say.
  struct Entry {
    std::vector<std::byte> bytes;
    Extent l1_table;
    std::uint64_t disk_bytes;
    std::string id;
    std::string name;
  };

  blockdev::Task<int> load();
  blockdev::Task<int> load_entries();
  blockdev::Task<int> read_words(Extent extent, std::vector<std::uint64_t>& words);
  // What the L2 tables that an L1 table names name, once more or once less; the tables too if
  // `with_tables`.
  blockdev::Task<int> count(const std::vector<std::uint64_t>& l1_table, int change,
                            bool with_tables);
  [[nodiscard]] bool count_clusters(std::uint64_t offset, std::uint64_t length, int change);
  [[nodiscard]] std::uint64_t take_clusters(std::uint64_t length_bytes);
  blockdev::Task<int> write_l1_table(std::uint64_t offset,
                                     const std::vector<std::uint64_t>& l1_table);
  blockdev::Task<int> write_entries();
  blockdev::Task<int> write_refcounts();
  blockdev::Task<int> switch_header();
  blockdev::Task<int> flush();
  // Writes those of an L1 table's L2 tables anew, all or where flags change, in which COPIED flags
  // are to be as the refcounts say; `l1_table` names them then.
  blockdev::Task<int> renew_tables(std::vector<std::uint64_t>& l1_table, bool all);
  // The disk gets this L1 table, in new clusters.
  blockdev::Task<int> renew_l1_table(const std::vector<std::uint64_t>& l1_table);
  // What is common at the end: snapshot table, refcounts, header.
  blockdev::Task<int> finish();
  blockdev::Task<int> discard_free();
  [[nodiscard]] int too_large(const char* what);

  blockdev::RawNode& file_;
  blockdev::IoContext& context_;
  Header header_;
  const Geometry geometry_;
  std::string why_;
  std::vector<std::uint32_t> references_;  // by cluster, without the refcount structures
  std::uint64_t survey_clusters_{0};       // that the file had
  std::vector<Entry> entries_;
  std::uint64_t entries_bytes_{0};  // of the table in the file
  std::vector<std::uint64_t> l1_table_;
};

}  // namespace vblk::qcow2
