#include "aio/engine_name.h"

namespace vblk::aio {

std::string_view to_string(EngineName name) {
  switch (name) {
    case EngineName::kThreads:
      return "threads";
    case EngineName::kNative:
      return "native";
    case EngineName::kIoUring:
      return "io_uring";
    case EngineName::kAuto:
      return "auto";
    case EngineName::kInline:
      return "inline";
  }
  return "?";
}

std::string_view to_string(IoKind kind) {
  switch (kind) {
    case IoKind::kRead:
      return "read";
    case IoKind::kWrite:
      return "write";
    case IoKind::kFlush:
      return "flush";
    case IoKind::kDiscard:
      return "discard";
    case IoKind::kWriteZeroes:
      return "write-zeroes";
    case IoKind::kWriteBehind:
      return "write-behind";
  }
  return "?";
}

}  // namespace vblk::aio
