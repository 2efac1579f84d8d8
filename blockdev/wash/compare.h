// `vblk wash compare`: results side by side.
#pragma once

#include <span>

namespace vblk::wash {

// `arguments`: the words from "compare" on. Returns the exit status: 0; 1: a folder cannot be read;
// 2: the command line makes no sense.
int run_compare(std::span<char*> arguments);

}  // namespace vblk::wash
