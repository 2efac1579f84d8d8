// Where reports go, and how a run is interrupted.
#pragma once

#include <atomic>
#include <string>

#include "aio/error.h"

namespace vblk::bench {

// Writes a whole file. Errors: kExhausted (a full disk), kPermission and so on, naming the path.
Expected<void> write_file(const std::string& path, const std::string& text);
// Whether that can be, without touching what is there; an empty path can. Errors: as write_file().
Expected<void> check_can_write(const std::string& path);
// To `path`, or to standard output if that is empty. What cannot be written to `path` goes to
// standard output, so that no result is lost. Errors: as write_file().
Expected<void> write_output(const std::string& path, const std::string& text);

// Set by SIGINT and SIGTERM from the first call on; the second signal ends the process.
const std::atomic<bool>& interrupt_flag();

}  // namespace vblk::bench
