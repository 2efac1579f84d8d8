#include "blockdev/vhost_user/backend.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <fcntl.h>
#include <functional>
#include <future>
#include <limits>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/flush_now.h"
#include "blockdev/log.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/packed_ring.h"

namespace vblk::vhost_user {

namespace {

constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }

constexpr std::uint64_t kOfferedProtocolFeatures =
    bit(kProtocolFMq) | bit(kProtocolFReplyAck) | bit(kProtocolFBackendReq) |
    bit(kProtocolFConfig) | bit(kProtocolFResetDevice) | bit(kProtocolFConfigureMemSlots) |
    bit(kProtocolFStatus);

// The gate has checked that the payload is long enough.
template <typename T>
T payload_of(const Message& message) {
  return *decode<T>(message.payload);
}

// Messages handled before the caller's thread may do something else. Setting up a frontend's
// largest number of rings takes a few hundred.
constexpr unsigned kMessagesPerTurn = 64;

std::unexpected<Error> refused(std::string why) {
  return make_error(ErrorKind::kInvalidArgument, std::move(why));
}

}  // namespace

// What a message may look like, and who handles it.
struct Backend::Rule {
  Request request;
  std::size_t payload_bytes_min;
  std::size_t payload_bytes_max;
  std::size_t fds_max;
  bool has_reply;  // of its own: REPLY_ACK adds none
  Expected<void> (Backend::*handler)(Message& message);
};

// "Front-end message types". Sizes are those of the payloads in "Message Specification".
const Backend::Rule* Backend::rule_for(Request request) {
  constexpr std::size_t kU64 = 8;
  constexpr std::size_t kTableMin = sizeof(MemoryTableHead);
  constexpr std::size_t kTableMax =
      kTableMin + kMemoryTableRegionsMax * sizeof(MemoryRegionDescription);
  constexpr std::size_t kConfigMin = sizeof(ConfigHead);
  constexpr std::size_t kConfigMax = kConfigMin + virtio::BlkDevice::kConfigBytesMax;
  static constexpr std::array kRules{
      Rule{Request::kGetFeatures, 0, 0, 0, true, &Backend::get_features},
      Rule{Request::kSetFeatures, kU64, kU64, 0, false, &Backend::set_features},
      Rule{Request::kSetOwner, 0, 0, 0, false, &Backend::set_owner},
      // "Deprecated ... should be ignored".
      Rule{Request::kResetOwner, 0, 0, 0, false, &Backend::accept_silently},
      Rule{Request::kSetMemTable, kTableMin, kTableMax, kMemoryTableRegionsMax, false,
           &Backend::set_mem_table},
      Rule{Request::kSetLogBase, sizeof(LogDescription), sizeof(LogDescription), 1, false,
           &Backend::set_log_base},
      Rule{Request::kSetLogFd, 0, kU64, 1, false, &Backend::set_log_fd},
      Rule{Request::kSetVringNum, sizeof(VringState), sizeof(VringState), 0, false,
           &Backend::set_vring_num},
      Rule{Request::kSetVringAddr, sizeof(VringAddress), sizeof(VringAddress), 0, false,
           &Backend::set_vring_addr},
      Rule{Request::kSetVringBase, sizeof(VringState), sizeof(VringState), 0, false,
           &Backend::set_vring_base},
      Rule{Request::kGetVringBase, sizeof(VringState), sizeof(VringState), 0, true,
           &Backend::get_vring_base},
      Rule{Request::kSetVringKick, kU64, kU64, 1, false, &Backend::set_vring_kick},
      Rule{Request::kSetVringCall, kU64, kU64, 1, false, &Backend::set_vring_call},
      Rule{Request::kSetVringErr, kU64, kU64, 1, false, &Backend::set_vring_err},
      Rule{Request::kGetProtocolFeatures, 0, 0, 0, true, &Backend::get_protocol_features},
      Rule{Request::kSetProtocolFeatures, kU64, kU64, 0, false, &Backend::set_protocol_features},
      Rule{Request::kGetQueueNum, 0, 0, 0, true, &Backend::get_queue_num},
      Rule{Request::kSetVringEnable, sizeof(VringState), sizeof(VringState), 0, false,
           &Backend::set_vring_enable},
      Rule{Request::kSetBackendReqFd, 0, kU64, 1, false, &Backend::set_backend_req_fd},
      Rule{Request::kGetConfig, kConfigMin, kConfigMax, 0, true, &Backend::get_config},
      Rule{Request::kSetConfig, kConfigMin, kConfigMax, 0, false, &Backend::set_config},
      Rule{Request::kGetInflightFd, kInflightBytesMin, sizeof(Inflight), 0, true,
           &Backend::get_inflight_fd},
      Rule{Request::kSetInflightFd, kInflightBytesMin, sizeof(Inflight), 1, false,
           &Backend::set_inflight_fd},
      Rule{Request::kResetDevice, 0, 0, 0, false, &Backend::reset_device},
      Rule{Request::kGetMaxMemSlots, 0, 0, 0, true, &Backend::get_max_mem_slots},
      Rule{Request::kAddMemReg, sizeof(SingleMemoryRegion), sizeof(SingleMemoryRegion), 1, false,
           &Backend::add_mem_reg},
      // Some frontends send the region's descriptor along once more; it is not needed.
      Rule{Request::kRemMemReg, sizeof(SingleMemoryRegion), sizeof(SingleMemoryRegion), 1, false,
           &Backend::rem_mem_reg},
      Rule{Request::kSetStatus, kU64, kU64, 0, false, &Backend::set_status},
      Rule{Request::kGetStatus, 0, 0, 0, true, &Backend::get_status},
  };
  const auto found = std::ranges::find(kRules, request, &Rule::request);
  return found == kRules.end() ? nullptr : &*found;
}

