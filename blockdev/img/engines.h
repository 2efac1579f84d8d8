// The engines under a command: io_uring where this system has it, otherwise threads.
#pragma once

#include <memory>

#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/private_context.h"

namespace vblk::img {

// Errors: as aio::EngineSet::create().
Expected<std::unique_ptr<aio::EngineSet>> make_engines();
Expected<std::unique_ptr<blockdev::PrivateContext>> make_context();

}  // namespace vblk::img
