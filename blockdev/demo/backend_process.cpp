#include "blockdev/demo/backend_process.h"

#include <array>
#include <cerrno>
#include <csignal>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

namespace vblk::demo {

using vhost_user::UniqueFd;

namespace {

// Opening an image and making an engine takes milliseconds; a loaded machine may take long.
constexpr std::chrono::milliseconds kReadyTimeout{30'000};
// What is in flight at the end is done by then, and one flush of little data.
constexpr std::chrono::milliseconds kEndTimeout{30'000};
// Where the child finds what it inherits; higher than anything standard.
constexpr int kSocketFdThere = 10;
constexpr int kImageFdThere = 11;
constexpr int kExecFailed = 127;

std::unexpected<Error> failed(const char* what, int error) {
  return make_error(kind_of_errno(error), fmt::format("cannot {}: {}", what, describe_errno(error)),
                    error);
}

// Between fork() and exec(): only calls that are safe there.
[[noreturn]] void become_server(int socket, int image, int output, int error, pid_t parent,
                                const std::array<const char*, 12>& words) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(kExecFailed);
  // First out of the way of the numbers that are wanted, then to them, without close-on-exec.
  const int socket_copy = ::fcntl(socket, F_DUPFD_CLOEXEC, kImageFdThere + 1);
  const int image_copy = ::fcntl(image, F_DUPFD_CLOEXEC, kImageFdThere + 1);
  const int output_copy = ::fcntl(output, F_DUPFD_CLOEXEC, kImageFdThere + 1);
  const int error_copy = ::fcntl(error, F_DUPFD_CLOEXEC, kImageFdThere + 1);
  ::dup2(output_copy, STDOUT_FILENO);
  ::dup2(error_copy, STDERR_FILENO);
  ::dup2(socket_copy, kSocketFdThere);
  ::dup2(image_copy, kImageFdThere);
  ::execv("/proc/self/exe", const_cast<char**>(words.data()));
  ::_exit(kExecFailed);
}

}  // namespace

Expected<std::unique_ptr<BackendProcess>> BackendProcess::start(const ScratchImage& image,
                                                                aio::EngineName engine) {
  std::array<int, 2> sockets{};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets.data()) != 0)
    return failed("make a socket pair", errno);
  std::unique_ptr<BackendProcess> process(new BackendProcess);
  process->socket_.reset(sockets[0]);
  const UniqueFd socket_there(sockets[1]);
  std::array<int, 2> pipe{};
  if (::pipe2(pipe.data(), O_CLOEXEC) != 0) return failed("make a pipe", errno);
  process->standard_output_.reset(pipe[0]);
  UniqueFd output_there(pipe[1]);
  process->standard_error_.reset(::memfd_create("vblk-demo-stderr", MFD_CLOEXEC));
  if (!process->standard_error_) return failed("make a file for messages", errno);

  const std::string image_path = image.path_for_child(kImageFdThere);
  const std::string engine_name(aio::to_string(engine));
  const std::string socket_number = fmt::format("{}", kSocketFdThere);
  const std::array<const char*, 12> words{"vblk",
                                          "serve",
                                          image_path.c_str(),
                                          "--fd",
                                          socket_number.c_str(),
                                          "--aio",
                                          engine_name.c_str(),
                                          "--cache",
                                          "none",
                                          "--log-level",
                                          "warning",
                                          nullptr};
  const pid_t parent = ::getpid();
  process->pid_ = ::fork();
  if (process->pid_ < 0) return failed("start a server process", errno);
  if (process->pid_ == 0) {
    become_server(socket_there.get(), image.fd(), output_there.get(),
                  process->standard_error_.get(), parent, words);
  }
  output_there.reset();
  if (auto ready = process->wait_until_ready(); !ready)
    return std::unexpected(std::move(ready.error()));
  return process;
}

// What the child writes next on its standard output; an empty text when it has ended.
Expected<std::string> BackendProcess::read_output(std::chrono::milliseconds timeout) {
  pollfd descriptor{.fd = standard_output_.get(), .events = POLLIN, .revents = 0};
  int ready = 0;
  do {
    ready = ::poll(&descriptor, 1, static_cast<int>(timeout.count()));
  } while (ready < 0 && errno == EINTR);
  if (ready <= 0) {
    return make_error(ErrorKind::kIo,
                      fmt::format("the server does not answer within {} ms", timeout.count()));
  }
  std::array<char, 256> text{};
  const ssize_t length = ::read(standard_output_.get(), text.data(), text.size());
  return std::string(text.data(), length > 0 ? static_cast<std::size_t>(length) : 0);
}

// Its only line means ready; the end of its output means that it has given up.
Expected<void> BackendProcess::wait_until_ready() {
  const auto text = read_output(kReadyTimeout);
  if (!text) return std::unexpected(text.error());
  if (text->empty()) return make_error(ErrorKind::kIo, last_words());
  return {};
}

std::string BackendProcess::last_words() const {
  std::array<char, 4096> text{};
  const off_t end = ::lseek(standard_error_.get(), 0, SEEK_END);
  const off_t begin = std::max<off_t>(0, end - static_cast<off_t>(text.size()));
  const ssize_t length = ::pread(standard_error_.get(), text.data(), text.size(), begin);
  std::string words(text.data(), length > 0 ? static_cast<std::size_t>(length) : 0);
  while (words.ends_with('\n')) words.pop_back();
  if (words.empty()) return "the server ended without a word";
  const auto line_end = words.rfind('\n');
  return line_end == std::string::npos ? words : words.substr(line_end + 1);
}

BackendProcess::~BackendProcess() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

Expected<void> BackendProcess::finish() {
  socket_.reset();
  for (;;) {
    const auto text = read_output(kEndTimeout);
    if (!text) return std::unexpected(text.error());
    if (text->empty()) break;
  }
  int status = 0;
  ::waitpid(std::exchange(pid_, -1), &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
  return make_error(ErrorKind::kIo, fmt::format("the server failed: {}", last_words()));
}

}  // namespace vblk::demo