Backend::Backend(UniqueFd socket, virtio::BlkDevice& device,
                 std::span<const std::unique_ptr<blockdev::IoThread>> io_threads,
                 const BackendOptions& options)
    : socket_(std::move(socket)),
      device_(device),
      io_threads_(io_threads),
      options_(options),
      session_(device.options().queue_count) {}

Backend::Session::Session(std::size_t ring_count) : rings(ring_count) {
  for (std::size_t i = 0; i < rings.size(); ++i) rings[i].index = static_cast<std::uint16_t>(i);
}

Backend::~Backend() {
  for (Ring& ring : session_.rings) stop(ring, Afterwards::kConnectionEnds);
  give_up_unused_disk();
  device_.reset();
}

Expected<bool> Backend::serve() {
  // Others wait for this thread as well: signals, the monitor.
  for (unsigned count = 0; count < kMessagesPerTurn; ++count) {
    Message message;
    const auto outcome = reader_.read(socket_.get(), message);
    if (!outcome) return std::unexpected(outcome.error());
    if (*outcome == MessageReader::Outcome::kClosed) return false;
    if (*outcome == MessageReader::Outcome::kNeedMore) return true;
    if (auto handled = handle(message); !handled)
      return std::unexpected(std::move(handled.error()));
  }
  return true;
}

Expected<void> Backend::handle(Message& message) {
  const Rule* const rule = rule_for(message.request());
  Expected<void> outcome;
  if (rule == nullptr) {
    outcome = refused(fmt::format("message {} is not supported", message.header.request));
  } else if (outcome = check(*rule, message); outcome) {
    outcome = (this->*rule->handler)(message);
  }
  if (!outcome) {
    outcome.error().message =
        fmt::format("{}: {}", name_of(message.request()), outcome.error().message);
  }
  const bool has_reply = rule != nullptr && rule->has_reply;
  return has_reply ? outcome : acknowledge(message, outcome);
}

Expected<void> Backend::check(const Rule& rule, const Message& message) const {
  const std::size_t bytes = message.payload.size();
  if (bytes < rule.payload_bytes_min || bytes > rule.payload_bytes_max) {
    return refused(
        fmt::format("a payload of {} bytes instead of {}", bytes, rule.payload_bytes_min));
  }
  if (message.fds.size() > rule.fds_max) {
    return refused(fmt::format("{} descriptors instead of {}", message.fds.size(), rule.fds_max));
  }
  return {};
}

bool Backend::wants_reply(const Message& message) const {
  return negotiated_protocol(kProtocolFReplyAck) && (message.header.flags & kFlagNeedReply) != 0;
}

// "VHOST_USER_PROTOCOL_F_REPLY_ACK": who asked for a reply is told of a failure and may go on; who
// did not can only be told by the end of the connection.
Expected<void> Backend::acknowledge(const Message& message, const Expected<void>& outcome) {
  if (!wants_reply(message)) return outcome;
  if (!outcome && log::peer_line_allowed()) log::warning("frontend: {}", outcome.error().message);
  return reply_u64(message, outcome ? 0 : 1);
}

Expected<void> Backend::reply(const Message& message, std::span<const std::byte> payload,
                              std::span<const int> fds) {
  return send_message(socket_.get(), {message.header.request, kVersion | kFlagReply, 0}, payload,
                      fds);
}

Expected<void> Backend::reply_u64(const Message& message, std::uint64_t value) {
  std::vector<std::byte> payload;
  append(payload, value);
  return reply(message, payload);
}

bool Backend::negotiated_protocol(unsigned number) const {
  return (protocol_features_ & bit(number)) != 0;
}

bool Backend::any_ring_runs() const {
  return std::ranges::any_of(session_.rings,
                             [](const Ring& ring) { return ring.queue != nullptr; });
}

