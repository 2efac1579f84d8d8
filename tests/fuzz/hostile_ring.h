// A driver without shame on a split or packed ring, told by a string of bytes: what the ring fuzzer
// makes up, and what its findings are repeated from.
//
//   byte 0    packed, event index, indirect descriptors, disk holds requests: a bit each
//   byte 1    the ring's size
//   byte 2    how far it has been used before
//   then      steps, each a byte for what it does and what that takes (hostile_ring.cpp)
//
// Whatever it writes, also while requests are in flight: no crash, no loop, no access outside guest
// memory, no request that ends twice or never; and the device's error descriptor is signalled once
// when it breaks the ring and never otherwise.
//
// With VBLK_FUZZ_CANARY in the environment a request is called lost that is not, which must be
// found.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace vblk::fuzz {

struct RingOutcome {
  std::uint64_t requests{0};
  bool is_broken{false};
  // What must not be, or empty.
  std::string failure;
};

RingOutcome run_hostile_ring(std::span<const std::uint8_t> input);

}  // namespace vblk::fuzz
