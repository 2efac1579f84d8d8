#include "blockdev/bench/output.h"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::bench {

namespace {

// Only a lock-free atomic may be touched by a signal handler.
std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free);

std::unexpected<Error> cannot_write(const std::string& name, int error) {
  return make_error(kind_of_errno(error),
                    fmt::format("cannot write {}: {}", name, describe_errno(error)), error);
}

Expected<void> write_stream(std::FILE* stream, const std::string& text, const std::string& name) {
  errno = 0;
  if (std::fwrite(text.data(), 1, text.size(), stream) != text.size() || std::fflush(stream) != 0)
    return cannot_write(name, errno);
  return {};
}

}  // namespace

Expected<void> write_file(const std::string& path, const std::string& text) {
  const std::string name = fmt::format("'{}'", path);
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "we"),
                                                             std::fclose);
  if (!file) return cannot_write(name, errno);
  return write_stream(file.get(), text, name);
}

Expected<void> check_can_write(const std::string& path) {
  if (path.empty()) return {};
  const std::string name = fmt::format("'{}'", path);
  struct stat status{};
  if (::stat(path.c_str(), &status) == 0) {
    if (S_ISDIR(status.st_mode)) return cannot_write(name, EISDIR);
    if (::access(path.c_str(), W_OK) != 0) return cannot_write(name, errno);
    return {};
  }
  if (errno != ENOENT) return cannot_write(name, errno);
  const std::string folder = std::filesystem::path(path).parent_path().string();
  if (::access(folder.empty() ? "." : folder.c_str(), W_OK | X_OK) != 0)
    return cannot_write(name, errno);
  return {};
}

Expected<void> write_output(const std::string& path, const std::string& text) {
  if (path.empty()) return write_stream(stdout, text, "the report to standard output");
  auto written = write_file(path, text);
  if (!written) {
    if (auto shown = write_stream(stdout, text, "the report to standard output"); !shown)
      return shown;
  }
  return written;
}

const std::atomic<bool>& interrupt_flag() {
  struct sigaction action{};
  action.sa_handler = [](int /*signal*/) { interrupted = true; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
  return interrupted;
}

}  // namespace vblk::bench
