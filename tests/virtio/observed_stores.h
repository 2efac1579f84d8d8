// What both programs that kill the device behind every store share: the seam through which its
// stores are seen (little_endian.h, compiled with VBLK_OBSERVE_STORES), and memory to take copies
// of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace vblk::virtio::testing {

// Thrown out of a store, in place of SIGKILL.
struct Killed {};

// While it lives, `function` is called behind each store; without a function, nothing is. The last
// one made is the one that counts. One thread.
class Watching {
 public:
  explicit Watching(std::function<void()> function = nullptr);
  ~Watching();
  Watching(const Watching&) = delete;
  Watching& operator=(const Watching&) = delete;

 private:
  const std::function<void()> function_;
  const std::function<void()>* const before_;
};

// Words, so that all in it is aligned as counters must be.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : words_((bytes + 7) / 8) {}
  [[nodiscard]] std::byte* data() { return reinterpret_cast<std::byte*>(words_.data()); }
  [[nodiscard]] std::size_t size() const { return words_.size() * 8; }

 private:
  std::vector<std::uint64_t> words_;
};

}  // namespace vblk::virtio::testing
