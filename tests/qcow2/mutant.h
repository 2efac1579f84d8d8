// Which defect of tests/qcow2/mutants.py is awake: the one that the test has named.
#pragma once

#include <string_view>

namespace vblk::qcow2 {

inline std::string_view awake_mutant;  // NOLINT: nothing else could reach so far into the code

inline bool mutant(std::string_view name) { return name == awake_mutant; }

}  // namespace vblk::qcow2
