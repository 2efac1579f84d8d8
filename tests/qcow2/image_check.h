// Checks a qcow2 image for what a power cut must never leave behind, and reads it: the test's own
// code, which shares nothing with what it tests.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "tests/qcow2/image_format.h"

namespace vblk::qcow2::testing {

struct CheckedImage {
  std::vector<std::string> errors;  // the first few
  std::uint64_t leaks{0};           // clusters with a higher refcount than references
  Tags disk;
  Tags snapshot;  // of the first one
  // Whoever knows bitmaps would take the image's for right.
  bool vouches_for_bitmaps{false};
};

// Errors: a refcount below the number of references, a table or cluster beyond the end of the file,
// a COPIED flag that contradicts the refcount, entries with reserved bits. `data_file` is what an
// image with an external data file has its data in: there each cluster is where the guest has it.
CheckedImage check_image(std::span<const std::byte> image, std::span<const std::uint64_t> backing,
                         std::span<const std::byte> data_file = {});
inline CheckedImage check_image(const ImageFiles& files, std::span<const std::uint64_t> backing) {
  return check_image(files.image, backing, files.data_file);
}

}  // namespace vblk::qcow2::testing
