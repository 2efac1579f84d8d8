// A vhost-user frontend without manners, told by a string of bytes: what the frontend fuzzer makes
// up, and what its findings are repeated from. The server's side is the real one, on a socketpair,
// with two I/O threads.
//
//   byte 0    packed rings, event index, a disk that is handed over, no recovery offered,
//             interrupts that are held back: a bit each
//   byte 1    how long the disk takes for a request
//   then      steps, each a byte for what it does and what that takes (hostile_frontend.cpp):
//             messages that are nearly right with descriptors of every kind, bytes that are no
//             message, a whole set-up, requests and garbage in the rings, files that are made
//             shorter, a disk that fails, pauses, another connection
//
// Whatever it says: no crash, no hang, no descriptor that stays open, no request that never ends;
// one answer at most to a message, and to the message that it is for; and the device is as new for
// the next frontend.
//
// With VBLK_FUZZ_CANARY in the environment a request is called lost that is not, which must be
// found.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace vblk::fuzz {

struct FrontendOutcome {
  std::uint64_t messages{0};
  std::uint64_t refused{0};  // told by REPLY_ACK
  std::uint64_t connections{0};
  std::uint64_t requests{0};  // that have come to the disk
  // What must not be, or empty.
  std::string failure;
};

FrontendOutcome run_hostile_frontend(std::span<const std::uint8_t> input);

}  // namespace vblk::fuzz
