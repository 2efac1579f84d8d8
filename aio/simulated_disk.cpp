#include "aio/simulated_disk.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "aio/blocking_io.h"

namespace vblk::aio {

SimulatedDisk::SimulatedDisk(SimulatedDiskOptions options)
    : options_(options),
      random_(options.seed),
      current_(options.size_bytes),
      durable_(options.size_bytes) {}

SimulatedDisk::SimulatedDisk(SimulatedDiskOptions options, std::vector<std::byte> contents)
    : options_(options), random_(options.seed), current_(contents), durable_(std::move(contents)) {}

long SimulatedDisk::execute(IoRequest& request, std::uint64_t flush_after) {
  const std::lock_guard lock(mutex_);
  const long result = run(request, flush_after);
  operations_.push_back({.kind = request.kind,
                         .offset_bytes = request.transfer.offset_bytes(),
                         .length_bytes = request.transfer.length_bytes(),
                         .write_through = request.write_through,
                         .result = result});
  return result;
}

long SimulatedDisk::run(IoRequest& request, std::uint64_t flush_after) {
  if (!is_named_by(request.fd)) return -EBADF;
  if (fault_plan_) {
    if (const auto error = fault_plan_(request, operations_.size())) return -*error;
  }
  if (chance(options_.interrupt_probability)) return -EINTR;
  if (chance(options_.again_probability)) return -EAGAIN;
  switch (request.kind) {
    case IoKind::kRead:
    case IoKind::kWrite:
      return is_misaligned(request) ? -EINVAL : transfer(request);
    case IoKind::kFlush:
      return flush(flush_after);
    case IoKind::kDiscard:
    case IoKind::kWriteZeroes:
      return zero(request);
    case IoKind::kWriteBehind:
      return 0;
  }
  return -EINVAL;
}

long SimulatedDisk::transfer(IoRequest& request) {
  const std::uint64_t offset = request.transfer.offset_bytes();
  const bool is_write = request.kind == IoKind::kWrite;
  if (offset >= current_.size()) return is_write ? -ENOSPC : 0;
  std::uint64_t length =
      std::min<std::uint64_t>(request.transfer.length_bytes(), current_.size() - offset);
  if (length > 1 && chance(options_.short_transfer_probability)) {
    // A short direct transfer ends on a block, like the kernel's.
    const std::uint64_t unit = request.fd == direct_fd() ? options_.direct_alignment_bytes : 1;
    if (length > unit) length = (1 + random_() % ((length - 1) / unit)) * unit;
  }
  std::vector<std::byte> data(length);
  if (!is_write) std::memcpy(data.data(), current_.data() + offset, length);
  std::uint64_t moved = 0;
  const std::span<iovec> iovecs(next_iov(request), next_iov_count(request));
  for (const iovec& element : iovecs) {
    const std::uint64_t part = std::min<std::uint64_t>(element.iov_len, length - moved);
    if (part == 0) continue;
    if (is_write) {
      std::memcpy(data.data() + moved, element.iov_base, part);
    } else {
      std::memcpy(element.iov_base, data.data() + moved, part);
    }
    moved += part;
  }
  data.resize(moved);
  if (is_write) land(offset, std::move(data), request.write_through);
  return static_cast<long>(moved);
}

void SimulatedDisk::land(std::uint64_t offset_bytes, std::vector<std::byte> data,
                         bool write_through) {
  std::ranges::copy(data, current_.begin() + static_cast<std::ptrdiff_t>(offset_bytes));
  ++completed_writes_;
  if (!write_through) {
    volatile_writes_.push_back({completed_writes_, offset_bytes, std::move(data)});
    return;
  }
  // The size that it needs is as durable as the data, and with it the sizes before.
  if (offset_bytes + data.size() > durable_.size()) {
    for (const auto& older : volatile_writes_) {
      if (older.is_resize) apply(older, durable_);
    }
    std::erase_if(volatile_writes_, [](const VolatileWrite& write) { return write.is_resize; });
  }
  apply({completed_writes_, offset_bytes, data}, durable_);
  // Older volatile writes to the same place must not come back over this one.
  for (auto& older : volatile_writes_) {
    if (older.is_resize) continue;
    const std::uint64_t begin = std::max(older.offset_bytes, offset_bytes);
    const std::uint64_t end =
        std::min(older.offset_bytes + older.data.size(), offset_bytes + data.size());
    if (begin < end) {
      std::memcpy(older.data.data() + (begin - older.offset_bytes),
                  data.data() + (begin - offset_bytes), end - begin);
    }
  }
}

// Writes are replayed in order, so that the youngest of those that overlap wins.
long SimulatedDisk::flush(std::uint64_t flush_after) {
  if (options_.loses_flushes) return 0;
  std::vector<VolatileWrite> kept;
  for (auto& write : volatile_writes_) {
    if (write.sequence > flush_after) {
      // Completed after the flush was queued: it may be covered, and nobody may count on it.
      if (!kept.empty() || chance(0.5)) {
        kept.push_back(std::move(write));
        continue;
      }
    }
    apply(write, durable_);
  }
  volatile_writes_ = std::move(kept);
  return 0;
}

void SimulatedDisk::apply(const VolatileWrite& write, std::vector<std::byte>& image) {
  if (write.is_resize) return image.resize(write.offset_bytes);
  image.resize(std::max<std::size_t>(image.size(), write.offset_bytes + write.data.size()));
  std::ranges::copy(write.data, image.begin() + static_cast<std::ptrdiff_t>(write.offset_bytes));
}

void SimulatedDisk::resize(std::uint64_t size_bytes) {
  const std::lock_guard lock(mutex_);
  current_.resize(size_bytes);
  ++completed_writes_;
  volatile_writes_.push_back({completed_writes_, size_bytes, {}, true});
}

long SimulatedDisk::zero(const IoRequest& request) {
  if (request.offset_bytes > current_.size()) return 0;
  const std::uint64_t length =
      std::min<std::uint64_t>(request.length_bytes, current_.size() - request.offset_bytes);
  land(request.offset_bytes, std::vector<std::byte>(length), false);
  return 0;
}

bool SimulatedDisk::is_misaligned(const IoRequest& request) const {
  if (request.fd != direct_fd()) return false;
  const std::uint64_t unit = options_.direct_alignment_bytes;
  if (request.transfer.offset_bytes() % unit != 0 || request.transfer.length_bytes() % unit != 0)
    return true;
  const std::span<const iovec> iovecs(next_iov(request), next_iov_count(request));
  return std::ranges::any_of(iovecs, [unit](const iovec& element) {
    return reinterpret_cast<std::uintptr_t>(element.iov_base) % unit != 0 ||
           element.iov_len % unit != 0;
  });
}

bool SimulatedDisk::chance(double probability) {
  return probability > 0 && std::uniform_real_distribution<>(0, 1)(random_) < probability;
}

std::uint64_t SimulatedDisk::completed_writes() const {
  const std::lock_guard lock(mutex_);
  return completed_writes_;
}

void SimulatedDisk::set_fault_plan(FaultPlan plan) {
  const std::lock_guard lock(mutex_);
  fault_plan_ = std::move(plan);
}

std::vector<std::byte> SimulatedDisk::survivors(std::uint64_t seed, Unflushed unflushed) const {
  std::vector<std::byte> image = durable_;
  std::mt19937_64 fate(seed);
  const auto survives = [&fate, unflushed](Unflushed granularity) {
    return unflushed == granularity ? fate() % 2 == 0 : unflushed != Unflushed::kLost;
  };
  // In order, so that the youngest of those that overlap and are kept wins.
  for (const auto& write : volatile_writes_) {
    const bool is_whole = write.is_resize || unflushed != Unflushed::kBySector;
    if (is_whole) {
      const auto granularity =
          unflushed == Unflushed::kBySector ? Unflushed::kBySector : Unflushed::kByWrite;
      if (survives(granularity)) apply(write, image);
      continue;
    }
    const std::uint64_t end = write.offset_bytes + write.data.size();
    for (std::uint64_t at = write.offset_bytes; at < end;) {
      const std::uint64_t next = std::min(end, (at / kSectorBytes + 1) * kSectorBytes);
      if (survives(Unflushed::kBySector)) {
        const auto from = write.data.begin() + static_cast<std::ptrdiff_t>(at - write.offset_bytes);
        apply({write.sequence, at, {from, from + static_cast<std::ptrdiff_t>(next - at)}}, image);
      }
      at = next;
    }
  }
  return image;
}

std::vector<std::byte> SimulatedDisk::after_power_cut(std::uint64_t seed,
                                                      Unflushed unflushed) const {
  const std::lock_guard lock(mutex_);
  return survivors(seed, unflushed);
}

void SimulatedDisk::power_cut(std::uint64_t seed) {
  const std::lock_guard lock(mutex_);
  durable_ = survivors(seed, Unflushed::kBySector);
  volatile_writes_.clear();
  current_ = durable_;
}

std::vector<std::byte> SimulatedDisk::current() const {
  const std::lock_guard lock(mutex_);
  return current_;
}

std::vector<std::byte> SimulatedDisk::durable() const {
  const std::lock_guard lock(mutex_);
  return durable_;
}

std::vector<SimulatedOperation> SimulatedDisk::operations() const {
  const std::lock_guard lock(mutex_);
  return operations_;
}

}  // namespace vblk::aio
