// All tests, and which of them a user has asked for.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "blockdev/conform/test.h"

namespace vblk::conform {

[[nodiscard]] std::vector<const Test*> all_tests();
// Those whose name matches one of `names` (globs as of glob(7), all if there is none) and whose
// group is one of `groups` (all if there is none).
[[nodiscard]] std::vector<const Test*> select_tests(std::span<const std::string> names,
                                                    std::span<const std::string> groups);
[[nodiscard]] bool is_group(std::string_view name);
// The table of tests and their statements, for people.
[[nodiscard]] std::string list_text(std::span<const Test* const> tests);

}  // namespace vblk::conform
