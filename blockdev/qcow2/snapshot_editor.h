// Internal snapshots of an image that nobody uses: made, taken back to, removed (qcow2.txt,
// "Snapshots"); and the disk emptied, which is the same kind of change.
//
// As image_editor.h says, nothing is changed in place, and one write of the header's first sector
// makes the change.
//
//            the disk's tables                                  the snapshot's
//   create   copies, without COPIED flags for what is shared    those that the disk had
//   apply    copies of the snapshot's, the same                 stay
//   remove   those in which flags change are written anew       become free
//   empty    an L1 table that names nothing                     stay
//   mend     stay                                               stay
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

#include "blockdev/qcow2/header.h"
#include "blockdev/qcow2/image_editor.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

class SnapshotEditor final : public ImageEditor {
 public:
  // `file` is open for writing and holds the image of `header`.
  SnapshotEditor(blockdev::RawNode& file, blockdev::IoContext& context, Header header)
      : ImageEditor(file, context, std::move(header)) {}

  // What each of the following begins with, if it has not been done: looks at all of the image.
  // Errors as below.
  blockdev::Task<int> load();
  // One of them, once. 0, or an errno value with `why` said, unless the file failed:
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
  // For check.h: the snapshot table is written anew, complete, without what is too much, and
  // without entries that are nobody's. Other errors stay. EINVAL: the refcounts are not right.
  blockdev::Task<int> mend();

 private:
  // What the L2 tables that an L1 table names name, once more or once less; the tables too if
  // `with_tables`.
  blockdev::Task<int> count(const std::vector<std::uint64_t>& l1_table, int change,
                            bool with_tables);
  // Writes those of an L1 table's L2 tables anew, all or where flags change, in which COPIED flags
  // are to be as the refcounts say; `l1_table` names them then.
  blockdev::Task<int> renew_tables(std::vector<std::uint64_t>& l1_table, bool all);
  // The disk gets this L1 table, in new clusters.
  blockdev::Task<int> renew_l1_table(const std::vector<std::uint64_t>& l1_table);
  // What is common at the end: snapshot table, refcounts, header.
  blockdev::Task<int> finish();

  std::vector<std::uint64_t> l1_table_;
  bool is_loaded_{false};
};

}  // namespace vblk::qcow2
