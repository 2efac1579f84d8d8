#include "blockdev/img/names.h"

#include <algorithm>
#include <filesystem>

namespace vblk::img {

std::string printable(std::string_view text) {
  std::string clean(text);
  std::ranges::replace_if(clean, [](char c) { return (c >= 0 && c < ' ') || c == '\x7f'; }, '?');
  return clean;
}

std::string resolve_name(const std::string& image, const std::string& name) {
  std::string path = name.starts_with("file:") ? name.substr(5) : name;
  const std::size_t colon = path.find(':');
  const bool has_protocol =
      colon != std::string::npos && colon < path.find('/') && !name.starts_with("file:");
  if (path.empty() || path.starts_with('/') || has_protocol) return path;
  return (std::filesystem::path(image).parent_path() / path).string();
}

}  // namespace vblk::img
