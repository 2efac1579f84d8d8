// Backends whose command lines are known.
#pragma once

#include <string>

#include "aio/error.h"
#include "blockdev/conform/backend.h"

namespace vblk::conform {

struct ProfileOptions {
  std::string name;     // "vblk", "qemu-storage-daemon" or "spdk"
  std::string program;  // empty: this program, or the one of that name in the PATH
  std::string aio;      // empty: the profile's own
  std::string format;
  std::string cache;
};

// Fills in the commands of `target`. Error: kInvalidArgument.
Expected<void> apply_profile(ProfileOptions options, Target& target);

}  // namespace vblk::conform
