// `vblk bench`: drives a vhost-user-blk backend, ours or another, through its socket.
#pragma once

namespace vblk::bench {

// Runs the command: `argv` are its words from its name on. Returns the exit status: 0 done, 1
// failed (one line on standard error says why), 2 the command line makes no sense.
int run(int argc, char** argv);

}  // namespace vblk::bench
