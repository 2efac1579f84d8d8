// The engine interface: queue, submit once per batch, reap once per batch.
//
// An engine belongs to one thread (its I/O thread), which makes every call on it: the one that
// queues first. Until then, and again when nothing is in flight any more, it may be made, told of
// files and memory, and destroyed on any thread, by one at a time. Several engines may work on one
// file at once: each I/O thread has its own, and an EngineSet (engine_set.h) routes kinds of
// operation to different ones. The contract every implementation keeps, tested by
// tests/aio/engine_contract_test.cpp on each of them:
//
//   queue()    takes a request. Makes no system call unless the batch bound is reached.
//   submit()   starts everything queued, with one system call per batch where the kernel interface
//              has batches. What the kernel will not take now (a full queue, EAGAIN) waits inside
//              and goes out after completions make room; nothing is refused to the caller.
//   reap()     runs `complete` for everything that has finished, without blocking. The only
//              place completions run from. A completion may queue() new requests.
//   prepare_to_sleep() / wake_up()   bracket a sleep on completion_fd(): between them a completion
//              makes the fd readable. prepare_to_sleep() returns false if something is
//              there to be reaped (or submitted) already.
//   sleep()    is the shorter way for a thread that waits for nothing but this engine.
//   ~Engine()  requires in_flight() == 0 (asserted): the owner drains first. Drain by reap() until
//              in_flight() is 0; every accepted request always completes, with its result or an
//              error.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "aio/error.h"
#include "aio/io_request.h"

namespace vblk::aio {

// Counters since creation. Written by the owner thread only; others may read a value a moment old
// through EngineSet::statistics().
struct EngineStatistics {
  std::uint64_t requests{0};      // queued by the caller
  std::uint64_t submit_calls{0};  // system calls (or pool hand-overs) that submitted
  std::uint64_t submitted{0};     // kernel I/Os submitted; more than requests after short transfers
  std::uint64_t resubmitted{0};   // of those: rests of short transfers, EINTR, EAGAIN
  std::uint64_t reap_calls{0};    // reap() calls that found at least one completion
  std::uint64_t completed{0};
  std::uint64_t page_cache_hits{0};  // of those: reads that the owner found in the page cache
  // Of `submitted`, on io_uring: by a registered file, from or to a registered buffer.
  std::uint64_t registered_files{0};
  std::uint64_t registered_buffers{0};
};

// Of one kind of operation, since creation; as above.
struct KindStatistics {
  std::uint64_t queued{0};
  std::uint64_t completed{0};
  std::uint64_t queued_bytes{0};  // meaningless for kFlush
  std::uint64_t depth_sum{0};     // over those queued: in flight then, itself included
};

class Engine {
 public:
  Engine() = default;
  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // "threads", "native", "io_uring", "simulated": QEMU's names.
  [[nodiscard]] virtual std::string_view name() const = 0;
  // Whether this kernel and this engine do `kind` asynchronously; queue() takes no other kind
  // (asserted). EngineSet routes the rest elsewhere.
  [[nodiscard]] virtual bool supports(IoKind kind) const = 0;

  // Advice: requests on this descriptor, or with buffers in this range, will come until it is taken
  // back. An engine that can make them cheaper prepares for them. Calls nest. The error says why
  // they will be no cheaper; they are carried out all the same. What is unregistered may be closed
  // or unmapped once no request that uses it is in flight.
  virtual Expected<void> register_file(int /*fd*/) { return {}; }
  virtual void unregister_file(int /*fd*/) {}
  virtual Expected<void> register_memory(const iovec& /*range*/) { return {}; }
  virtual void unregister_memory(const iovec& /*range*/) {}

  virtual void queue(IoRequest& request) = 0;
  virtual void submit() = 0;
  // Returns the number of requests completed.
  virtual std::size_t reap() = 0;

  // Readable (an eventfd or a ring) when there is something to reap after prepare_to_sleep()
  // returned true. The caller drains it only through wake_up().
  [[nodiscard]] virtual int completion_fd() const = 0;
  [[nodiscard]] virtual bool prepare_to_sleep() = 0;
  virtual void wake_up() = 0;
  // Blocks until there may be something to reap, at most `timeout`, for ever if that is negative; a
  // signal ends it too. Not between prepare_to_sleep() and wake_up(). Half the system calls of a
  // sleep on completion_fd(), and no eventfd that has to be signalled first. False, at once: the
  // engine cannot, or there is something to do already.
  [[nodiscard]] virtual bool sleep(std::chrono::nanoseconds /*timeout*/) { return false; }

  // Requests queued and not completed yet.
  [[nodiscard]] std::size_t in_flight() const { return in_flight_; }
  // Whether the caller may look for completions without sleeping. False: the kernel carries out
  // something in a thread of this processor, and looking would hold that up.
  [[nodiscard]] virtual bool is_worth_looking() const { return true; }
  [[nodiscard]] const EngineStatistics& statistics() const { return statistics_; }
  [[nodiscard]] const KindStatistics& statistics_of(IoKind kind) const {
    return kinds_[static_cast<std::size_t>(kind)];
  }
  // One line per thing the user should know: a missing kernel feature, a limit that was lowered.
  [[nodiscard]] const std::vector<std::string>& notes() const { return notes_; }

 protected:
  // The first and the last thing that every engine does with a request.
  void accept(IoRequest& request) {
    request.engine = this;
    ++in_flight_;
    ++statistics_.requests;
    KindStatistics& of_kind = kinds_[static_cast<std::size_t>(request.kind)];
    ++of_kind.queued;
    of_kind.queued_bytes += request.length_bytes;
    of_kind.depth_sum += of_kind.queued - of_kind.completed;
  }
  // The request may be gone afterwards.
  void finish(IoRequest& request, int error) {
    --in_flight_;
    ++statistics_.completed;
    ++kinds_[static_cast<std::size_t>(request.kind)].completed;
    request.complete(request, error);
  }

  std::size_t in_flight_{0};
  EngineStatistics statistics_;
  std::array<KindStatistics, kIoKindCount> kinds_{};
  std::vector<std::string> notes_;
};

}  // namespace vblk::aio
