#include "blockdev/demo/demo.h"

namespace vblk::demo {

int run(int /*argc*/, char** /*argv*/) { return 1; }

}  // namespace vblk::demo
