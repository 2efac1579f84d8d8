// `vblk conform`: tests a vhost-user-blk backend against the specifications.
#pragma once

namespace vblk::conform {

// The arguments are the command's own, its name first. Returns the exit status: 0 all passed or
// skipped, 1 a test failed, 2 the command line makes no sense, 3 no backend to test, 4 the time
// ended first, 130 interrupted.
int run(int argc, char** argv);

}  // namespace vblk::conform
