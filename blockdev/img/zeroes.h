// Whether memory is all zeroes.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>

namespace vblk::img {

// Memory equals itself moved by a piece that is zero: the library's comparison is as fast as it
// gets, and ends at the first difference.
[[nodiscard]] inline bool is_zero(std::span<const std::byte> bytes) {
  constexpr std::size_t kPiece = 16;
  static constexpr std::byte kZeroes[kPiece]{};
  if (bytes.size() <= kPiece) return std::memcmp(bytes.data(), kZeroes, bytes.size()) == 0;
  return std::memcmp(bytes.data(), kZeroes, kPiece) == 0 &&
         std::memcmp(bytes.data(), bytes.data() + kPiece, bytes.size() - kPiece) == 0;
}

}  // namespace vblk::img
