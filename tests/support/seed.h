// The seed of a random test: a fresh one each time, printed, or VBLK_TEST_SEED to repeat one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>

namespace vblk::test {

inline std::uint64_t test_seed() {
  const char* const given = std::getenv("VBLK_TEST_SEED");
  const std::uint64_t seed = given != nullptr ? std::stoull(given) : std::random_device{}();
  std::cout << "seed: VBLK_TEST_SEED=" << seed << '\n';
  return seed;
}

}  // namespace vblk::test