std::uint32_t Backend::base_of(const Ring& ring) const {
  return ring.next_avail.value_or(has_packed_rings() ? virtio::kPackedBaseInitial : 0);
}

bool Backend::has_packed_rings() const {
  return (session_.features & bit(virtio::kFRingPacked)) != 0;
}

// ---- Features and config space

Expected<void> Backend::get_features(Message& message) {
  std::uint64_t features = device_.offered_features() | bit(kFProtocolFeatures);
  if (options_.handover != nullptr) features |= bit(kFLogAll);
  return reply_u64(message, features);
}

Expected<void> Backend::set_features(Message& message) {
  const auto features = payload_of<std::uint64_t>(message);
  return while_quiesced([this, features]() -> Expected<void> {
    std::uint64_t of_the_device = features & ~bit(kFProtocolFeatures);
    if (options_.handover != nullptr) of_the_device &= ~bit(kFLogAll);
    auto set = device_.set_features(of_the_device);
    session_.features_accepted = set.has_value();
    if (!set) return set;
    session_.features = features;
    carry_writeback_over();
    // "the back-end must enable all rings immediately" ("Ring states").
    if ((features & bit(kFProtocolFeatures)) == 0) {
      for (Ring& ring : session_.rings) ring.enabled = true;
    }
    return {};
  });
}

Expected<void> Backend::accept_silently(Message& /*message*/) { return {}; }

// "This can be used on the back-end as a "session start" flag." A second one begins another session
// on the same connection: QEMU does that when a device is unplugged and another one is plugged in
// for the same chardev, and takes nothing back that belonged to the first. What it says before this
// message, protocol features and the back-end channel, is the new session's already.
Expected<void> Backend::set_owner(Message& /*message*/) {
  const bool is_first = !std::exchange(has_owner_, true);
  if (is_first || any_ring_runs()) return {};
  session_ = Session(session_.rings.size());
  needs_reset_ = false;
  give_up_unused_disk();
  device_.reset();
  return {};
}

Expected<void> Backend::get_protocol_features(Message& message) {
  return reply_u64(message, offered_protocol_features());
}

std::uint64_t Backend::offered_protocol_features() const {
  return kOfferedProtocolFeatures |
         (options_.offers_recovery
              ? bit(kProtocolFInflightShmfd) | bit(kProtocolFGetVringBaseInflight)
              : std::uint64_t{0}) |
         (options_.handover != nullptr ? bit(kProtocolFLogShmfd) : std::uint64_t{0});
}

Expected<void> Backend::set_protocol_features(Message& message) {
  const auto features = payload_of<std::uint64_t>(message);
  const std::uint64_t surplus = features & ~offered_protocol_features();
  if (surplus != 0) return refused(fmt::format("bits {:#x} were not offered", surplus));
  if ((features & bit(kProtocolFGetVringBaseInflight)) != 0 &&
      (features & bit(kProtocolFInflightShmfd)) == 0)
    return refused("GET_VRING_BASE_INFLIGHT comes without INFLIGHT_SHMFD");
  protocol_features_ = features;
  return {};
}

Expected<void> Backend::get_queue_num(Message& message) {
  return reply_u64(message, session_.rings.size());
}

Expected<void> Backend::set_backend_req_fd(Message& message) {
  if (!negotiated_protocol(kProtocolFBackendReq)) return refused("BACKEND_REQ was not negotiated");
  if (message.fds.empty()) return refused("no descriptor comes with it");
  backend_channel_ = std::move(message.fds[0]);
  return {};
}

// Sends without asking for a reply, so that a frontend that does not listen cannot hold anything
// up.
void Backend::notify_config_change() {
  if (!backend_channel_) return;
  const Header header{static_cast<std::uint32_t>(BackendRequest::kConfigChange), kVersion, 0};
  if (const auto sent = send_message(backend_channel_.get(), header, {}); !sent) {
    log::warning("frontend: cannot tell it that the configuration has changed: {}",
                 sent.error().message);
    backend_channel_.reset();
  }
}

// "VHOST_USER_GET_CONFIG": "on error the back-end replies with a zero length payload".
Expected<void> Backend::get_config(Message& message) {
  const auto head = payload_of<ConfigHead>(message);
  if (head.size_bytes > virtio::BlkDevice::kConfigBytesMax) return reply(message, {});
  std::vector<std::byte> payload(sizeof(ConfigHead) + head.size_bytes);
  const std::span<std::byte> room(payload);
  if (!device_.read_config(head.offset, room.subspan(sizeof(ConfigHead))))
    return reply(message, {});
  std::memcpy(payload.data(), &head, sizeof head);
  return reply(message, payload);
}

