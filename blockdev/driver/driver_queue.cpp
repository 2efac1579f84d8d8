#include "blockdev/driver/driver_queue.h"

#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/virtio/little_endian.h"

namespace vblk::driver {

using namespace virtio;

namespace {

// virtio 1.2, "Split Virtqueues", the table of parts.
constexpr std::size_t kDescriptorAlignment = 16;
constexpr std::size_t kRingAlignment = 4;

}  // namespace

Expected<std::unique_ptr<DriverQueue>> DriverQueue::create(DriverMemory& memory,
                                                           const DriverQueueOptions& options) {
  std::unique_ptr<DriverQueue> queue(new DriverQueue(memory, options));
  if (auto done = queue->lay_out(); !done) return std::unexpected(std::move(done.error()));
  for (vhost_user::UniqueFd* fd : {&queue->kick_, &queue->call_, &queue->error_}) {
    fd->reset(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    if (!*fd) {
      return make_error(ErrorKind::kExhausted,
                        fmt::format("cannot make an eventfd: {}", describe_errno(errno)));
    }
  }
  return queue;
}

Expected<void> DriverQueue::lay_out() {
  const auto descriptors =
      memory_.allocate(descriptor_table_bytes(options_.size), kDescriptorAlignment);
  const auto avail = memory_.allocate(
      options_.packed ? kPackedEventBytes : avail_ring_bytes(options_.size), kRingAlignment);
  const auto used = memory_.allocate(
      options_.packed ? kPackedEventBytes : used_ring_bytes(options_.size), kRingAlignment);
  const auto tables = memory_.allocate(
      options_.indirect ? descriptor_table_bytes(options_.indirect_max) * options_.size : 0,
      kDescriptorAlignment);
  if (descriptors.empty() || avail.empty() || used.empty() ||
      (options_.indirect && tables.empty())) {
    return make_error(ErrorKind::kExhausted,
                      fmt::format("no guest memory left for a queue of {}", options_.size));
  }
  descriptors_ = descriptors.data();
  avail_ = avail.data();
  used_ = used.data();
  indirect_tables_ = tables.data();
  if (options_.packed) {
    packed_.emplace(
        PackedDriverRing::Parts{
            .descriptor_ring = descriptors_, .driver_event = avail_, .device_event = used_},
        options_.size, options_.event_idx);
    pieces_.resize(options_.size);
  }
  return {};
}

DriverQueue::DriverQueue(DriverMemory& memory, const DriverQueueOptions& options)
    : memory_(memory),
      options_(options),
      chain_length_(options.size),
      writable_bytes_(options.size),
      next_(options.size) {
  for (std::size_t i = options.size; i > 0; --i) free_.push_back(static_cast<std::uint16_t>(i - 1));
}

vhost_user::VringAddress DriverQueue::addresses(std::uint32_t index) const {
  return {.index = index,
          .flags = 0,
          .descriptor_user_address = reinterpret_cast<std::uint64_t>(descriptors_),
          .used_user_address = reinterpret_cast<std::uint64_t>(used_),
          .avail_user_address = reinterpret_cast<std::uint64_t>(avail_),
          .log_guest_address = 0};
}

void DriverQueue::write_descriptor(std::byte* table, std::size_t index, const Buffer& buffer,
                                   bool has_next, std::uint16_t next, std::uint16_t extra_flags) {
  std::byte* const entry = table + index * kDescriptorBytes;
  const auto flags = static_cast<std::uint16_t>((buffer.device_writable ? kDescFWrite : 0) |
                                                (has_next ? kDescFNext : 0) | extra_flags);
  store_le<std::uint64_t>(entry, buffer.guest_address);
  store_le<std::uint32_t>(entry + 8, buffer.length_bytes);
  store_le<std::uint16_t>(entry + 12, flags);
  store_le<std::uint16_t>(entry + 14, next);
}

std::optional<std::uint16_t> DriverQueue::add(std::span<const Buffer> chain) {
  assert(!chain.empty());
  const auto token = packed_ ? add_packed(chain) : add_split(chain);
  if (!token) return std::nullopt;
  writable_bytes_[*token] = 0;
  for (const Buffer& buffer : chain)
    writable_bytes_[*token] += buffer.device_writable ? buffer.length_bytes : 0;
  ++in_flight_;
  return token;
}

std::optional<std::uint16_t> DriverQueue::add_packed(std::span<const Buffer> chain) {
  const auto id = packed_->next_id();
  if (!id) return std::nullopt;
  std::size_t count = 0;
  if (is_indirect(chain)) {
    const Buffer whole = write_table(*id, chain);
    pieces_[count++] = {whole.guest_address, whole.length_bytes, kDescFIndirect};
  } else if (chain.size() > pieces_.size()) {
    return std::nullopt;
  } else {
    for (const Buffer& buffer : chain) {
      pieces_[count++] = {buffer.guest_address, buffer.length_bytes,
                          buffer.device_writable ? kDescFWrite : std::uint16_t{0}};
    }
  }
  return packed_->add(std::span(pieces_).first(count)) ? id : std::nullopt;
}

std::optional<std::uint16_t> DriverQueue::add_split(std::span<const Buffer> chain) {
  const auto head = is_indirect(chain) ? add_indirect(chain) : add_direct(chain);
  if (!head) return std::nullopt;
  const std::size_t entry = avail_index_ & (options_.size - 1U);
  store_release_le(avail_ + kAvailRingOffset + 2 * entry, *head);
  ++avail_index_;
  return head;
}

std::optional<std::uint16_t> DriverQueue::add_direct(std::span<const Buffer> chain) {
  if (chain.size() > free_.size()) return std::nullopt;
  // Written back to front, so that each knows the next.
  std::uint16_t next = 0;
  for (std::size_t i = chain.size(); i > 0; --i) {
    const std::uint16_t index = free_.back();
    free_.pop_back();
    write_descriptor(descriptors_, index, chain[i - 1], i < chain.size(), next, 0);
    next_[index] = next;
    next = index;
  }
  chain_length_[next] = static_cast<std::uint16_t>(chain.size());
  return next;
}

std::optional<std::uint16_t> DriverQueue::add_indirect(std::span<const Buffer> chain) {
  if (free_.empty()) return std::nullopt;
  const std::uint16_t head = free_.back();
  free_.pop_back();
  write_descriptor(descriptors_, head, write_table(head, chain), false, 0, kDescFIndirect);
  chain_length_[head] = 1;
  return head;
}

// The two kinds of rings differ in what stands where the others have flags and next: a packed
// table has its flags there, of which WRITE alone counts.
Buffer DriverQueue::write_table(std::uint16_t index, std::span<const Buffer> chain) {
  std::byte* const table = indirect_tables_ + index * descriptor_table_bytes(options_.indirect_max);
  for (std::size_t i = 0; i < chain.size(); ++i) {
    if (options_.packed) {
      std::byte* const entry = table + i * kDescriptorBytes;
      store_le<std::uint64_t>(entry, chain[i].guest_address);
      store_le<std::uint32_t>(entry + kPackedLengthOffset, chain[i].length_bytes);
      store_le<std::uint16_t>(entry + kPackedIdOffset, 0);
      store_le<std::uint16_t>(entry + kPackedFlagsOffset,
                              chain[i].device_writable ? kDescFWrite : std::uint16_t{0});
    } else {
      write_descriptor(table, i, chain[i], i + 1 < chain.size(), static_cast<std::uint16_t>(i + 1),
                       0);
    }
  }
  return {.guest_address = memory_.guest_address(table),
          .length_bytes = static_cast<std::uint32_t>(descriptor_table_bytes(chain.size())),
          .device_writable = false};
}

void DriverQueue::publish() {
  if (!(packed_ ? packed_->publish() : publish_split())) return;
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(kick_.get(), &one, sizeof one);
  ++kicks_;
}

// Whether the device wants a kick.
bool DriverQueue::publish_split() {
  if (avail_index_ == published_avail_index_) return false;
  const std::uint16_t old_index = published_avail_index_;
  store_release_le(avail_ + kAvailIndexOffset, avail_index_);
  published_avail_index_ = avail_index_;
  // "Available Buffer Notification Suppression": the index first, then the device's wish.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!options_.event_idx)
    return (load_acquire_le<std::uint16_t>(used_ + kUsedFlagsOffset) & kUsedFNoNotify) == 0;
  return need_event(load_acquire_le<std::uint16_t>(used_ + used_avail_event_offset(options_.size)),
                    avail_index_, old_index);
}

std::uint32_t DriverQueue::initial_base() const { return packed_ ? kPackedBaseInitial : 0; }

std::uint32_t DriverQueue::resume_base() const {
  return packed_ ? packed_->base() : device_used_index();
}

std::uint16_t DriverQueue::device_used_index() const {
  return load_acquire_le<std::uint16_t>(used_ + kUsedIndexOffset);
}

bool DriverQueue::has_used() const {
  return packed_ ? packed_->has_used() : device_used_index() != used_index_;
}

Expected<void> DriverQueue::check_length(std::uint16_t token, std::uint32_t length_bytes) const {
  if (length_bytes <= writable_bytes_[token]) return {};
  return make_error(ErrorKind::kCorrupt,
                    fmt::format("the device claims to have written {} bytes into a buffer of {}",
                                length_bytes, writable_bytes_[token]));
}

Expected<std::optional<DriverQueue::Used>> DriverQueue::take_used() {
  if (!packed_) return take_used_split();
  auto used = packed_->take_used();
  if (!used) return std::unexpected(std::move(used.error()));
  if (!*used) return std::nullopt;
  const auto [id, length] = **used;
  if (auto checked = check_length(id, length); !checked)
    return std::unexpected(std::move(checked.error()));
  --in_flight_;
  return Used{.token = id, .length_bytes = length};
}

Expected<std::optional<DriverQueue::Used>> DriverQueue::take_used_split() {
  const auto available = static_cast<std::uint16_t>(device_used_index() - used_index_);
  if (available == 0) return std::nullopt;
  if (available > in_flight_) {
    return make_error(
        ErrorKind::kCorrupt,
        fmt::format("the device returns {} buffers of {} in flight", available, in_flight_));
  }
  const std::byte* const element =
      used_ + kUsedRingOffset + (used_index_ & (options_.size - 1U)) * kUsedElementBytes;
  const auto id = load_le<std::uint32_t>(element);
  const auto length = load_le<std::uint32_t>(element + 4);
  if (id >= options_.size || chain_length_[id] == 0) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("the device returns buffer {}, which it does not have", id));
  }
  if (auto checked = check_length(static_cast<std::uint16_t>(id), length); !checked)
    return std::unexpected(std::move(checked.error()));
  ++used_index_;
  release(static_cast<std::uint16_t>(id));
  return Used{.token = static_cast<std::uint16_t>(id), .length_bytes = length};
}

