// What pages are made of.
#pragma once

#include <string>
#include <string_view>

namespace vblk::bench {

// For text in HTML and SVG, and for attributes in double quotes.
[[nodiscard]] std::string escaped(std::string_view text);

}  // namespace vblk::bench
