// A disk that moves no data: every request succeeds at once. The floor of every measurement.
#pragma once

#include <cstdint>
#include <memory>

#include "aio/error.h"
#include "blockdev/block_node.h"

namespace vblk::blockdev {

// Reads leave the buffers as they are (they are the guest's own); writes go nowhere.
class NullNode final : public BlockNode {
 public:
  // Error: kInvalidArgument unless the size is a positive multiple of 512.
  static Expected<std::unique_ptr<NullNode>> create(std::uint64_t size_bytes, bool read_only);

 protected:
  void do_submit(BlockRequest& request, IoContext& context) override;

 private:
  NullNode(std::uint64_t size_bytes, bool read_only);
};

}  // namespace vblk::blockdev
