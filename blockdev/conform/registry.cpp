#include "blockdev/conform/registry.h"

#include <algorithm>
#include <fnmatch.h>

#include <fmt/core.h>

namespace vblk::conform {

std::string_view to_string(Force force) {
  switch (force) {
    case Force::kMust:
      return "MUST";
    case Force::kShould:
      return "SHOULD";
    case Force::kStates:
      return "states";
    case Force::kRobust:
      return "robust";
  }
  return "";
}

std::vector<const Test*> all_tests() {
  std::vector<const Test*> tests;
  for (const auto group :
       {program_tests(), protocol_tests(), status_tests(), config_tests(), ring_tests(),
        packed_tests(), request_tests(), memory_tests(), durability_tests(), reconnect_tests(),
        migration_tests(), hostile_ring_tests(), hostile_packed_tests(), hostile_message_tests(),
        integrity_tests()}) {
    for (const Test& test : group) tests.push_back(&test);
  }
  return tests;
}

std::vector<const Test*> select_tests(std::span<const std::string> names,
                                      std::span<const std::string> groups) {
  auto tests = all_tests();
  std::erase_if(tests, [&](const Test* test) {
    const bool name_fits =
        names.empty() || std::ranges::any_of(names, [test](const std::string& pattern) {
          return ::fnmatch(pattern.c_str(), test->name, 0) == 0;
        });
    const bool group_fits =
        groups.empty() || std::ranges::find(groups, test->group()) != groups.end();
    return !name_fits || !group_fits;
  });
  return tests;
}

bool is_group(std::string_view name) {
  return std::ranges::any_of(all_tests(),
                             [name](const Test* test) { return test->group() == name; });
}

std::string list_text(std::span<const Test* const> tests) {
  std::string text;
  for (const Test* test : tests) {
    text += fmt::format("{}{}\n    {}, \"{}\", {}:\n    {}\n", test->name,
                        test->destructive ? " (writes)" : "", test->statement.document,
                        test->statement.section, to_string(test->statement.force),
                        test->statement.text);
  }
  return text;
}

}  // namespace vblk::conform
