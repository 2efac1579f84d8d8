// SHA-256 (FIPS 180-4), so that a result can say by which program and rules it was made, and
// whether its lines are whole, in a way that sha256sum(1) can check.
#pragma once

#include <string>
#include <string_view>

#include "aio/error.h"

namespace vblk::wash {

// In 64 hexadecimal digits.
[[nodiscard]] std::string sha256(std::string_view bytes);
// Of a file. Errors: as open(2) and read(2) say, naming the path.
Expected<std::string> sha256_of_file(const std::string& path);

}  // namespace vblk::wash
