// `vblk demo`: the engines compared on this machine, through the socket, without a virtual machine.
#pragma once

namespace vblk::demo {

// `argv` from the word "demo" on. Returns the exit status of the program.
int run(int argc, char** argv);

}  // namespace vblk::demo
