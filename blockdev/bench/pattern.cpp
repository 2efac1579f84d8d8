#include "blockdev/bench/pattern.h"

#include <bit>
#include <cstring>

#include "blockdev/block_request.h"

namespace vblk::bench {

namespace {

using blockdev::kSectorBytes;

// SplitMix64 (Steele, Lea and Flood, 2014): a good bijection of 64 bits, in a few instructions.
std::uint64_t mix(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30U)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27U)) * 0x94d049bb133111eb;
  return value ^ (value >> 31U);
}

// Calls `function(word, value)` for each 8 bytes with what they ought to hold, until it says no.
template <typename Byte, typename Function>
bool for_each_word(std::uint64_t seed, std::uint64_t offset_bytes, std::span<Byte> data,
                   Function&& function) {
  for (std::size_t at = 0; at + 8 <= data.size(); at += 8) {
    const std::uint64_t sector = (offset_bytes + at) / kSectorBytes;
    const std::uint64_t word = (offset_bytes + at) % kSectorBytes / 8;
    if (!function(data.subspan(at, 8), mix(mix(seed ^ sector) + word))) return false;
  }
  return true;
}

}  // namespace

std::unique_ptr<Pattern> Pattern::everywhere(std::uint64_t seed) {
  return std::unique_ptr<Pattern>(new Pattern(seed));
}

std::unique_ptr<Pattern> Pattern::where_written(std::uint64_t seed, std::uint64_t offset_bytes,
                                                std::uint64_t end_bytes, std::size_t block_bytes) {
  auto pattern = everywhere(seed);
  pattern->first_bytes_ = offset_bytes;
  pattern->block_bytes_ = block_bytes;
  const std::uint64_t blocks = (end_bytes - offset_bytes) / block_bytes;
  pattern->written_ = std::vector<std::atomic<std::uint64_t>>(blocks / 64 + 1);
  return pattern;
}

void Pattern::before_write(std::uint64_t offset_bytes, std::span<std::byte> data) {
  for_each_word(seed_, offset_bytes, data, [](std::span<std::byte> word, std::uint64_t value) {
    std::memcpy(word.data(), &value, sizeof value);
    return true;
  });
}

void Pattern::written(std::uint64_t offset_bytes, std::size_t /*length_bytes*/) {
  if (written_.empty()) return;
  const std::uint64_t block = block_of(offset_bytes);
  written_[block / 64].fetch_or(std::uint64_t{1} << (block % 64), std::memory_order_relaxed);
}

bool Pattern::before_read(std::uint64_t offset_bytes, std::span<std::byte> data) {
  if (!written_.empty()) {
    const std::uint64_t block = block_of(offset_bytes);
    if ((written_[block / 64].load(std::memory_order_relaxed) >> (block % 64) & 1) == 0)
      return false;
  }
  for (std::size_t at = 0; at < data.size(); at += kSectorBytes) {
    for_each_word(seed_, offset_bytes + at, data.subspan(at, 8),
                  [](std::span<std::byte> word, std::uint64_t value) {
                    const std::uint64_t wrong = ~value;
                    std::memcpy(word.data(), &wrong, sizeof wrong);
                    return true;
                  });
  }
  return true;
}

bool Pattern::is_right(std::uint64_t offset_bytes, std::span<const std::byte> data) {
  return for_each_word(seed_, offset_bytes, data,
                       [](std::span<const std::byte> word, std::uint64_t value) {
                         return std::memcmp(word.data(), &value, sizeof value) == 0;
                       });
}

std::uint64_t Pattern::written_blocks() const {
  std::uint64_t count = 0;
  for (const auto& word : written_)
    count += static_cast<std::uint64_t>(std::popcount(word.load(std::memory_order_relaxed)));
  return count;
}

}  // namespace vblk::bench
