// Persistent bitmaps of an image that nobody uses: made, removed, cleared, switched on and off,
// merged (qcow2.txt, "Bitmaps"). Several changes come into the image at once, by save(), as
// image_editor.h says: new tables and data where something has changed, a new directory, and the
// bitmaps extension of the header. What has not changed stays where it is, and entries of the
// directory keep what in them nobody here knows. Where only flags change, they are written in
// place: one sector each, and no survey.
//
// Memory: a survey; of each bitmap whose bits change all of them, 512 MiB at most and mostly far
// less: 2 MiB for 1 TiB in granules of 64 KiB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "blockdev/qcow2/bitmaps.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/qcow2/image_editor.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

class BitmapEditor final : public ImageEditor {
 public:
  // `file` is open for writing and holds the image of `header`.
  BitmapEditor(blockdev::RawNode& file, blockdev::IoContext& context, Header header)
      : ImageEditor(file, context, std::move(header)) {}

  // First and once. Error: EINVAL (the directory is damaged).
  blockdev::Task<int> load();

  // Changes, in memory. 0, or an errno value with `why` said, and nothing has changed:
  //   ENOENT      there is no such bitmap
  //   EEXIST      there is one of this name
  //   EINVAL      name or granularity
  //   EUCLEAN     it is marked inconsistent and can only be removed
  //   EFBIG       too large, or too many
  //   EOPNOTSUPP  an image of version 2, a disk of no bytes, extra data nobody here knows
  // `granularity_bytes`: none is the size of a cluster, 4 KiB at least. A new one is enabled.
  [[nodiscard]] int add(std::string_view name, std::optional<std::uint64_t> granularity_bytes);
  [[nodiscard]] int remove(std::string_view name);
  [[nodiscard]] int clear(std::string_view name);
  // Whether it is to record writes (flag auto).
  [[nodiscard]] int enable(std::string_view name, bool enabled);
  // What is set in `source` gets set in `name`, of this image or of `other`.
  blockdev::Task<int> merge(std::string_view name, std::string_view source);
  struct Other {
    blockdev::RawNode& file;
    const Header& header;
    const std::vector<Bitmap>& bitmaps;
  };
  blockdev::Task<int> merge(std::string_view name, std::string_view source, const Other& other);

  // A bitmap without its image.
  struct Loose {
    std::string name;
    unsigned granularity_bits;
    bool enabled;
    bool inconsistent;  // without bits then
    std::vector<std::byte> bits;
  };
  // Takes all bitmaps out of the image, with their bits; inconsistent ones if they may be there.
  // Errors besides those above: of reading.
  blockdev::Task<int> take_out(bool may_be_inconsistent, std::vector<Loose>& bitmaps);
  // Puts one back, into an image whose disk may have another size by now: bits behind its end are
  // forgotten, those of what is new are not set.
  [[nodiscard]] int put_in(Loose bitmap);

  // Writes what has changed; nothing if nothing has. Once, last. Errors: EINVAL (the image has
  // errors), EFBIG (tables or the file would be too large).
  blockdev::Task<int> save();

 private:
  struct Kept {
    BitmapEntry entry;  // without its name
    std::string name;
    std::vector<std::byte> bytes;                // of the directory; empty: a new one
    std::optional<std::vector<std::byte>> bits;  // nothing: as they are stored
  };

  [[nodiscard]] Kept* find(std::string_view name);
  // To be used: not inconsistent, and known in all that it is.
  [[nodiscard]] int find_usable(std::string_view name, Kept*& found);
  [[nodiscard]] int check_usable(const BitmapEntry& entry, std::string_view name);
  blockdev::Task<int> read_bits(blockdev::RawNode& file, const Geometry& geometry,
                                const BitmapEntry& entry, std::vector<std::byte>& bits);
  blockdev::Task<int> merge_bits(Kept& into, unsigned granularity_bits,
                                 const std::vector<std::byte>& bits);
  blockdev::Task<int> write_bits(Kept& bitmap);
  blockdev::Task<int> write_directory();
  blockdev::Task<int> write_flags();

  std::vector<Kept> bitmaps_;
  std::vector<BitmapEntry> released_;  // that were in the image
  bool is_rewritten_{false};           // the directory, at least
  bool flags_change_{false};
};

}  // namespace vblk::qcow2
