// Memory that a frontend shares by a file, mapped here: checked before, guarded afterwards.
//
// The frontend can shrink the file after we mapped it; touching it would kill the process with
// SIGBUS. The guard (guest_memory_guard.h) turns that into a flag on the mapping.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "aio/error.h"

namespace vblk::virtio {

class SharedMapping {
 public:
  // Maps nothing.
  SharedMapping() = default;
  // Maps `size_bytes` bytes of `fd` from `offset_bytes` on, to be read and written. `fd` stays the
  // caller's. `what` names the memory in messages: "guest memory". Errors: kInvalidArgument (empty,
  // no file, beyond the end of the file), kPermission (sealed or not open for writing), kExhausted.
  static Expected<SharedMapping> map(int fd, std::uint64_t size_bytes, std::uint64_t offset_bytes,
                                     std::string_view what);
  ~SharedMapping() { reset(); }
  SharedMapping(SharedMapping&& other) noexcept
      : mapping_(std::exchange(other.mapping_, nullptr)),
        mapping_bytes_(other.mapping_bytes_),
        host_(other.host_),
        guard_entry_(std::exchange(other.guard_entry_, -1)) {}
  SharedMapping& operator=(SharedMapping&& other) noexcept;
  SharedMapping(const SharedMapping&) = delete;
  SharedMapping& operator=(const SharedMapping&) = delete;

  // Where `offset_bytes` of the file is.
  [[nodiscard]] std::byte* host() const { return host_; }
  // Whether the file was shrunk and a page that is gone was touched: since then there are zeroes,
  // and whoever shared it must be cut off. Any thread.
  [[nodiscard]] bool faulted() const;

 private:
  void reset();

  void* mapping_{nullptr};  // what to unmap: page-aligned, so it may start before `host_`
  std::size_t mapping_bytes_{0};
  std::byte* host_{nullptr};
  int guard_entry_{-1};  // guest_memory_guard.h
};

}  // namespace vblk::virtio
