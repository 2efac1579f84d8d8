#include "aio/io_uring_engine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <fstream>
#include <limits>
#include <string>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>
#include <liburing.h>

#include "aio/blocking_io.h"
#include "aio/event_fd.h"
#include "aio/io_uring_tables.h"

namespace vblk::aio {

namespace {

// Carries out what is left of `request` on this thread. Returns its errno value.
int finish_blocking(IoRequest& request) {
  const auto offset_bytes = request.offset_bytes;
  const auto length_bytes = request.length_bytes;
  iovec* const iov = request.iov;
  const auto iov_count = request.iov_count;
  request.offset_bytes = request.transfer.offset_bytes();
  request.length_bytes = request.transfer.length_bytes();
  request.iov += request.transfer.iov_first();
  request.iov_count -= request.transfer.iov_first();
  const int error = perform_blocking(request);
  request.offset_bytes = offset_bytes;
  request.length_bytes = length_bytes;
  request.iov = iov;
  request.iov_count = iov_count;
  return error;
}

struct SetupAttempt {
  unsigned flags;
  const char* note;  // what the user loses by this attempt, or nullptr
};

// The single issuer is the thread that enables the ring, not the one that has made it.
constexpr unsigned kDeferTaskrun = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                                   IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_R_DISABLED;
constexpr unsigned kCoopTaskrun = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;

constexpr std::array kAttempts{
    SetupAttempt{kDeferTaskrun, nullptr},
    SetupAttempt{kCoopTaskrun, "this kernel has no DEFER_TASKRUN (Linux 6.1): using COOP_TASKRUN"},
    SetupAttempt{
        0, "this kernel has no COOP_TASKRUN (Linux 5.19): completions interrupt the I/O thread"},
};

// linux/io_uring.h of Linux 6.15: newer than Debian 12's headers.
constexpr int kOpReadvFixed = 60;
constexpr int kOpWritevFixed = 61;

struct TransferOperations {
  int single;
  int single_fixed;  // "fixed": from or to a registered buffer
  int vectored;
  int vectored_fixed;
};
constexpr TransferOperations kReads{IORING_OP_READ, IORING_OP_READ_FIXED, IORING_OP_READV,
                                    kOpReadvFixed};
constexpr TransferOperations kWrites{IORING_OP_WRITE, IORING_OP_WRITE_FIXED, IORING_OP_WRITEV,
                                     kOpWritevFixed};

// For sync_file_range: what does not fit becomes 0, which means up to the end of the file.
unsigned length_of_32_bits(std::uint64_t length_bytes) {
  return length_bytes > std::numeric_limits<unsigned>::max() ? 0
                                                             : static_cast<unsigned>(length_bytes);
}

bool is_allowed(const SetupAttempt& attempt, const IoUringLimits& limits) {
  if (attempt.flags == kDeferTaskrun) return limits.allow_defer_taskrun;
  return attempt.flags != kCoopTaskrun || limits.allow_coop_taskrun;
}

std::string io_uring_disabled_setting() {
  std::ifstream file("/proc/sys/kernel/io_uring_disabled");
  std::string value;
  file >> value;
  return value;
}

std::unexpected<Error> setup_error(int error) {
  const std::string other = "or choose another engine with --aio";
  if (error == EPERM) {
    const std::string setting = io_uring_disabled_setting();
    const std::string why =
        setting.empty() || setting == "0"
            ? "a seccomp policy or the container forbids it; allow io_uring_setup there"
            : fmt::format(
                  "kernel.io_uring_disabled is {}; set it with 'sysctl "
                  "kernel.io_uring_disabled=0'",
                  setting);
    return make_error(ErrorKind::kPermission,
                      fmt::format("io_uring is not permitted: {}, {}", why, other), error);
  }
  if (error == ENOSYS) {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("this kernel has no io_uring (Linux 5.6 and later have what vblk needs), or a "
                    "sandbox hides it; allow it there, {}",
                    other),
        error);
  }
  if (error == ENOMEM) {
    return make_error(
        ErrorKind::kExhausted,
        fmt::format(
            "no memory for an io_uring: the limit of locked memory is too low; raise it with "
            "'ulimit -l', {}",
            other),
        error);
  }
  return make_error(kind_of_errno(error),
                    fmt::format("cannot set up an io_uring: {}; {}", describe_errno(error),
                                "choose another engine with --aio"),
                    error);
}

}  // namespace

