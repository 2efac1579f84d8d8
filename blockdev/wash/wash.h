// `vblk wash`: the claim of the mail, as experiments (docs/wash.md).
#pragma once

namespace vblk::wash {

// `argv` are the words from "wash" on. Returns the exit status: 0 done; 1 failed (one line says
// why), what was measured is kept; 2 the command line makes no sense; 130 interrupted.
int run(int argc, char** argv);

}  // namespace vblk::wash
