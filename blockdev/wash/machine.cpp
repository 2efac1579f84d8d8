#include "blockdev/wash/machine.h"

#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <fmt/core.h>

#include "blockdev/wash/digest.h"

namespace vblk::wash {

namespace {

std::string first_line(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The value behind "key :" in a file of such lines.
std::string value_behind(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const auto colon = line.find(':');
    const auto begin = line.find_first_not_of(" \t", colon + 1);
    if (colon != std::string::npos && begin != std::string::npos) return line.substr(begin);
  }
  return "unknown";
}

// "ext4 rw,relatime" of the mount that `device` is seen by.
std::string file_system_of(dev_t device) {
  std::ifstream file("/proc/self/mountinfo");
  const std::string wanted = fmt::format("{}:{}", ::major(device), ::minor(device));
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string id;
    std::string parent;
    std::string numbers;
    words >> id >> parent >> numbers;
    const auto dash = line.find(" - ");
    if (numbers != wanted || dash == std::string::npos) continue;
    std::istringstream rest(line.substr(dash + 3));
    std::string type;
    std::string source;
    std::string options;
    rest >> type >> source >> options;
    return fmt::format("{} {}", type, options);
  }
  return "unknown";
}

void add_device(std::map<std::string, std::string>& facts, const std::string& image_path) {
  struct stat status{};
  if (::stat(image_path.c_str(), &status) != 0) return;
  const bool is_device = S_ISBLK(status.st_mode);
  const dev_t device = is_device ? status.st_rdev : status.st_dev;
  facts["file system"] = is_device ? "none, a block device" : file_system_of(device);
  std::filesystem::path queue =
      fmt::format("/sys/dev/block/{}:{}", ::major(device), ::minor(device));
  std::error_code error;
  queue = std::filesystem::canonical(queue, error);
  if (error) return;
  facts["block device"] = queue.filename();
  if (std::filesystem::exists(queue / "partition", error)) queue = queue.parent_path();
  for (const char* name : {"scheduler", "nr_requests", "rotational", "write_cache", "fua",
                           "logical_block_size", "wbt_lat_usec"}) {
    const std::string value = first_line(queue / "queue" / name);
    if (!value.empty()) facts[fmt::format("block device, {}", name)] = value;
  }
  std::size_t queues = 0;
  for (const auto& entry : std::filesystem::directory_iterator(queue / "mq", error)) {
    static_cast<void>(entry);
    ++queues;
  }
  if (!error) facts["block device, queues"] = fmt::format("{}", queues);
}

}  // namespace

std::map<std::string, std::string> machine_facts(const std::string& image_path) {
  utsname system{};
  ::uname(&system);
  std::map<std::string, std::string> facts;
  facts["kernel"] = fmt::format("{} {}", system.release, system.version);
  facts["processors"] = fmt::format("{} of {}", ::sysconf(_SC_NPROCESSORS_ONLN),
                                    value_behind("/proc/cpuinfo", "model name"));
  facts["virtual machine"] =
      value_behind("/proc/cpuinfo", "flags").find(" hypervisor") == std::string::npos ? "no"
                                                                                      : "yes";
  facts["memory"] = value_behind("/proc/meminfo", "MemTotal");
  for (const auto& [name, path] :
       {std::pair("idle governor", "/sys/devices/system/cpu/cpuidle/current_governor"),
        std::pair("frequency governor", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        std::pair("clock", "/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        std::pair("load when it began", "/proc/loadavg")}) {
    const std::string value = first_line(path);
    if (!value.empty()) facts[name] = value;
  }
  facts["vblk"] = VBLK_VERSION;
  add_device(facts, image_path);
  return facts;
}

Expected<Identity> identity_of_this_process() {
  auto program = sha256_of_file("/proc/self/exe");
  if (!program) return std::unexpected(program.error());
  utsname system{};
  ::uname(&system);
  std::string machine = first_line("/etc/machine-id");
  if (machine.empty()) machine = system.nodename;
  // Short enough to be read in a message; the program's own digest is for comparing.
  return Identity{{"program", program->substr(0, 16)},
                  {"analysis", sha256(analysis_text()).substr(0, 16)},
                  {"machine", sha256(machine).substr(0, 16)},
                  {"processors", fmt::format("{}", ::sysconf(_SC_NPROCESSORS_ONLN))},
                  {"kernel", system.release}};
}

}  // namespace vblk::wash
