// Coroutines for work on a disk that takes several steps: Task<T>, lazy, awaited once.
//
//   Task<int> copy(...) {
//     const int error = co_await read(...);   // a whole statement or the right side of one, never
//     ...                                     // inside ?: or beside a capturing lambda (GCC 12)
//     co_return 0;
//   }
//
// A Task starts when it is awaited, on the awaiting thread, and resumes its awaiter when it ends;
// neither passes through the loop. A frame lives on one thread: what a coroutine waits for resumes
// it there (block_io.h, wait_list.h). Frames come from a pool of that thread, so that a steady load
// allocates none. Exceptions end the process: here they only ever mean that memory has run out.
//
// start_detached() starts one that nobody awaits.
#pragma once

#include <array>
#include <coroutine>
#include <cstddef>
#include <exception>
#include <new>
#include <optional>
#include <utility>

namespace vblk::blockdev {

// Frames that have ended, by size, for the next ones of this thread.
class FramePool {
 public:
  static void* allocate(std::size_t bytes) {
    const std::size_t size_class = class_of(bytes);
    if (size_class >= kClassCount) return ::operator new(bytes);
    Frame*& first = pool().first[size_class];
    if (first == nullptr) return ::operator new((size_class + 1) * kClassBytes);
    return std::exchange(first, first->next);
  }
  static void release(void* frame, std::size_t bytes) noexcept {
    const std::size_t size_class = class_of(bytes);
    if (size_class >= kClassCount) return ::operator delete(frame);
    Frame*& first = pool().first[size_class];
    first = new (frame) Frame{first};
  }

 private:
  static constexpr std::size_t kClassBytes = 256;
  static constexpr std::size_t kClassCount = 32;  // up to 8 KiB
  struct Frame {
    Frame* next;
  };
  struct Pool {
    std::array<Frame*, kClassCount> first{};
    ~Pool() {
      for (Frame* frame : first) {
        while (frame != nullptr) ::operator delete(std::exchange(frame, frame->next));
      }
    }
  };
  static std::size_t class_of(std::size_t bytes) { return (bytes - 1) / kClassBytes; }
  static Pool& pool() {
    thread_local Pool pool;
    return pool;
  }
};

struct PooledFrame {
  static void* operator new(std::size_t bytes) { return FramePool::allocate(bytes); }
  static void operator delete(void* frame, std::size_t bytes) noexcept {
    FramePool::release(frame, bytes);
  }
  [[noreturn]] static void unhandled_exception() { std::terminate(); }
};

template <typename T>
class [[nodiscard]] Task {
 public:
  struct promise_type : PooledFrame {
    std::coroutine_handle<> awaiter;
    std::optional<T> value;

    Task get_return_object() { return Task(Handle::from_promise(*this)); }
    static std::suspend_always initial_suspend() noexcept { return {}; }
    struct ResumeAwaiter {
      static bool await_ready() noexcept { return false; }
      static std::coroutine_handle<> await_suspend(
          std::coroutine_handle<promise_type> ended) noexcept {
        return ended.promise().awaiter;
      }
      static void await_resume() noexcept {}
    };
    static ResumeAwaiter final_suspend() noexcept { return {}; }
    void return_value(T result) { value.emplace(std::move(result)); }
  };

  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;
  Task& operator=(Task&&) = delete;
  ~Task() {
    if (handle_) handle_.destroy();
  }

  static bool await_ready() noexcept { return false; }
  std::coroutine_handle<> await_suspend(std::coroutine_handle<> awaiter) noexcept {
    handle_.promise().awaiter = awaiter;
    return handle_;
  }
  T await_resume() { return std::move(*handle_.promise().value); }

 private:
  using Handle = std::coroutine_handle<promise_type>;
  explicit Task(Handle handle) : handle_(handle) {}
  Handle handle_;
};

// The frame of a coroutine that nobody awaits: starts at once and frees itself.
struct Detached {
  struct promise_type : PooledFrame {
    static Detached get_return_object() { return {}; }
    static std::suspend_never initial_suspend() noexcept { return {}; }
    static std::suspend_never final_suspend() noexcept { return {}; }
    static void return_void() {}
  };
};

}  // namespace vblk::blockdev
