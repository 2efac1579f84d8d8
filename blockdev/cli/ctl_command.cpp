#include <fmt/core.h>

#include "blockdev/cli/commands.h"
#include "blockdev/cli/monitor.h"
#include "blockdev/cli/options.h"

namespace vblk::cli {

int ctl_command(std::span<const std::string> arguments) {
  const auto parsed = parse_ctl_options(arguments);
  if (!parsed) {
    fmt::print(stderr, "vblk: ctl: {}\n", parsed.error().message);
    return kExitUsage;
  }
  if (const auto* answer = std::get_if<Answer>(&*parsed)) {
    fmt::print("{}", answer->text);
    return 0;
  }
  const auto& options = std::get<CtlOptions>(*parsed);
  boost::json::object members;
  if (options.argument) members[options.argument->first] = options.argument->second;
  const auto reply = ask_monitor(options.monitor_path, options.command, members);
  if (!reply) {
    fmt::print(stderr, "vblk: ctl: {}\n", reply.error().message);
    return kExitFailure;
  }
  fmt::print("{}", *reply);
  return 0;
}

}  // namespace vblk::cli
