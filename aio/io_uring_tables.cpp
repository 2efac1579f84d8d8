#include "aio/io_uring_tables.h"

#include <algorithm>
#include <cerrno>
#include <numeric>

#include <fmt/core.h>
#include <liburing.h>

namespace vblk::aio {

namespace {

// io_uring_register_buffers_update_tag(3): a buffer of no bytes empties the slot.
int set_buffer(io_uring& ring, unsigned slot, const iovec& buffer) {
  const __u64 no_tag = 0;
  return io_uring_register_buffers_update_tag(&ring, slot, &buffer, &no_tag, 1);
}

std::unexpected<Error> buffer_error(int error) {
  if (error == ENOMEM) {
    return make_error(ErrorKind::kExhausted,
                      "guest memory is not registered with io_uring: the limit of locked memory is "
                      "too low; raise it with 'ulimit -l'",
                      error);
  }
  return make_error(
      ErrorKind::kNotSupported,
      fmt::format("guest memory is not registered with io_uring: the kernel cannot pin it: {}",
                  describe_errno(error)),
      error);
}

}  // namespace

Expected<void> RegisteredFiles::create(io_uring& ring) {
  if (const int error = -io_uring_register_files_sparse(&ring, kSlots); error > 0) {
    return make_error(kind_of_errno(error),
                      fmt::format("files are not registered: {}", describe_errno(error)), error);
  }
  ring_ = &ring;
  return {};
}

Expected<void> RegisteredFiles::add(int fd) {
  if (ring_ == nullptr || fd < 0) return {};
  if (const int slot = find(fd); slot >= 0) {
    ++slots_[static_cast<std::size_t>(slot)].users;
    return {};
  }
  const auto free = std::ranges::find(slots_, 0U, &Slot::users);
  const auto slot = static_cast<std::size_t>(free - slots_.begin());
  if (slot == kSlots)
    return make_error(ErrorKind::kExhausted, "files are not registered: the table is full");
  const int updated = io_uring_register_files_update(ring_, static_cast<unsigned>(slot), &fd, 1);
  if (updated < 0) {
    return make_error(kind_of_errno(-updated),
                      fmt::format("a file is not registered: {}", describe_errno(-updated)),
                      -updated);
  }
  if (free == slots_.end()) slots_.emplace_back();
  slots_[slot] = {.fd = fd, .users = 1};
  const auto index = static_cast<std::size_t>(fd);
  if (slot_of_fd_.size() <= index) slot_of_fd_.resize(index + 1, -1);
  slot_of_fd_[index] = static_cast<int>(slot);
  return {};
}

void RegisteredFiles::remove(int fd) {
  const int slot = find(fd);
  if (slot < 0 || --slots_[static_cast<std::size_t>(slot)].users > 0) return;
  slot_of_fd_[static_cast<std::size_t>(fd)] = -1;
  constexpr int kNone = -1;
  io_uring_register_files_update(ring_, static_cast<unsigned>(slot), &kNone, 1);
}

Expected<void> RegisteredBuffers::create(io_uring& ring) {
  if (const int error = -io_uring_register_buffers_sparse(&ring, kSlots); error > 0) {
    return make_error(
        kind_of_errno(error),
        fmt::format("guest memory is not registered with io_uring: {}", describe_errno(error)),
        error);
  }
  ring_ = &ring;
  free_slots_.resize(kSlots);
  std::iota(free_slots_.rbegin(), free_slots_.rend(), 0U);
  return {};
}

std::vector<RegisteredBuffers::Range>::iterator RegisteredBuffers::find_range(const iovec& range) {
  const auto begin = reinterpret_cast<std::uintptr_t>(range.iov_base);
  return std::ranges::find_if(ranges_, [&](const Range& known) {
    return known.begin == begin && known.bytes == range.iov_len;
  });
}

Expected<void> RegisteredBuffers::add_buffer(std::uintptr_t begin, std::size_t bytes) {
  if (free_slots_.empty()) {
    return make_error(ErrorKind::kExhausted,
                      "guest memory is not registered with io_uring: it is in too many pieces");
  }
  const unsigned slot = free_slots_.back();
  // NOLINTNEXTLINE(performance-no-int-to-ptr): pieces of a range are computed as numbers.
  const iovec buffer{.iov_base = reinterpret_cast<void*>(begin), .iov_len = bytes};
  if (const int result = set_buffer(*ring_, slot, buffer); result < 0) return buffer_error(-result);
  free_slots_.pop_back();
  const auto after = std::ranges::upper_bound(buffers_, begin, {}, &Buffer::begin);
  buffers_.insert(after, {.begin = begin, .end = begin + bytes, .slot = slot});
  return {};
}

void RegisteredBuffers::remove_buffers(std::uintptr_t begin, std::uintptr_t end) {
  std::erase_if(buffers_, [&](const Buffer& buffer) {
    if (buffer.begin < begin || buffer.end > end) return false;
    set_buffer(*ring_, buffer.slot, {.iov_base = nullptr, .iov_len = 0});
    free_slots_.push_back(buffer.slot);
    return true;
  });
}

Expected<void> RegisteredBuffers::add(const iovec& range) {
  if (ring_ == nullptr || range.iov_len == 0) return {};
  if (const auto known = find_range(range); known != ranges_.end()) {
    ++known->users;
    return {};
  }
  const auto begin = reinterpret_cast<std::uintptr_t>(range.iov_base);
  const std::uintptr_t end = begin + range.iov_len;
  for (std::uintptr_t at = begin; at < end; at += std::min(end - at, kBufferBytesMax)) {
    if (auto added = add_buffer(at, std::min(end - at, kBufferBytesMax)); !added) {
      remove_buffers(begin, end);
      return added;
    }
  }
  ranges_.push_back({.begin = begin, .bytes = range.iov_len, .users = 1});
  return {};
}

void RegisteredBuffers::remove(const iovec& range) {
  const auto known = find_range(range);
  if (known == ranges_.end() || --known->users > 0) return;
  remove_buffers(known->begin, known->begin + known->bytes);
  ranges_.erase(known);
}

int RegisteredBuffers::find(std::span<const iovec> buffers) const {
  if (buffers_.empty() || buffers.empty()) return -1;
  const auto begin_of = [](const iovec& buffer) {
    return reinterpret_cast<std::uintptr_t>(buffer.iov_base);
  };
  const auto after =
      std::ranges::upper_bound(buffers_, begin_of(buffers.front()), {}, &Buffer::begin);
  if (after == buffers_.begin()) return -1;
  const Buffer& candidate = *(after - 1);
  const bool all_inside = std::ranges::all_of(buffers, [&](const iovec& buffer) {
    const std::uintptr_t begin = begin_of(buffer);
    return begin >= candidate.begin && begin < candidate.end &&
           buffer.iov_len <= candidate.end - begin;
  });
  return all_inside ? static_cast<int>(candidate.slot) : -1;
}

}  // namespace vblk::aio
