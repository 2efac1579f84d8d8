#include "blockdev/null_node.h"

#include <fmt/core.h>

#include "blockdev/io_context.h"

namespace vblk::blockdev {

Expected<std::unique_ptr<NullNode>> NullNode::create(std::uint64_t size_bytes, bool read_only) {
  if (size_bytes == 0 || size_bytes % kSectorBytes != 0) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("--size {}: the size of a null disk is a positive multiple of 512",
                    size_bytes));
  }
  return std::unique_ptr<NullNode>(new NullNode(size_bytes, read_only));
}

NullNode::NullNode(std::uint64_t size_bytes, bool read_only) {
  size_bytes_.store(size_bytes, std::memory_order_relaxed);
  name_ = "null";
  limits_.read_only = read_only;
  limits_.can_discard = !read_only;
  limits_.can_write_zeroes = !read_only;
  limits_.write_zeroes_may_unmap = !read_only;
}

void NullNode::do_submit(BlockRequest& request, IoContext& context) {
  context.complete_later(request, 0);
}

}  // namespace vblk::blockdev
