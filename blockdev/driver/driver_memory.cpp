#include "blockdev/driver/driver_memory.h"

#include <cassert>
#include <cerrno>
#include <numeric>
#include <sys/mman.h>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::driver {

namespace {

std::unexpected<Error> out_of_memory(std::size_t bytes) {
  const int error = errno;
  return make_error(
      kind_of_errno(error),
      fmt::format("cannot make {} bytes of guest memory: {}", bytes, describe_errno(error)), error);
}

}  // namespace

Expected<std::unique_ptr<DriverMemory>> DriverMemory::create(
    const std::vector<std::size_t>& region_bytes) {
  std::unique_ptr<DriverMemory> memory(new DriverMemory);
  const std::size_t total =
      std::accumulate(region_bytes.begin(), region_bytes.end(), std::size_t{0});
  if (total == 0) return make_error(ErrorKind::kInvalidArgument, "guest memory of no size");
  // One reservation, into which the regions are mapped side by side.
  void* const reservation =
      ::mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reservation == MAP_FAILED) return out_of_memory(total);
  memory->begin_ = static_cast<std::byte*>(reservation);
  memory->size_bytes_ = total;
  std::size_t offset = 0;
  for (const std::size_t bytes : region_bytes) {
    assert(bytes % static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)) == 0);
    const int fd = ::memfd_create("vblk-guest-memory", MFD_CLOEXEC);
    if (fd < 0) return out_of_memory(bytes);
    std::byte* const place = memory->begin_ + offset;
    memory->regions_.push_back(
        {.fd = fd,
         .description = {.guest_address = kGuestBase + offset,
                         .size_bytes = bytes,
                         .user_address = reinterpret_cast<std::uint64_t>(place),
                         .mmap_offset = 0}});
    if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
        ::mmap(place, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
      return out_of_memory(bytes);
    }
    offset += bytes;
  }
  return memory;
}

DriverMemory::~DriverMemory() {
  if (begin_ != nullptr) ::munmap(begin_, size_bytes_);
  for (const Region& region : regions_) ::close(region.fd);
}

std::span<std::byte> DriverMemory::allocate(std::size_t bytes, std::size_t alignment) {
  const std::size_t begin = (used_bytes_ + alignment - 1) & ~(alignment - 1);
  if (begin > size_bytes_ || bytes > size_bytes_ - begin) return {};
  used_bytes_ = begin + bytes;
  return {begin_ + begin, bytes};
}

}  // namespace vblk::driver
