#include "blockdev/bench/noise.h"

#include <algorithm>
#include <cstring>

#include "blockdev/virtio/little_endian.h"

namespace vblk::bench {

namespace {

// SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators"): fast enough
// that the disk is what limits the filling.
std::uint64_t next_random(std::uint64_t& state) {
  std::uint64_t mixed = state += 0x9e3779b97f4a7c15;
  mixed = (mixed ^ (mixed >> 30U)) * 0xbf58476d1ce4e5b9;
  mixed = (mixed ^ (mixed >> 27U)) * 0x94d049bb133111eb;
  return mixed ^ (mixed >> 31U);
}

}  // namespace

void fill_with_noise(std::span<std::byte> bytes, std::uint64_t seed) {
  for (std::size_t i = 0; i + 8 <= bytes.size(); i += 8) {
    virtio::store_le<std::uint64_t>(bytes.data() + i, next_random(seed));
  }
}

}  // namespace vblk::bench
