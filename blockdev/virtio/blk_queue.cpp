#include "blockdev/virtio/blk_queue.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cerrno>
#include <climits>
#include <cstring>
#include <fcntl.h>
#include <new>
#include <optional>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/io_limiter.h"
#include "blockdev/log.h"
#include "blockdev/virtio/any_virtqueue.h"
#include "blockdev/virtio/blk_request.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/device_gate.h"
#include "blockdev/virtio/dirty_marker.h"
#include "blockdev/virtio/guest_memory_guard.h"
#include "blockdev/virtio/inflight_region.h"
#include "blockdev/virtio/interrupt_hold.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::virtio {

namespace {

// Chains popped in one poll: enough to share a submission to the kernel, few enough that a driver
// which is awake gets the first ones back while the next are worked on
// (docs/decisions/0005-look-before-sleeping.md).
constexpr unsigned kPopsPerPoll = 8;

// A chain is a ring's worth of descriptors and then an indirect table; each descriptor may be cut
// where memory regions meet, which happens once in a while at most. A request with more pieces than
// one kernel I/O takes is refused (parse_blk_request), so a longer ring needs no more room.
constexpr std::size_t kExtraIovecs = 16;
constexpr std::size_t room_per_slot(std::size_t queue_size) {
  return std::min<std::size_t>(queue_size, IOV_MAX) + kIndirectEntriesMax + kExtraIovecs;
}

// Memory that exists only where it is touched: room for the longest chain in every slot, of which a
// guest uses a few percent. 33 KiB for each slot of a long ring, of which a request takes a page.
class IovecArena {
 public:
  IovecArena(std::size_t slots, std::size_t per_slot)
      : per_slot_(per_slot), bytes_(slots * per_slot * sizeof(iovec)) {
    void* const mapping = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    // A huge page for a touch here and there would make all of it exist.
    if (bytes_ > kBytesWithHugePagesMax) ::madvise(mapping, bytes_, MADV_NOHUGEPAGE);
    iovecs_ = static_cast<iovec*>(mapping);
  }
  ~IovecArena() { ::munmap(iovecs_, bytes_); }
  IovecArena(const IovecArena&) = delete;
  IovecArena& operator=(const IovecArena&) = delete;

  [[nodiscard]] std::span<iovec> room(std::size_t slot) const {
    return {iovecs_ + slot * per_slot_, per_slot_};
  }

 private:
  // The longest rings that QEMU makes, of 1024, have 33 MiB.
  static constexpr std::size_t kBytesWithHugePagesMax = std::size_t{64} << 20;

  std::size_t per_slot_;
  std::size_t bytes_;
  iovec* iovecs_;
};

std::uint8_t status_of(int error) {
  if (error == 0) return kBlkSOk;
  return error == EOPNOTSUPP ? kBlkSUnsupp : kBlkSIoErr;
}

// A notification must never block the I/O thread, whatever kind of descriptor the frontend has
// passed. The flag is the frontend's as well; vhost-user wants these descriptors to be eventfds,
// which QEMU makes non-blocking itself.
void make_non_blocking(int fd) {
  if (fd < 0) return;
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags >= 0 && (flags & O_NONBLOCK) == 0) ::fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

void signal(int fd) {
  if (fd < 0) return;
  const std::uint64_t one = 1;
  // EAGAIN: it is readable already. EPIPE and the like: the frontend is on its way out.
  [[maybe_unused]] const auto written = ::write(fd, &one, sizeof one);
}

}  // namespace

// Tells the I/O thread what a queue will use, so that its engines can prepare for it, and takes it
// back in time: before the memory may be unmapped.
class Attachment {
 public:
  Attachment(blockdev::IoContext& context, blockdev::BlockNode& node, const GuestMemory& memory)
      : context_(context), node_(node), memory_(memory) {}
  // To be called once. May throw: what has been announced by then is taken back all the same.
  void announce() {
    for (const auto& region : memory_.regions()) {
      const auto registered = context_.engines().register_memory(range_of(*region));
      if (registered || !log::peer_line_allowed()) continue;
      log::warning("{}; requests pin it one by one", registered.error().message);
    }
    node_.attach(context_);
    attached_ = true;
  }
  ~Attachment() {
    if (attached_) node_.detach(context_);
    for (const auto& region : memory_.regions())
      context_.engines().unregister_memory(range_of(*region));
  }
  Attachment(const Attachment&) = delete;
  Attachment& operator=(const Attachment&) = delete;

 private:
  static iovec range_of(const MemoryRegion& region) {
    return {.iov_base = region.host(), .iov_len = region.size_bytes()};
  }

  blockdev::IoContext& context_;
  blockdev::BlockNode& node_;
  const GuestMemory& memory_;
  bool attached_{false};
};

// One request in flight: everything it needs, made when the queue starts.
struct BlkQueue::Slot : blockdev::BlockRequest {
  State* queue{nullptr};
  struct Ticket : blockdev::IoLimiter::Ticket {
    Slot* slot{nullptr};
  } ticket;                 // while it waits for the device's limits
  std::uint64_t number{0};  // in the order of popping
  std::uint16_t head{0};
  bool busy{false};
  BlkCommandKind kind{BlkCommandKind::kRefused};
  std::byte* status{nullptr};
  std::uint64_t writable_bytes{0};
  std::uint64_t data_bytes{0};  // device-written if it succeeds
  std::size_t segment_count{0};
  std::size_t segment_next{0};
  std::array<BlkSegment, kBlkSegmentsMax> segments;
};

