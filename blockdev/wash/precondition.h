// Makes an image such that a read finds data and a write finds its place, and says whether it is.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "aio/error.h"

namespace vblk::wash {

// Makes a raw image of this size, if nothing is there; whether it did. Errors: as the system says;
// nothing is left behind then.
Expected<bool> make_image(const std::string& path, std::uint64_t size_bytes);

struct Preconditioned {
  std::uint64_t region_bytes{0};  // what is used: what was asked for, or all if that is less
  bool was_written{false};        // it had to be
};
// Writes the first `region_bytes` once, with data that nothing can compress, unless all of them are
// written already; makes that stable and drops it from the page cache. Errors: kNotFound and so on
// of the image; kInvalidArgument: it is too small to say anything; kNotSupported: read-only;
// kExhausted: the disk below is full; kBusy: somebody else has it; kIo: the check after it says
// that there are holes.
Expected<Preconditioned> precondition(const std::string& path, std::uint64_t region_bytes,
                                      const std::atomic<bool>& interrupted,
                                      const std::function<void(double fraction)>& show);

// Whether all of the first bytes of a file have data behind them: no holes, nothing preallocated
// and not written (FIEMAP). Nothing where that cannot be known: devices, some file systems.
Expected<std::optional<bool>> is_all_written(const std::string& path, std::uint64_t length_bytes);

}  // namespace vblk::wash
