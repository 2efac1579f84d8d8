// `vblk serve` and `vblk ctl` with seeded defects (mutants.py); those of the program are here.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <string>
#include <string_view>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include "blockdev/cli/commands.h"
#include "tests/conform/mutant.h"

namespace {

int serve(const std::vector<std::string>& arguments) {
  const auto has = [&arguments](std::string_view option) {
    return std::ranges::any_of(
        arguments, [option](const std::string& argument) { return argument.starts_with(option); });
  };
  if (vblk::mutant("capabilities-are-of-a-network-card") && has("--print-capabilities")) {
    std::puts(R"({"type": "net"})");
    return 0;
  }
  if (vblk::mutant("fd-is-not-known") && has("--fd")) return vblk::cli::kExitUsage;
  if (vblk::mutant("it-serves-from-a-child")) {
    if (const pid_t child = ::fork(); child != 0) {
      int status = 0;
      ::waitpid(child, &status, 0);
      return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    }
  }
  const int status = vblk::cli::serve_command(arguments);
  return vblk::mutant("failure-ends-with-status-0") ? 0 : status;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.empty()) return vblk::cli::kExitUsage;
  const std::vector<std::string> arguments(words.begin() + 1, words.end());
  return words[0] == "ctl" ? vblk::cli::ctl_command(arguments) : serve(arguments);
}
