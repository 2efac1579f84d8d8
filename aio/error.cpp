#include "aio/error.h"

#include <cerrno>
#include <cstring>

namespace vblk {

std::string describe_errno(int errno_value) {
  const char* const description = strerrordesc_np(errno_value);
  const char* const name = strerrorname_np(errno_value);
  if (description == nullptr || name == nullptr) return "error " + std::to_string(errno_value);
  return std::string(description) + " (" + name + ")";
}

ErrorKind kind_of_errno(int errno_value) {
  switch (errno_value) {
    case ENOENT:
    case ENOTDIR:
    case ENXIO:
    case ENODEV:
    case ECONNREFUSED:
      return ErrorKind::kNotFound;
    case EACCES:
    case EPERM:
    case EROFS:
      return ErrorKind::kPermission;
    case EBUSY:
    case EADDRINUSE:
    case EAGAIN:
    case ETXTBSY:
      return ErrorKind::kBusy;
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case ENOSPC:
    case EDQUOT:
    case ENOBUFS:
      return ErrorKind::kExhausted;
    case EINVAL:
    case ENAMETOOLONG:
    case EISDIR:
    case EBADF:
    case ELOOP:
    case ENOTSOCK:
      return ErrorKind::kInvalidArgument;
    case ENOSYS:
    case EOPNOTSUPP:
    case ENOTTY:
      return ErrorKind::kNotSupported;
    default:
      return ErrorKind::kIo;
  }
}

}  // namespace vblk
