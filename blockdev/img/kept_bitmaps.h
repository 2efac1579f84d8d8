// The persistent bitmaps of an image that a command writes to, or whose disk gets another size: out
// of it, and in again. What serves disks marks them inconsistent (qcow2_node.h); here nobody else
// uses the image, and what is written is known.
//
//   take_out()   the image has no bitmaps
//   mark()       what is written goes into those that record writes
//   put_in()     it has them again
//
// Between the two the image is locked here, so that nobody else writes to it unseen: whoever opens
// it says that it is (SourceOptions::is_locked). An interruption leaves the image without bitmaps,
// and the next backup is a full one.
// Memory: all bits. take_out() and put_in() survey the image (image_editor.h).
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/img/edited_file.h"
#include "blockdev/qcow2/bitmap_editor.h"

namespace vblk::img {

class KeptBitmaps {
 public:
  explicit KeptBitmaps(std::string path) : path_(std::move(path)) {}
  ~KeptBitmaps() { unlock(); }
  KeptBitmaps(const KeptBitmaps&) = delete;
  KeptBitmaps& operator=(const KeptBitmaps&) = delete;

  // Of an image whose disk will have `disk_bytes`; nothing if it is raw, or has none. Errors: as
  // EditedFile::open() and BitmapEditor's, also kExhausted (too large for such a disk).
  Expected<void> take_out(const std::string& format, std::uint64_t disk_bytes,
                          bool may_be_inconsistent);
  // [offset_bytes, +length_bytes) of the disk changes. Any thread.
  void mark(std::uint64_t offset_bytes, std::uint64_t length_bytes);
  // The same as a function; none if there is nothing to be marked.
  [[nodiscard]] std::function<void(std::uint64_t, std::uint64_t)> marker() {
    if (bitmaps_.empty()) return {};
    return [this](std::uint64_t offset, std::uint64_t length) { mark(offset, length); };
  }
  [[nodiscard]] bool has_locked() const { return fd_ >= 0; }
  // All that have been taken out, whatever has become of `work`, which came between; that, or what
  // is wrong with the bitmaps, or both. The lock goes.
  Expected<void> put_in(Expected<void> work);

 private:
  Expected<void> edit(const char* what,
                      const std::function<int(EditedFile&, qcow2::BitmapEditor&)>& change);
  Expected<void> lock();
  void unlock();
  [[nodiscard]] Expected<bool> has_bitmaps() const;

  const std::string path_;
  int fd_{-1};
  std::mutex mutex_;  // over the bits
  std::vector<qcow2::BitmapEditor::Loose> bitmaps_;
};

// What take_out() would refuse of an image that is open already.
Expected<void> can_take_out_bitmaps(EditedFile& file, const std::string& path,
                                    std::uint64_t disk_bytes);

}  // namespace vblk::img