namespace {
constexpr const char* kMemoryGone = "guest memory has been taken away under the queue";
constexpr const char* kNoStatus = "a request has no place for its status byte";
constexpr const char* kLogGone = "the log of dirty pages has been taken away under the queue";
constexpr const char* kInflightGone = "the in-flight area has been taken away under the queue";
}  // namespace

struct BlkQueue::State {
  State(BlkDevice& blk_device, blockdev::IoContext& io_context,
        std::shared_ptr<const GuestMemory> guest_memory, const AnyVirtqueue::Layout& layout,
        const BlkQueueSetup& setup, InflightRecovery recovery,
        std::unique_ptr<DirtyMarker> dirty_marker)
      : device(blk_device),
        context(io_context),
        memory(std::move(guest_memory)),
        inflight(setup.inflight),
        ring(layout, *memory),
        marker(std::move(dirty_marker)),
        log_event_fd(setup.logging.event_fd),
        on_broken(setup.on_broken),
        index(setup.index),
        is_resumed(!recovery.is_fresh),
        again(std::move(recovery.heads)),
        predecessors(again.size()),
        is_recovering(!again.empty()),
        iovecs(layout.size, room_per_slot(layout.size)),
        slots(layout.size),
        attachment(io_context, blk_device.node(), *memory),
        limiter(blk_device.gate().limiter(), io_context.loop(),
                [this](blockdev::IoLimiter::Ticket& ticket) { go_on(ticket); }),
        retry_timer(io_context.loop().make_timer([this] { retry(); })),
        interrupts(blk_device.options().interrupts, io_context.loop(),
                   [this] { send_interrupt(); }),
        registration(blk_device.gate(), io_context.loop(), [this] { look_at_gate(); }) {
    again.reserve(layout.size);
    kept.reserve(layout.size);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      slots[i].queue = this;
      slots[i].ticket.slot = &slots[i];
      slots[i].head = static_cast<std::uint16_t>(i);
      // Whoever goes on after us must find what the driver was told is done.
      slots[i].outlives_process = inflight != nullptr;
    }
  }
  ~State() {
    if (keeps) device.gate().is_rid();
  }

  bool pop_one();
  std::size_t recover_one();
  bool start_request(std::uint16_t head, const Chain& chain);
  void dispatch(Slot& slot, const BlkCommand& command);
  void submit_transfer(Slot& slot, blockdev::BlockOperation operation, const BlkCommand& command);
  void submit_segment(Slot& slot);
  void submit_limited(Slot& slot);
  [[nodiscard]] bool must_wait(Slot& slot);
  void go_on(blockdev::IoLimiter::Ticket& ticket);
  void failed(Slot& slot, int error);
  void put_back(Slot& slot);
  void keep(Slot& slot, int error);
  void sort_in_kept();
  void end_recovery();
  void give_up_the_rest();
  void interrupt();
  void hold_interrupt();
  void send_held_interrupt();
  void send_interrupt();
  [[nodiscard]] bool is_suspending() const {
    return stopping && unfinished == Unfinished::kSuspend;
  }
  [[nodiscard]] std::uint64_t answered() const {
    return statistics.requests - in_flight - times_kept;
  }
  void retry();
  void look_at_gate();
  void get_id(Slot& slot, const BlkCommand& command);
  void finish(Slot& slot, std::uint8_t status, std::uint64_t data_bytes);
  void break_ring(const char* reason);
  void check_memory();
  void watch_kicks();
  [[nodiscard]] BlkRequestLimits limits() const;

  void wake() { context.loop().wake(*poller); }
  bool publish();
  bool enable_notifications();
  void disable_notifications();
  void ring_written();

  BlkDevice& device;
  blockdev::IoContext& context;
  blockdev::Poller* poller{nullptr};  // the queue itself, as the loop knows it
  std::shared_ptr<const GuestMemory> memory;
  std::shared_ptr<const InflightArea> inflight;  // may be none
  AnyVirtqueue ring;
  const std::unique_ptr<DirtyMarker> marker;  // nothing where nothing is to be marked
  const int log_event_fd;
  const std::function<void()> on_broken;
  const std::uint16_t index;
  const bool is_resumed;             // goes on where a predecessor stopped
  std::vector<std::uint16_t> again;  // heads to be taken again, in this order; room for all
  std::size_t next_again{0};
  std::size_t predecessors;     // of those, the first so many are a predecessor's
  Slot* taken_again{nullptr};   // what was taken of those, until it has completed
  std::vector<Slot*> kept;      // failed while others were in flight; room for all
  bool is_recovering;           // until the last of all those has completed
  LeftRequests left;            // what it was stopped with
  bool keeps{false};            // the gate knows that this queue keeps a failed request
  bool is_trial{false};         // the device is paused, and the next is to be tried all the same
  bool trial_in_flight{false};  // taken_again is that trial
  IovecArena iovecs;
  std::vector<Slot> slots;  // by head index; never resized
  Attachment attachment;
  blockdev::IoLimiter::Queue limiter;
  std::unique_ptr<blockdev::IoLoop::Timer> retry_timer;
  InterruptHold interrupts;
  DeviceGate::Registration registration;
  std::size_t in_flight{0};     // taken and not answered, but for those that are kept
  std::uint64_t times_kept{0};  // of any request
  // No count that is ever reached: the first look is at the memory itself, which may have gone
  // before this queue started.
  std::uint64_t faults_seen{~std::uint64_t{0}};
  bool memory_gone{false};
  bool is_broken{false};
  bool stopping{false};
  Unfinished unfinished{Unfinished::kLeave};
  std::move_only_function<void()> stopped;
  int kick_fd{-1};
  int call_fd{-1};
  int error_fd{-1};
  std::unique_ptr<blockdev::IoLoop::Watch> kick_watch;
  BlkQueueStatistics statistics;
};

