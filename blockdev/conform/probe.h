// What a test has in its hands: a backend to talk to, and the ways to end.
//
// A test's verdict leaves it as an exception, so that a test reads as what it does and not as what
// may go wrong at each step. Nothing else in the suite throws by intention. One thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>

#include "aio/error.h"
#include "blockdev/conform/backend.h"

namespace vblk::conform {

enum class Outcome : std::uint8_t { kPassed, kFailed, kSkipped };

// How a test has ended, unless it just returned.
struct Verdict {
  Outcome outcome;
  std::string text;  // what was seen, or why not
};

// How long a backend may take for what it has to do; nothing waits it out unless it fails.
inline constexpr std::chrono::milliseconds kPatience{4000};
// How long is waited for what must not happen.
inline constexpr std::chrono::milliseconds kQuiet{150};

struct ProbeOptions {
  Target target;
  std::uint64_t seed{0};
  std::chrono::seconds soak{4};  // of the integrity tests
};

class Probe {
 public:
  // `folder`: of this test alone, for the image and the socket.
  Probe(const ProbeOptions& options, std::string folder);

  [[noreturn]] static void fail(std::string seen) {
    throw Verdict{Outcome::kFailed, std::move(seen)};
  }
  [[noreturn]] static void skip(std::string reason) {
    throw Verdict{Outcome::kSkipped, std::move(reason)};
  }
  static void expect(bool holds, std::string otherwise_seen) {
    if (!holds) fail(std::move(otherwise_seen));
  }
  // The value, or a failure with the error's message.
  template <typename T>
  static T value(Expected<T> result, const char* what) {
    if (!result) fail(std::string(what) + ": " + result.error().message);
    if constexpr (!std::is_void_v<T>) return std::move(*result);
  }

  // The socket of the backend under test, which is started at the first call where the suite starts
  // it.
  const std::string& socket_path();
  // The backend as a process of ours. Skips the test if it is not.
  Backend& own_backend(const char* why_needed);
  [[nodiscard]] bool has_own_backend() const { return options_.target.starts_itself(); }
  // A folder that is this test's alone.
  [[nodiscard]] const std::string& folder() const { return folder_; }
  // Starts a second kind of it: read-only. Skips the test where no command for that is known.
  void use_read_only();
  // The test ends the backend itself: its end is not a failure any more.
  void expect_end() { end_expected_ = true; }
  // The process behind the socket; 0: not known.
  [[nodiscard]] int backend_pid();
  // The file that the backend serves; empty: not known.
  [[nodiscard]] std::string image_path() const;

  std::mt19937_64& random() { return random_; }
  [[nodiscard]] const ProbeOptions& options() const { return options_; }

  // To be called when the test has done its work: the backend must be there, and serve the next
  // frontend.
  void check_aftermath();
  // What is to be said of a backend that has died unexpectedly; empty if it has not.
  [[nodiscard]] std::string death();

 private:
  void start();

  const ProbeOptions options_;
  const std::string folder_;
  std::mt19937_64 random_;
  std::unique_ptr<Backend> backend_;
  bool read_only_{false};
  bool end_expected_{false};
};

}  // namespace vblk::conform
