#include "blockdev/img/engines.h"

#include <algorithm>
#include <utility>

namespace vblk::img {

Expected<std::unique_ptr<aio::EngineSet>> make_engines() {
  aio::AioSelection selection;
  std::ranges::fill(selection.engine_of_kind, aio::EngineName::kIoUring);
  auto engines = aio::EngineSet::create(selection, {});
  // Nobody has asked for it by name, so its absence is no error.
  return engines ? std::move(engines) : aio::EngineSet::create({}, {});
}

Expected<std::unique_ptr<blockdev::PrivateContext>> make_context() {
  auto engines = make_engines();
  if (!engines) return std::unexpected(std::move(engines.error()));
  return std::make_unique<blockdev::PrivateContext>(std::move(*engines));
}

}  // namespace vblk::img