namespace {

// What a ring starts with.
struct Start {
  AnyVirtqueue::Layout layout;
  InflightRecovery recovery;
};

template <typename... Arguments>
std::unexpected<Error> bad_setup(const BlkQueueSetup& setup,
                                 fmt::format_string<Arguments...> format,
                                 Arguments&&... arguments) {
  return make_error(ErrorKind::kInvalidArgument,
                    fmt::format("queue {}: {}", setup.index,
                                fmt::format(format, std::forward<Arguments>(arguments)...)));
}

// A part of a ring at a frontend's virtual address, or nullptr: not in memory, or not aligned.
std::byte* part_of_ring(const GuestMemory& memory, std::uint64_t address, std::size_t bytes,
                        std::uintptr_t alignment) {
  std::byte* const part = memory.translate_user(address, bytes);
  return reinterpret_cast<std::uintptr_t>(part) % alignment == 0 ? part : nullptr;
}

bool has_feature(const BlkDevice& device, unsigned bit) {
  return (device.negotiated_features() & feature_bit(bit)) != 0;
}

// What is wrong with the area's part for a queue, or nothing.
Expected<void> check_inflight(const BlkQueueSetup& setup, bool is_packed) {
  if (setup.index >= setup.inflight->queue_count())
    return bad_setup(setup, "the in-flight area is for {} queues", setup.inflight->queue_count());
  if (setup.inflight->is_packed() != is_packed)
    return bad_setup(setup, "the in-flight area was given for the other kind of rings");
  return {};
}

// What a queue before this one has left.
bool fits(const BlkQueueSetup& setup) {
  std::size_t descriptors = 0;
  for (const auto& buffer : setup.left.buffers) descriptors += buffer.chain.size();
  return descriptors <= setup.size &&
         std::ranges::all_of(setup.left.heads,
                             [&](std::uint16_t head) { return head < setup.size; });
}

// Alignments: "Split Virtqueues", the table of parts.
Expected<Start> start_split(const BlkDevice& device, const GuestMemory& memory,
                            const BlkQueueSetup& setup) {
  if (!std::has_single_bit(setup.size))
    return bad_setup(setup, "size {} is no power of two", setup.size);
  Virtqueue::Layout layout{
      .descriptor_table =
          part_of_ring(memory, setup.descriptor_address, descriptor_table_bytes(setup.size), 16),
      .avail_ring = part_of_ring(memory, setup.avail_address, avail_ring_bytes(setup.size), 2),
      .used_ring = part_of_ring(memory, setup.used_address, used_ring_bytes(setup.size), 4),
      .size = setup.size,
      .next_avail = static_cast<std::uint16_t>(setup.next_avail),
      .event_idx = has_feature(device, kFEventIdx),
      .indirect = has_feature(device, kFIndirectDesc),
      .inflight = {}};
  if (layout.descriptor_table == nullptr) {
    return bad_setup(setup, "descriptor table at {:#x} is outside guest memory or not aligned",
                     setup.descriptor_address);
  }
  if (layout.avail_ring == nullptr) {
    return bad_setup(setup, "available ring at {:#x} is outside guest memory or not aligned",
                     setup.avail_address);
  }
  if (layout.used_ring == nullptr) {
    return bad_setup(setup, "used ring at {:#x} is outside guest memory or not aligned",
                     setup.used_address);
  }
  const auto start = [&](InflightRecovery recovery) {
    return Start{.layout = {.size = setup.size, .of_kind = layout},
                 .recovery = std::move(recovery)};
  };
  if (setup.inflight == nullptr) {
    if (!fits(setup)) return bad_setup(setup, "it is smaller than when requests were left in it");
    return start({.is_fresh = true, .heads = setup.left.heads});
  }
  if (auto checked = check_inflight(setup, false); !checked)
    return std::unexpected(std::move(checked.error()));
  layout.inflight = setup.inflight->region(setup.index);
  auto recovered = layout.inflight.recover(
      load_acquire_le<std::uint16_t>(layout.used_ring + kUsedIndexOffset), setup.size);
  if (!recovered) return bad_setup(setup, "{}", recovered.error().message);
  if (!recovered->is_fresh) layout.next_avail = recovered->next_avail;
  return start(std::move(*recovered));
}

struct PackedBase {
  PackedPosition next_avail;
  PackedPosition next_used;
};

// Where a packed ring stands by its base. Error: kInvalidArgument.
Expected<PackedBase> packed_base_of(const BlkQueueSetup& setup) {
  const auto next_avail = static_cast<std::uint16_t>(setup.next_avail);
  // Some frontends know no upper half: rings are handed over with nothing in flight.
  const auto upper = static_cast<std::uint16_t>(setup.next_avail >> 16);
  const std::uint16_t next_used = upper == 0 ? next_avail : upper;
  const PackedBase base{.next_avail = PackedPosition::decode(next_avail),
                        .next_used = PackedPosition::decode(next_used)};
  const bool is_idle = next_used == next_avail;
  if (std::max(base.next_avail.index, base.next_used.index) < setup.size &&
      is_idle == setup.left.buffers.empty())
    return base;
  return bad_setup(setup,
                   "base {:#x} is beyond the ring of {}, or says that buffers are in flight, of "
                   "which nothing is known",
                   setup.next_avail, setup.size);
}

// Alignments: "Packed Virtqueues", "Structure Size and Alignment".
Expected<Start> start_packed(const BlkDevice& device, const GuestMemory& memory,
                             const BlkQueueSetup& setup) {
  PackedVirtqueue::Layout layout{
      .descriptor_ring =
          part_of_ring(memory, setup.descriptor_address, descriptor_table_bytes(setup.size), 16),
      .driver_event = part_of_ring(memory, setup.avail_address, kPackedEventBytes, 4),
      .device_event = part_of_ring(memory, setup.used_address, kPackedEventBytes, 4),
      .size = setup.size,
      .next_avail = {},
      .next_used = {},
      .event_idx = has_feature(device, kFEventIdx),
      .indirect = has_feature(device, kFIndirectDesc),
      .inflight = {},
      .in_flight = {}};
  if (layout.descriptor_ring == nullptr) {
    return bad_setup(setup, "descriptor ring at {:#x} is outside guest memory or not aligned",
                     setup.descriptor_address);
  }
  if (layout.driver_event == nullptr) {
    return bad_setup(setup, "driver area at {:#x} is outside guest memory or not aligned",
                     setup.avail_address);
  }
  if (layout.device_event == nullptr) {
    return bad_setup(setup, "device area at {:#x} is outside guest memory or not aligned",
                     setup.used_address);
  }
  const auto start = [&](InflightRecovery recovery) {
    return Start{.layout = {.size = setup.size, .of_kind = std::move(layout)},
                 .recovery = std::move(recovery)};
  };
  layout.in_flight = setup.left.buffers;
  const auto base = packed_base_of(setup);
  if (base) {
    layout.next_avail = base->next_avail;
    layout.next_used = base->next_used;
  }
  if (setup.inflight == nullptr) {
    if (!base) return std::unexpected(base.error());
    if (!fits(setup)) return bad_setup(setup, "it is smaller than when requests were left in it");
    return start({.is_fresh = true, .heads = setup.left.heads});
  }
  if (auto checked = check_inflight(setup, true); !checked)
    return std::unexpected(std::move(checked.error()));
  layout.inflight = setup.inflight->packed_region(setup.index);
  // A frontend does not know where the ring stood when a predecessor died.
  if (layout.inflight.is_fresh() && !base) return std::unexpected(base.error());
  auto recovered = layout.inflight.recover(
      layout.descriptor_ring, setup.size,
      base ? std::optional<PackedPosition>(base->next_used) : std::optional<PackedPosition>());
  if (!recovered) return bad_setup(setup, "{}", recovered.error().message);
  if (recovered->is_fresh) return start({});
  InflightRecovery recovery{.is_fresh = false, .heads = {}};
  for (const auto& buffer : recovered->in_flight) recovery.heads.push_back(buffer.chain.back().id);
  layout.next_avail = recovered->next_avail;
  layout.next_used = recovered->next_used;
  layout.in_flight = std::move(recovered->in_flight);
  return start(std::move(recovery));
}

// Nothing if nothing is to be marked.
Expected<std::unique_ptr<DirtyMarker>> make_marker(const BlkDevice& device,
                                                   const std::shared_ptr<const GuestMemory>& memory,
                                                   const BlkQueueSetup& setup) {
  const DirtyLogging& logging = setup.logging;
  if (logging.log == nullptr) return nullptr;
  const bool is_packed = has_feature(device, kFRingPacked);
  std::vector<DirtyMarker::RingPart> parts;
  if (logging.marks_ring) {
    parts.push_back(
        {logging.ring_address, is_packed ? kPackedEventBytes : used_ring_bytes(setup.size)});
  }
  // Used descriptors lie in the descriptor ring, which has no address of its own in the log.
  if (is_packed) {
    const std::size_t bytes = descriptor_table_bytes(setup.size);
    const std::byte* const ring = memory->translate_user(setup.descriptor_address, bytes);
    parts.push_back({memory->guest_address_of(ring), bytes});
  }
  return DirtyMarker::create(logging.log, memory, std::move(parts), setup.size);
}

}  // namespace

