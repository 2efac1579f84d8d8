#include "threadpool/completion_queue.h"

namespace vblk::threadpool {

// Why no completion is lost between push() and arm(): both sides write one variable and then read
// the other's, all with sequential consistency. Either arm() sees the pushed node (and refuses to
// sleep) or push() sees `armed_` (and signals); in the single order of these four operations one
// read comes last, and it sees the other side's write.
bool CompletionQueue::push(Work& work) noexcept {
  Work* head = head_.load(std::memory_order_relaxed);
  do {
    work.next = head;
  } while (!head_.compare_exchange_weak(head, &work, std::memory_order_seq_cst,
                                        std::memory_order_relaxed));
  // The plain load keeps the cache line shared while the consumer is awake.
  return armed_.load(std::memory_order_seq_cst) &&
         armed_.exchange(false, std::memory_order_seq_cst);
}

std::size_t CompletionQueue::take_all(WorkList& list) noexcept {
  if (head_.load(std::memory_order_relaxed) == nullptr) return 0;
  Work* newest = head_.exchange(nullptr, std::memory_order_acquire);
  // The stack holds the newest first; completions are handed out in the order they came.
  Work* oldest = nullptr;
  while (newest != nullptr) {
    Work* const next = newest->next;
    newest->next = oldest;
    oldest = newest;
    newest = next;
  }
  std::size_t count = 0;
  while (oldest != nullptr) {
    Work* const next = oldest->next;
    list.push_back(*oldest);
    oldest = next;
    ++count;
  }
  return count;
}

bool CompletionQueue::arm() noexcept {
  armed_.store(true, std::memory_order_seq_cst);
  if (head_.load(std::memory_order_seq_cst) == nullptr) return true;
  disarm();
  return false;
}

bool CompletionQueue::disarm() noexcept {
  return !armed_.exchange(false, std::memory_order_relaxed);
}

}  // namespace vblk::threadpool
