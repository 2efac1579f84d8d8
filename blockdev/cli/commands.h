// The commands of the `vblk` program. Each takes the words after its name and returns the exit
// status: 0 done, 1 failed (one line on standard error says why), 2 the command line makes no
// sense.
#pragma once

#include <span>
#include <string>

namespace vblk::cli {

int serve_command(std::span<const std::string> arguments);
int ctl_command(std::span<const std::string> arguments);

inline constexpr int kExitFailure = 1;
inline constexpr int kExitUsage = 2;

}  // namespace vblk::cli
