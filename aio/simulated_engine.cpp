#include "aio/simulated_engine.h"

#include <algorithm>
#include <cassert>
#include <unistd.h>
#include <utility>

#include "aio/event_fd.h"

namespace vblk::aio {

Expected<std::unique_ptr<SimulatedEngine>> SimulatedEngine::create(SimulatedDisk& disk,
                                                                   SimulatedEngineOptions options) {
  auto event_fd = make_event_fd("the simulated engine");
  if (!event_fd) return std::unexpected(std::move(event_fd.error()));
  return std::unique_ptr<SimulatedEngine>(new SimulatedEngine(disk, options, *event_fd));
}

SimulatedEngine::SimulatedEngine(SimulatedDisk& disk, SimulatedEngineOptions options, int event_fd)
    : disks_{&disk}, options_(options), event_fd_(event_fd), random_(options.seed) {}

SimulatedEngine::~SimulatedEngine() {
  assert(in_flight_ == 0 && "the owner drains before it destroys an engine");
  ::close(event_fd_);
}

// The first one says that it does not know a descriptor.
SimulatedDisk& SimulatedEngine::disk_of(const IoRequest& request) const {
  const auto found = std::ranges::find_if(
      disks_, [fd = request.fd](const SimulatedDisk* disk) { return disk->is_named_by(fd); });
  return found == disks_.end() ? *disks_.front() : **found;
}

void SimulatedEngine::queue(IoRequest& request) {
  accept(request);
  request.transfer.begin(request);
  queued_.push_back({&request, 0, disk_of(request).completed_writes()});
}

void SimulatedEngine::submit() {
  if (queued_.empty()) return;
  ++statistics_.submit_calls;
  statistics_.submitted += queued_.size();
  for (Pending& pending : std::exchange(queued_, {})) {
    pending.due = clock_ + 1 + random_() % options_.delay_reaps_max;
    pending_.push_back(pending);
  }
  if (options_.completes_inside_submit) reap();
}

// What is due by now, shuffled: nothing may rely on the order of completions.
std::vector<SimulatedEngine::Pending> SimulatedEngine::take_due() {
  const auto first_due =
      std::partition(pending_.begin(), pending_.end(),
                     [this](const Pending& pending) { return pending.due > clock_; });
  std::vector<Pending> due(first_due, pending_.end());
  pending_.erase(first_due, pending_.end());
  std::shuffle(due.begin(), due.end(), random_);
  return due;
}

std::size_t SimulatedEngine::reap() {
  ++clock_;
  std::size_t count = 0;
  for (Pending& pending : take_due()) {
    IoRequest& request = *pending.request;
    if (request.transfer.advance(request, disk_of(request).execute(request, pending.flush_after)) ==
        Transfer::Next::kResubmit) {
      ++statistics_.resubmitted;
      ++statistics_.submitted;
      pending.due = clock_ + 1 + random_() % options_.delay_reaps_max;
      pending_.push_back(pending);
      continue;
    }
    ++count;
    finish(request, request.transfer.error());
  }
  if (count > 0) ++statistics_.reap_calls;
  return count;
}

}  // namespace vblk::aio
