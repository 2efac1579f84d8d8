#include "threadpool/wake_word.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <ctime>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace vblk::threadpool {

static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t) &&
              std::atomic<std::uint32_t>::is_always_lock_free);

WakeWord::Ticket WakeWord::prepare() noexcept {
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return word_.load(std::memory_order_seq_cst);
}

void WakeWord::cancel() noexcept { sleepers_.fetch_sub(1, std::memory_order_relaxed); }

bool WakeWord::sleep(Ticket ticket, std::optional<std::chrono::nanoseconds> timeout) noexcept {
  timespec relative{};
  if (timeout) {
    relative.tv_sec = static_cast<time_t>(timeout->count() / 1'000'000'000);
    relative.tv_nsec = static_cast<long>(timeout->count() % 1'000'000'000);
  }
  // Who was woken has been taken off the count already. EAGAIN (the word has changed), EINTR and a
  // wake-up mean the same to the caller: look again.
  if (::syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, ticket, timeout ? &relative : nullptr,
                nullptr, 0) == 0) {
    return false;
  }
  const bool timed_out = errno == ETIMEDOUT;
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return timed_out;
}

std::size_t WakeWord::wake(std::size_t count) noexcept {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (count == 0 || sleepers_.load(std::memory_order_seq_cst) == 0) return 0;
  word_.fetch_add(1, std::memory_order_seq_cst);
  const auto most = static_cast<int>(std::min<std::size_t>(count, INT_MAX));
  const std::int64_t woken =
      ::syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, most, nullptr, nullptr, 0);
  if (woken <= 0) return 0;
  sleepers_.fetch_sub(static_cast<std::uint32_t>(woken), std::memory_order_relaxed);
  return static_cast<std::size_t>(woken);
}

}  // namespace vblk::threadpool