Expected<std::unique_ptr<BlkQueue>> BlkQueue::start(BlkDevice& device, blockdev::IoContext& context,
                                                    std::shared_ptr<const GuestMemory> memory,
                                                    const BlkQueueSetup& setup) {
  if (setup.size == 0 || setup.size > device.options().queue_size_max)
    return bad_setup(setup, "size {} is not 1 to {}", setup.size, device.options().queue_size_max);
  try {
    return start_with_memory(device, context, std::move(memory), setup);
  } catch (const std::bad_alloc&) {
    return make_error(ErrorKind::kExhausted,
                      fmt::format("queue {}: no memory for {} entries; raise 'ulimit -v' or the "
                                  "memory of this process, or lower --queue-size",
                                  setup.index, setup.size));
  }
}

// As start(), where there is memory. Throws std::bad_alloc where there is none.
Expected<std::unique_ptr<BlkQueue>> BlkQueue::start_with_memory(
    BlkDevice& device, blockdev::IoContext& context, std::shared_ptr<const GuestMemory> memory,
    const BlkQueueSetup& setup) {
  auto started = has_feature(device, kFRingPacked) ? start_packed(device, *memory, setup)
                                                   : start_split(device, *memory, setup);
  if (!started) return std::unexpected(std::move(started.error()));
  auto& [layout, recovery] = *started;
  if (setup.inflight != nullptr && !recovery.heads.empty() && log::peer_line_allowed()) {
    log::info("queue {}: {} requests were in flight when a predecessor ended; they are done again",
              setup.index, recovery.heads.size());
  }
  make_non_blocking(setup.logging.event_fd);
  auto marker = make_marker(device, memory, setup);
  if (!marker) return bad_setup(setup, "{}", marker.error().message);
  auto state = std::make_unique<State>(device, context, std::move(memory), layout, setup,
                                       std::move(recovery), std::move(*marker));
  state->attachment.announce();
  std::unique_ptr<BlkQueue> queue(new BlkQueue(std::move(state)));
  queue->set_call_fd(setup.call_fd);
  queue->set_error_fd(setup.error_fd);
  queue->set_kick_fd(setup.kick_fd);
  return queue;
}

