#include "blockdev/conform/backend.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

namespace vblk::conform {

namespace {

using vhost_user::UniqueFd;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kStartPatience{10'000};
constexpr std::chrono::milliseconds kStep{5};
constexpr int kExecFailed = 127;

std::string fill_in(std::string word, std::string_view name, const std::string& value) {
  for (std::size_t at = word.find(name); at != std::string::npos;
       at = word.find(name, at + value.size()))
    word.replace(at, name.size(), value);
  return word;
}

// Starts a program in a process group of its own, with `output` for what it says.
Expected<pid_t> spawn(const std::vector<std::string>& words, ProgramOutput& output) {
  if (output.write_end() < 0)
    return make_error(ErrorKind::kIo, "cannot make a pipe for what a program says", EMFILE);
  std::vector<char*> pointers;
  pointers.reserve(words.size() + 1);
  for (const std::string& word : words) pointers.push_back(const_cast<char*>(word.c_str()));
  pointers.push_back(nullptr);
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid < 0) {
    const int error = errno;
    return make_error(kind_of_errno(error),
                      fmt::format("cannot start a process: {}", describe_errno(error)), error);
  }
  if (pid == 0) {
    ::setpgid(0, 0);
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(kExecFailed);
    for (const int number : {SIGPIPE, SIGXFSZ, SIGINT, SIGHUP}) ::signal(number, SIG_DFL);
    const int null = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null >= 0) ::dup2(null, STDIN_FILENO);
    ::dup2(output.write_end(), STDOUT_FILENO);
    ::dup2(output.write_end(), STDERR_FILENO);
    ::execvp(pointers[0], pointers.data());
    ::dprintf(STDERR_FILENO, "cannot run '%s': %s\n", pointers[0], std::strerror(errno));
    ::_exit(kExecFailed);
  }
  ::setpgid(pid, pid);  // whoever of the two comes first
  output.close_write_end();
  return pid;
}

std::string describe_end(int status) {
  if (WIFEXITED(status)) return fmt::format("ended with status {}", WEXITSTATUS(status));
  return fmt::format("killed by signal {} ({})", WTERMSIG(status), ::strsignal(WTERMSIG(status)));
}

// Runs a program to its end.
Expected<void> run(const std::vector<std::string>& words) {
  ProgramOutput output;
  const auto pid = spawn(words, output);
  if (!pid) return std::unexpected(pid.error());
  int status = 0;
  while (::waitpid(*pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
  constexpr std::size_t kSaidMax = 500;
  std::string said = output.text().substr(0, kSaidMax);
  std::ranges::replace(said, '\n', ' ');
  return make_error(ErrorKind::kIo,
                    fmt::format("'{}' {}: {}", words[0], describe_end(status), said));
}

Expected<void> make_image(const Target& target, const std::string& path) {
  if (target.format == ImageFormat::kQcow2) {
    return run(
        {"qemu-img", "create", "-q", "-f", "qcow2", path, fmt::format("{}", target.image_bytes)});
  }
  const UniqueFd file(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!file || ::ftruncate(file.get(), static_cast<off_t>(target.image_bytes)) != 0) {
    const int error = errno;
    return make_error(kind_of_errno(error),
                      fmt::format("cannot make the image '{}': {}", path, describe_errno(error)),
                      error);
  }
  return {};
}

UniqueFd connect_to(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return {};
  std::memcpy(address.sun_path, path.data(), path.size());
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket ||
      ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return {};
  return socket;
}

// One command of QMP: waits for the line that answers it. "" if nothing came.
std::string qmp(int socket, const std::string& command) {
  if (!command.empty() && ::send(socket, command.data(), command.size(), MSG_NOSIGNAL) !=
                              static_cast<ssize_t>(command.size()))
    return "";
  std::string answer;
  std::array<char, 1024> bytes{};
  const timeval limit{.tv_sec = 3, .tv_usec = 0};
  ::setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  const auto is_answer = [&] {
    return answer.find("\"return\"") != std::string::npos ||
           answer.find("\"error\"") != std::string::npos ||
           (command.empty() && answer.find('\n') != std::string::npos);
  };
  while (!is_answer()) {
    const ssize_t length = ::recv(socket, bytes.data(), bytes.size(), 0);
    if (length <= 0) return "";
    answer.append(bytes.data(), static_cast<std::size_t>(length));
  }
  return answer;
}

Expected<void> resize_by_qmp(const std::string& monitor_path, std::uint64_t bytes) {
  const UniqueFd socket = connect_to(monitor_path);
  if (!socket) {
    return make_error(ErrorKind::kIo,
                      fmt::format("the monitor at '{}' does not accept", monitor_path));
  }
  qmp(socket.get(), "");
  qmp(socket.get(), "{\"execute\":\"qmp_capabilities\"}\n");
  const std::string answer =
      qmp(socket.get(),
          fmt::format("{{\"execute\":\"block_resize\",\"arguments\":{{\"node-name\":\"disk\","
                      "\"size\":{}}}}}\n",
                      bytes));
  if (answer.find("\"return\"") != std::string::npos) return {};
  return make_error(ErrorKind::kIo, fmt::format("block_resize is answered by '{}'", answer));
}

// Whether somebody listens on the Unix socket `path`, as /proc/net/unix tells it: to connect would
// be one frontend too many for a program that ends with its first.
bool is_listening(const std::string& path) {
  std::ifstream sockets("/proc/net/unix");
  for (std::string line; std::getline(sockets, line);) {
    constexpr std::string_view kListens = " 00010000 ";  // __SO_ACCEPTCON
    if (line.ends_with(path) && line.find(kListens) != std::string::npos) return true;
  }
  return false;
}

}  // namespace

Expected<std::vector<std::string>> split_command(const std::string& text) {
  std::vector<std::string> words;
  std::string word;
  bool in_word = false;
  char quote = 0;
  for (const char c : text) {
    if (quote != 0) {
      if (c == quote) {
        quote = 0;
      } else {
        word += c;
      }
    } else if (c == '\'' || c == '"') {
      quote = c;
      in_word = true;
    } else if (c == ' ' || c == '\t' || c == '\n') {
      if (in_word) words.push_back(std::exchange(word, {}));
      in_word = false;
    } else {
      word += c;
      in_word = true;
    }
  }
  if (quote != 0) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("a quote in the command '{}' does not end", text));
  }
  if (in_word) words.push_back(word);
  return words;
}