Expected<void> Backend::set_config(Message& message) {
  const auto head = payload_of<ConfigHead>(message);
  constexpr std::uint32_t kForMigration = 1;
  if (head.flags == kForMigration)
    return refused("a configuration that comes with a migration is not taken over");
  if (head.flags != 0) return refused(fmt::format("flags {:#x} are unknown", head.flags));
  const auto bytes = std::span<const std::byte>(message.payload).subspan(sizeof(ConfigHead));
  if (head.size_bytes != bytes.size()) {
    return refused(fmt::format("announces {} bytes and brings {}", head.size_bytes, bytes.size()));
  }
  const bool was_writeback = !device_.write_through();
  auto written = device_.write_config(head.offset, bytes);
  if (!written) return written;
  // Only `writeback` can be written.
  if (session_.inflight != nullptr) session_.inflight->keep_writeback(!device_.write_through());
  if (!was_writeback || !device_.write_through()) return {};
  // From here on the driver sends no flush: what it has written before must be stable as well, and
  // so must what is still on its way and was begun without write-through.
  return while_quiesced(
      [this] { return blockdev::flush_now(device_.node(), *io_threads_.front()); });
}

// ---- Memory

Expected<void> Backend::replace_memory(
    std::vector<std::shared_ptr<const virtio::MemoryRegion>> regions) {
  auto memory = virtio::GuestMemory::create(std::move(regions));
  if (!memory) return std::unexpected(std::move(memory.error()));
  return while_quiesced([this, &memory]() -> Expected<void> {
    session_.memory = std::move(*memory);
    return {};
  });
}

Expected<void> Backend::set_mem_table(Message& message) {
  const auto head = payload_of<MemoryTableHead>(message);
  const std::size_t expected =
      sizeof(MemoryTableHead) + head.region_count * sizeof(MemoryRegionDescription);
  if (head.region_count > kMemoryTableRegionsMax || message.payload.size() != expected) {
    return refused(fmt::format("{} regions in a payload of {} bytes", head.region_count,
                               message.payload.size()));
  }
  if (message.fds.size() != head.region_count) {
    return refused(
        fmt::format("{} regions with {} descriptors", head.region_count, message.fds.size()));
  }
  std::vector<std::shared_ptr<const virtio::MemoryRegion>> regions;
  for (std::size_t i = 0; i < head.region_count; ++i) {
    const std::size_t offset = sizeof(MemoryTableHead) + i * sizeof(MemoryRegionDescription);
    const auto wire = *decode<MemoryRegionDescription>(
        std::span<const std::byte>(message.payload).subspan(offset));
    auto region = virtio::MemoryRegion::map(message.fds[i].get(), wire.guest_address,
                                            wire.size_bytes, wire.user_address, wire.mmap_offset);
    if (!region) return std::unexpected(std::move(region.error()));
    regions.push_back(std::move(*region));
  }
  return replace_memory(std::move(regions));
}

Expected<void> Backend::add_mem_reg(Message& message) {
  if (message.fds.size() != 1) return refused("no descriptor comes with it");
  const auto wire = payload_of<SingleMemoryRegion>(message).region;
  auto region = virtio::MemoryRegion::map(message.fds[0].get(), wire.guest_address, wire.size_bytes,
                                          wire.user_address, wire.mmap_offset);
  if (!region) return std::unexpected(std::move(region.error()));
  std::vector<std::shared_ptr<const virtio::MemoryRegion>> regions;
  if (session_.memory)
    regions.assign(session_.memory->regions().begin(), session_.memory->regions().end());
  regions.push_back(std::move(*region));
  return replace_memory(std::move(regions));
}

// "The memory region to be removed is identified by its guest address, user address and size".
Expected<void> Backend::rem_mem_reg(Message& message) {
  const auto wire = payload_of<SingleMemoryRegion>(message).region;
  std::vector<std::shared_ptr<const virtio::MemoryRegion>> regions;
  if (session_.memory)
    regions.assign(session_.memory->regions().begin(), session_.memory->regions().end());
  const auto removed = std::erase_if(regions, [&wire](const auto& region) {
    return region->guest_address() == wire.guest_address &&
           region->size_bytes() == wire.size_bytes && region->user_address() == wire.user_address;
  });
  if (removed == 0) return refused(fmt::format("there is no region at {:#x}", wire.guest_address));
  return replace_memory(std::move(regions));
}

Expected<void> Backend::get_max_mem_slots(Message& message) {
  return reply_u64(message, virtio::GuestMemory::kMaxRegions);
}

// ---- Requests in flight

