// A descriptor chain as a request sees it, whatever ring it came from, and how it is put together
// from descriptors. virtio 1.2, "Split Virtqueues" and "Packed Virtqueues".
//
// A chain whose structure holds is handed out even if an address in it is bad, because its status
// byte may still be reached; a structure that does not hold breaks the ring, which is the rings'
// business.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <sys/uio.h>

#include "blockdev/virtio/guest_memory.h"

namespace vblk::virtio {

// A popped descriptor chain. The iovecs lie in the caller's room: readable first, then writable.
struct Chain {
  std::uint16_t head{0};  // by which it is given back: head index, or the buffer's id
  std::span<iovec> readable;
  std::span<iovec> writable;
  std::uint64_t readable_bytes{0};
  std::uint64_t writable_bytes{0};
  // What is wrong with it, or nullptr: an address outside guest memory, readable after writable,
  // too many pieces. Then the iovecs and sums above are incomplete.
  const char* problem{nullptr};
  // Last byte of the last device-writable descriptor, where the status belongs; nullptr if there is
  // none.
  std::byte* last_writable_byte{nullptr};
};

// What became of taking a chain off a ring.
enum class Pop : std::uint8_t { kChain, kBroken };

// Longest indirect table taken. "A driver MUST NOT create a descriptor chain longer than the Queue
// Size", but Linux sizes its tables by seg_max alone, and a backend announces that before it knows
// the queue size.
inline constexpr std::size_t kIndirectEntriesMax = 1024;

// A chain while its descriptors are gone through, front to back.
class ChainBuilder {
 public:
  explicit ChainBuilder(std::span<iovec> room) : room_(room) {}

  // Translates one descriptor into the room. What cannot be translated marks the chain; the rest of
  // it is gone through all the same, to find the status byte.
  void add(AddressTranslator& translator, std::uint64_t guest_address, std::uint32_t length_bytes,
           bool writable) {
    if (length_bytes == 0) return;
    const std::size_t count =
        translator.translate(guest_address, length_bytes, room_.subspan(used_count_));
    if (writable) last_writable_byte_ = last_byte(translator, guest_address, length_bytes);
    // "The driver MUST place any device-writable descriptor elements after any device-readable
    // ones."
    if (!writable && used_count_ > readable_count_) {
      problem_ = "a device-readable descriptor follows a device-writable one";
      return;
    }
    if (count == 0) {
      problem_ = "a descriptor points outside guest memory, or the chain has too many pieces";
      return;
    }
    used_count_ += count;
    if (writable) {
      writable_bytes_ += length_bytes;
    } else {
      readable_count_ += count;
      readable_bytes_ += length_bytes;
    }
  }

  [[nodiscard]] Chain chain(std::uint16_t head) const {
    return {.head = head,
            .readable = room_.first(readable_count_),
            .writable = room_.subspan(readable_count_, used_count_ - readable_count_),
            .readable_bytes = readable_bytes_,
            .writable_bytes = writable_bytes_,
            .problem = problem_,
            .last_writable_byte = last_writable_byte_};
  }

 private:
  // Where the status byte would lie if the chain ended with this descriptor; nullptr outside
  // memory.
  static std::byte* last_byte(AddressTranslator& translator, std::uint64_t guest_address,
                              std::uint32_t length_bytes) {
    std::uint64_t address = 0;
    const bool wraps = __builtin_add_overflow(guest_address, length_bytes - 1U, &address);
    return wraps ? nullptr : translator.translate(address, 1);
  }

  std::span<iovec> room_;
  std::size_t readable_count_{0};
  std::size_t used_count_{0};  // readable and writable
  std::uint64_t readable_bytes_{0};
  std::uint64_t writable_bytes_{0};
  const char* problem_{nullptr};
  std::byte* last_writable_byte_{nullptr};
};

}  // namespace vblk::virtio
