// The unit of work of a thread pool: an intrusive node, owned by whoever submits it.
#pragma once

#include <cstddef>

namespace vblk::threadpool {

// Something to run once on some worker thread.
//
// The submitter owns it and keeps it alive and in place until `run` has been called; inside `run`
// the worker may hand it on (that is how completions travel back), and must not touch it
// afterwards. `next` belongs to whichever list holds the node at the moment.
struct Work {
  void (*run)(Work& work) noexcept {nullptr};
  Work* next{nullptr};
  // Whether its worker is gone for long, compared with other works: nothing may wait behind it.
  bool takes_long{false};
};

// A singly linked FIFO of nodes linked through `Work::next`. Not thread-safe. Owns nothing.
class WorkList {
 public:
  void push_back(Work& work);
  // Appends all of `other` and leaves it empty.
  void append(WorkList& other);
  // Removes and returns the oldest node, or nullptr.
  Work* pop_front();
  [[nodiscard]] bool empty() const { return head_ == nullptr; }
  [[nodiscard]] std::size_t size() const { return size_; }

 private:
  Work* head_{nullptr};
  Work* tail_{nullptr};
  std::size_t size_{0};
};

}  // namespace vblk::threadpool
