// What becomes of a request that the disk fails, as QEMU's users know it (qemu(1), "-device
// virtio-blk", rerror= and werror=).
#pragma once

#include <cstdint>
#include <string_view>

#include "aio/error.h"
#include "blockdev/block_request.h"

namespace vblk::virtio {

enum class ErrorAction : std::uint8_t {
  kReport,  // the guest is told
  kIgnore,  // the guest is told that it is done
  kStop,    // the request is kept, and the device pauses until it is resumed
};

// A choice by name. kEnospc: kStop for ENOSPC, otherwise kReport.
enum class ErrorChoice : std::uint8_t { kReport, kIgnore, kStop, kEnospc };

struct ErrorPolicy {
  ErrorChoice read{ErrorChoice::kReport};
  ErrorChoice write{ErrorChoice::kEnospc};  // whatever is no read: flushes and discards as well

  [[nodiscard]] ErrorAction action(blockdev::BlockOperation operation, int error) const;
};

// For `option`, "--rerror" or "--werror". Error: kInvalidArgument, naming what there is; "enospc"
// is for writes.
Expected<ErrorChoice> parse_read_error_choice(std::string_view text, std::string_view option);
Expected<ErrorChoice> parse_write_error_choice(std::string_view text, std::string_view option);
[[nodiscard]] std::string_view to_string(ErrorChoice choice);

}  // namespace vblk::virtio
