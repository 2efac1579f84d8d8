#include "blockdev/conform/profile.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <string_view>

#include <fmt/core.h>

namespace vblk::conform {

namespace {

// More than one, so that what belongs to a queue and what to the device can be told apart.
constexpr int kQueues = 4;

std::unexpected<Error> unknown(std::string_view option, const std::string& given,
                               std::string_view known) {
  return make_error(ErrorKind::kInvalidArgument,
                    fmt::format("--{} {}: use {}", option, given, known));
}

bool is_one_of(const std::string& word, std::initializer_list<std::string_view> known) {
  return std::ranges::find(known, word) != known.end();
}

std::vector<std::string> vblk_command(const ProfileOptions& options, const std::string& program,
                                      bool read_only) {
  std::vector<std::string> words{
      program,        "serve",     "{image}",     "--socket-path", "{socket}",
      "--monitor",    "{monitor}", "--aio",       options.aio,     "--format",
      options.format, "--cache",   options.cache, "--queues",      fmt::format("{}", kQueues),
      "--log-level",  "warning"};
  if (read_only) words.emplace_back("--read-only");
  return words;
}

// As QEMU's manual has it, plus a monitor for block_resize.
std::vector<std::string> qemu_command(const ProfileOptions& options, const std::string& program,
                                      bool read_only) {
  const bool direct = is_one_of(options.cache, {"none", "directsync"});
  const bool through = is_one_of(options.cache, {"writethrough", "directsync"});
  const std::string common = read_only ? ",read-only=on" : "";
  return {program,
          "--blockdev",
          fmt::format("driver=file,node-name=file,filename={{image}},aio={},cache.direct={},"
                      "discard=unmap{}",
                      options.aio, direct ? "on" : "off", common),
          "--blockdev",
          fmt::format("driver={},node-name=disk,file=file,discard=unmap{}", options.format, common),
          "--export",
          fmt::format("type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,"
                      "addr.path={{socket}},num-queues={},writable={}{}",
                      kQueues, read_only ? "off" : "on", through ? ",writethrough=on" : ""),
          "--chardev",
          "socket,id=monitor,path={monitor},server=on,wait=off",
          "--monitor",
          "chardev=monitor"};
}

}  // namespace

Expected<void> apply_profile(const ProfileOptions& options, Target& target) {
  if (!is_one_of(options.name, {"vblk", "qemu-storage-daemon"}))
    return unknown("profile", options.name, "vblk or qemu-storage-daemon");
  if (!is_one_of(options.aio, {"threads", "native", "io_uring"}))
    return unknown("aio", options.aio, "threads, native or io_uring");
  if (!is_one_of(options.format, {"raw", "qcow2"}))
    return unknown("format", options.format, "raw or qcow2");
  if (!is_one_of(options.cache, {"none", "writeback", "writethrough", "directsync"}))
    return unknown("cache", options.cache, "none, writeback, writethrough or directsync");
  target.format = options.format == "qcow2" ? ImageFormat::kQcow2 : ImageFormat::kRaw;
  if (options.name == "vblk") {
    std::error_code ignored;
    const std::string program =
        options.program.empty() ? std::filesystem::read_symlink("/proc/self/exe", ignored).string()
                                : options.program;
    target.command = vblk_command(options, program, false);
    target.read_only_command = vblk_command(options, program, true);
    target.resize_command = {program, "ctl", "{monitor}", "resize", "{bytes}"};
    target.resize_by = ResizeBy::kCommand;
    return {};
  }
  const std::string program = options.program.empty() ? options.name : options.program;
  target.command = qemu_command(options, program, false);
  target.read_only_command = qemu_command(options, program, true);
  target.resize_by = ResizeBy::kQmp;
  return {};
}

}  // namespace vblk::conform
