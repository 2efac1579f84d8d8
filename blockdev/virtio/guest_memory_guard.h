// Keeps the process alive when guest memory goes away under it.
//
// A frontend shares memory as files, and may shrink such a file at any time after we mapped it.
// Touching a page behind the new end is SIGBUS. One handler for the process looks the fault up in a
// table of guest mappings: inside one, it puts a page of zeroes in the place and marks the mapping,
// so that its owner can be cut off; anywhere else, the fault is our own bug and stays fatal.
//
//   entry state   begin   who may change it
//   free          0       guard_memory() claims it
//   in use        != 0    unguard_memory() frees it; the handler sets `faulted`
//
// The table is of atomics, because a signal handler may take no lock, and grows in blocks. The
// kernel's own accesses (preadv into such memory) fail with EFAULT and need none of this.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vblk::virtio {

// Regions guarded at once in this process. A connection has no more than GuestMemory::kMaxRegions
// (512), the eight of a table that is to replace them, and two each of in-flight areas and logs:
// 524. So what one device's frontend shares leaves room for 124 others'. The kernel takes as many
// mappings of a process, unless told otherwise (vm.max_map_count).
inline constexpr std::size_t kGuardedMappingsMax = 65'536;

// Guards [begin, begin + size_bytes), both multiples of `page_bytes`. Installs the handler first
// time. Returns the entry, or -1 if the table is full. Any thread.
[[nodiscard]] int guard_memory(void* begin, std::size_t size_bytes, std::size_t page_bytes);
// Must come before the mapping goes. Any thread.
void unguard_memory(int entry);
// Whether a page of it had to be replaced. Any thread.
[[nodiscard]] bool guarded_memory_faulted(int entry);

// Pages replaced in this process so far, in any mapping: a cheap question for those who ask often.
[[nodiscard]] std::uint64_t guarded_memory_fault_count();

}  // namespace vblk::virtio
