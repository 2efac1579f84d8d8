#include "blockdev/virtio/guest_memory.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <utility>

#include <fmt/format.h>

#include "blockdev/virtio/guest_memory_guard.h"

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

// Mappings of hugetlbfs files start and end on huge pages.
std::size_t page_bytes_of(int fd) {
  struct statfs file_system{};
  if (::fstatfs(fd, &file_system) == 0 && file_system.f_type == HUGETLBFS_MAGIC)
    return static_cast<std::size_t>(file_system.f_bsize);
  return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

Expected<void> check_file(int fd, std::uint64_t size_bytes, std::uint64_t mmap_offset) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) {
    const int error = errno;
    return make_error(ErrorKind::kInvalidArgument,
                      "cannot map guest memory: " + describe_errno(error), error);
  }
  if (!S_ISREG(status.st_mode))
    return make_error(ErrorKind::kInvalidArgument,
                      "cannot map guest memory: its descriptor is not a file (memfd, shm, "
                      "hugetlbfs); share the guest's memory by one");
  const auto file_bytes = static_cast<std::uint64_t>(status.st_size);
  if (!contains(0, file_bytes, mmap_offset, size_bytes))
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("cannot map guest memory: {} bytes at offset {} do not lie in its file of {} "
                    "bytes",
                    size_bytes, mmap_offset, file_bytes));
  return {};
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
  if (auto checked = check_file(fd, size_bytes, mmap_offset); !checked)
    return std::unexpected(checked.error());

  // Rounded outwards to pages. Neither sum overflows: the range lies in a file, below 2^63.
  const std::size_t page_bytes = page_bytes_of(fd);
  const std::uint64_t map_begin = mmap_offset & ~(std::uint64_t{page_bytes} - 1);
  const std::uint64_t map_end =
      (mmap_offset + size_bytes + page_bytes - 1) & ~(std::uint64_t{page_bytes} - 1);
  void* const mapping = ::mmap(nullptr, map_end - map_begin, PROT_READ | PROT_WRITE,
                               MAP_SHARED | MAP_NORESERVE, fd, static_cast<off_t>(map_begin));
  if (mapping == MAP_FAILED) {
    const int error = errno;
    return make_error(
        kind_of_errno(error),
        fmt::format("cannot map {} bytes of guest memory: {}", size_bytes, describe_errno(error)),
        error);
  }
  std::shared_ptr<MemoryRegion> region(new MemoryRegion());
  region->guest_address_ = guest_address;
  region->size_bytes_ = size_bytes;
  region->user_address_ = user_address;
  region->mapping_ = mapping;
  region->mapping_bytes_ = map_end - map_begin;
  region->host_ = static_cast<std::byte*>(mapping) + (mmap_offset - map_begin);
  region->guard_entry_ = guard_memory(mapping, region->mapping_bytes_, page_bytes);
  if (region->guard_entry_ < 0)
    return make_error(ErrorKind::kExhausted,
                      fmt::format("cannot guard guest memory: {} regions are mapped already",
                                  kGuardedMappingsMax));
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

MemoryRegion::~MemoryRegion() {
  if (guard_entry_ >= 0) unguard_memory(guard_entry_);
  if (mapping_ != nullptr) ::munmap(mapping_, mapping_bytes_);
}

bool MemoryRegion::faulted() const {
  return guard_entry_ >= 0 && guarded_memory_faulted(guard_entry_);
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
