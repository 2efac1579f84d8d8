// The persistent bitmaps of an image that is read.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/qcow2/bitmap_editor.h"
#include "blockdev/qcow2/bitmaps.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/raw_node.h"

namespace vblk::img {

struct StoredBitmaps {
  std::unique_ptr<blockdev::RawNode> file;
  qcow2::Header header;
  std::vector<qcow2::Bitmap> list;

  [[nodiscard]] qcow2::BitmapEditor::Other view() const { return {*file, header, list}; }
};

// Opens the file of `path` and reads which bitmaps it has; their bits are read when they are
// needed. Errors: kNotFound (raw images have none), as decide_format(), open_file() and
// read_header().
Expected<StoredBitmaps> open_stored_bitmaps(const std::string& path, const std::string& format,
                                            bool lock);

}  // namespace vblk::img
