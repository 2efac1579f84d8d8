// Properties of an image that nobody uses, changed: version, refcount width, lazy refcounts, what
// is recorded of the data file (qcow2.txt, "Header"). As image_editor.h says, all of it comes into
// the image by one write of the header's first sector.
//
//   to version 3   snapshots get the extra data that version 3 wants of them
//   to version 2   has no clusters that read as zeroes by a flag: they lose it and their space
//   where
//                  there is no backing file, and otherwise get a cluster of zeroes, in the tables
//                  of snapshots too; persistent bitmaps go; what else version 2 does not have is
//                  refused
//   refcounts      are written anew in any case
//
// What changes fields alone (lazy refcounts, the data file, version 3 without snapshots) does not
// need the image to be surveyed.
//
// Memory: as image_editor.h, and for version 2 the L1 tables of all snapshots, 8 MiB of L2 tables,
// and some 100 bytes for each L2 table that changes.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "blockdev/qcow2/header.h"
#include "blockdev/qcow2/image_editor.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

// What is not given stays as it is.
struct Amendment {
  std::optional<std::uint32_t> version;  // 2 or 3
  std::optional<unsigned> refcount_order;
  std::optional<bool> lazy_refcounts;
  std::optional<std::string> data_file;  // its name; "": none is recorded
  bool data_file_is_raw_no_more{false};

  [[nodiscard]] bool is_empty() const {
    return !version && !refcount_order && !lazy_refcounts && !data_file &&
           !data_file_is_raw_no_more;
  }
};

class ImageAmender final : public ImageEditor {
 public:
  // `file` is open for writing and holds the image of `header`, which is not marked dirty.
  ImageAmender(blockdev::RawNode& file, blockdev::IoContext& context, Header header)
      : ImageEditor(file, context, std::move(header)) {}

  // Once. 0, or an errno value with `why` said, unless the file failed; nothing has changed then:
  //   EINVAL      what is asked for excludes itself or what the image is; the image has errors
  //   EFBIG       refcounts, tables or the file would be too large
  blockdev::Task<int> amend(const Amendment& amendment);
  // In place of amend(): what that would say, of a disk of `disk_bytes`. Changes nothing.
  blockdev::Task<int> check(const Amendment& amendment, std::uint64_t disk_bytes);

 private:
  // An L1 table: the disk's, or a snapshot's.
  struct L1Table {
    Extent extent;
    std::vector<std::uint64_t> entries;
    bool has_changed{false};
  };

  [[nodiscard]] int refuse(std::string why);
  [[nodiscard]] bool changes_tables(const Amendment& amendment) const;
  // Whether it can be, as far as is known before anything is written; surveys the image if tables
  // change.
  blockdev::Task<int> prepare(const Amendment& amendment, std::uint64_t disk_bytes);
  [[nodiscard]] int check_properties(const Amendment& amendment, std::uint64_t disk_bytes);
  [[nodiscard]] int check_downgrade(std::uint64_t disk_bytes);
  [[nodiscard]] int check_refcounts();
  blockdev::Task<int> downgrade();
  blockdev::Task<int> drop_bitmaps();
  blockdev::Task<int> load_l1_tables(std::vector<L1Table>& tables);
  blockdev::Task<int> drop_zero_flags(const std::vector<std::uint64_t>& tables);
  // The clusters that read as zeroes in a copy of an L2 table with so many owners, as version 2
  // has them. Whether there are any.
  [[nodiscard]] bool drop_zero_flags_of(std::span<std::byte> table, std::uint32_t owners);
  blockdev::Task<int> write_zero_clusters();
  blockdev::Task<int> write_l1_tables(std::vector<L1Table>& tables);

  std::map<std::uint64_t, std::uint64_t> renewed_;  // L2 tables: where they were, where they are
  std::vector<std::uint64_t> zero_clusters_;        // that are to hold zeroes
};

}  // namespace vblk::qcow2
