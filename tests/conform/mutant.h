// Which defect of tests/conform/mutants.py is awake: the one that VBLK_MUTANT names.
#pragma once

#include <cstdlib>
#include <string_view>

namespace vblk {

inline bool mutant(std::string_view name) {
  static const char* const awake = std::getenv("VBLK_MUTANT");
  return awake != nullptr && name == awake;
}

}  // namespace vblk
