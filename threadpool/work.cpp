#include "threadpool/work.h"

namespace vblk::threadpool {

void WorkList::push_back(Work& work) {
  work.next = nullptr;
  if (tail_ == nullptr) {
    head_ = &work;
  } else {
    tail_->next = &work;
  }
  tail_ = &work;
  ++size_;
}

void WorkList::append(WorkList& other) {
  if (other.empty()) return;
  if (tail_ == nullptr) {
    head_ = other.head_;
  } else {
    tail_->next = other.head_;
  }
  tail_ = other.tail_;
  size_ += other.size_;
  other = WorkList{};
}

Work* WorkList::pop_front() {
  Work* const work = head_;
  if (work == nullptr) return nullptr;
  head_ = work->next;
  if (head_ == nullptr) tail_ = nullptr;
  work->next = nullptr;
  --size_;
  return work;
}

}  // namespace vblk::threadpool
