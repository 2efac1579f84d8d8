#include "aio/native_engine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <fstream>
#include <string>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <libaio.h>

#include "aio/blocking_io.h"
#include "aio/event_fd.h"

namespace vblk::aio {

namespace {

// Head of the completion ring as the kernel lays it out (fs/aio.c, struct aio_ring), followed by
// io_event entries. User space owns `head`, the kernel `tail`.
struct AioRing {
  unsigned id;
  unsigned entry_count;
  unsigned head;
  unsigned tail;
  unsigned magic;
  unsigned compat_features;
  unsigned incompat_features;
  unsigned header_bytes;
};
constexpr unsigned kAioRingMagic = 0xa10a10a1;
static_assert(sizeof(AioRing) == 32 && sizeof(io_event) == 32, "the kernel's layout");

std::string read_first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line.empty() ? "?" : line;
}

std::unexpected<Error> setup_error(unsigned depth, int error) {
  if (error == EAGAIN) {
    return make_error(
        ErrorKind::kExhausted,
        fmt::format("cannot set up Linux AIO for {} requests: the system-wide limit is reached ({} "
                    "of {} in use); raise "
                    "it with 'sysctl fs.aio-max-nr=N' or choose another engine with --aio",
                    depth, read_first_line("/proc/sys/fs/aio-nr"),
                    read_first_line("/proc/sys/fs/aio-max-nr")),
        error);
  }
  return make_error(
      kind_of_errno(error),
      fmt::format("cannot set up Linux AIO: io_setup: {}; choose another engine with --aio",
                  describe_errno(error)),
      error);
}

// Whether this kernel takes IOCB_CMD_FDSYNC (since Linux 4.18): asked of an anonymous file, once.
// Older kernels answer EINVAL; so do files without fsync, which a memory file has.
bool probe_fdsync(io_context_t context) {
  const int fd = ::memfd_create("vblk-probe", MFD_CLOEXEC);
  if (fd < 0) return false;
  iocb probe{};
  io_prep_fdsync(&probe, fd);
  iocb* list[] = {&probe};
  const bool taken = ::io_submit(context, 1, list) == 1;
  if (taken) {
    io_event event{};
    // Nothing of the probe may stay in the ring. A wait can be interrupted without a signal: by the
    // end of an io_uring that this thread has made (task work).
    while (::io_getevents(context, 1, 1, &event, nullptr) == -EINTR) {
    }
  }
  ::close(fd);
  return taken;
}

// Linux carries these out in a work queue of the processor that submitted them.
bool needs_kernel_worker(const IoRequest& request) {
  return request.kind == IoKind::kFlush ||
         (request.kind == IoKind::kWrite && request.write_through);
}

}  // namespace

struct NativeEngine::State {
  io_context_t context{nullptr};
  int event_fd{-1};
  unsigned max_batch{0};
  bool has_fdsync{false};
  bool ring_readable{false};
  threadpool::WorkList waiting;   // not submitted yet: new, or what remains of a short transfer
  std::vector<iocb> iocbs;        // one per kernel I/O in flight
  std::vector<iocb*> free_iocbs;  // never shrinks: no allocation after create()
  std::vector<iocb*> batch;       // room for one io_submit
  std::array<io_event, 64> fetched{};  // by sleep(), which cannot look without taking
  std::size_t fetched_count{0};
  threadpool::WorkList failed;  // refused by io_submit; completed by reap(), never from submit()
  unsigned kernel_in_flight{0};
  unsigned on_kernel_workers{0};  // of those in flight, queued ones included

  [[nodiscard]] AioRing* ring() const { return reinterpret_cast<AioRing*>(context); }
  [[nodiscard]] bool has_completions() const;
  void prepare(iocb& control, IoRequest& request) const;
  template <typename Function>
  std::size_t take_completions(Function&& function);
};

bool NativeEngine::State::has_completions() const {
  if (fetched_count > 0) return true;
  if (!ring_readable) return false;
  return ring()->head != std::atomic_ref(ring()->tail).load(std::memory_order_acquire);
}

