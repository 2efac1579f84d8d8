#include "tests/virtio/observed_stores.h"

#include <utility>

#include "blockdev/virtio/little_endian.h"

namespace vblk::virtio {

namespace {

// NOLINTNEXTLINE(cppcoreguidelines-avoid-non-const-global-variables): the seam has no argument.
const std::function<void()>* on_store{nullptr};

}  // namespace

void observe_store() {
  if (on_store != nullptr) (*on_store)();
}

namespace testing {

Watching::Watching(std::function<void()> function)
    : function_(std::move(function)),
      before_(std::exchange(on_store, function_ ? &function_ : nullptr)) {}

Watching::~Watching() { on_store = before_; }

}  // namespace testing
}  // namespace vblk::virtio
