#include "blockdev/flush_now.h"

#include <future>

#include <fmt/core.h>

#include "blockdev/block_request.h"

namespace vblk::blockdev {

Expected<void> flush_now(BlockNode& node, IoThread& thread) {
  if (node.limits().read_only) return {};
  struct Flush : BlockRequest {
    std::promise<int> done;
  } request;
  request.operation = BlockOperation::kFlush;
  request.complete = [](BlockRequest& flushed, int error) {
    static_cast<Flush&>(flushed).done.set_value(error);
  };
  auto outcome = request.done.get_future();
  thread.loop().post([&node, &thread, &request] { node.submit(request, thread.context()); });
  thread.wait_for(outcome);
  const int error = outcome.get();
  if (error == 0) return {};
  return make_error(ErrorKind::kIo,
                    fmt::format("the last flush of '{}' failed: {}; what was written may be lost",
                                node.name(), describe_errno(error)),
                    error);
}

bool is_quiet(std::span<const std::unique_ptr<IoThread>> threads) {
  for (int look = 0; look < 2; ++look) {
    for (const auto& thread : threads) {
      bool idle = false;
      thread->run_and_wait([&] { idle = thread->context().is_idle(); });
      if (!idle) return false;
    }
  }
  return true;
}

}  // namespace vblk::blockdev
