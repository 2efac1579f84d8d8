// The bytes that the fuzzer gives, taken one after another. Beyond their end there are zeroes.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

namespace vblk::fuzz {

class Input {
 public:
  explicit Input(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}

  [[nodiscard]] bool is_empty() const { return bytes_.empty(); }
  // Little-endian.
  template <std::unsigned_integral T>
  [[nodiscard]] T take() {
    std::uint64_t value = 0;
    for (unsigned i = 0; i < sizeof(T); ++i) {
      if (bytes_.empty()) break;
      value |= std::uint64_t{bytes_.front()} << (8 * i);
      bytes_ = bytes_.subspan(1);
    }
    return static_cast<T>(value);
  }
  [[nodiscard]] std::uint8_t byte() { return take<std::uint8_t>(); }
  [[nodiscard]] bool flag() { return (byte() & 1) != 0; }
  [[nodiscard]] std::span<const std::uint8_t> bytes(std::size_t count) {
    const auto taken = bytes_.first(std::min(count, bytes_.size()));
    bytes_ = bytes_.subspan(taken.size());
    return taken;
  }

 private:
  std::span<const std::uint8_t> bytes_;
};

}  // namespace vblk::fuzz
