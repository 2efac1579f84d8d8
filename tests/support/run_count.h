// How often a random test begins anew, each time with other images and other work.
#pragma once

#include <cstdlib>
#include <string>

namespace vblk::test {

// As often as the environment variable says, or else as there is time for in every run of all
// tests.
inline int run_count(const char* variable, int otherwise) {
  const char* const given = std::getenv(variable);
  return given != nullptr ? std::stoi(given) : otherwise;
}

}  // namespace vblk::test
