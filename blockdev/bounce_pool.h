// Aligned buffers for transfers that O_DIRECT would refuse, bounded per I/O thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace vblk::blockdev {

// A fixed number of equal buffers, aligned for any disk, mapped when first used. One I/O thread.
// Who finds none free waits in line: bounce memory is bounded whatever the guest does.
class BouncePool {
 public:
  static constexpr std::size_t kBufferBytes = std::size_t{1} << 20;
  // 16 x 1 MiB per I/O thread: as much as 128 waiting 128 KiB requests keep busy.
  static constexpr std::size_t kBufferCount = 16;
  static constexpr std::size_t kAlignment =
      4096;  // the largest logical block size Linux offers O_DIRECT

  // Somebody in line; embedded in whatever waits.
  struct Waiter {
    void (*ready)(Waiter& waiter, std::byte* buffer){nullptr};
    Waiter* next{nullptr};
  };

  BouncePool();
  ~BouncePool();
  BouncePool(const BouncePool&) = delete;
  BouncePool& operator=(const BouncePool&) = delete;

  // A free buffer of kBufferBytes, or nullptr.
  [[nodiscard]] std::byte* try_acquire();
  // Puts `waiter` in line: its `ready` runs inside a later release().
  void wait(Waiter& waiter);
  // Returns a buffer; hands it to the first waiter if there is one.
  void release(std::byte* buffer);

 private:
  std::byte* memory_{nullptr};
  std::vector<std::byte*> free_;
  Waiter* waiting_head_{nullptr};
  Waiter* waiting_tail_{nullptr};
};

}  // namespace vblk::blockdev
