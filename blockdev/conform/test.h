// A test of the conformance suite: the statement it holds a backend to, and how.
//
// A test's function gets a Probe (probe.h), and with it a backend that no test has used before
// where the suite starts backends itself. It ends by returning (passed), or by fail() or skip(). It
// runs in a process of its own with a deadline (runner.h), so that whatever a backend does, to
// shared memory included, costs one test.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace vblk::conform {

class Probe;

// The word that the source of a statement has for it. What a source only allows (MAY) is held
// against nobody, so that no test has that word.
enum class Force : std::uint8_t {
  kMust,
  kShould,
  // It says what a message, a field or a status is, without any of these words.
  kStates,
  // No sentence of a specification, but what everybody relies on: a frontend that breaks the rules
  // costs nobody else anything; what is offered works.
  kRobust,
};
inline constexpr std::size_t kForces = 4;
[[nodiscard]] std::string_view to_string(Force force);

struct Statement {
  const char* document;  // with its version
  const char* section;   // its title
  Force force;
  const char* text;  // in our words
};

struct Test {
  const char* name;  // "group/what-it-tests"
  Statement statement;
  void (*run)(Probe& probe);
  bool destructive{false};  // writes to the disk
  std::chrono::seconds deadline{20};

  [[nodiscard]] std::string_view group() const {
    const std::string_view whole(name);
    return whole.substr(0, whole.find('/'));
  }
};

// Whether a test goes on for as long as --duration says.
[[nodiscard]] inline bool is_soak(const Test& test) { return test.group() == "integrity"; }

inline constexpr const char* kVirtio = "virtio 1.2";
inline constexpr const char* kVirtio13 = "virtio 1.3";
inline constexpr const char* kVhostUser = "vhost-user.rst (QEMU 7.2)";
inline constexpr const char* kVhostUser82 = "vhost-user.rst (QEMU 8.2)";

// By group, in the order in which they run.
[[nodiscard]] std::span<const Test> protocol_tests();
[[nodiscard]] std::span<const Test> config_tests();
[[nodiscard]] std::span<const Test> ring_tests();
[[nodiscard]] std::span<const Test> packed_tests();
[[nodiscard]] std::span<const Test> request_tests();
[[nodiscard]] std::span<const Test> hostile_ring_tests();
[[nodiscard]] std::span<const Test> hostile_packed_tests();
[[nodiscard]] std::span<const Test> hostile_message_tests();
[[nodiscard]] std::span<const Test> memory_tests();
[[nodiscard]] std::span<const Test> durability_tests();
[[nodiscard]] std::span<const Test> migration_tests();
[[nodiscard]] std::span<const Test> status_tests();
[[nodiscard]] std::span<const Test> program_tests();
[[nodiscard]] std::span<const Test> reconnect_tests();
[[nodiscard]] std::span<const Test> integrity_tests();

}  // namespace vblk::conform
