// The two tables of an io_uring that spare the kernel work per request: registered files and
// registered buffers (io_uring_register(2)). Both start sparse and are filled and cleared entry by
// entry while requests run; a request that finds nothing in them goes without.
//
// Thread: the ring's owner. The ring must outlive them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <sys/uio.h>
#include <vector>

#include "aio/error.h"

struct io_uring;

namespace vblk::aio {

// Descriptors that the ring holds open by itself, so that no request has to take a reference.
class RegisteredFiles {
 public:
  // Makes the empty table. Error: this kernel has none (Linux 5.19).
  Expected<void> create(io_uring& ring);

  // Calls nest. Errors: the table is full (one disk has two descriptors at most), the kernel's.
  Expected<void> add(int fd);
  void remove(int fd);

  // The table's index of `fd`, or -1.
  [[nodiscard]] int find(int fd) const {
    const auto index = static_cast<std::size_t>(fd);
    return index < slot_of_fd_.size() ? slot_of_fd_[index] : -1;
  }

 private:
  struct Slot {
    int fd{-1};
    unsigned users{0};
  };
  static constexpr unsigned kSlots = 128;

  io_uring* ring_{nullptr};
  std::vector<Slot> slots_;
  std::vector<int> slot_of_fd_;
};

// Ranges of memory whose pages the kernel keeps pinned, so that no request has to pin its own.
class RegisteredBuffers {
 public:
  // Makes the empty table. Error: this kernel has none (Linux 5.19).
  Expected<void> create(io_uring& ring);

  // Calls with the same range nest; ranges do not overlap otherwise. All of it, or nothing.
  // Errors: kExhausted (locked memory, the table), kNotSupported (memory that cannot be pinned).
  Expected<void> add(const iovec& range);
  void remove(const iovec& range);

  // The table's index of the one buffer that holds all of `buffers`, or -1.
  [[nodiscard]] int find(std::span<const iovec> buffers) const;

 private:
  // The kernel takes at most 1 GiB per buffer: a large range is several.
  struct Buffer {
    std::uintptr_t begin;
    std::uintptr_t end;
    unsigned slot;
  };
  struct Range {
    std::uintptr_t begin;
    std::size_t bytes;
    unsigned users;
  };
  static constexpr unsigned kSlots = 1024;
  static constexpr std::size_t kBufferBytesMax = std::size_t{1} << 30;

  [[nodiscard]] std::vector<Range>::iterator find_range(const iovec& range);
  Expected<void> add_buffer(std::uintptr_t begin, std::size_t bytes);
  void remove_buffers(std::uintptr_t begin, std::uintptr_t end);

  io_uring* ring_{nullptr};
  std::vector<Range> ranges_;
  std::vector<Buffer> buffers_;  // sorted by address
  std::vector<unsigned> free_slots_;
};

}  // namespace vblk::aio
