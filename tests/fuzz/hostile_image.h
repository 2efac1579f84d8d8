// A hostile image and what a guest does with it, told by a string of bytes: what the fuzzer makes
// up, and what its findings are repeated from.
//
//   byte 0              what follows
//   even                a valid image: its geometry (kSpecBytes); then patches of it, each of a
//                       header field, extension, table entry or the file's length, by values that
//                       are likely to hurt; then requests
//   odd                 the length of a file's beginning (2 bytes) and these bytes; then requests
//
// Everything that is missing at the end of the input is 0, so each input means something.
//
// Whatever the image: no crash, no loop, no request that ends twice or never; and what damage there
// is does not get worse:
//   - an image opened read-only is not written;
//   - the header's fixed part stays; so does every entry of the L1 and refcount tables: none
//     becomes 0;
//   - no guest data lands in the tables that are in use;
//   - a sector that was written well is read back as it was written, right after;
//   - an image that can be opened can be opened again.
//
// With VBLK_FUZZ_CANARY in the environment an L1 entry is lost after each use, which must be found.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace vblk::fuzz {

// Bytes of an image, and of the file that vblk may make of it.
inline constexpr std::uint64_t kImageBytesMax = std::uint64_t{1} << 20;
inline constexpr std::uint64_t kFileBytesMax = std::uint64_t{4} << 20;

struct Outcome {
  bool opened{false};   // for reading
  bool written{false};  // opened for writing as well
  // What must not be, or empty.
  std::string failure;
};

Outcome run_hostile_image(std::span<const std::uint8_t> input);

}  // namespace vblk::fuzz
