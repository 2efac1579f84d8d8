#include "blockdev/wash/child.h"

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/vhost_user/socket.h"

namespace vblk::wash {

using vhost_user::UniqueFd;

namespace {

constexpr int kExecFailed = 127;
constexpr const char* kItself = "/proc/self/exe";
constexpr std::chrono::seconds kReadyTimeout{20};
constexpr std::chrono::seconds kEndTimeout{10};
constexpr std::chrono::milliseconds kLookInterval{2};

std::unexpected<Error> failed(const std::string& what, int error) {
  return make_error(kind_of_errno(error), fmt::format("cannot {}: {}", what, describe_errno(error)),
                    error);
}

std::string last_line(std::string text) {
  while (text.ends_with('\n')) text.pop_back();
  const auto line_end = text.rfind('\n');
  return line_end == std::string::npos ? text : text.substr(line_end + 1);
}

std::string read_all(int fd) {
  std::string text;
  std::array<char, 65536> chunk{};
  for (;;) {
    const ssize_t count = ::read(fd, chunk.data(), chunk.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return text;
    text.append(chunk.data(), static_cast<std::size_t>(count));
  }
}

int wait_for(pid_t pid) {
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

std::string how_it_died(int status) {
  if (WIFSIGNALED(status)) return fmt::format("killed by signal {}", WTERMSIG(status));
  return fmt::format("ended with status {}", WEXITSTATUS(status));
}

// Forks and becomes `program` with `words`; `streams` are its standard input, output and error.
Expected<pid_t> spawn(const char* program, const std::vector<std::string>& words,
                      const std::array<int, 3>& streams) {
  std::vector<char*> arguments;
  arguments.reserve(words.size() + 1);
  for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid < 0) return failed("start a process", errno);
  if (pid > 0) return pid;
  // Between fork() and exec(): only calls that are safe there.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(kExecFailed);
  for (int i = 0; i < 3; ++i) ::dup2(streams[static_cast<std::size_t>(i)], i);
  ::execv(program, arguments.data());
  ::_exit(kExecFailed);
}

// Whether the socket is there; who connects waits until it listens.
bool is_there(const std::string& socket_path) {
  std::error_code ignored;
  return std::filesystem::is_socket(socket_path, ignored);
}

std::string replaced(std::string text, const std::string& what, const std::string& by) {
  for (std::size_t at = text.find(what); at != std::string::npos;
       at = text.find(what, at + by.size()))
    text.replace(at, what.size(), by);
  return text;
}

}  // namespace

Expected<std::string> ask_child(const std::vector<std::string>& words, const std::string& input) {
  std::array<int, 2> to{};
  std::array<int, 2> from{};
  if (::pipe2(to.data(), O_CLOEXEC) != 0) return failed("make a pipe", errno);
  const UniqueFd input_there(to[0]);
  UniqueFd input_here(to[1]);
  if (::pipe2(from.data(), O_CLOEXEC) != 0) return failed("make a pipe", errno);
  const UniqueFd output_here(from[0]);
  UniqueFd output_there(from[1]);
  // A file, not a pipe: nobody reads it while the child runs.
  std::FILE* const errors = std::tmpfile();
  if (errors == nullptr) return failed("make a file for messages", errno);
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> closed(errors, std::fclose);
  std::vector<std::string> whole{"vblk"};
  whole.insert(whole.end(), words.begin(), words.end());
  const auto pid = spawn(kItself, whole, {input_there.get(), output_there.get(), ::fileno(errors)});
  if (!pid) return std::unexpected(pid.error());
  output_there.reset();
  // It fits the pipe's buffer; who does not read it says why elsewhere.
  if (::write(input_here.get(), input.data(), input.size()) < 0 && errno != EPIPE)
    return failed("write to a run", errno);
  input_here.reset();
  std::string output = read_all(output_here.get());
  const int status = wait_for(*pid);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return output;
  ::lseek(::fileno(errors), 0, SEEK_SET);
  const std::string words_of_it = last_line(read_all(::fileno(errors)));
  return make_error(ErrorKind::kIo,
                    words_of_it.empty() ? "the run " + how_it_died(status) : words_of_it);
}

bool is_peer_command(const std::string& peer) { return peer.find("{socket}") != std::string::npos; }

std::string peer_socket(const std::string& peer, const std::string& engine) {
  return replaced(peer, "{aio}", engine);
}

Expected<std::unique_ptr<ServerProcess>> ServerProcess::start_vblk(const std::string& image_path,
                                                                   const std::string& engine) {
  std::unique_ptr<ServerProcess> server(new ServerProcess);
  if (auto made = server->make_folder(); !made) return std::unexpected(made.error());
  auto started = server->start({kItself, "serve", image_path, "--socket-path", server->socket_path_,
                                "--aio", engine, "--cache", "none", "--log-level", "warning"});
  if (!started) return std::unexpected(started.error());
  return server;
}

Expected<std::unique_ptr<ServerProcess>> ServerProcess::start_peer(const std::string& command,
                                                                   const std::string& image_path,
                                                                   const std::string& engine) {
  std::unique_ptr<ServerProcess> server(new ServerProcess);
  if (auto made = server->make_folder(); !made) return std::unexpected(made.error());
  std::string line = replaced(command, "{image}", image_path);
  line = replaced(std::move(line), "{aio}", engine);
  line = replaced(std::move(line), "{socket}", server->socket_path_);
  // "exec": the process is the server itself, whose time is counted.
  auto started = server->start({"/bin/sh", "-c", "exec " + line});
  if (!started) return std::unexpected(started.error());
  return server;
}

Expected<void> ServerProcess::make_folder() {
  std::string path = "/tmp/vblk-wash-XXXXXX";
  if (::mkdtemp(path.data()) == nullptr) return failed("make a folder in /tmp", errno);
  folder_ = path;
  socket_path_ = folder_ + "/s";
  return {};
}

Expected<void> ServerProcess::start(const std::vector<std::string>& words) {
  const UniqueFd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  const UniqueFd messages(
      ::open((folder_ + "/messages").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  const auto pid =
      spawn(words.front().c_str(), words, {nothing.get(), nothing.get(), messages.get()});
  if (!pid) return std::unexpected(pid.error());
  pid_ = *pid;
  return wait_until_ready();
}

Expected<void> ServerProcess::wait_until_ready() {
  const auto deadline = std::chrono::steady_clock::now() + kReadyTimeout;
  while (std::chrono::steady_clock::now() < deadline) {
    int status = 0;
    if (::waitpid(pid_, &status, WNOHANG) == pid_) {
      pid_ = -1;
      return make_error(ErrorKind::kIo,
                        fmt::format("the server {}: {}", how_it_died(status), last_words()));
    }
    if (is_there(socket_path_)) return {};
    std::this_thread::sleep_for(kLookInterval);
  }
  return make_error(ErrorKind::kIo, fmt::format("the server makes no socket within {} s: {}",
                                                kReadyTimeout.count(), last_words()));
}

std::string ServerProcess::last_words() const {
  std::ifstream file(folder_ + "/messages");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  return text.empty() ? "it said nothing" : last_line(text);
}

ServerProcess::~ServerProcess() {
  if (pid_ > 0) {
    ::kill(pid_, SIGTERM);
    const auto deadline = std::chrono::steady_clock::now() + kEndTimeout;
    int status = 0;
    while (::waitpid(pid_, &status, WNOHANG) == 0) {
      if (std::chrono::steady_clock::now() > deadline) {
        ::kill(pid_, SIGKILL);
        wait_for(pid_);
        break;
      }
      std::this_thread::sleep_for(kLookInterval);
    }
  }
  std::error_code ignored;
  if (!folder_.empty()) std::filesystem::remove_all(folder_, ignored);
}

}  // namespace vblk::wash
