#include "blockdev/bench/markup.h"

namespace vblk::bench {

std::string escaped(std::string_view text) {
  std::string safe;
  for (const char letter : text) {
    if (letter == '<') {
      safe += "&lt;";
    } else if (letter == '>') {
      safe += "&gt;";
    } else if (letter == '&') {
      safe += "&amp;";
    } else if (letter == '"') {
      safe += "&quot;";
    } else {
      safe += letter;
    }
  }
  return safe;
}

}  // namespace vblk::bench
