// An image, with an engine in this process: no ring and no socket between the load and the disk.
#pragma once

#include <memory>

#include "aio/engine_set.h"
#include "blockdev/bench/target.h"
#include "blockdev/image.h"

namespace vblk::bench {

struct ImageTargetOptions {
  blockdev::ImageOptions image;
  aio::AioSelection aio;
  aio::EngineOptions engine;
};
// Errors: as open_image(); as EngineSet::create(), from open_port().
Expected<std::unique_ptr<Target>> open_image_target(const ImageTargetOptions& options);

}  // namespace vblk::bench
