#include "blockdev/img/stored_bitmaps.h"

#include <utility>

#include <fmt/core.h>

#include "blockdev/img/engines.h"
#include "blockdev/img/source.h"

namespace vblk::img {

Expected<StoredBitmaps> open_stored_bitmaps(const std::string& path, const std::string& format,
                                            bool lock) {
  const auto decided = decide_format(path, format);
  if (!decided) return std::unexpected(decided.error());
  auto file = open_file({.path = path, .format = *decided, .lock = lock});
  if (!file) return std::unexpected(std::move(file.error()));
  if (*decided == "raw" || !*file)
    return make_error(ErrorKind::kNotFound, fmt::format("'{}' is raw and has no bitmaps", path));
  auto header = read_header(**file);
  if (!header) return std::unexpected(std::move(header.error()));
  auto list = qcow2::read_bitmaps(**file, *header, make_context);
  if (!list) return std::unexpected(std::move(list.error()));
  return StoredBitmaps{std::move(*file), std::move(*header), std::move(*list)};
}

}  // namespace vblk::img