void NativeEngine::State::prepare(iocb& control, IoRequest& request) const {
  const auto offset = static_cast<long long>(request.transfer.offset_bytes());
  const auto iov_count = static_cast<int>(next_iov_count(request));
  switch (request.kind) {
    case IoKind::kRead:
      io_prep_preadv(&control, request.fd, next_iov(request), iov_count, offset);
      break;
    case IoKind::kWrite:
      io_prep_pwritev2(&control, request.fd, next_iov(request), iov_count, offset,
                       request.write_through ? RWF_DSYNC : 0);
      break;
    default:
      io_prep_fdsync(&control, request.fd);
      break;
  }
  io_set_eventfd(&control, event_fd);
  control.data = &request;
}

// Hands every completion in the ring to `function(iocb, result)`. Each entry is copied before
// `head` gives it back to the kernel.
template <typename Function>
std::size_t NativeEngine::State::take_completions(Function&& function) {
  const std::size_t fetched_before = std::exchange(fetched_count, 0);
  for (std::size_t i = 0; i < fetched_before; ++i)
    function(fetched[i].obj, static_cast<long>(fetched[i].res));
  std::size_t count = fetched_before;
  if (!ring_readable) {
    io_event events[64];
    timespec now{};
    const int taken = ::io_getevents(context, 0, 64, events, &now);
    for (int i = 0; i < taken; ++i) function(events[i].obj, static_cast<long>(events[i].res));
    return count + (taken > 0 ? static_cast<std::size_t>(taken) : 0);
  }
  AioRing* const shared = ring();
  const auto* const events = reinterpret_cast<const io_event*>(shared + 1);
  const unsigned tail = std::atomic_ref(shared->tail).load(std::memory_order_acquire);
  unsigned head = shared->head;
  while (head != tail) {
    const io_event event = events[head];
    head = head + 1 == shared->entry_count ? 0 : head + 1;
    std::atomic_ref(shared->head).store(head, std::memory_order_release);
    function(event.obj, static_cast<long>(event.res));
    ++count;
  }
  return count;
}

Expected<std::unique_ptr<NativeEngine>> NativeEngine::create(const EngineOptions& options) {
  auto event_fd = make_event_fd("the native engine");
  if (!event_fd) return std::unexpected(std::move(event_fd.error()));
  auto state = std::make_unique<State>();
  state->event_fd = *event_fd;
  if (const int error = -::io_setup(static_cast<int>(options.queue_depth), &state->context);
      error != 0) {
    ::close(*event_fd);
    return setup_error(options.queue_depth, error);
  }
  state->max_batch = std::min(options.max_batch, options.queue_depth);
  state->iocbs.resize(options.queue_depth);
  state->free_iocbs.reserve(options.queue_depth);
  for (auto& control : state->iocbs) state->free_iocbs.push_back(&control);
  state->batch.reserve(state->max_batch);
  state->has_fdsync = probe_fdsync(state->context);
  const AioRing& ring = *state->ring();
  state->ring_readable = ring.magic == kAioRingMagic && ring.incompat_features == 0 &&
                         ring.header_bytes == sizeof(AioRing);
  const bool ring_readable = state->ring_readable;
  std::unique_ptr<NativeEngine> engine(new NativeEngine(std::move(state)));
  if (!ring_readable) {
    engine->notes_.emplace_back(
        "this kernel's completion ring is unknown: completions are fetched with io_getevents");
  }
  return engine;
}

NativeEngine::NativeEngine(std::unique_ptr<State> state) : state_(std::move(state)) {}

NativeEngine::~NativeEngine() {
  assert(in_flight_ == 0 && "the owner drains before it destroys an engine");
  ::io_destroy(state_->context);
  ::close(state_->event_fd);
}

bool NativeEngine::supports(IoKind kind) const {
  switch (kind) {
    case IoKind::kRead:
    case IoKind::kWrite:
      return true;
    case IoKind::kFlush:
      return state_->has_fdsync;
    default:
      return false;
  }
}

void NativeEngine::queue(IoRequest& request) {
  assert(supports(request.kind));
  if (needs_kernel_worker(request)) ++state_->on_kernel_workers;
  accept(request);
  request.transfer.begin(request);
  state_->waiting.push_back(request);
}

void NativeEngine::submit() {
  while (!state_->waiting.empty() && !state_->free_iocbs.empty()) {
    const std::uint64_t submitted_before = statistics_.submitted;
    const std::size_t failed_before = state_->failed.size();
    submit_batch();
    // The kernel has no room now. Completions will make some, and the loop submits again after
    // them.
    if (statistics_.submitted == submitted_before && state_->failed.size() == failed_before) return;
  }
}

