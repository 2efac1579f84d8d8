#include "blockdev/conform/program_output.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

namespace vblk::conform {

ProgramOutput::ProgramOutput() : ends_(::eventfd(0, EFD_CLOEXEC)) {
  std::array<int, 2> pipe{-1, -1};
  if (!ends_ || ::pipe2(pipe.data(), O_CLOEXEC) != 0) return;  // then nothing is kept
  read_end_.reset(pipe[0]);
  write_end_.reset(pipe[1]);
  // Only this end: the program's is to wait, as it would for a terminal.
  ::fcntl(read_end_.get(), F_SETFL, O_NONBLOCK);
  thread_ = std::thread([this] { read_on(); });
}

ProgramOutput::~ProgramOutput() {
  if (!thread_.joinable()) return;
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(ends_.get(), &one, sizeof one);
  thread_.join();
}

void ProgramOutput::read_on() {
  for (bool open = true; open;) {
    std::array<pollfd, 2> descriptors{{{.fd = read_end_.get(), .events = POLLIN, .revents = 0},
                                       {.fd = ends_.get(), .events = POLLIN, .revents = 0}}};
    if (::poll(descriptors.data(), descriptors.size(), -1) < 0) continue;
    if (descriptors[1].revents != 0) return;
    const std::lock_guard lock(mutex_);
    open = take();
  }
}

bool ProgramOutput::take() {
  std::array<char, 4096> bytes{};
  // What a pipe holds, so that one who never stops does not keep whoever asks for the text.
  for (std::size_t left = kKeptBytes; left > 0;) {
    // NOLINTNEXTLINE(clang-analyzer-unix.BlockInCriticalSection): it does not block, by O_NONBLOCK.
    const ssize_t length = ::read(read_end_.get(), bytes.data(), bytes.size());
    if (length <= 0) return length < 0 && (errno == EAGAIN || errno == EINTR);
    const auto count = static_cast<std::size_t>(length);
    text_.append(bytes.data(), count);
    if (text_.size() > kKeptBytes) text_.erase(0, text_.size() - kKeptBytes);
    left -= std::min(left, count);
  }
  return true;
}

std::string ProgramOutput::text() {
  const std::lock_guard lock(mutex_);
  if (read_end_) take();
  return text_;
}

}  // namespace vblk::conform
