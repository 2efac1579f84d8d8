#include "blockdev/wash/observed_target.h"

#include <algorithm>
#include <utility>

namespace vblk::wash {

namespace {

using Clock = std::chrono::steady_clock;

class ObservedPort final : public bench::Port {
 public:
  ObservedPort(std::unique_ptr<bench::Port> port, std::chrono::nanoseconds settling, double spin_ns,
               Observation& observation)
      : port_(std::move(port)),
        spin_(static_cast<std::int64_t>(spin_ns)),
        observed_from_(Clock::now() + settling),
        observation_(observation) {}

  Expected<bench::Io*> make_io(std::size_t buffer_bytes) override {
    return port_->make_io(buffer_bytes);
  }
  bool submit(bench::Io& io) override {
    if (spin_.count() > 0) {
      const auto end = Clock::now() + spin_;
      while (Clock::now() < end) {
      }
    }
    return port_->submit(io);
  }
  void kick() override {
    const auto begin = Clock::now();
    port_->kick();
    const auto end = Clock::now();
    if (begin < observed_from_) return;
    const std::chrono::nanoseconds took = end - begin;
    observation_.longest_submission = std::max(observation_.longest_submission, took);
    observation_.submitting += took;
    ++observation_.submissions;
  }
  Expected<std::size_t> poll() override { return port_->poll(); }
  Expected<void> sleep(std::chrono::nanoseconds timeout) override { return port_->sleep(timeout); }
  [[nodiscard]] bench::TargetStatistics statistics() const override { return port_->statistics(); }

 private:
  const std::unique_ptr<bench::Port> port_;
  const std::chrono::nanoseconds spin_;
  const Clock::time_point observed_from_;
  Observation& observation_;
};

class ObservedTarget final : public bench::Target {
 public:
  ObservedTarget(std::unique_ptr<bench::Target> target, std::chrono::nanoseconds settling,
                 double spin_ns, Observation& observation)
      : target_(std::move(target)),
        settling_(settling),
        spin_ns_(spin_ns),
        observation_(observation) {}

  [[nodiscard]] std::string name() const override { return target_->name(); }
  [[nodiscard]] std::uint64_t size_bytes() const override { return target_->size_bytes(); }
  [[nodiscard]] std::size_t transfer_bytes_max() const override {
    return target_->transfer_bytes_max();
  }
  [[nodiscard]] bool can(bench::Operation operation) const override {
    return target_->can(operation);
  }
  [[nodiscard]] bool is_read_only() const override { return target_->is_read_only(); }
  [[nodiscard]] pid_t process() const override { return target_->process(); }
  [[nodiscard]] bool is_in_process() const override { return target_->is_in_process(); }
  Expected<void> set_write_through(bool write_through) override {
    return target_->set_write_through(write_through);
  }
  Expected<std::unique_ptr<bench::Port>> open_port(unsigned index) override {
    auto port = target_->open_port(index);
    if (!port) return port;
    return std::make_unique<ObservedPort>(std::move(*port), settling_, spin_ns_, observation_);
  }
  [[nodiscard]] bench::TargetStatistics statistics() const override {
    return target_->statistics();
  }

 private:
  const std::unique_ptr<bench::Target> target_;
  const std::chrono::nanoseconds settling_;
  const double spin_ns_;
  Observation& observation_;
};

}  // namespace

std::unique_ptr<bench::Target> observe(std::unique_ptr<bench::Target> target,
                                       std::chrono::nanoseconds settling, double spin_ns,
                                       Observation& observation) {
  return std::make_unique<ObservedTarget>(std::move(target), settling, spin_ns, observation);
}

}  // namespace vblk::wash
