// The `io_uring` engine: one ring per I/O thread, one io_uring_enter(2) per batch.
//
// Completions are read from the mapped ring. With DEFER_TASKRUN the kernel finishes requests only
// when the owner enters it, so that no interrupt disturbs the loop; a flag in the ring says when
// that is due. A sleeping loop waits on a registered eventfd, which is switched off while the loop
// is awake (docs/decisions/0002-eventfd-to-wake-from-io-uring.md).
//
// Newer kernel features are probed, each with a fallback, and what is missing is noted:
//   IORING_SETUP_SINGLE_ISSUER | DEFER_TASKRUN   Linux 6.1, else COOP_TASKRUN
//   IORING_SETUP_COOP_TASKRUN | TASKRUN_FLAG     Linux 5.19, else plain
//   IORING_OP_FALLOCATE                          Linux 5.6, else not supported(): the pool does it
//   sparse tables of files and buffers           Linux 5.19, else none are registered
//   IORING_OP_READV_FIXED, WRITEV_FIXED          Linux 6.15, else a registered buffer serves
//                                                requests with one iovec only
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "aio/engine.h"
#include "aio/engine_options.h"
#include "aio/error.h"

namespace vblk::aio {

// Pretends that a kernel is older than it is, so that the fallbacks can be tested.
struct IoUringLimits {
  bool allow_defer_taskrun{true};
  bool allow_coop_taskrun{true};
  bool allow_fallocate{true};
  bool allow_tables{true};
  bool allow_vectored_fixed{true};
};

class IoUringEngine final : public Engine {
 public:
  // The thread of the first submit() becomes the ring's only submitter, and the only one that may
  // register files and memory from then on.
  // Errors: kNotSupported (no io_uring in this kernel or sandbox), kPermission
  // (kernel.io_uring_disabled, seccomp), kExhausted (locked memory, descriptors).
  static Expected<std::unique_ptr<IoUringEngine>> create(const EngineOptions& options,
                                                         const IoUringLimits& limits = {});
  ~IoUringEngine() override;

  [[nodiscard]] std::string_view name() const override { return "io_uring"; }
  // Discard means PUNCH_HOLE here; BLKDISCARD is not an operation of the ring (EngineSet knows).
  [[nodiscard]] bool supports(IoKind kind) const override;
  Expected<void> register_file(int fd) override;
  void unregister_file(int fd) override;
  Expected<void> register_memory(const iovec& range) override;
  void unregister_memory(const iovec& range) override;
  void queue(IoRequest& request) override;
  void submit() override;
  std::size_t reap() override;
  [[nodiscard]] int completion_fd() const override;
  [[nodiscard]] bool prepare_to_sleep() override;
  void wake_up() override;
  [[nodiscard]] bool sleep(std::chrono::nanoseconds timeout) override;

 private:
  struct State;
  explicit IoUringEngine(std::unique_ptr<State> state);
  void make_tables(const IoUringFeatures& features, const IoUringLimits& limits);
  void bound_kernel_workers(unsigned count);
  void fill_ring();

  std::unique_ptr<State> state_;
};

}  // namespace vblk::aio
