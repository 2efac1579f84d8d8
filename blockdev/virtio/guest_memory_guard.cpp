#include "blockdev/virtio/guest_memory_guard.h"

#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <new>
#include <sys/mman.h>

namespace vblk::virtio {

namespace {

struct GuardedMapping {
  std::atomic<std::uintptr_t> begin{0};  // published last, with release
  std::atomic<std::uintptr_t> end{0};
  std::atomic<std::size_t> page_bytes{0};
  std::atomic<bool> faulted{false};
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic<std::uintptr_t>::is_always_lock_free);

// A part of the table, made when it is needed and never taken away: the handler may be looking.
constexpr std::size_t kBlockSize = 512;
using Block = std::array<GuardedMapping, kBlockSize>;
static_assert(kGuardedMappingsMax % kBlockSize == 0);

// NOLINTBEGIN(cppcoreguidelines-avoid-non-const-global-variables): a signal handler has no other.
std::array<std::atomic<Block*>, kGuardedMappingsMax / kBlockSize> blocks;  // filled front to back
std::atomic<std::uint64_t> fault_count{0};
std::mutex registration_mutex;
struct sigaction previous_action;
// NOLINTEND(cppcoreguidelines-avoid-non-const-global-variables)

GuardedMapping* find_mapping(std::uintptr_t address) {
  for (const auto& each : blocks) {
    Block* const block = each.load(std::memory_order_acquire);
    if (block == nullptr) return nullptr;
    for (GuardedMapping& mapping : *block) {
      const std::uintptr_t begin = mapping.begin.load(std::memory_order_acquire);
      if (begin != 0 && address >= begin && address < mapping.end.load(std::memory_order_relaxed))
        return &mapping;
    }
  }
  return nullptr;
}

// Of an entry that guard_memory() has given out.
GuardedMapping& mapping_of(int entry) {
  const auto index = static_cast<std::size_t>(entry);
  return (*blocks[index / kBlockSize].load(std::memory_order_acquire))[index % kBlockSize];
}

// Under the mutex. Nothing: there is no memory for more.
Block* block_at(std::size_t index) {
  Block* block = blocks[index].load(std::memory_order_relaxed);
  if (block != nullptr) return block;
  block = new (std::nothrow) Block();
  blocks[index].store(block, std::memory_order_release);
  return block;
}

bool replace_page(const GuardedMapping& mapping, std::uintptr_t address) {
  const std::size_t page_bytes = mapping.page_bytes.load(std::memory_order_relaxed);
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the kernel reports the address as a number.
  void* const page = reinterpret_cast<void*>(address & ~(page_bytes - 1));
  // mmap is not on POSIX's list of async-signal-safe functions; on Linux it is a bare system call.
  return ::mmap(page, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                -1, 0) != MAP_FAILED;
}

void on_sigbus(int /*signal*/, siginfo_t* info, void* /*context*/) {
  const int saved_errno = errno;
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  GuardedMapping* const mapping = find_mapping(address);
  if (mapping != nullptr && replace_page(*mapping, address)) {
    mapping->faulted.store(true, std::memory_order_release);
    fault_count.fetch_add(1, std::memory_order_release);
  } else {
    // Not ours: put back what was there, and let the instruction fault again.
    ::sigaction(SIGBUS, &previous_action, nullptr);
  }
  errno = saved_errno;
}

void install_handler_once() {
  static const bool installed = [] {
    struct sigaction action{};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO;
    ::sigemptyset(&action.sa_mask);
    return ::sigaction(SIGBUS, &action, &previous_action) == 0;
  }();
  assert(installed && "sigaction fails only for signals that do not exist");
}

}  // namespace

int guard_memory(void* begin, std::size_t size_bytes, std::size_t page_bytes) {
  install_handler_once();
  const std::scoped_lock lock(registration_mutex);
  for (std::size_t i = 0; i < kGuardedMappingsMax; ++i) {
    Block* const block = block_at(i / kBlockSize);
    if (block == nullptr) return -1;
    GuardedMapping& mapping = (*block)[i % kBlockSize];
    if (mapping.begin.load(std::memory_order_relaxed) != 0) continue;
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    mapping.end.store(address + size_bytes, std::memory_order_relaxed);
    mapping.page_bytes.store(page_bytes, std::memory_order_relaxed);
    mapping.faulted.store(false, std::memory_order_relaxed);
    mapping.begin.store(address, std::memory_order_release);
    return static_cast<int>(i);
  }
  return -1;
}

void unguard_memory(int entry) {
  const std::scoped_lock lock(registration_mutex);
  mapping_of(entry).begin.store(0, std::memory_order_release);
}

bool guarded_memory_faulted(int entry) {
  return mapping_of(entry).faulted.load(std::memory_order_acquire);
}

std::uint64_t guarded_memory_fault_count() { return fault_count.load(std::memory_order_acquire); }

}  // namespace vblk::virtio
