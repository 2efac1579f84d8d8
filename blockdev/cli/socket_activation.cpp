#include "blockdev/cli/socket_activation.h"

#include <charconv>
#include <cstdlib>
#include <string_view>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::cli {

namespace {

// SD_LISTEN_FDS_START: what is passed begins behind standard input, output and error.
constexpr int kFirstFd = 3;

std::optional<long> number_in(const char* variable) {
  const char* const value = std::getenv(variable);
  if (value == nullptr) return std::nullopt;
  const std::string_view text(value);
  long number = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || rest != text.data() + text.size()) return -1;
  return number;
}

}  // namespace

Expected<std::optional<int>> activated_socket() {
  // Inherited from a parent for which it was meant.
  if (number_in("LISTEN_PID") != ::getpid()) return std::nullopt;
  const auto count = number_in("LISTEN_FDS");
  if (!count || *count == 0) return std::nullopt;
  if (*count == 1) return kFirstFd;
  return make_error(ErrorKind::kInvalidArgument,
                    fmt::format("LISTEN_FDS={}: one socket is served; let the socket unit have one "
                                "ListenStream=",
                                std::getenv("LISTEN_FDS")));
}

}  // namespace vblk::cli
