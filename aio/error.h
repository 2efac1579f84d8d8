// Errors of the control path: opening images, creating engines, negotiating, parsing options.
//
// The data path does not use this type. A request there fails with a bare errno value (0 is
// success), which one place turns into a virtio status byte.
#pragma once

#include <cstdint>
#include <expected>
#include <string>
#include <utility>

namespace vblk {

// What sort of mistake an Error reports. Callers branch on it; people read `message`.
enum class ErrorKind : std::uint8_t {
  kInvalidArgument,  // the user or the peer asked for something that makes no sense
  kNotSupported,     // meaningful, but this build, kernel, file or device cannot do it
  kNotFound,         // a file, socket or name that is not there
  kPermission,       // the kernel refuses it to this user
  kBusy,             // somebody else holds it: a lock, a socket path
  kExhausted,        // a limit is reached: aio-max-nr, file descriptors, memory, space
  kCorrupt,          // bytes from an image or a peer that break their own specification
  kIo,               // the system failed at something that ought to have worked
};

// One failure, ready to be printed. `message` is one line without a trailing newline and names what
// was tried, on what, why it failed and what the user can do. `errno_value` is 0 where no system
// call failed.
struct Error {
  ErrorKind kind;
  int errno_value{0};
  std::string message;
};

template <typename T>
using Expected = std::expected<T, Error>;

// Makes the unexpected value of an Expected<T>. `message` as in Error.
inline std::unexpected<Error> make_error(ErrorKind kind, std::string message, int errno_value = 0) {
  return std::unexpected(Error{kind, errno_value, std::move(message)});
}

// "No space left on device (ENOSPC)": the text of `errno_value` for a message. Thread-safe.
std::string describe_errno(int errno_value);

// The ErrorKind that a failed open, socket or set-up call suggests.
ErrorKind kind_of_errno(int errno_value);

}  // namespace vblk
