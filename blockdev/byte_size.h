// Sizes as people write them: 512, 64k, 10G.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "aio/error.h"

namespace vblk::blockdev {

// Parses a whole number with an optional suffix b, k, M, G, T, P or E (any case; powers of 1024, as
// qemu-img reads them). Error: kInvalidArgument naming the text, also for sizes beyond 2^63 - 1.
Expected<std::uint64_t> parse_byte_size(std::string_view text);

// The shortest exact form: "1G", "1536M", "513".
[[nodiscard]] std::string format_byte_size(std::uint64_t bytes);

}  // namespace vblk::blockdev