void DriverQueue::release(std::uint16_t head) {
  std::uint16_t index = head;
  for (std::uint16_t left = std::exchange(chain_length_[head], std::uint16_t{0}); left > 0;
       --left) {
    free_.push_back(index);
    index = next_[index];
  }
  --in_flight_;
}

DriverQueue::Wakening DriverQueue::wait(std::chrono::nanoseconds timeout, int other_fd) {
  // "Used Buffer Notification Suppression": say what is waited for, then look once more.
  if (packed_)
    packed_->ask_for_interrupt();
  else if (options_.event_idx)
    store_release_le(avail_ + avail_used_event_offset(options_.size), used_index_);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (has_used()) return {.by_device = true};
  std::array<pollfd, 2> descriptors{pollfd{.fd = call_.get(), .events = POLLIN, .revents = 0},
                                    pollfd{.fd = other_fd, .events = POLLIN, .revents = 0}};
  const auto seconds = std::chrono::floor<std::chrono::seconds>(timeout);
  const timespec limit{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
  const int ready = ::ppoll(descriptors.data(), descriptors.size(), &limit, nullptr);
  if (ready <= 0) return {.by_device = has_used()};
  if (descriptors[0].revents != 0) {
    std::uint64_t count = 0;
    [[maybe_unused]] const auto consumed = ::read(call_.get(), &count, sizeof count);
    ++wake_ups_;
  }
  return {.by_device = descriptors[0].revents != 0 || has_used(),
          .by_other_fd = descriptors[1].revents != 0};
}

}  // namespace vblk::driver
