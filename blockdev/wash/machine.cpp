#include "blockdev/wash/machine.h"

#include <cerrno>
#include <cstdint>
#include <endian.h>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <linux/fs.h>
#include <linux/perf_event.h>
#include <set>
#include <sstream>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <fmt/core.h>

#include "blockdev/vhost_user/socket.h"
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

// Whether cycles can be counted; without, work is known by processor time alone.
std::string performance_counters() {
  perf_event_attr what{};
  what.size = sizeof(what);
  what.type = PERF_TYPE_HARDWARE;
  what.config = PERF_COUNT_HW_CPU_CYCLES;
  what.exclude_kernel = 1;
  const vhost_user::UniqueFd counter(
      static_cast<int>(::syscall(SYS_perf_event_open, &what, 0, -1, -1, PERF_FLAG_FD_CLOEXEC)));
  if (counter) return "yes";
  return errno == EACCES || errno == EPERM ? "not permitted" : "none";
}

// The bytes of a disk that an image holds, not of the file.
std::uint64_t disk_bytes(const std::string& path, int fd, const struct stat& status) {
  std::uint64_t bytes = static_cast<std::uint64_t>(status.st_size);
  if (S_ISBLK(status.st_mode)) {
    ::ioctl(fd, BLKGETSIZE64, &bytes);
  } else if (path.ends_with(".qcow2")) {
    // qcow2.txt, "Header": the size of the virtual disk, big endian. The file grows.
    constexpr off_t kSizeOffset = 24;
    std::uint64_t size = 0;
    if (::pread(fd, &size, sizeof(size), kSizeOffset) == sizeof(size)) bytes = be64toh(size);
  }
  return bytes;
}

// Of a device what its maker calls it, or the file behind it; of a file its place in its file
// system. Numbers of devices change with the machine's start and say nothing.
std::string which_disk(int fd, const struct stat& status) {
  if (S_ISBLK(status.st_mode)) {
    const std::filesystem::path device =
        fmt::format("/sys/dev/block/{}:{}", ::major(status.st_rdev), ::minor(status.st_rdev));
    for (const char* name :
         {"wwid", "device/wwid", "serial", "device/serial", "loop/backing_file"}) {
      const std::string value = first_line(device / name);
      if (!value.empty()) return value;
    }
    return "no serial number";
  }
  struct statfs system{};
  ::fstatfs(fd, &system);
  return fmt::format("file {} of file system {:08x}{:08x}", status.st_ino,
                     static_cast<std::uint32_t>(system.f_fsid.__val[0]),
                     static_cast<std::uint32_t>(system.f_fsid.__val[1]));
}

}  // namespace

std::string identity_of_image(const std::string& path) {
  std::error_code error;
  const std::string absolute = std::filesystem::absolute(path, error).string();
  const vhost_user::UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat status{};
  if (!fd || ::fstat(fd.get(), &status) != 0) return absolute + ", not there";
  return fmt::format("{}, {} bytes, {}", absolute, disk_bytes(path, fd.get(), status),
                     which_disk(fd.get(), status));
}

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
  facts["performance counters"] = performance_counters();
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
