// What lies between two runs: nothing of one may be left to the next.
//
// A buffered run leaves dirty pages, whose writing would fall into the next run's time, and clean
// ones, which make the next buffered run a hot one and cost a direct one that has to drop them. All
// arms of a block have the same seed: without this the first would warm just the pages that the
// others read.
#pragma once

#include <cstdint>
#include <string>

#include "aio/error.h"
#include "blockdev/wash/analysis.h"

namespace vblk::wash {

// Does what `rules` say with an image, block device or folder before a run: makes all of it stable
// (of a file or folder: of its whole file system, where a run before may have left something else),
// and drops an image or device from the page cache. Memory file systems have no other place for
// their pages and keep them. Error: as the system says.
Expected<void> settle(const std::string& path, const BeforeRun& rules);

// How much of a file is in the page cache: bytes. Error: as the system says.
Expected<std::uint64_t> cached_bytes(const std::string& path);

}  // namespace vblk::wash
