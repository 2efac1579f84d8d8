// What a test has in its hands: a backend to talk to, and the ways to end.
//
// A test's verdict leaves it as an exception, so that a test reads as what it does and not as what
// may go wrong at each step. Nothing else in the suite throws by intention. One thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
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

// What a driver may not exceed. virtio 1.2, "Block Device / Feature bits" (SIZE_MAX, SEG_MAX,
// DISCARD, WRITE_ZEROES).
struct RequestLimits {
  std::uint64_t segment_bytes{kNone};
  std::uint64_t segments{kNone};
  std::uint64_t discard_sectors{kNone};
  std::uint64_t discard_segments{kNone};
  std::uint64_t write_zeroes_sectors{kNone};
  std::uint64_t write_zeroes_segments{kNone};

  static constexpr std::uint64_t kNone = ~std::uint64_t{0};
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

  // The socket of the backend under test, for one connection. The backend is started at the first
  // call where the suite starts it, and again where it has ended in good order with the frontend
  // before. Skips the test if that one is still connected and has the backend to itself.
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

  // What the backend has said of the largest requests that it takes; Guest asks for it, once.
  std::optional<RequestLimits>& request_limits() { return request_limits_; }

  std::mt19937_64& random() { return random_; }
  [[nodiscard]] const ProbeOptions& options() const { return options_; }

  // Whether the backend is about to end with the frontend before, in good order.
  [[nodiscard]] bool ends_in_order_soon();
  // To be called when the test has done its work: the backend must be there, and serve the next
  // frontend.
  void check_aftermath();
  // What is to be said of a backend that has died unexpectedly; empty if it has not.
  [[nodiscard]] std::string death();

 private:
  void start();
  // Where the frontend before has taken the backend with it.
  void start_for_the_next();

  const ProbeOptions options_;
  const std::string folder_;
  std::mt19937_64 random_;
  std::unique_ptr<Backend> backend_;
  bool read_only_{false};
  bool end_expected_{false};
  std::optional<RequestLimits> request_limits_;
  unsigned connected_launch_{0};  // of the backend, the last that a connection was made to
};

}  // namespace vblk::conform