BlkQueue::BlkQueue(std::unique_ptr<State> state) : state_(std::move(state)) {
  state_->poller = this;
  state_->context.loop().add_poller(*this, blockdev::PollStage::kDispatch);
}

BlkQueue::~BlkQueue() {
  assert(in_flight() == 0 && "stop() before destruction");
  state_->context.loop().remove_poller(*this);
}

void BlkQueue::stop(Unfinished unfinished, std::move_only_function<void()> stopped) {
  assert(!state_->stopping);
  state_->stopping = true;
  state_->unfinished = unfinished;
  if (unfinished == Unfinished::kSuspend) {
    state_->limiter.withdraw_all([this](blockdev::IoLimiter::Ticket& ticket) {
      state_->put_back(*static_cast<Slot::Ticket&>(ticket).slot);
    });
  } else {
    state_->limiter.release_all();
  }
  state_->kick_watch.reset();
  state_->stopped = std::move(stopped);
  state_->wake();
}

void BlkQueue::set_call_fd(int fd) {
  // What is held was wanted by whom the former one tells.
  if (state_->interrupts.is_holding()) state_->send_interrupt();
  make_non_blocking(fd);
  state_->call_fd = fd;
  // A predecessor may have died between what it published and its interrupt, or have sent that to
  // another descriptor. One too many is harmless; one too few hangs the guest.
  if (state_->is_resumed) signal(fd);
}

void BlkQueue::set_error_fd(int fd) {
  make_non_blocking(fd);
  state_->error_fd = fd;
}

void BlkQueue::set_kick_fd(int fd) {
  state_->kick_watch.reset();
  make_non_blocking(fd);
  state_->kick_fd = fd;
  state_->watch_kicks();
  // Buffers may have come that another descriptor was kicked for.
  state_->wake();
}

void BlkQueue::State::watch_kicks() {
  if (kick_fd < 0 || is_broken || stopping) return;
  kick_watch = context.loop().watch(kick_fd, [this] {
    std::uint64_t value;
    const auto bytes = ::read(kick_fd, &value, sizeof value);
    if (bytes > 0) {
      ++statistics.kicks;
      wake();
    } else if (bytes == 0 || errno != EAGAIN) {
      kick_watch.reset();  // its other end is gone; the ring is still looked at now and then while
                           // the loop is awake
    }
  });
  // A ring that is never looked at again would hang the guest without a word.
  if (kick_watch == nullptr) break_ring("its kick descriptor cannot be waited on");
}

bool BlkQueue::broken() const { return state_->is_broken; }
std::size_t BlkQueue::in_flight() const { return state_->in_flight + kept(); }
std::size_t BlkQueue::waiting() const { return state_->limiter.waiting(); }
std::size_t BlkQueue::kept() const {
  return state_->kept.size() + state_->again.size() - state_->next_again;
}
const LeftRequests& BlkQueue::left() const { return state_->left; }
std::uint32_t BlkQueue::next_avail() const { return state_->ring.next_avail(); }
const BlkQueueStatistics& BlkQueue::statistics() const { return state_->statistics; }

std::size_t BlkQueue::poll() {
  if (state_->is_broken) return 0;
  if (state_->is_recovering) return state_->recover_one();
  if (state_->stopping || state_->device.gate().is_paused()) return 0;
  state_->check_memory();
  unsigned count = 0;
  while (count < kPopsPerPoll && !state_->is_broken && state_->pop_one()) ++count;
  return count;
}

void BlkQueue::settle() {
  State& state = *state_;
  // Nobody knows when the device is resumed: a stop does not wait for that.
  if (state.stopping && state.in_flight == 0 && state.is_recovering &&
      (state.is_suspending() || state.device.gate().is_paused()))
    state.give_up_the_rest();
  if (state.ring.has_unpublished() && state.publish() && state.call_fd >= 0) state.interrupt();
  if (state.interrupts.is_holding()) state.send_held_interrupt();
  if (state.stopping && state.in_flight == 0 && !state.is_recovering && state.stopped) {
    // Whoever runs the ring next may wait for a kick at once. The last access to guest memory.
    static_cast<void>(state.enable_notifications());
    // Not called from here: it may destroy this queue.
    state.context.loop().post(std::exchange(state.stopped, nullptr));
  }
}

