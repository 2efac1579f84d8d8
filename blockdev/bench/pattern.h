// Content that can be checked without knowing when, in which blocks or by which run it was written:
// each sector of 512 bytes follows from the seed and its place on the disk alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "blockdev/bench/block_content.h"

namespace vblk::bench {

// A write fills in the pattern, a read is right if it brings it. A second write to a place writes
// the same bytes, so the loss of that one alone is not seen.
class Pattern final : public BlockContent {
 public:
  // Of a run that only reads every block is checked. Otherwise the blocks of `block_bytes` from
  // `offset_bytes` to `end_bytes` that were written so far.
  static std::unique_ptr<Pattern> everywhere(std::uint64_t seed);
  static std::unique_ptr<Pattern> where_written(std::uint64_t seed, std::uint64_t offset_bytes,
                                                std::uint64_t end_bytes, std::size_t block_bytes);

  void before_write(std::uint64_t offset_bytes, std::span<std::byte> data) override;
  void written(std::uint64_t offset_bytes, std::size_t length_bytes) override;
  // Makes sure that what is not read is not right.
  [[nodiscard]] bool before_read(std::uint64_t offset_bytes, std::span<std::byte> data) override;
  [[nodiscard]] bool is_right(std::uint64_t offset_bytes, std::span<const std::byte> data) override;
  // How many blocks have been written. 0 of everywhere().
  [[nodiscard]] std::uint64_t written_blocks() const;

 private:
  explicit Pattern(std::uint64_t seed) : seed_(seed) {}
  [[nodiscard]] std::uint64_t block_of(std::uint64_t offset_bytes) const {
    return (offset_bytes - first_bytes_) / block_bytes_;
  }

  const std::uint64_t seed_;
  std::uint64_t first_bytes_{0};
  std::size_t block_bytes_{0};
  std::vector<std::atomic<std::uint64_t>> written_;  // a bit per block; empty: all are
};

}  // namespace vblk::bench
