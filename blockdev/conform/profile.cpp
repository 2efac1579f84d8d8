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

// SPDK's vhost takes its devices from a file of JSON-RPC calls, and makes its sockets in a folder,
// each with the name of its controller. Words behind the script: $0 the program, $1 the socket, $2
// the image, $3 the monitor, which is SPDK's RPC socket here.
std::vector<std::string> spdk_command(const ProfileOptions& options, const std::string& program,
                                      bool read_only) {
  const std::string script = fmt::format(
      R"sh(printf '{{"subsystems":[{{"subsystem":"bdev","config":[{{"method":"bdev_{}_create",)sh"
      R"sh("params":{{"name":"disk","filename":"%s","block_size":512}}}}]}},)sh"
      R"sh({{"subsystem":"vhost_blk","config":[{{"method":"vhost_create_blk_controller",)sh"
      R"sh("params":{{"ctrlr":"%s","dev_name":"disk","cpumask":"0x1","readonly":{}}}}}]}}]}}' )sh"
      R"sh("$2" "$(basename "$1")" > "$3.json" && )sh"
      R"sh(exec "$0" -S "$(dirname "$1")" -c "$3.json" -r "$3" -m 0x1 -s 512)sh",
      options.aio == "native" ? "aio" : "uring", read_only ? "true" : "false");
  return {"sh", "-c", script, program, "{socket}", "{image}", "{monitor}"};
}

// What each profile can start; the first engine is what it starts without --aio.
Expected<void> check(ProfileOptions& options) {
  const bool is_spdk = options.name == "spdk";
  if (!is_one_of(options.name, {"vblk", "qemu-storage-daemon", "spdk"}))
    return unknown("profile", options.name, "vblk, qemu-storage-daemon or spdk");
  if (options.aio.empty()) options.aio = is_spdk ? "native" : "threads";
  if (!is_one_of(options.aio, {"threads", "native", "io_uring"}) ||
      (is_spdk && options.aio == "threads")) {
    return unknown("aio", options.aio,
                   is_spdk ? "native or io_uring" : "threads, native or io_uring");
  }
  if (!is_one_of(options.format, {"raw", "qcow2"}) || (is_spdk && options.format != "raw"))
    return unknown("format", options.format, is_spdk ? "raw" : "raw or qcow2");
  if (!is_one_of(options.cache, {"none", "writeback", "writethrough", "directsync"}) ||
      (is_spdk && options.cache != "none")) {
    return unknown("cache", options.cache,
                   is_spdk ? "none" : "none, writeback, writethrough or directsync");
  }
  return {};
}

}  // namespace

Expected<void> apply_profile(ProfileOptions options, Target& target) {
  if (auto checked = check(options); !checked) return checked;
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
  if (options.name == "spdk") {
    const std::string program = options.program.empty() ? "vhost" : options.program;
    target.command = spdk_command(options, program, false);
    target.read_only_command = spdk_command(options, program, true);
    return {};
  }
  const std::string program = options.program.empty() ? options.name : options.program;
  target.command = qemu_command(options, program, false);
  target.read_only_command = qemu_command(options, program, true);
  target.resize_by = ResizeBy::kQmp;
  return {};
}

}  // namespace vblk::conform
