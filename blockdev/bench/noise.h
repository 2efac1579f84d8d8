// Content that no disk can compress.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace vblk::bench {

// The same seed gives the same bytes.
void fill_with_noise(std::span<std::byte> bytes, std::uint64_t seed);

}  // namespace vblk::bench
