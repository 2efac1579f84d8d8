// Walks a request's memory without changing its iovec array: each piece of the request gets an
// array of its own, since nodes may rewrite what they are given.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <sys/uio.h>
#include <vector>

namespace vblk::qcow2 {

class IovCursor {
 public:
  explicit IovCursor(std::span<const iovec> memory) : memory_(memory) {}

  // The next `bytes`; there must be as many left.
  [[nodiscard]] std::vector<iovec> take(std::uint64_t bytes) {
    std::vector<iovec> taken;
    while (bytes > 0) {
      const iovec& element = memory_[index_];
      const auto part = std::min<std::uint64_t>(bytes, element.iov_len - used_);
      if (part > 0) taken.push_back({static_cast<std::byte*>(element.iov_base) + used_, part});
      used_ += part;
      bytes -= part;
      if (used_ == element.iov_len) {
        ++index_;
        used_ = 0;
      }
    }
    return taken;
  }
  void zero(std::uint64_t bytes) {
    for (const iovec& element : take(bytes)) std::memset(element.iov_base, 0, element.iov_len);
  }

 private:
  std::span<const iovec> memory_;
  std::size_t index_{0};
  std::size_t used_{0};
};

}  // namespace vblk::qcow2
