// The `native` engine: Linux AIO, io_submit(2). Batches submission; reaps without a system call.
//
// Completions are read from the ring that the kernel maps into the process at the address of the
// AIO context (fs/aio.c, struct aio_ring; io_getevents(2) only reads the same ring). Every iocb
// signals an eventfd, which matters only to a loop that sleeps.
//
// What AIO cannot do (fallocate, discard; fdatasync before Linux 4.18) is not supported(): the
// EngineSet routes it to the thread pool. On a file without O_DIRECT io_submit(2) blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "aio/engine.h"
#include "aio/engine_options.h"
#include "aio/error.h"

namespace vblk::aio {

class NativeEngine final : public Engine {
 public:
  // Errors: kExhausted (fs.aio-max-nr), kNotSupported (a kernel without AIO).
  static Expected<std::unique_ptr<NativeEngine>> create(const EngineOptions& options);
  ~NativeEngine() override;

  [[nodiscard]] std::string_view name() const override { return "native"; }
  [[nodiscard]] bool supports(IoKind kind) const override;
  void queue(IoRequest& request) override;
  void submit() override;
  std::size_t reap() override;
  [[nodiscard]] int completion_fd() const override;
  [[nodiscard]] bool is_worth_looking() const override;
  [[nodiscard]] bool prepare_to_sleep() override;
  void wake_up() override;
  [[nodiscard]] bool sleep(std::chrono::nanoseconds timeout) override;

 private:
  struct State;
  explicit NativeEngine(std::unique_ptr<State> state);
  void submit_batch();
  void end(IoRequest& request, int error);
  void fail_front(int error);

  std::unique_ptr<State> state_;
};

}  // namespace vblk::aio