// One io_submit. The kernel takes a prefix of the batch; a request it refuses stops the batch in
// front of it.
void NativeEngine::submit_batch() {
  State& state = *state_;
  threadpool::WorkList taken_off;
  state.batch.clear();
  while (state.batch.size() < state.max_batch && !state.free_iocbs.empty()) {
    threadpool::Work* const work = state.waiting.pop_front();
    if (work == nullptr) break;
    iocb* const control = state.free_iocbs.back();
    state.free_iocbs.pop_back();
    state.prepare(*control, static_cast<IoRequest&>(*work));
    state.batch.push_back(control);
    taken_off.push_back(*work);
  }
  const auto count = static_cast<long>(state.batch.size());
  long submitted = ::io_submit(state.context, count, state.batch.data());
  ++statistics_.submit_calls;
  const int error = submitted < 0 ? static_cast<int>(-submitted) : 0;
  submitted = std::max(submitted, 0L);
  statistics_.submitted += static_cast<std::uint64_t>(submitted);
  state.kernel_in_flight += static_cast<unsigned>(submitted);
  for (long i = 0; i < submitted; ++i) taken_off.pop_front();
  for (long i = count; i > submitted; --i)
    state.free_iocbs.push_back(state.batch[static_cast<std::size_t>(i - 1)]);
  // EAGAIN and EINTR are no fault of the request in front; anything else is its own.
  if (error != 0 && error != EAGAIN && error != EINTR) {
    auto& refused = static_cast<IoRequest&>(*taken_off.pop_front());
    refused.result = error;
    state.failed.push_back(refused);
  } else if (error == EAGAIN && state.kernel_in_flight == 0) {
    // Nothing of ours will ever make room: count it as a stall of the first request, which gives up
    // in the end.
    auto& first = static_cast<IoRequest&>(*taken_off.pop_front());
    if (first.transfer.advance(first, -EAGAIN) == Transfer::Next::kFinished) {
      first.result = first.transfer.error();
      state.failed.push_back(first);
    } else {
      threadpool::WorkList reordered;
      reordered.push_back(first);
      reordered.append(taken_off);
      taken_off = reordered;
    }
  }
  // What was not taken goes back to the front, in order.
  taken_off.append(state.waiting);
  state.waiting = taken_off;
}

void NativeEngine::end(IoRequest& request, int error) {
  if (needs_kernel_worker(request)) --state_->on_kernel_workers;
  finish(request, error);
}

bool NativeEngine::is_worth_looking() const { return state_->on_kernel_workers == 0; }

std::size_t NativeEngine::reap() {
  State& state = *state_;
  std::size_t count = 0;
  while (threadpool::Work* const work = state.failed.pop_front()) {
    auto& request = static_cast<IoRequest&>(*work);
    ++count;
    end(request, static_cast<int>(request.result));
  }
  const std::size_t kernel_completions = state.take_completions([&](iocb* control, long result) {
    auto& request = *static_cast<IoRequest*>(control->data);
    state.free_iocbs.push_back(control);
    --state.kernel_in_flight;
    if (request.transfer.advance(request, result) == Transfer::Next::kResubmit) {
      ++statistics_.resubmitted;
      state.waiting.push_back(request);
      return;
    }
    ++count;
    end(request, request.transfer.error());
  });
  if (kernel_completions > 0 || count > 0) ++statistics_.reap_calls;
  return count;
}

int NativeEngine::completion_fd() const { return state_->event_fd; }

bool NativeEngine::prepare_to_sleep() {
  const State& state = *state_;
  if (!state.failed.empty() || state.has_completions()) return false;
  // Waiting for room is waiting for completions; waiting without any in flight is work to do.
  return state.waiting.empty() || state.kernel_in_flight > 0;
}

bool NativeEngine::sleep(std::chrono::nanoseconds timeout) {
  State& state = *state_;
  if (!state.failed.empty() || state.has_completions() || state.kernel_in_flight == 0) return false;
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
  timespec limit{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
  const int taken = ::io_getevents(state.context, 1, static_cast<long>(state.fetched.size()),
                                   state.fetched.data(), timeout.count() < 0 ? nullptr : &limit);
  state.fetched_count = taken > 0 ? static_cast<std::size_t>(taken) : 0;
  return true;
}

void NativeEngine::wake_up() { drain_event_fd(state_->event_fd); }

}  // namespace vblk::aio
