// A disk in memory that behaves as badly as a real one may: for tests, in all of vblk.
//
// It keeps two images. `current` is what reads see; `durable` is what a power cut leaves: every
// write lands in `current` when it completes, and moves to `durable` when a flush that was queued
// after that completes, or at once if it was write-through. A power cut keeps any part of the rest,
// sector by sector, as its seed decides: lost, kept or torn. Its size changes like its bytes: a new
// size is durable after a flush, and what was written beyond the durable end extends it.
//
// Thread-safe: engines on several I/O threads may share one disk; a lock is fine in a test double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "aio/io_request.h"

namespace vblk::aio {

struct SimulatedDiskOptions {
  unsigned number{0};  // of several that one engine has: each has descriptors of its own
  std::size_t size_bytes{std::size_t{1} << 20};
  std::uint64_t seed{1};
  // Required of offset, length and every buffer on kDirectFd; kBufferedFd takes anything.
  std::size_t direct_alignment_bytes{512};
  double short_transfer_probability{0};  // a read or write moves only a part, as the kernel may
  double interrupt_probability{0};       // EINTR
  double again_probability{0};           // EAGAIN
  // A lie, to prove that tests notice: flushes succeed and make nothing durable.
  bool loses_flushes{false};
};

// One kernel I/O as the disk saw it.
struct SimulatedOperation {
  IoKind kind;
  std::uint64_t offset_bytes;
  std::uint64_t length_bytes;
  bool write_through;
  long result;  // bytes, or a negated errno value
};

class SimulatedDisk {
 public:
  // File descriptor numbers that requests name the disk by: with and without O_DIRECT. Of disk 0.
  static constexpr int kDirectFd = 1'000'001;
  static constexpr int kBufferedFd = 1'000'002;
  static constexpr std::size_t kSectorBytes = 512;  // what survives a power cut whole or not at all

  explicit SimulatedDisk(SimulatedDiskOptions options);
  // With these contents, all durable, whatever `options` say of the size.
  SimulatedDisk(SimulatedDiskOptions options, std::vector<std::byte> contents);

  [[nodiscard]] int direct_fd() const { return kDirectFd + 2 * static_cast<int>(options_.number); }
  [[nodiscard]] int buffered_fd() const {
    return kBufferedFd + 2 * static_cast<int>(options_.number);
  }
  [[nodiscard]] bool is_named_by(int fd) const { return fd == direct_fd() || fd == buffered_fd(); }

  // Carries out what remains of `request` (or a part of it) as one kernel call would: bytes moved,
  // or a negated errno value. `flush_after` is the value of completed_writes() when a flush was
  // queued.
  long execute(IoRequest& request, std::uint64_t flush_after);
  // Writes completed so far; a flush covers those that completed before it was queued.
  [[nodiscard]] std::uint64_t completed_writes() const;

  // Decides the fate of each operation before it runs: an errno value fails it, nullopt lets it
  // run.
  using FaultPlan =
      std::function<std::optional<int>(const IoRequest& request, std::uint64_t operation_index)>;
  void set_fault_plan(FaultPlan plan);

  // Makes the disk end at `size_bytes`, as ftruncate(2) does; what is new reads as zeroes.
  void resize(std::uint64_t size_bytes);

  // What a power cut makes of the writes that were not flushed: all are lost, all are kept, each
  // write is lost or kept, or each of its sectors.
  enum class Unflushed : std::uint8_t { kLost, kKept, kByWrite, kBySector };
  // What a power cut at this moment would leave; nothing changes.
  [[nodiscard]] std::vector<std::byte> after_power_cut(
      std::uint64_t seed, Unflushed unflushed = Unflushed::kBySector) const;
  // Forgets what was not flushed, wholly or in part. What is left is current and durable.
  void power_cut(std::uint64_t seed);

  [[nodiscard]] std::vector<std::byte> current() const;
  [[nodiscard]] std::vector<std::byte> durable() const;
  [[nodiscard]] std::vector<SimulatedOperation> operations() const;

 private:
  struct VolatileWrite {
    std::uint64_t sequence;
    std::uint64_t offset_bytes;
    std::vector<std::byte> data;
    bool is_resize{false};  // to `offset_bytes`
  };

  static void apply(const VolatileWrite& write, std::vector<std::byte>& image);
  [[nodiscard]] std::vector<std::byte> survivors(std::uint64_t seed, Unflushed unflushed) const;
  long run(IoRequest& request, std::uint64_t flush_after);
  long transfer(IoRequest& request);
  long flush(std::uint64_t flush_after);
  long zero(const IoRequest& request);
  [[nodiscard]] bool is_misaligned(const IoRequest& request) const;
  void land(std::uint64_t offset_bytes, std::vector<std::byte> data, bool write_through);
  bool chance(double probability);

  const SimulatedDiskOptions options_;
  mutable std::mutex mutex_;
  std::mt19937_64 random_;
  std::vector<std::byte> current_;
  std::vector<std::byte> durable_;
  std::vector<VolatileWrite> volatile_writes_;
  std::uint64_t completed_writes_{0};
  std::vector<SimulatedOperation> operations_;
  FaultPlan fault_plan_;
};

}  // namespace vblk::aio
