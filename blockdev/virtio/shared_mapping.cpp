#include "blockdev/virtio/shared_mapping.h"

#include <cerrno>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <fmt/format.h>

#include "blockdev/virtio/guest_memory_guard.h"

namespace vblk::virtio {

namespace {

// Mappings of hugetlbfs files start and end on huge pages.
std::size_t page_bytes_of(int fd) {
  struct statfs file_system{};
  if (::fstatfs(fd, &file_system) == 0 && file_system.f_type == HUGETLBFS_MAGIC)
    return static_cast<std::size_t>(file_system.f_bsize);
  return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

Expected<void> check_file(int fd, std::uint64_t size_bytes, std::uint64_t offset_bytes,
                          std::string_view what) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) {
    const int error = errno;
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("cannot map {}: {}", what, describe_errno(error)), error);
  }
  if (!S_ISREG(status.st_mode)) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("cannot map {}: its descriptor is not a file (memfd, shm, hugetlbfs)", what));
  }
  const auto file_bytes = static_cast<std::uint64_t>(status.st_size);
  if (size_bytes == 0 || offset_bytes > file_bytes || size_bytes > file_bytes - offset_bytes) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("cannot map {}: {} bytes at offset {} do not lie in its file of {} bytes", what,
                    size_bytes, offset_bytes, file_bytes));
  }
  return {};
}

}  // namespace

Expected<SharedMapping> SharedMapping::map(int fd, std::uint64_t size_bytes,
                                           std::uint64_t offset_bytes, std::string_view what) {
  if (auto checked = check_file(fd, size_bytes, offset_bytes, what); !checked)
    return std::unexpected(std::move(checked.error()));
  // Rounded outwards to pages. Neither sum overflows: the range lies in a file, below 2^63.
  const std::size_t page_bytes = page_bytes_of(fd);
  const std::uint64_t map_begin = offset_bytes & ~(std::uint64_t{page_bytes} - 1);
  const std::uint64_t map_end =
      (offset_bytes + size_bytes + page_bytes - 1) & ~(std::uint64_t{page_bytes} - 1);
  void* const mapping = ::mmap(nullptr, map_end - map_begin, PROT_READ | PROT_WRITE,
                               MAP_SHARED | MAP_NORESERVE, fd, static_cast<off_t>(map_begin));
  if (mapping == MAP_FAILED) {
    const int error = errno;
    return make_error(
        kind_of_errno(error),
        fmt::format("cannot map {} bytes of {}: {}", size_bytes, what, describe_errno(error)),
        error);
  }
  SharedMapping shared;
  shared.mapping_ = mapping;
  shared.mapping_bytes_ = map_end - map_begin;
  shared.host_ = static_cast<std::byte*>(mapping) + (offset_bytes - map_begin);
  shared.guard_entry_ = guard_memory(mapping, shared.mapping_bytes_, page_bytes);
  if (shared.guard_entry_ < 0) {
    return make_error(
        ErrorKind::kExhausted,
        fmt::format("cannot guard {}: {} regions are mapped already", what, kGuardedMappingsMax));
  }
  return shared;
}

SharedMapping& SharedMapping::operator=(SharedMapping&& other) noexcept {
  if (this == &other) return *this;
  reset();
  mapping_ = std::exchange(other.mapping_, nullptr);
  mapping_bytes_ = other.mapping_bytes_;
  host_ = other.host_;
  guard_entry_ = std::exchange(other.guard_entry_, -1);
  return *this;
}

void SharedMapping::reset() {
  if (guard_entry_ >= 0) unguard_memory(std::exchange(guard_entry_, -1));
  if (mapping_ != nullptr) ::munmap(std::exchange(mapping_, nullptr), mapping_bytes_);
}

bool SharedMapping::faulted() const {
  return guard_entry_ >= 0 && guarded_memory_faulted(guard_entry_);
}

}  // namespace vblk::virtio