struct IoUringEngine::State {
  io_uring ring{};
  int event_fd{-1};
  unsigned depth{0};
  unsigned max_batch{0};
  bool has_fallocate{false};
  bool has_vectored_fixed{false};
  bool needs_enabling{false};
  bool force_async{false};
  RegisteredFiles files;
  RegisteredBuffers buffers;
  threadpool::WorkList waiting;  // not in the submission ring yet
  unsigned in_ring{0};           // from being filled in to its completion: at most `depth`, so the
                                 // completion ring (twice as long) cannot overflow

  void probe(const IoUringLimits& limits);
  void prepare(io_uring_sqe& entry, const IoRequest& request, EngineStatistics& statistics) const;
  // Whether the buffers are registered.
  bool prepare_transfer(io_uring_sqe& entry, const IoRequest& request) const;
  [[nodiscard]] bool kernel_wants_entry() const;
  void enable();
};

// The calling thread becomes the only one that may submit. io_uring_register(2),
// IORING_REGISTER_ENABLE_RINGS; liburing 2.3 declares a function for it and has none.
void IoUringEngine::State::enable() {
  needs_enabling = false;
  [[maybe_unused]] const long result =
      ::syscall(SYS_io_uring_register, ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
  assert(result == 0 && "fails for a ring only that is enabled already");
}

void IoUringEngine::State::probe(const IoUringLimits& limits) {
  io_uring_probe* const probe = io_uring_get_probe_ring(&ring);
  if (probe == nullptr) return;
  has_fallocate =
      limits.allow_fallocate && io_uring_opcode_supported(probe, IORING_OP_FALLOCATE) != 0;
  has_vectored_fixed = limits.allow_vectored_fixed &&
                       io_uring_opcode_supported(probe, kOpReadvFixed) != 0 &&
                       io_uring_opcode_supported(probe, kOpWritevFixed) != 0;
  io_uring_free_probe(probe);
}

// Reads and writes alike. A single buffer spares the kernel the copy of the iovec array, a
// registered one the pinning of its pages.
bool IoUringEngine::State::prepare_transfer(io_uring_sqe& entry, const IoRequest& request) const {
  const auto& operations = request.kind == IoKind::kRead ? kReads : kWrites;
  const iovec* const iov = next_iov(request);
  const unsigned iov_count = next_iov_count(request);
  const std::uint64_t offset = request.transfer.offset_bytes();
  const int buffer = iov_count == 1 || has_vectored_fixed ? buffers.find({iov, iov_count}) : -1;
  const bool fixed = buffer >= 0;
  if (iov_count == 1) {
    // What does not fit 32 bits comes back short.
    const auto length =
        static_cast<unsigned>(std::min<std::size_t>(iov->iov_len, std::numeric_limits<int>::max()));
    const int operation = fixed ? operations.single_fixed : operations.single;
    io_uring_prep_rw(operation, &entry, request.fd, iov->iov_base, length, offset);
  } else {
    const int operation = fixed ? operations.vectored_fixed : operations.vectored;
    io_uring_prep_rw(operation, &entry, request.fd, iov, iov_count, offset);
  }
  if (fixed) entry.buf_index = static_cast<std::uint16_t>(buffer);
  if (request.kind == IoKind::kWrite) entry.rw_flags = request.write_through ? RWF_DSYNC : 0;
  return fixed;
}

void IoUringEngine::State::prepare(io_uring_sqe& entry, const IoRequest& request,
                                   EngineStatistics& statistics) const {
  switch (request.kind) {
    case IoKind::kRead:
    case IoKind::kWrite:
      if (prepare_transfer(entry, request)) ++statistics.registered_buffers;
      break;
    case IoKind::kFlush:
      io_uring_prep_fsync(&entry, request.fd, IORING_FSYNC_DATASYNC);
      break;
    case IoKind::kDiscard:
    case IoKind::kWriteZeroes:
      io_uring_prep_fallocate(&entry, request.fd, fallocate_mode(request),
                              static_cast<off_t>(request.transfer.offset_bytes()),
                              static_cast<off_t>(request.length_bytes));
      break;
    case IoKind::kWriteBehind:
      io_uring_prep_sync_file_range(&entry, request.fd, length_of_32_bits(request.length_bytes),
                                    request.transfer.offset_bytes(),
                                    static_cast<int>(sync_file_range_flags(request)));
      break;
  }
  if (const int file = files.find(request.fd); file >= 0) {
    entry.fd = file;
    entry.flags |= IOSQE_FIXED_FILE;
    ++statistics.registered_files;
  }
}

// Completions that the kernel has not put into the ring yet: it waits for the owner to enter.
bool IoUringEngine::State::kernel_wants_entry() const {
  return (std::atomic_ref(*ring.sq.kflags).load(std::memory_order_relaxed) &
          (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) != 0;
}

Expected<std::unique_ptr<IoUringEngine>> IoUringEngine::create(const EngineOptions& options,
                                                               const IoUringLimits& limits) {
  auto state = std::make_unique<State>();
  const char* note = nullptr;
  int result = -EINVAL;
  for (const auto& attempt : kAttempts) {
    if (!is_allowed(attempt, limits)) continue;
    if (attempt.flags == kDeferTaskrun && !options.io_uring.defer_taskrun) continue;
    note = options.io_uring.defer_taskrun ? attempt.note : nullptr;
    result = io_uring_queue_init(options.queue_depth, &state->ring, attempt.flags);
    state->needs_enabling = (attempt.flags & IORING_SETUP_R_DISABLED) != 0;
    if (result != -EINVAL) break;
  }
  if (result < 0) return setup_error(-result);
  state->depth = options.queue_depth;
  state->max_batch = options.max_batch;
  state->force_async = options.io_uring.force_async;
  state->probe(limits);
  std::unique_ptr<IoUringEngine> engine(new IoUringEngine(std::move(state)));
  auto event_fd = make_event_fd("the io_uring engine");
  if (!event_fd) return std::unexpected(std::move(event_fd.error()));
  engine->state_->event_fd = *event_fd;
  if (const int error = -io_uring_register_eventfd(&engine->state_->ring, *event_fd); error != 0) {
    return setup_error(error);
  }
  engine->wake_up();
  if (note != nullptr) engine->notes_.emplace_back(note);
  engine->make_tables(options.io_uring, limits);
  engine->bound_kernel_workers(options.io_uring.kernel_workers);
  return engine;
}

// Without them requests are carried out all the same.
void IoUringEngine::make_tables(const IoUringFeatures& features, const IoUringLimits& limits) {
  State& state = *state_;
  const auto note_refusal = [this](const Expected<void>& made) {
    if (!made) notes_.push_back(made.error().message);
  };
  if (features.registered_files && limits.allow_tables)
    note_refusal(state.files.create(state.ring));
  if (features.registered_buffers && limits.allow_tables)
    note_refusal(state.buffers.create(state.ring));
}

void IoUringEngine::bound_kernel_workers(unsigned count) {
  if (count == 0) return;
  std::array<unsigned, 2> bounds{count, count};  // of regular files and the like, and of others
  const int error = -io_uring_register_iowq_max_workers(&state_->ring, bounds.data());
  if (error != 0) {
    notes_.push_back(fmt::format("the number of kernel workers stays what it is: {} (Linux 5.15)",
                                 describe_errno(error)));
  }
}

Expected<void> IoUringEngine::register_file(int fd) { return state_->files.add(fd); }
void IoUringEngine::unregister_file(int fd) { state_->files.remove(fd); }
Expected<void> IoUringEngine::register_memory(const iovec& range) {
  return state_->buffers.add(range);
}
void IoUringEngine::unregister_memory(const iovec& range) { state_->buffers.remove(range); }

IoUringEngine::IoUringEngine(std::unique_ptr<State> state) : state_(std::move(state)) {}

IoUringEngine::~IoUringEngine() {
  assert(in_flight_ == 0 && "the owner drains before it destroys an engine");
  io_uring_queue_exit(&state_->ring);
  if (state_->event_fd >= 0) ::close(state_->event_fd);
}

bool IoUringEngine::supports(IoKind kind) const {
  return state_->has_fallocate || (kind != IoKind::kDiscard && kind != IoKind::kWriteZeroes);
}

void IoUringEngine::queue(IoRequest& request) {
  assert(supports(request.kind));
  accept(request);
  request.transfer.begin(request);
  state_->waiting.push_back(request);
}

// Moves at most one batch of waiting requests into the submission ring.
void IoUringEngine::fill_ring() {
  State& state = *state_;
  while (!state.waiting.empty() && state.in_ring < state.depth &&
         io_uring_sq_ready(&state.ring) < state.max_batch) {
    io_uring_sqe* const entry = io_uring_get_sqe(&state.ring);
    if (entry == nullptr) return;
    auto& request = static_cast<IoRequest&>(*state.waiting.pop_front());
    state.prepare(*entry, request, statistics_);
    if (state.force_async) entry->flags |= IOSQE_ASYNC;
    io_uring_sqe_set_data(entry, &request);
    ++state.in_ring;
  }
}

void IoUringEngine::submit() {
  if (state_->needs_enabling) state_->enable();
  for (;;) {
    fill_ring();
    if (io_uring_sq_ready(&state_->ring) == 0) return;
    const int submitted = io_uring_submit(&state_->ring);
    ++statistics_.submit_calls;
    // EAGAIN, EBUSY, EINTR: the entries stay in the ring and go out with the next call.
    if (submitted <= 0) return;
    statistics_.submitted += static_cast<unsigned>(submitted);
  }
}

std::size_t IoUringEngine::reap() {
  State& state = *state_;
  if (state.kernel_wants_entry()) io_uring_get_events(&state.ring);
  std::size_t count = 0;
  unsigned seen = 0;
  io_uring_cqe* completion = nullptr;
  // One by one: a completion may queue() and so on, but never touches the completion ring.
  while (io_uring_cq_ready(&state.ring) > 0 && io_uring_peek_cqe(&state.ring, &completion) == 0) {
    auto& request = *static_cast<IoRequest*>(io_uring_cqe_get_data(completion));
    const long result = completion->res;
    io_uring_cqe_seen(&state.ring, completion);
    --state.in_ring;
    ++seen;
    int error = 0;
    if (result == -ECANCELED) {
      // We cancel nothing: the kernel got no worker thread for what has to wait ('ulimit -u', a
      // cgroup's limit of tasks). Better late than never.
      error = finish_blocking(request);
    } else if (request.transfer.advance(request, result) == Transfer::Next::kResubmit) {
      ++statistics_.resubmitted;
      state.waiting.push_back(request);
      continue;
    } else {
      error = request.transfer.error();
    }
    ++count;
    finish(request, error);
  }
  if (seen > 0) ++statistics_.reap_calls;
  return count;
}

int IoUringEngine::completion_fd() const { return state_->event_fd; }

bool IoUringEngine::prepare_to_sleep() {
  State& state = *state_;
  io_uring_cq_eventfd_toggle(&state.ring, true);
  // The wish must be visible before the ring is looked at once more.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (io_uring_cq_ready(&state.ring) > 0 || state.kernel_wants_entry()) return false;
  const unsigned unsubmitted = io_uring_sq_ready(&state.ring);
  // Waiting for room is waiting for completions; waiting without any in flight is work to do.
  const bool waiting = unsubmitted > 0 || !state.waiting.empty();
  return !waiting || state.in_ring > unsubmitted;
}

bool IoUringEngine::sleep(std::chrono::nanoseconds timeout) {
  State& state = *state_;
  // A wait with a time needs Linux 5.11; liburing would submit a request of its own before that.
  if ((state.ring.features & IORING_FEAT_EXT_ARG) == 0) return false;
  if (io_uring_cq_ready(&state.ring) > 0 || state.kernel_wants_entry()) return false;
  if (state.in_ring <= io_uring_sq_ready(&state.ring)) return false;
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
  __kernel_timespec limit{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
  io_uring_cqe* completion = nullptr;
  io_uring_wait_cqes(&state.ring, &completion, 1, timeout.count() < 0 ? nullptr : &limit, nullptr);
  return true;
}

void IoUringEngine::wake_up() {
  io_uring_cq_eventfd_toggle(&state_->ring, false);
  drain_event_fd(state_->event_fd);
}

}  // namespace vblk::aio
