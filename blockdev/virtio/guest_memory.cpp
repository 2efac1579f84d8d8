#include "blockdev/virtio/guest_memory.h"

#include <algorithm>
#include <cassert>
#include <limits>
#include <utility>

#include <fmt/format.h>

namespace vblk::virtio {

namespace {

bool wraps(std::uint64_t start, std::uint64_t size_bytes) {
  return size_bytes > std::numeric_limits<std::uint64_t>::max() - start;
}

// The last byte counts: a range may end exactly at 2^64.
bool contains(std::uint64_t start, std::uint64_t size_bytes, std::uint64_t address,
              std::uint64_t length_bytes) {
  if (address < start) return false;
  const std::uint64_t offset_bytes = address - start;
  return offset_bytes <= size_bytes && length_bytes <= size_bytes - offset_bytes;
}

}  // namespace

Expected<std::shared_ptr<const MemoryRegion>> MemoryRegion::map(int fd, std::uint64_t guest_address,
                                                                std::uint64_t size_bytes,
                                                                std::uint64_t user_address,
                                                                std::uint64_t mmap_offset) {
  if (size_bytes == 0 || wraps(guest_address, size_bytes) || wraps(user_address, size_bytes) ||
      wraps(mmap_offset, size_bytes))
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("cannot map guest memory: region at {:#x} of {:#x} bytes is "
                                  "empty or wraps around",
                                  guest_address, size_bytes));
  auto mapping = SharedMapping::map(fd, size_bytes, mmap_offset, "guest memory");
  if (!mapping) return std::unexpected(std::move(mapping.error()));
  std::shared_ptr<MemoryRegion> region(new MemoryRegion());
  region->guest_address_ = guest_address;
  region->size_bytes_ = size_bytes;
  region->user_address_ = user_address;
  region->host_ = mapping->host();
  region->mapping_ = std::move(*mapping);
  return region;
}

std::shared_ptr<const MemoryRegion> MemoryRegion::wrap(std::byte* host, std::uint64_t guest_address,
                                                       std::uint64_t size_bytes,
                                                       std::uint64_t user_address) {
  const std::shared_ptr<MemoryRegion> region(new MemoryRegion());
  region->guest_address_ = guest_address;
  region->size_bytes_ = size_bytes;
  region->user_address_ = user_address;
  region->host_ = host;
  return region;
}

Expected<std::shared_ptr<const GuestMemory>> GuestMemory::create(
    std::vector<std::shared_ptr<const MemoryRegion>> regions) {
  if (regions.size() > kMaxRegions)
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("guest memory has {} regions; at most {} are taken",
                                  regions.size(), kMaxRegions));
  std::ranges::sort(regions, {}, [](const auto& region) { return region->guest_address(); });
  for (std::size_t i = 1; i < regions.size(); ++i) {
    const MemoryRegion& lower = *regions[i - 1];
    const MemoryRegion& upper = *regions[i];
    if (upper.guest_address() - lower.guest_address() < lower.size_bytes())
      return make_error(ErrorKind::kInvalidArgument,
                        fmt::format("guest memory regions at {:#x} and {:#x} overlap",
                                    lower.guest_address(), upper.guest_address()));
  }
  std::shared_ptr<GuestMemory> memory(new GuestMemory());
  memory->regions_ = std::move(regions);
  return memory;
}

// Most guests have one to three regions; a binary search keeps five hundred bearable.
const MemoryRegion* GuestMemory::find(std::uint64_t guest_address) const {
  const auto above = std::ranges::upper_bound(
      regions_, guest_address, {}, [](const auto& region) { return region->guest_address(); });
  if (above == regions_.begin()) return nullptr;
  const MemoryRegion& region = **std::prev(above);
  return guest_address - region.guest_address() < region.size_bytes() ? &region : nullptr;
}

std::byte* GuestMemory::translate_user(std::uint64_t user_address,
                                       std::uint64_t length_bytes) const {
  for (const auto& region : regions_) {
    if (contains(region->user_address(), region->size_bytes(), user_address, length_bytes))
      return region->host() + (user_address - region->user_address());
  }
  return nullptr;
}

std::uint64_t GuestMemory::guest_address_of(const std::byte* host) const {
  for (const auto& region : regions_) {
    // As integers: pointers into different objects have no order.
    const auto offset_bytes =
        reinterpret_cast<std::uintptr_t>(host) - reinterpret_cast<std::uintptr_t>(region->host());
    if (offset_bytes < region->size_bytes()) return region->guest_address() + offset_bytes;
  }
  assert(false && "a pointer that is not into guest memory");
  return 0;
}

bool GuestMemory::faulted() const {
  return std::ranges::any_of(regions_, [](const auto& region) { return region->faulted(); });
}

bool AddressTranslator::look_up(std::uint64_t guest_address) {
  const MemoryRegion* const region = memory_.find(guest_address);
  if (region == nullptr) return false;
  begin_ = region->guest_address();
  size_bytes_ = region->size_bytes();
  host_ = region->host();
  return true;
}

std::size_t AddressTranslator::split(std::uint64_t guest_address, std::uint64_t length_bytes,
                                     std::span<iovec> room) {
  std::size_t count = 0;
  while (length_bytes > 0) {
    if (count == room.size() || !look_up(guest_address)) return 0;
    const std::uint64_t offset_bytes = guest_address - begin_;
    const std::uint64_t bytes = std::min(length_bytes, size_bytes_ - offset_bytes);
    room[count++] = {.iov_base = host_ + offset_bytes, .iov_len = bytes};
    length_bytes -= bytes;
    // Only an end at 2^64 wraps to 0, and what would go on there has no end left to lie in.
    guest_address += bytes;
    if (guest_address == 0 && length_bytes > 0) return 0;
  }
  return count;
}

}  // namespace vblk::virtio