Expected<ProgramEnd> run_program(const std::vector<std::string>& words,
                                 std::chrono::milliseconds patience) {
  ProgramOutput output;
  const auto pid = spawn(words, output);
  if (!pid) return std::unexpected(pid.error());
  const auto deadline = Clock::now() + patience;
  ProgramEnd end;
  int status = 0;
  while (!end.in_time && Clock::now() < deadline) {
    end.in_time = ::waitpid(*pid, &status, WNOHANG) == *pid;
    if (!end.in_time) std::this_thread::sleep_for(kStep);
  }
  ::kill(-*pid, SIGKILL);  // with what it may have started
  if (end.in_time && WIFEXITED(status)) end.exit_status = WEXITSTATUS(status);
  while (!end.in_time && ::waitpid(*pid, &status, 0) < 0 && errno == EINTR) {
  }
  end.output = output.text();
  return end;
}

Expected<std::unique_ptr<Backend>> Backend::start(const Target& target, const std::string& folder,
                                                  bool read_only) {
  std::unique_ptr<Backend> backend(new Backend);
  backend->target_ = target;
  backend->read_only_ = read_only;
  backend->folder_ = folder;
  backend->socket_path_ = folder + "/s";
  backend->monitor_path_ = folder + "/m";
  backend->image_path_ =
      folder + (target.format == ImageFormat::kQcow2 ? "/disk.qcow2" : "/disk.raw");
  if (!std::filesystem::exists(backend->image_path_)) {
    if (auto made = make_image(target, backend->image_path_); !made)
      return std::unexpected(std::move(made.error()));
  }
  if (auto launched = backend->launch(); !launched)
    return std::unexpected(std::move(launched.error()));
  return backend;
}

Backend::~Backend() { kill(); }