bool BlkQueue::prepare_to_sleep() {
  if (state_->interrupts.is_holding()) state_->interrupts.prepare_to_sleep();
  // A stop that settle() has not seen yet: stop() may be called between the cycle and the sleep.
  if (state_->stopping) return state_->in_flight > 0 || !state_->stopped;
  if (state_->is_broken) return true;
  // The next one's turn comes with a completion; new ones are not looked for.
  if (state_->is_recovering) {
    return state_->in_flight > 0 || (state_->device.gate().is_paused() && !state_->is_trial);
  }
  // The gate wakes it.
  if (state_->device.gate().is_paused()) return true;
  // Nothing would end the sleep ("if the invalid FD flag is set ... polling should be used").
  if (state_->kick_fd < 0) return false;
  const bool is_empty = state_->enable_notifications();
  // A ring that has gone looks empty, and nobody kicks again for that.
  state_->check_memory();
  return is_empty;
}

void BlkQueue::wake_up() {
  if (state_->stopping || state_->is_broken) return;
  state_->disable_notifications();
}

// The driver wants one for what has just been published.
inline void BlkQueue::State::interrupt() {
  if (interrupts.is_on()) return hold_interrupt();
  ++statistics.interrupts;
  signal(call_fd);
}

[[gnu::noinline]] void BlkQueue::State::hold_interrupt() {
  if (!interrupts.hold()) ++statistics.interrupts_merged;
}

// Once in each cycle, if there is one.
[[gnu::noinline]] void BlkQueue::State::send_held_interrupt() {
  const bool more_will_come =
      in_flight > 0 && !stopping && !is_broken && !is_recovering && !device.gate().is_paused();
  if (!more_will_come || interrupts.is_due(answered())) send_interrupt();
}

void BlkQueue::State::send_interrupt() {
  interrupts.sent(answered());
  if (call_fd < 0) return;
  ++statistics.interrupts;
  signal(call_fd);
}

// What a ring writes of its own accord is marked as what requests write is.
bool BlkQueue::State::publish() {
  const bool is_interrupt_wanted = ring.publish();
  if (marker != nullptr) ring_written();
  return is_interrupt_wanted;
}

bool BlkQueue::State::enable_notifications() {
  const bool is_empty = ring.enable_notifications();
  if (marker != nullptr) ring_written();
  return is_empty;
}

void BlkQueue::State::disable_notifications() {
  ring.disable_notifications();
  if (marker != nullptr) ring_written();
}

[[gnu::noinline]] void BlkQueue::State::ring_written() {
  marker->ring_written();
  signal(log_event_fd);
}

// False: the chain cannot be answered, and the ring is broken. Inline, because one of its two
// callers starts every request.
[[gnu::always_inline]] inline bool BlkQueue::State::start_request(std::uint16_t head,
                                                                  const Chain& chain) {
  if (chain.last_writable_byte == nullptr) {
    break_ring(kNoStatus);
    return false;
  }
  Slot& slot = slots[head];
  slot.busy = true;
  slot.status = chain.last_writable_byte;
  slot.writable_bytes = chain.problem == nullptr ? chain.writable_bytes : 0;
  slot.data_bytes = 0;
  ++in_flight;
  slot.number = ++statistics.requests;
  if (marker != nullptr) marker->popped(head, chain.writable, chain.last_writable_byte);
  if (chain.problem != nullptr) {
    finish(slot, kBlkSIoErr, 0);
  } else {
    dispatch(slot, parse_blk_request(chain, limits(), slot.segments));
  }
  return true;
}

// Takes the next of what is to be taken again when the one before has completed. Whether something
// was done, as a number.
std::size_t BlkQueue::State::recover_one() {
  if (in_flight > 0) return 0;
  taken_again = nullptr;
  // It would be among the kept ones again if it had failed for want of space.
  if (std::exchange(trial_in_flight, false)) device.gate().space_is_back();
  sort_in_kept();
  if (next_again == again.size()) {
    end_recovery();
    return 1;
  }
  if (is_suspending()) return 0;
  if (device.gate().is_paused() && !std::exchange(is_trial, false)) return 0;
  check_memory();
  if (is_broken) return 0;
  trial_in_flight = device.gate().is_paused();
  const std::uint16_t head = again[next_again];
  Chain chain;
  if (ring.take_again(head, iovecs.room(head), chain) == Pop::kBroken) {
    break_ring(ring.broken_reason());
    return 0;
  }
  ++(next_again < predecessors ? statistics.recovered : statistics.retried);
  ++next_again;
  taken_again = &slots[head];
  return start_request(head, chain) ? 1 : 0;
}

void BlkQueue::State::end_recovery() {
  is_recovering = false;
  again.clear();
  kept.clear();
  next_again = 0;
  predecessors = 0;
  trial_in_flight = false;
  is_trial = false;
  retry_timer->cancel();
  if (std::exchange(keeps, false)) device.gate().is_rid();
}

// What failed beside others comes after what was to be taken again before it was popped.
void BlkQueue::State::sort_in_kept() {
  if (kept.empty()) return;
  again.erase(again.begin(), again.begin() + static_cast<std::ptrdiff_t>(next_again));
  predecessors -= std::min(predecessors, next_again);
  next_again = 0;
  std::ranges::sort(kept, {}, &Slot::number);
  for (const Slot* slot : kept) again.push_back(slot->head);
  kept.clear();
}

