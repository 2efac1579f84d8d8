// `vblk serve` and `vblk ctl` with seeded defects (mutants.py).
#include <csignal>
#include <string>
#include <string_view>
#include <vector>

#include "blockdev/cli/commands.h"

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.empty()) return vblk::cli::kExitUsage;
  const std::vector<std::string> arguments(words.begin() + 1, words.end());
  return words[0] == "ctl" ? vblk::cli::ctl_command(arguments)
                           : vblk::cli::serve_command(arguments);
}