std::vector<std::string> Backend::fill_in_paths(std::vector<std::string> words,
                                                const std::string& socket_path,
                                                const std::string& image_path,
                                                const std::string& monitor_path) {
  for (std::string& word : words) {
    word = fill_in(std::move(word), "{socket}", socket_path);
    word = fill_in(std::move(word), "{image}", image_path);
    word = fill_in(std::move(word), "{monitor}", monitor_path);
  }
  return words;
}

Expected<void> Backend::launch() {
  const std::vector<std::string> words =
      fill_in_paths(read_only_ ? target_.read_only_command : target_.command, socket_path_,
                    image_path_, monitor_path_);
  output_ = std::make_unique<ProgramOutput>();
  const auto pid = spawn(words, *output_);
  if (!pid) return std::unexpected(pid.error());
  ++launches_;
  pid_ = *pid;
  end_.clear();
  return wait_until_it_accepts();
}

Expected<void> Backend::wait_until_it_accepts() {
  const auto deadline = Clock::now() + kStartPatience;
  for (;;) {
    if (is_listening(socket_path_)) return {};
    if (const std::string ended = end(); !ended.empty()) {
      return make_error(
          ErrorKind::kIo,
          fmt::format("the backend {} before its socket was there: {}", ended, last_words()));
    }
    if (Clock::now() > deadline) {
      return make_error(
          ErrorKind::kIo,
          fmt::format("the backend's socket '{}' does not accept within {} s: {}", socket_path_,
                      std::chrono::duration_cast<std::chrono::seconds>(kStartPatience).count(),
                      last_words()));
    }
    std::this_thread::sleep_for(kStep);
  }
}

std::string Backend::end() {
  if (pid_ <= 0) return end_;
  int status = 0;
  if (::waitpid(pid_, &status, WNOHANG) != pid_) return "";
  ::kill(-pid_, SIGKILL);  // what it may have started
  pid_ = -1;
  end_ = describe_end(status);
  return end_;
}

std::string Backend::last_words() const {
  std::string words = output_->text();
  while (words.ends_with('\n')) words.pop_back();
  const auto line_end = words.rfind('\n');
  return line_end == std::string::npos ? words : words.substr(line_end + 1);
}

void Backend::kill() {
  if (pid_ <= 0) return;
  ::kill(-pid_, SIGKILL);
  int status = 0;
  while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
  }
  pid_ = -1;
  end_ = describe_end(status);
}

std::string Backend::terminate(std::chrono::milliseconds patience) {
  if (pid_ <= 0) return "was gone before";
  ::kill(pid_, SIGTERM);
  const auto deadline = Clock::now() + patience;
  while (Clock::now() < deadline) {
    if (const std::string ended = end(); !ended.empty()) return ended;
    std::this_thread::sleep_for(kStep);
  }
  kill();
  return fmt::format("still running {} ms after SIGTERM", patience.count());
}

// The image's lock may outlive a killed process for a moment, while the kernel finishes its
// requests: some programs refuse to start then.
Expected<void> Backend::restart() {
  constexpr int kTries = 20;
  Expected<void> launched;
  for (int i = 0; i < kTries; ++i) {
    ::unlink(socket_path_.c_str());
    ::unlink(monitor_path_.c_str());
    launched = launch();
    if (launched) return launched;
    kill();
    std::this_thread::sleep_for(10 * kStep);
  }
  return launched;
}

Expected<void> Backend::resize(std::uint64_t bytes) {
  switch (target_.resize_by) {
    case ResizeBy::kNothing:
      break;
    case ResizeBy::kQmp:
      return resize_by_qmp(monitor_path_, bytes);
    case ResizeBy::kCommand: {
      std::vector<std::string> words = target_.resize_command;
      for (std::string& word : words) {
        word = fill_in(std::move(word), "{monitor}", monitor_path_);
        word = fill_in(std::move(word), "{bytes}", fmt::format("{}", bytes));
      }
      return run(words);
    }
  }
  return make_error(ErrorKind::kNotSupported, "no way to resize the disk is known");
}

}  // namespace vblk::conform