// Of a queue that is suspended, or stops under a paused device, with nothing in flight.
void BlkQueue::State::give_up_the_rest() {
  sort_in_kept();
  if (unfinished == Unfinished::kFail) {
    check_memory();
    while (next_again < again.size() && !is_broken) {
      const std::uint16_t head = again[next_again++];
      Chain chain;
      if (ring.take_again(head, iovecs.room(head), chain) == Virtqueue::Pop::kBroken) {
        break_ring(ring.broken_reason());
      } else if (chain.last_writable_byte == nullptr) {
        break_ring(kNoStatus);
      } else {
        Slot& slot = slots[head];
        slot.status = chain.last_writable_byte;
        slot.writable_bytes = chain.problem == nullptr ? chain.writable_bytes : 0;
        ++in_flight;
        if (marker != nullptr) marker->popped(head, chain.writable, chain.last_writable_byte);
        finish(slot, kBlkSIoErr, 0);
      }
    }
  }
  left.heads.assign(again.begin() + static_cast<std::ptrdiff_t>(next_again), again.end());
  left.buffers = ring.descriptors_of(left.heads);
  end_recovery();
}

// Takes one chain off the ring and starts it. False if there is none, or the ring is broken.
bool BlkQueue::State::pop_one() {
  Chain chain;
  // A slot and its room are found by the head, so that is asked first.
  const auto head = ring.peek_head();
  if (!head) {
    if (ring.broken_reason() != nullptr) break_ring(ring.broken_reason());
    return false;
  }
  if (slots[*head].busy) {
    break_ring("a descriptor chain is made available again while it is in flight");
    return false;
  }
  if (ring.pop(iovecs.room(*head), chain) == Pop::kBroken) {
    break_ring(ring.broken_reason());
    return false;
  }
  return start_request(*head, chain);
}

BlkRequestLimits BlkQueue::State::limits() const {
  const blockdev::BlockLimits& node = device.node().limits();
  const std::uint64_t features = device.offered_features();
  return {.capacity_bytes = device.node().size_bytes(),
          .read_only = node.read_only,
          .can_discard = (features & feature_bit(kBlkFDiscard)) != 0,
          .can_write_zeroes = (features & feature_bit(kBlkFWriteZeroes)) != 0};
}

void BlkQueue::State::dispatch(Slot& slot, const BlkCommand& command) {
  slot.kind = command.kind;
  switch (command.kind) {
    case BlkCommandKind::kRefused:
      return finish(slot, command.refusal, 0);
    case BlkCommandKind::kRead:
      slot.data_bytes = command.length_bytes;
      return submit_transfer(slot, blockdev::BlockOperation::kRead, command);
    case BlkCommandKind::kWrite:
      return submit_transfer(slot, blockdev::BlockOperation::kWrite, command);
    case BlkCommandKind::kFlush:
      return submit_transfer(slot, blockdev::BlockOperation::kFlush, command);
    case BlkCommandKind::kGetId:
      return get_id(slot, command);
    case BlkCommandKind::kDiscard:
    case BlkCommandKind::kWriteZeroes:
      slot.segment_count = command.segment_count;
      slot.segment_next = 0;
      return submit_segment(slot);
  }
}

void BlkQueue::State::submit_transfer(Slot& slot, blockdev::BlockOperation operation,
                                      const BlkCommand& command) {
  slot.operation = operation;
  slot.write_through = operation == blockdev::BlockOperation::kWrite && device.write_through();
  slot.offset_bytes = command.offset_bytes;
  slot.length_bytes = command.length_bytes;
  slot.iov = command.data.data();
  slot.iov_count = static_cast<std::uint32_t>(command.data.size());
  slot.complete = [](blockdev::BlockRequest& request, int error) {
    auto& done = static_cast<Slot&>(request);
    if (error != 0) return done.queue->failed(done, error);
    done.queue->finish(done, kBlkSOk, done.data_bytes);
  };
  // Both are the last thing done: without limits there is no cost but the look.
  if (device.gate().limiter().is_active()) return submit_limited(slot);
  device.node().submit(slot, context);
}

// Under the device's limits.
[[gnu::noinline]] void BlkQueue::State::submit_limited(Slot& slot) {
  if (!must_wait(slot)) device.node().submit(slot, context);
}

// Whether the device's limits hold a request up; then go_on() submits it.
bool BlkQueue::State::must_wait(Slot& slot) {
  using blockdev::BlockOperation;
  // A flush only has earlier I/O finished; and a stop does not wait for anybody's turn.
  if (slot.operation == BlockOperation::kFlush || stopping) return false;
  const bool is_read = slot.operation == BlockOperation::kRead;
  slot.ticket.direction =
      is_read ? blockdev::IoLimiter::Direction::kRead : blockdev::IoLimiter::Direction::kWrite;
  slot.ticket.bytes = 0;  // a discard moves none
  if (is_read || slot.operation == BlockOperation::kWrite) slot.ticket.bytes = slot.length_bytes;
  if (slot.operation == BlockOperation::kWriteZeroes) {
    // They may have to be written.
    for (std::size_t i = 0; i < slot.segment_count; ++i)
      slot.ticket.bytes += slot.segments[i].length_bytes;
  }
  return !limiter.admit(slot.ticket);
}

void BlkQueue::State::go_on(blockdev::IoLimiter::Ticket& ticket) {
  device.node().submit(*static_cast<Slot::Ticket&>(ticket).slot, context);
}

