// An I/O context for work that no I/O thread does: opening an image, closing it. It has a loop that
// never runs; everything happens inside run(), on the calling thread.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/io_context.h"
#include "blockdev/io_loop.h"
#include "blockdev/task.h"

namespace vblk::blockdev {

class PrivateContext {
 public:
  explicit PrivateContext(std::unique_ptr<aio::EngineSet> engines)
      : context_(loop_, std::move(engines)) {}

  // Carries `task` to its end. It and all that it started is over when this returns.
  int run(Task<int> task) {
    int result = 0;
    start(std::move(task), result);
    context_.drain();
    return result;
  }
  [[nodiscard]] IoContext& context() { return context_; }

 private:
  static Detached start(Task<int> task, int& result) { result = co_await task; }

  IoLoop loop_;
  IoContext context_;
};

using MakePrivateContext = std::function<Expected<std::unique_ptr<PrivateContext>>()>;

}  // namespace vblk::blockdev
