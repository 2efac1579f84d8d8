// The names of engines and of kinds of operation.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "aio/io_request.h"

namespace vblk::aio {

// kAuto is no engine: whichever of them costs least (auto_choice.h). kInline is there to be
// measured; users are not offered it, and parse() does not know it.
enum class EngineName : std::uint8_t { kThreads, kNative, kIoUring, kAuto, kInline };
inline constexpr std::array kAllEngineNames{EngineName::kThreads, EngineName::kNative,
                                            EngineName::kIoUring};
inline constexpr std::array kAllKinds{IoKind::kRead,    IoKind::kWrite,       IoKind::kFlush,
                                      IoKind::kDiscard, IoKind::kWriteZeroes, IoKind::kWriteBehind};
static_assert(kAllKinds.size() == kIoKindCount);

[[nodiscard]] std::string_view to_string(EngineName name);  // QEMU's names, and "auto"
// "read", "write", "flush", "discard", "write-zeroes", "write-behind"
[[nodiscard]] std::string_view to_string(IoKind kind);

}  // namespace vblk::aio
