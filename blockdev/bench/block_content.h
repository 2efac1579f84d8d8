// What is in the blocks, for those who want to know whether they get what they asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace vblk::bench {

// Thread: of several queues at once.
class BlockContent {
 public:
  BlockContent() = default;
  virtual ~BlockContent() = default;
  BlockContent(const BlockContent&) = delete;
  BlockContent& operator=(const BlockContent&) = delete;

  virtual void before_write(std::uint64_t offset_bytes, std::span<std::byte> data) = 0;
  virtual void written(std::uint64_t /*offset_bytes*/, std::size_t /*length_bytes*/) {}
  // Whether what the read brings can be known; then it is asked is_right().
  [[nodiscard]] virtual bool before_read(std::uint64_t offset_bytes, std::span<std::byte> data) = 0;
  [[nodiscard]] virtual bool is_right(std::uint64_t offset_bytes,
                                      std::span<const std::byte> data) = 0;
};

}  // namespace vblk::bench