namespace {

// A file that nobody can shorten or lengthen. It is zeroes: regions that are not initialized yet.
Expected<UniqueFd> make_inflight_file(std::uint64_t size_bytes) {
  UniqueFd fd(::memfd_create("vblk-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0) {
    const int error = errno;
    return make_error(kind_of_errno(error),
                      fmt::format("cannot make {} bytes of memory for the requests in flight: {}",
                                  size_bytes, describe_errno(error)),
                      error);
  }
  return fd;
}

}  // namespace

Expected<virtio::InflightDescription> Backend::inflight_description(const Message& message) const {
  if (!negotiated_protocol(kProtocolFInflightShmfd))
    return refused("INFLIGHT_SHMFD was not negotiated");
  Inflight wire{};
  std::memcpy(&wire, message.payload.data(), kInflightBytesMin);
  if (wire.queue_count == 0 || wire.queue_count > session_.rings.size()) {
    return refused(
        fmt::format("for {} queues; there are {}", wire.queue_count, session_.rings.size()));
  }
  if (wire.queue_size == 0 || wire.queue_size > device_.options().queue_size_max) {
    return refused(fmt::format("for queues of {} entries; up to {} are taken, see --queue-size",
                               wire.queue_size, device_.options().queue_size_max));
  }
  return virtio::InflightDescription{.size_bytes = wire.mmap_size,
                                     .offset_bytes = wire.mmap_offset,
                                     .queue_count = wire.queue_count,
                                     .queue_size = wire.queue_size,
                                     .is_packed = has_packed_rings()};
}

// The file is the frontend's from here on; it comes back by SET_INFLIGHT_FD, now and to whoever
// serves this disk after us.
Expected<void> Backend::get_inflight_fd(Message& message) {
  const auto wanted = inflight_description(message);
  if (!wanted) return std::unexpected(wanted.error());
  const std::uint64_t size_bytes =
      virtio::InflightArea::bytes_for(wanted->queue_count, wanted->queue_size, wanted->is_packed);
  const auto file = make_inflight_file(size_bytes);
  if (!file) return std::unexpected(file.error());
  std::vector<std::byte> payload;
  append(payload, Inflight{.mmap_size = size_bytes,
                           .mmap_offset = 0,
                           .queue_count = wanted->queue_count,
                           .queue_size = wanted->queue_size,
                           .padding = 0});
  payload.resize(message.payload.size());  // with or without the padding, as it was asked
  const int fds[] = {file->get()};
  return reply(message, payload, fds);
}

Expected<void> Backend::set_inflight_fd(Message& message) {
  if (message.fds.empty()) return refused("no descriptor comes with it");
  const auto description = inflight_description(message);
  if (!description) return std::unexpected(description.error());
  // What is in flight now would be in flight in the old area.
  for (const Ring& ring : session_.rings) {
    if (ring.queue != nullptr) return refused(fmt::format("queue {} is running", ring.index));
  }
  auto area = virtio::InflightArea::map(message.fds[0].get(), *description);
  if (!area) return std::unexpected(std::move(area.error()));
  session_.inflight = std::move(*area);
  session_.inflight_is_of_before_reset = false;
  carry_writeback_over();
  return {};
}

// A driver reads and sets `writeback` once; a frontend that goes on with another backend does not
// repeat it, and the other backend may have been started with another cache mode.
void Backend::carry_writeback_over() {
  const bool can_be_set =
      (device_.negotiated_features() & virtio::feature_bit(virtio::kBlkFConfigWce)) != 0;
  if (session_.inflight == nullptr || !can_be_set) return;
  const auto writeback = session_.inflight->writeback();
  if (!writeback) return session_.inflight->keep_writeback(!device_.write_through());
  const std::byte value{*writeback ? std::uint8_t{1} : std::uint8_t{0}};
  [[maybe_unused]] const auto written =
      device_.write_config(virtio::kBlkConfigWriteback, {&value, 1});
}

// ---- Migration

// "Sets logging shared memory space"; with LOG_SHMFD it has a reply, asked for or not
// ("Communication").
Expected<void> Backend::set_log_base(Message& message) {
  if (!negotiated_protocol(kProtocolFLogShmfd)) return refused("LOG_SHMFD was not negotiated");
  if (message.fds.empty()) return refused("no descriptor comes with it");
  const auto wire = payload_of<LogDescription>(message);
  auto log = virtio::DirtyLog::map(message.fds[0].get(), wire.size_bytes, wire.mmap_offset);
  if (!log) return std::unexpected(std::move(log.error()));
  auto changed = while_quiesced([this, &log]() -> Expected<void> {
    session_.log = std::move(*log);
    return {};
  });
  if (!changed || wants_reply(message)) return changed;
  return reply_u64(message, 0);
}

Expected<void> Backend::set_log_fd(Message& message) {
  if (!negotiated_protocol(kProtocolFLogShmfd)) return refused("LOG_SHMFD was not negotiated");
  if (message.fds.empty()) return refused("no descriptor comes with it");
  return while_quiesced([this, &message]() -> Expected<void> {
    session_.log_event = std::move(message.fds[0]);
    return {};
  });
}

virtio::DirtyLogging Backend::logging_of(const Ring& ring) const {
  if ((session_.features & bit(kFLogAll)) == 0 || session_.log == nullptr) return {};
  return {.log = session_.log,
          .event_fd = session_.log_event.get(),
          .marks_ring = (ring.addresses.flags & kVringAddressFLog) != 0,
          .ring_address = ring.addresses.log_guest_address};
}

// A disk that has another size than when the frontend last looked is a change of its configuration.
Expected<void> Backend::take_disk() {
  if (options_.handover == nullptr || options_.handover->is_taken()) return {};
  const std::uint64_t before = device_.node().size_bytes();
  if (auto taken = options_.handover->take(); !taken) return taken;
  log::info("'{}' is taken", device_.node().name());
  if (device_.node().size_bytes() != before) notify_config_change();
  return {};
}

void Backend::give_up_unused_disk() {
  if (options_.handover == nullptr || !options_.handover->is_taken()) return;
  if (any_ring_runs()) return;
  if (const auto given = options_.handover->give_up(io_threads_); !given)
    return log::error("{}; '{}' is not given up", given.error().message, device_.node().name());
  log::info("'{}' is given up: no guest runs on it here", device_.node().name());
}

// ---- Status and reset

void Backend::reset() {
  for (Ring& ring : session_.rings) {
    stop(ring, Afterwards::kUnknown);
    if (!ring.base_before_reset) ring.base_before_reset = base_of(ring);
    ring.size = 0;
    ring.next_avail.reset();
    ring.left = {};
    ring.has_addresses = false;
    ring.started = false;
    ring.enabled = false;
    ring.waits_for_memory = false;
    ring.kick.reset();
  }
  give_up_unused_disk();
  device_.forget_features();
  session_.features = 0;
  session_.features_accepted = false;
  session_.inflight_is_of_before_reset = session_.inflight != nullptr;
  session_.status.reset();
  needs_reset_ = false;
}

Expected<void> Backend::reset_device(Message& /*message*/) {
  if (!negotiated_protocol(kProtocolFResetDevice))
    return refused("RESET_DEVICE was not negotiated");
  reset();
  return {};
}

Expected<void> Backend::set_status(Message& message) {
  if (!negotiated_protocol(kProtocolFStatus)) return refused("STATUS was not negotiated");
  const auto value = payload_of<std::uint64_t>(message);
  if (value != 0) return session_.status.write(value, session_.features_accepted);
  reset();
  return {};
}

Expected<void> Backend::get_status(Message& message) {
  if (!negotiated_protocol(kProtocolFStatus)) return refused("STATUS was not negotiated");
  return reply_u64(message, device_status());
}

std::uint8_t Backend::device_status() const {
  const bool needs_reset = needs_reset_.load(std::memory_order_relaxed);
  return static_cast<std::uint8_t>(session_.status.value() |
                                   (needs_reset ? virtio::kStatusNeedsReset : 0));
}

void Backend::tell_needs_reset() {
  if (needs_reset_.load(std::memory_order_relaxed) && session_.status.is_driver_ok())
    notify_config_change();
}

// ---- Rings

Expected<Backend::Ring*> Backend::ring_at(std::uint64_t index) {
  if (index < session_.rings.size()) return &session_.rings[index];
  return refused(fmt::format("there is no queue {}; there are {}", index, session_.rings.size()));
}

blockdev::IoThread& Backend::thread_of(const Ring& ring) const {
  return *io_threads_[ring.index % io_threads_.size()];
}

Expected<void> Backend::start_if_ready(Ring& ring) {
  if (ring.queue != nullptr || !ring.started || !ring.enabled) return {};
  auto outcome = start(ring);
  ring.waits_for_memory = false;
  // Or every later change of memory or features would be refused for it.
  if (!outcome) ring.started = false;
  return outcome;
}

// The driver may have chosen the other kind of rings since.
Expected<void> Backend::renew_inflight() {
  if (!session_.inflight_is_of_before_reset) return {};
  auto renewed = session_.inflight->renewed(has_packed_rings());
  if (!renewed) {
    return refused(fmt::format("the in-flight area of before the reset is {}; give another one",
                               renewed.error().message));
  }
  session_.inflight = std::move(*renewed);
  session_.inflight_is_of_before_reset = false;
  return {};
}

Expected<void> Backend::start(Ring& ring) {
  if (session_.memory == nullptr || ring.size == 0 || !ring.has_addresses) {
    return refused(fmt::format("queue {} is started before its memory, size and addresses are set",
                               ring.index));
  }
  if (auto taken = take_disk(); !taken) return taken;
  if (auto renewed = renew_inflight(); !renewed) return renewed;
  const virtio::BlkQueueSetup setup{.index = ring.index,
                                    .size = ring.size,
                                    .next_avail = base_of(ring),
                                    .descriptor_address = ring.addresses.descriptor_user_address,
                                    .avail_address = ring.addresses.avail_user_address,
                                    .used_address = ring.addresses.used_user_address,
                                    .kick_fd = ring.kick.get(),
                                    .call_fd = ring.call.get(),
                                    .error_fd = ring.error.get(),
                                    .inflight = session_.inflight,
                                    .left = ring.left,
                                    .logging = logging_of(ring),
                                    .on_broken = [this] {
                                      needs_reset_.store(true, std::memory_order_relaxed);
                                      if (options_.on_broken) options_.on_broken();
                                    }};
  blockdev::IoThread& thread = thread_of(ring);
  Expected<void> outcome;
  thread.run_and_wait([&] {
    auto queue = virtio::BlkQueue::start(device_, thread.context(), session_.memory, setup);
    if (queue) {
      ring.queue = std::move(*queue);
    } else {
      outcome = std::unexpected(std::move(queue.error()));
    }
  });
  if (outcome) {
    ring.base_before_reset.reset();
    ring.left = {};
  }
  return outcome;
}

virtio::BlkQueue::Unfinished Backend::unfinished_when(Afterwards afterwards) const {
  using enum virtio::BlkQueue::Unfinished;
  if (afterwards == Afterwards::kRunsAgain) return kLeave;
  if (session_.inflight == nullptr) return kFail;
  if (negotiated_protocol(kProtocolFGetVringBaseInflight)) return kLeave;
  // The in-flight area does not go where a guest is migrated to. A frontend that has stopped the
  // guest before it migrates it says nothing of that here.
  const bool may_migrate = (session_.features & bit(kFLogAll)) != 0 ||
                           (options_.handover != nullptr && afterwards == Afterwards::kUnknown);
  return may_migrate ? kFail : kLeave;
}

// Waits until nothing of the ring is in flight: from then on its memory may go.
void Backend::stop(Ring& ring, Afterwards afterwards) { stop(ring, unfinished_when(afterwards)); }

void Backend::stop(Ring& ring, virtio::BlkQueue::Unfinished unfinished) {
  if (ring.queue == nullptr) return;
  blockdev::IoThread& thread = thread_of(ring);
  std::promise<void> stopped;
  thread.loop().post([this, &ring, &stopped, unfinished] {
    ring.queue->stop(unfinished, [this, &ring, &stopped] {
      ring.next_avail = ring.queue->next_avail();
      if (ring.queue->broken()) ring.started = false;
      if (session_.inflight == nullptr) ring.left = ring.queue->left();
      ring.queue.reset();
      stopped.set_value();
    });
  });
  thread.wait_for(stopped.get_future());
}

Expected<void> Backend::while_quiesced(std::move_only_function<Expected<void>()> change) {
  for (Ring& ring : session_.rings) stop(ring, Afterwards::kRunsAgain);
  auto outcome = change();
  for (Ring& ring : session_.rings) {
    const bool was_started = ring.started;
    const bool has_waited = ring.waits_for_memory;
    auto started = start_if_ready(ring);
    if (started) continue;
    // A frontend may take a region away to bring it back larger: then the ring goes on.
    ring.started = ring.waits_for_memory = was_started;
    if (outcome && !has_waited) outcome = std::move(started);
  }
  return outcome;
}

Expected<void> Backend::set_vring_num(Message& message) {
  const auto state = payload_of<VringState>(message);
  const auto ring = ring_at(state.index);
  if (!ring) return std::unexpected(ring.error());
  if ((*ring)->queue != nullptr) return refused(fmt::format("queue {} is running", state.index));
  if (state.value == 0 || state.value > device_.options().queue_size_max ||
      (!has_packed_rings() && !std::has_single_bit(state.value))) {
    return refused(fmt::format("queue {}: size {} is no {} up to {}; see --queue-size", state.index,
                               state.value, has_packed_rings() ? "number" : "power of two",
                               device_.options().queue_size_max));
  }
  (*ring)->size = static_cast<std::uint16_t>(state.value);
  return {};
}

Expected<void> Backend::set_vring_addr(Message& message) {
  const auto addresses = payload_of<VringAddress>(message);
  const auto ring = ring_at(addresses.index);
  if (!ring) return std::unexpected(ring.error());
  stop(**ring, Afterwards::kRunsAgain);
  (*ring)->addresses = addresses;
  (*ring)->has_addresses = true;
  return start_if_ready(**ring);
}

Expected<void> Backend::set_vring_base(Message& message) {
  const auto state = payload_of<VringState>(message);
  const auto ring = ring_at(state.index);
  if (!ring) return std::unexpected(ring.error());
  if ((*ring)->queue != nullptr) return refused(fmt::format("queue {} is running", state.index));
  // What a packed ring's says is looked at when the ring starts, for its size may still come.
  if (!has_packed_rings() && state.value > std::numeric_limits<std::uint16_t>::max()) {
    return refused(fmt::format("queue {}: base {} is no 16-bit index", state.index, state.value));
  }
  (*ring)->next_avail = state.value;
  (*ring)->base_before_reset.reset();
  return {};
}

Expected<void> Backend::get_vring_base(Message& message) {
  const auto state = payload_of<VringState>(message);
  const auto ring = ring_at(state.index);
  if (!ring) return std::unexpected(ring.error());
  const bool suspends =
      session_.inflight != nullptr && negotiated_protocol(kProtocolFGetVringBaseInflight);
  stop(**ring,
       suspends ? virtio::BlkQueue::Unfinished::kSuspend : unfinished_when(Afterwards::kUnknown));
  (*ring)->started = false;
  (*ring)->waits_for_memory = false;
  (*ring)->kick.reset();
  give_up_unused_disk();
  std::vector<std::byte> payload;
  const std::uint32_t base = (*ring)->base_before_reset.value_or(base_of(**ring));
  append(payload, VringState{.index = state.index, .value = base});
  return reply(message, payload);
}

// "the back-end must start a ring upon receiving a kick": from here on the ring is looked at, kick
// or not. A kick that came before this message left the descriptor readable or the ring filled;
// both are seen.
Expected<void> Backend::set_vring_kick(Message& message) {
  const auto value = payload_of<std::uint64_t>(message);
  const auto ring = ring_at(value & kVringIndexMask);
  if (!ring) return std::unexpected(ring.error());
  const bool no_fd = (value & kVringNoFd) != 0;
  if (no_fd != message.fds.empty())
    return refused("its descriptor and its flag for none contradict each other");
  // Without a descriptor the ring would have to be polled for ever, which costs a processor; no
  // frontend asks for it.
  if (no_fd) return refused("a ring without a kick descriptor is not supported");
  stop(**ring, Afterwards::kRunsAgain);
  (*ring)->kick = std::move(message.fds[0]);
  (*ring)->started = true;
  return start_if_ready(**ring);
}

namespace {

// The descriptor of SET_VRING_CALL and SET_VRING_ERR: none if bit 8 says so.
Expected<UniqueFd> optional_fd(Message& message) {
  const bool no_fd = (payload_of<std::uint64_t>(message) & kVringNoFd) != 0;
  if (no_fd != message.fds.empty())
    return refused("its descriptor and its flag for none contradict each other");
  return no_fd ? UniqueFd() : std::move(message.fds[0]);
}

}  // namespace

Expected<void> Backend::set_vring_call(Message& message) {
  const auto ring = ring_at(payload_of<std::uint64_t>(message) & kVringIndexMask);
  if (!ring) return std::unexpected(ring.error());
  auto fd = optional_fd(message);
  if (!fd) return std::unexpected(std::move(fd.error()));
  if ((*ring)->queue != nullptr) {
    thread_of(**ring).run_and_wait([&] { (*ring)->queue->set_call_fd(fd->get()); });
  }
  (*ring)->call = std::move(*fd);  // closes the old one, which nobody uses any more
  return {};
}

Expected<void> Backend::set_vring_err(Message& message) {
  const auto ring = ring_at(payload_of<std::uint64_t>(message) & kVringIndexMask);
  if (!ring) return std::unexpected(ring.error());
  auto fd = optional_fd(message);
  if (!fd) return std::unexpected(std::move(fd.error()));
  if ((*ring)->queue != nullptr) {
    thread_of(**ring).run_and_wait([&] { (*ring)->queue->set_error_fd(fd->get()); });
  }
  (*ring)->error = std::move(*fd);
  return {};
}

Expected<void> Backend::set_vring_enable(Message& message) {
  const auto state = payload_of<VringState>(message);
  const auto ring = ring_at(state.index);
  if (!ring) return std::unexpected(ring.error());
  if (state.value > 1)
    return refused(fmt::format("queue {}: {} is neither 0 nor 1", state.index, state.value));
  (*ring)->enabled = state.value == 1;
  if (!(*ring)->enabled) stop(**ring, Afterwards::kUnknown);
  return start_if_ready(**ring);
}

std::vector<RingStatus> Backend::ring_status() const {
  std::vector<RingStatus> status(session_.rings.size());
  for (std::size_t i = 0; i < session_.rings.size(); ++i) {
    const Ring& ring = session_.rings[i];
    if (ring.queue == nullptr) continue;
    thread_of(ring).run_and_wait([&] {
      status[i] = {.running = true,
                   .broken = ring.queue->broken(),
                   .in_flight = ring.queue->in_flight(),
                   .waiting = ring.queue->waiting(),
                   .kept = ring.queue->kept(),
                   .statistics = ring.queue->statistics()};
    });
  }
  return status;
}

}  // namespace vblk::vhost_user
