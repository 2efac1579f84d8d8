// What the changes of an image's metadata have in common that nobody uses meanwhile: snapshots
// (snapshot_editor.h), bitmaps (bitmap_editor.h), the format's own properties (image_amender.h).
//
// The image is surveyed first (check.h), and refused if it has errors, so that the references that
// were counted are what refcounts ought to be; leaks end with the change. Nothing that the image
// uses is changed in place: what is new (tables, directories, refcount table and blocks) is written
// where the image has nothing, in holes of the file or behind its end, flushed, and put in place by
// one write of the header's first sector. An interruption leaves the image as it was or as it is to
// be. What became free is given back last.
//
// `references_` says how many owners each cluster is to have, without the refcount structures;
// free clusters are those that had none when the survey was made, never those that have just lost
// theirs, for an interruption would need them again.
//
// Memory: that of a survey, 64 KiB of holes, an L1 table.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "aio/error.h"
#include "blockdev/qcow2/check.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/qcow2/snapshots.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

struct BitmapEntry;

class ImageEditor {
 public:
  // Of an errno value that an editor has returned; empty: the file failed.
  [[nodiscard]] const std::string& why() const { return why_; }
  // That, or what the value itself says.
  [[nodiscard]] std::string reason(int error) const {
    return why_.empty() ? describe_errno(error) : why_;
  }
  // As the image has it, once an edit has succeeded.
  [[nodiscard]] const Header& header() const { return header_; }

 protected:
  // With its entry of the snapshot table, padding and what in it nobody here knows included.
  struct KeptSnapshot : Snapshot {
    std::vector<std::byte> bytes;
  };

  // `file` is open for writing and holds the image of `header`.
  ImageEditor(blockdev::RawNode& file, blockdev::IoContext& context, Header header)
      : file_(file), context_(context), header_(std::move(header)), geometry_(header_.geometry) {}
  ~ImageEditor() = default;
  ImageEditor(const ImageEditor&) = delete;
  ImageEditor& operator=(const ImageEditor&) = delete;

  // Surveys the image and finds its free clusters. EINVAL: it has errors. With `only_refcounts`:
  // its refcounts are not what the references say.
  blockdev::Task<int> survey(bool only_refcounts = false);
  blockdev::Task<int> read_words(Extent extent, std::vector<std::uint64_t>& words);
  // Once more or once less for each cluster of [offset, +length). False: there is no room for it in
  // a refcount.
  [[nodiscard]] bool count_clusters(std::uint64_t offset, std::uint64_t length, int change);
  // Clusters side by side where nothing is, owned once; where they begin.
  [[nodiscard]] std::uint64_t take_clusters(std::uint64_t length_bytes);
  // Writes whole clusters; the file becomes as long as that.
  blockdev::Task<int> write(std::uint64_t offset, std::span<std::byte> bytes);
  // A table of 64-bit entries, padded to whole clusters.
  blockdev::Task<int> write_words(std::uint64_t offset, const std::vector<std::uint64_t>& words);
  // The snapshot table, into `snapshots_`; as far as `file_end`.
  blockdev::Task<int> load_snapshots(std::uint64_t file_end);
  blockdev::Task<int> load_snapshots();
  // Snapshots get the extra data that version 3 wants, from what there is.
  void complete_snapshots();
  // `snapshots_` in a new table, for the next header; the old one becomes free.
  blockdev::Task<int> write_snapshots();
  // A bitmap's table and data become free.
  blockdev::Task<int> release_bitmap(const BitmapEntry& entry);
  // A new refcount table and blocks that say what `references_` does, for the next header, whose
  // refcount width they have.
  blockdev::Task<int> write_refcounts();
  blockdev::Task<int> flush();
  // Flushes, and has the fields in the first sector say what `header_` does. Flushed.
  blockdev::Task<int> switch_fields();
  // The same with extensions (header_rewrite.h).
  blockdev::Task<int> switch_header();
  // Gives back what nobody names any more. The image does not need it to be done.
  blockdev::Task<int> discard_free();
  [[nodiscard]] int too_large(const char* what);

  // NOLINTBEGIN(cppcoreguidelines-non-private-member-variables-in-classes): the editors' own base
  blockdev::RawNode& file_;
  blockdev::IoContext& context_;
  Header header_;
  const Geometry geometry_;  // as it was
  std::string why_;
  std::vector<std::uint32_t> references_;  // by cluster, without the refcount structures
  std::vector<KeptSnapshot> snapshots_;
  // NOLINTEND(cppcoreguidelines-non-private-member-variables-in-classes)

 private:
  struct Run {
    std::uint64_t first;
    std::uint64_t count;
  };
  blockdev::Task<int> find_free_clusters();
  void clear_unknown_features();
  [[nodiscard]] std::optional<std::uint64_t> take_run(std::uint64_t clusters);

  std::vector<Run> free_runs_;
  std::uint64_t snapshots_bytes_{0};  // of the table in the file
};

}  // namespace vblk::qcow2