// The segments of a discard or write zeroes, one after another; the first error ends the request.
void BlkQueue::State::submit_segment(Slot& slot) {
  const BlkSegment& segment = slot.segments[slot.segment_next++];
  const bool zeroes = slot.kind == BlkCommandKind::kWriteZeroes;
  slot.operation =
      zeroes ? blockdev::BlockOperation::kWriteZeroes : blockdev::BlockOperation::kDiscard;
  slot.write_through = zeroes && device.write_through();
  slot.may_unmap = segment.may_unmap;
  slot.offset_bytes = segment.offset_bytes;
  slot.length_bytes = segment.length_bytes;
  slot.iov = nullptr;
  slot.iov_count = 0;
  slot.complete = [](blockdev::BlockRequest& request, int error) {
    auto& done = static_cast<Slot&>(request);
    if (error != 0) return done.queue->failed(done, error);
    if (done.segment_next < done.segment_count) return done.queue->submit_segment(done);
    done.queue->finish(done, kBlkSOk, 0);
  };
  // The limits count the request with its first segment.
  if (slot.segment_next == 1 && device.gate().limiter().is_active()) return submit_limited(slot);
  device.node().submit(slot, context);
}

// GET_ID: 20 bytes, padded with zeroes, without a terminating one ("Device Operation").
void BlkQueue::State::get_id(Slot& slot, const BlkCommand& command) {
  std::array<char, kBlkIdBytes> id{};
  device.options().serial.copy(id.data(), id.size());
  std::size_t copied = 0;
  for (const iovec& piece : command.data) {
    const std::size_t part = std::min(piece.iov_len, id.size() - copied);
    std::memcpy(piece.iov_base, id.data() + copied, part);
    copied += part;
  }
  finish(slot, kBlkSOk, copied);
}

void BlkQueue::State::finish(Slot& slot, std::uint8_t status, std::uint64_t data_bytes) {
  // What was read from memory that has gone was zeroes, so nothing can be called done any more.
  check_memory();
  if (memory_gone) status = kBlkSIoErr;
  *slot.status = static_cast<std::byte>(status);
  if (marker != nullptr) marker->written(slot.head);
  if (status == kBlkSIoErr) ++statistics.errors;
  if (status == kBlkSUnsupp) ++statistics.unsupported;
  slot.busy = false;
  --in_flight;
  wake();  // to be settled
  ring.push_used(slot.head, used_length(slot.writable_bytes, data_bytes));
}

// The node has failed the request, and the device's policy says what that means.
[[gnu::cold]] void BlkQueue::State::failed(Slot& slot, int error) {
  switch (device.action_on(slot.operation, error)) {
    case ErrorAction::kStop:
      // Who waits for this queue's end wants an answer.
      if (is_broken || memory_gone || (stopping && unfinished == Unfinished::kFail)) break;
      return keep(slot, error);
    case ErrorAction::kIgnore:
      return finish(slot, kBlkSOk, slot.data_bytes);
    case ErrorAction::kReport:
      break;
  }
  finish(slot, status_of(error), 0);
}

// Of what is in flight, to what is to be taken again. The slot stays busy: its head may not be made
// available again. The pieces of memory are looked up again when it is taken again, for a node may
// have rewritten them.
void BlkQueue::State::put_back(Slot& slot) {
  --in_flight;
  ++times_kept;
  if (&slot == taken_again) {
    --next_again;
    taken_again = nullptr;
    trial_in_flight = false;
  } else {
    kept.push_back(&slot);
  }
  is_recovering = true;
  wake();
}

void BlkQueue::State::keep(Slot& slot, int error) {
  const FailedRequest what{.operation = slot.operation,
                           .offset_bytes = slot.offset_bytes,
                           .length_bytes = slot.length_bytes,
                           .error = error};
  put_back(slot);
  is_trial = false;
  device.gate().keep(what, !std::exchange(keeps, true));
  retry_timer->start(DeviceGate::kRetryInterval);
}

// A full disk is looked at by trying the first kept request again: whether there is space for it
// depends on more than can be asked (quotas, thin volumes, what a format has to allocate).
void BlkQueue::State::retry() {
  if (!keeps) return;
  retry_timer->start(DeviceGate::kRetryInterval);
  if (stopping || in_flight > 0 || !device.gate().is_worth_retrying()) return;
  is_trial = true;
  wake();
}

void BlkQueue::State::look_at_gate() {
  if (device.gate().is_paused_by_command()) {
    limiter.release_all();  // what has been taken is finished
  } else {
    limiter.look();
  }
  wake();
}

// The frontend may shorten the file that guest memory is. Asked often, answered by one load.
void BlkQueue::State::check_memory() {
  const std::uint64_t faults = guarded_memory_fault_count();
  if (faults == std::exchange(faults_seen, faults)) return;
  if (memory->faulted()) break_ring(kMemoryGone);
  if (inflight != nullptr && inflight->faulted()) break_ring(kInflightGone);
  if (marker != nullptr && marker->faulted()) break_ring(kLogGone);
}

// "The ring is stopped and its error descriptor signalled": the driver has to reset the device.
// Memory that has gone reads as zeroes, which may look like any other mistake: it comes first.
void BlkQueue::State::break_ring(const char* reason) {
  memory_gone |= memory->faulted();
  if (memory_gone) reason = kMemoryGone;
  // Nobody waits for what would have been taken again.
  end_recovery();
  if (std::exchange(is_broken, true)) return;
  if (log::peer_line_allowed())
    log::error("queue {}: {}; the queue is stopped until the device is reset", index, reason);
  signal(error_fd);
  if (on_broken) on_broken();
}

}  // namespace vblk::virtio
