// What the commands say.
//
// Saying something never fails, and so never ends work that has begun: a log may be on a full disk.
// What could not be written to standard output is told of when the work is done, by the exit
// status; but a reader of a pipe who has left wants no more, and is told nothing, as with qemu-img.
#pragma once

#include <cstdio>
#include <string_view>
#include <utility>

#include <fmt/core.h>

namespace vblk::img {

// Any thread.
void write_text(std::FILE* stream, std::string_view text);

// On standard output.
template <typename... Values>
void say(fmt::format_string<Values...> format, Values&&... values) {
  write_text(stdout, fmt::format(format, std::forward<Values>(values)...));
}
// On standard error.
template <typename... Values>
void warn(fmt::format_string<Values...> format, Values&&... values) {
  write_text(stderr, fmt::format(format, std::forward<Values>(values)...));
}

// What has been said gets to where it goes, for people who wait.
void flush_output();

// Once, at the end: the exit status of a command that has ended with `status`. One that would be 0
// is 1 where not all of the output has been taken, and a line says why.
[[nodiscard]] int finish_output(int status);

}  // namespace vblk::img
