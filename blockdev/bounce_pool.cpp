#include "blockdev/bounce_pool.h"

#include <cassert>
#include <new>
#include <sys/mman.h>

namespace vblk::blockdev {

// One reservation, whose pages exist only once they are touched; mmap aligns to pages, which is
// kAlignment.
BouncePool::BouncePool() {
  void* const mapping = ::mmap(nullptr, kBufferBytes * kBufferCount, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::byte*>(mapping);
  for (std::size_t i = kBufferCount; i > 0; --i) free_.push_back(memory_ + (i - 1) * kBufferBytes);
}

BouncePool::~BouncePool() {
  assert(free_.size() == kBufferCount && waiting_head_ == nullptr && "all requests are done");
  ::munmap(memory_, kBufferBytes * kBufferCount);
}

std::byte* BouncePool::try_acquire() {
  // Who came first and waits is served first.
  if (free_.empty() || waiting_head_ != nullptr) return nullptr;
  std::byte* const buffer = free_.back();
  free_.pop_back();
  return buffer;
}

void BouncePool::wait(Waiter& waiter) {
  waiter.next = nullptr;
  if (waiting_tail_ == nullptr) {
    waiting_head_ = &waiter;
  } else {
    waiting_tail_->next = &waiter;
  }
  waiting_tail_ = &waiter;
}

void BouncePool::release(std::byte* buffer) {
  Waiter* const waiter = waiting_head_;
  if (waiter == nullptr) {
    free_.push_back(buffer);
    return;
  }
  waiting_head_ = waiter->next;
  if (waiting_head_ == nullptr) waiting_tail_ = nullptr;
  waiter->ready(*waiter, buffer);
}

}  // namespace vblk::blockdev
