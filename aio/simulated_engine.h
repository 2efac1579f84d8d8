// The `simulated` engine: the contract of every engine, kept on a SimulatedDisk, with completions
// that are delayed and reordered as a seed decides. A logical clock ticks at each reap(): no time
// passes.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "aio/engine.h"
#include "aio/error.h"
#include "aio/simulated_disk.h"

namespace vblk::aio {

struct SimulatedEngineOptions {
  std::uint64_t seed{1};
  unsigned delay_reaps_max{4};  // a request completes at one of this many next reaps
  // A lie, to prove that tests notice: completes inside submit().
  bool completes_inside_submit{false};
};

class SimulatedEngine final : public Engine {
 public:
  // `disk` must outlive the engine. Error: kExhausted if there is no descriptor left.
  static Expected<std::unique_ptr<SimulatedEngine>> create(SimulatedDisk& disk,
                                                           SimulatedEngineOptions options = {});
  ~SimulatedEngine() override;

  // Another disk, for the requests that name it. It must outlive the engine; nothing is in flight.
  void add_disk(SimulatedDisk& disk) { disks_.push_back(&disk); }

  [[nodiscard]] std::string_view name() const override { return "simulated"; }
  [[nodiscard]] bool supports(IoKind /*kind*/) const override { return true; }
  void queue(IoRequest& request) override;
  void submit() override;
  std::size_t reap() override;
  [[nodiscard]] int completion_fd() const override { return event_fd_; }
  // A request in flight is work to do: the next reap() moves the clock.
  [[nodiscard]] bool prepare_to_sleep() override { return in_flight_ == 0; }
  void wake_up() override {}

 private:
  struct Pending {
    IoRequest* request;
    std::uint64_t due;
    std::uint64_t flush_after;
  };
  SimulatedEngine(SimulatedDisk& disk, SimulatedEngineOptions options, int event_fd);
  std::vector<Pending> take_due();
  [[nodiscard]] SimulatedDisk& disk_of(const IoRequest& request) const;

  std::vector<SimulatedDisk*> disks_;
  const SimulatedEngineOptions options_;
  int event_fd_;
  std::mt19937_64 random_;
  std::uint64_t clock_{0};
  std::vector<Pending> queued_;
  std::vector<Pending> pending_;
};

}  // namespace vblk::aio
