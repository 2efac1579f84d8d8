// Calls on files that are no transfers (openat, unlinkat, fsync and so on), asynchronous by the
// same means as transfers: in the caller, by a pool of threads, by io_uring, by Linux AIO. For
// measuring what asynchrony is worth there; the disks of vblk need none of it.
//
// The contract is that of aio/engine.h in small: one owner thread, caller-owned calls, completions
// from reap() alone.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "aio/engine_options.h"
#include "aio/engine_set.h"
#include "aio/error.h"
#include "threadpool/work.h"

namespace vblk::aio {

enum class FileCallKind : std::uint8_t {
  kOpenat,  // O_RDONLY | O_CLOEXEC; the result is the descriptor
  kUnlinkat,
  kFadvise,  // POSIX_FADV_WILLNEED
  kMsync,    // MS_SYNC; io_uring has none, and syncs that range of the file instead
  kFsync,
  kFdatasync,
  kRangeFdatasync,  // of the range alone; where there is no such call, sync_file_range of it and
                    // fdatasync
};

struct FileCall : threadpool::Work {
  using Completion = void (*)(FileCall& call, long result);  // of the system call, or -errno

  FileCallKind kind{FileCallKind::kFsync};
  int fd{-1};                     // of a file, or of the folder that `name` is in
  const char* name{nullptr};      // kOpenat, kUnlinkat
  void* address{nullptr};         // kMsync: where the range is mapped
  std::uint64_t offset_bytes{0};  // of those with a range
  std::uint64_t length_bytes{0};
  Completion complete{nullptr};
  void* context{nullptr};  // the caller's

  // The engine's own.
  class FileCallEngine* engine{nullptr};
  long result{0};
};

// On the calling thread.
[[nodiscard]] long perform_blocking(const FileCall& call) noexcept;

class FileCallEngine {
 public:
  FileCallEngine() = default;
  // Nothing may be in flight.
  virtual ~FileCallEngine() = default;
  FileCallEngine(const FileCallEngine&) = delete;
  FileCallEngine& operator=(const FileCallEngine&) = delete;

  [[nodiscard]] virtual bool supports(FileCallKind kind) const = 0;
  virtual void queue(FileCall& call) = 0;
  virtual void submit() = 0;
  virtual std::size_t reap() = 0;
  // Blocks until there may be something to reap, at most `timeout`.
  virtual void sleep(std::chrono::nanoseconds timeout) = 0;
  [[nodiscard]] std::size_t in_flight() const { return in_flight_; }

 protected:
  void accept(FileCall& call) {
    call.engine = this;
    ++in_flight_;
  }
  void finish(FileCall& call) {
    --in_flight_;
    call.complete(call, call.result);
  }

  std::size_t in_flight_{0};
};

// Errors: as EngineSet::create().
Expected<std::unique_ptr<FileCallEngine>> make_file_call_engine(EngineName name,
                                                                const EngineOptions& options);
// The makers of the two that need a library.
Expected<std::unique_ptr<FileCallEngine>> make_io_uring_file_calls(const EngineOptions& options);
Expected<std::unique_ptr<FileCallEngine>> make_native_file_calls(const EngineOptions& options);

}  // namespace vblk::aio
