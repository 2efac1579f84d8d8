// `vblk`: one program, one command per job.
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <fmt/core.h>

#include "aio/error.h"
#include "blockdev/bench/bench.h"
#include "blockdev/cli/commands.h"
#include "blockdev/conform/conform.h"
#include "blockdev/demo/demo.h"
#include "blockdev/img/img.h"
#include "blockdev/wash/wash.h"

namespace {

constexpr std::string_view kUsage = R"(Usage: vblk COMMAND [options]

A virtual block device backend: serves disk images to virtual machines over
vhost-user, on the I/O engine of your choice.

Commands:
  serve   serve a disk image on a vhost-user socket
  ctl     ask a running server which engines it uses and what it has done
  img     make, describe, check and convert images, as qemu-img does
  bench   measure a vhost-user-blk backend through its socket
  conform test a vhost-user-blk backend against the specifications
  wash    decide by experiment whether AIO does better than a pool of threads
  demo    compare the engines on this machine, without a virtual machine

Options:
  --help      print this text and exit
  --version   print the version and exit

Other options without a command are those of serve, as the conventions for
vhost-user back-end programs want it: vblk --socket-path PATH --blk-file IMAGE

'vblk COMMAND --help' tells more about a command.
)";

// Whether `word` is an option of serve in place of a command (vhost-user.rst, "Backend program
// conventions").
bool names_no_command(std::string_view word) {
  return word.starts_with("--") && word != "--help" && word != "--version";
}

int run_command(std::string_view command, std::span<const std::string> arguments,
                std::span<char*> raw_arguments) {
  if (command == "serve") return vblk::cli::serve_command(arguments);
  if (command == "ctl") return vblk::cli::ctl_command(arguments);
  if (command == "img") return vblk::img::run(arguments);
  if (command == "bench")
    return vblk::bench::run(static_cast<int>(raw_arguments.size()), raw_arguments.data());
  if (command == "conform")
    return vblk::conform::run(static_cast<int>(raw_arguments.size()), raw_arguments.data());
  if (command == "demo")
    return vblk::demo::run(static_cast<int>(raw_arguments.size()), raw_arguments.data());
  if (command == "wash")
    return vblk::wash::run(static_cast<int>(raw_arguments.size()), raw_arguments.data());
  if (command == "--help" || command == "-h" || command == "help") {
    fmt::print("{}", kUsage);
    return 0;
  }
  if (command == "--version") {
    fmt::print("vblk {}\n", VBLK_VERSION);
    return 0;
  }
  fmt::print(stderr, "vblk: unknown command '{}'; see vblk --help\n", command);
  return vblk::cli::kExitUsage;
}

// The exit status of a command that ended with `status`, where writing to standard output failed
// with `error`, or 0. A reader of a pipe who has left wants no more, and is told nothing.
int finish_output(const char* command, int status, int error) {
  errno = 0;
  if (std::fflush(stdout) != 0 && error == 0) error = errno;
  if (error == 0 || error == EPIPE || status != 0) return status;
  fmt::print(stderr, "vblk: {}: cannot write to standard output: {}\n", command,
             vblk::describe_errno(error));
  return vblk::cli::kExitFailure;
}

}  // namespace

int main(int argc, char** argv) {
  // A peer that went away is an error of its own descriptor (EPIPE), and a file at its limit of its
  // own write (EFBIG); never of the process.
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  if (argc < 2) {
    fmt::print(stderr, "vblk: no command; see vblk --help\n");
    return vblk::cli::kExitUsage;
  }
  const std::span<char*> words(argv, static_cast<std::size_t>(argc));
  const bool serves = names_no_command(words[1]);
  const std::vector<std::string> arguments(words.begin() + (serves ? 1 : 2), words.end());
  try {
    const int status = run_command(serves ? "serve" : words[1], arguments, words.subspan(1));
    return finish_output(words[1], status, 0);
  } catch (const std::exception& exception) {
    // What fmt::print() throws.
    const auto* const output = dynamic_cast<const std::system_error*>(&exception);
    if (output != nullptr && std::ferror(stdout) != 0)
      return finish_output(words[1], 0, output->code().value());
    // Nothing throws by intention; this is for memory, threads or descriptors that run out.
    fmt::print(stderr,
               "vblk: {}: cannot set up: {}; a limit of this process is reached, see 'ulimit -a'\n",
               words[1], exception.what());
    return vblk::cli::kExitFailure;
  }
}
