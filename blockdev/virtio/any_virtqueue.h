// The device's side of a virtqueue, split or packed, as was negotiated: virtqueue.h or
// packed_virtqueue.h behind the same calls. Which it is never changes, so that telling them apart
// is a branch that is always predicted.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <sys/uio.h>
#include <type_traits>
#include <utility>
#include <variant>

#include "blockdev/virtio/chain.h"
#include "blockdev/virtio/guest_memory.h"
#include "blockdev/virtio/packed_virtqueue.h"
#include "blockdev/virtio/virtqueue.h"

namespace vblk::virtio {

class AnyVirtqueue {
 public:
  struct Layout {
    std::uint16_t size{0};
    std::variant<Virtqueue::Layout, PackedVirtqueue::Layout> of_kind;
  };

  // As the constructors of the two.
  AnyVirtqueue(Layout layout, const GuestMemory& memory)
      : queue_(std::holds_alternative<Virtqueue::Layout>(layout.of_kind)
                   ? Queue(std::in_place_type<Virtqueue>,
                           *std::get_if<Virtqueue::Layout>(&layout.of_kind), memory)
                   : Queue(std::in_place_type<PackedVirtqueue>,
                           std::move(*std::get_if<PackedVirtqueue::Layout>(&layout.of_kind)),
                           memory)) {}

  [[nodiscard]] std::optional<std::uint16_t> peek_head() {
    return call([](auto& queue) { return queue.peek_head(); });
  }
  Pop pop(std::span<iovec> room, Chain& chain) {
    return call([&](auto& queue) { return queue.pop(room, chain); });
  }
  Pop take_again(std::uint16_t head, std::span<iovec> room, Chain& chain) {
    return call([&](auto& queue) { return queue.take_again(head, room, chain); });
  }
  void push_used(std::uint16_t head, std::uint32_t length_bytes) {
    call([&](auto& queue) { queue.push_used(head, length_bytes); });
  }
  [[nodiscard]] bool has_unpublished() {
    return call([](auto& queue) { return queue.has_unpublished(); });
  }
  [[nodiscard]] bool publish() {
    return call([](auto& queue) { return queue.publish(); });
  }
  [[nodiscard]] bool enable_notifications() {
    return call([](auto& queue) { return queue.enable_notifications(); });
  }
  void disable_notifications() {
    call([](auto& queue) { queue.disable_notifications(); });
  }
  // Where the ring stands, as SET_VRING_BASE and GET_VRING_BASE have it.
  [[nodiscard]] std::uint32_t next_avail() {
    return call([](auto& queue) { return std::uint32_t{queue.next_avail()}; });
  }
  [[nodiscard]] const char* broken_reason() {
    return call([](auto& queue) { return queue.broken_reason(); });
  }

 private:
  using Queue = std::variant<Virtqueue, PackedVirtqueue>;

  template <typename Function>
  [[gnu::always_inline]] std::invoke_result_t<Function, Virtqueue&> call(Function function) {
    if (auto* const split = std::get_if<Virtqueue>(&queue_); split != nullptr) [[likely]]
      return function(*split);
    return function(*std::get_if<PackedVirtqueue>(&queue_));
  }

  Queue queue_;
};

}  // namespace vblk::virtio
