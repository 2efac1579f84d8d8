// `vblk bench flush`.
#pragma once

#include <span>

namespace vblk::bench {

// `arguments`: the words from "flush" on. Returns the exit status: 0 done and passed; 1 a test
// failed, or the run did; 2 the command line makes no sense.
int run_flush(std::span<char*> arguments);

}  // namespace vblk::bench
