#include "blockdev/conform/guest.h"

#include <algorithm>
#include <array>
#include <cstring>

#include <fmt/core.h>

#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace virtio;
using namespace vhost_user;

namespace {

constexpr std::size_t kDataBytes = std::size_t{1} << 20;
constexpr std::size_t kSegmentsMax = 256;
constexpr std::uint16_t kDescriptorsPerSlot = 3;
constexpr std::uint8_t kUntouched = 0xee;

std::byte byte_of(std::uint64_t stamp, std::size_t offset) {
  // Different in each sector and each byte of it, and never a constant fill.
  const std::uint64_t mixed = (stamp + offset / 8) * 0x9e3779b97f4a7c15U;
  return static_cast<std::byte>(mixed >> (8 * (offset % 8)));
}

void need(std::uint64_t wanted, std::uint64_t most, const char* what) {
  if (wanted > most)
    Probe::skip(fmt::format("takes {} {}, and the backend takes {}", wanted, what, most));
}

}  // namespace

Guest::Guest(Probe& probe, const GuestOptions& options)
    : probe_(probe),
      options_(options),
      channel_(probe),
      memory_(Probe::value(driver::DriverMemory::create(options.memory_bytes), "guest memory")) {
  channel_.negotiate(options.features, options.protocol_features);
  const auto slots = static_cast<std::size_t>(options.queue_size);
  for (std::uint16_t i = 0; i < options.queue_count; ++i) {
    rings_.push_back(std::make_unique<Ring>(*memory_, options.queue_size, options.base));
    if (channel_.has(kFEventIdx)) rings_.back()->use_event_idx();
    headers_.push_back(allocate(slots * kBlkRequestHeaderBytes, 16));
    statuses_.push_back(allocate(slots, 1));
  }
  if (options.memory_bytes[0] >= 4 * kDataBytes) data_ = allocate(kDataBytes);
  segments_ = allocate(kSegmentsMax * kBlkDiscardSegmentBytes, 16);
  limits();  // here nothing is on its way that could be taken for the answer
  if (!options.starts_rings) return;
  share_memory();
  for (std::uint16_t i = 0; i < options.queue_count; ++i) start_ring(i);
}

std::span<std::byte> Guest::allocate(std::size_t bytes, std::size_t alignment) {
  const auto room = memory_->allocate(bytes, alignment);
  Probe::expect(!room.empty(), "the suite's own guest memory is too small");
  return room;
}

void Guest::share_memory() {
  if (channel_.has_protocol(kProtocolFConfigureMemSlots)) {
    for (const auto& region : memory_->regions()) {
      const int fds[] = {region.fd};
      channel_.command(Request::kAddMemReg,
                       payload_of(SingleMemoryRegion{.padding = 0, .region = region.description}),
                       fds);
    }
    return;
  }
  share_table(channel_, *memory_);
}

void share_table(Channel& channel, const driver::DriverMemory& memory) {
  Bytes payload = payload_of(MemoryTableHead{
      .region_count = static_cast<std::uint32_t>(memory.regions().size()), .padding = 0});
  std::vector<int> fds;
  for (const auto& region : memory.regions()) {
    append(payload, region.description);
    fds.push_back(region.fd);
  }
  channel.command(Request::kSetMemTable, payload, fds);
}

void enable_ring(Channel& channel, std::uint32_t index, bool enable) {
  channel.command(Request::kSetVringEnable, payload_of(VringState{index, enable ? 1U : 0U}));
}

bool try_start_ring(Channel& channel, const Doorbells& bells, const RingStart& start) {
  const std::uint64_t number = 0;
  const int kick[] = {bells.kick_fd()};
  const int call[] = {bells.call_fd()};
  const auto lasts = [&channel](Request request, const Bytes& payload,
                                std::span<const int> fds = {}) {
    return channel.try_command(request, payload, fds) != Channel::Taken::kClosed;
  };
  return lasts(Request::kSetVringNum, payload_of(VringState{0, start.size})) &&
         lasts(Request::kSetVringBase, payload_of(VringState{0, start.base})) &&
         lasts(Request::kSetVringAddr, payload_of(start.addresses)) &&
         lasts(Request::kSetVringCall, payload_of(number), call) &&
         lasts(Request::kSetVringKick, payload_of(number), kick) &&
         lasts(Request::kSetVringEnable, payload_of(VringState{0, 1}));
}

void Guest::start_ring(std::uint16_t index) {
  conform::start_ring(channel_, ring(index), index, ring(index).used_index(), options_.has_call_fd);
}

std::uint16_t Guest::stop_ring(std::uint16_t index) {
  const Message answer = channel_.call(Request::kGetVringBase, payload_of(VringState{index, 0}));
  const auto state = decode<VringState>(answer.payload);
  Probe::expect(state && state->index == index,
                fmt::format("GET_VRING_BASE of ring {} is answered with {} bytes, for ring {}",
                            index, answer.payload.size(), state ? state->index : 0));
  return static_cast<std::uint16_t>(state->value);
}

std::byte* Guest::header_of(std::size_t ring, std::uint16_t slot) const {
  return headers_[ring].data() + slot * kBlkRequestHeaderBytes;
}

std::byte* Guest::status_byte(std::size_t ring, std::uint16_t slot) const {
  return statuses_[ring].data() + slot;
}

std::uint8_t Guest::status_of(std::size_t ring, std::uint16_t slot) const {
  return std::to_integer<std::uint8_t>(*status_byte(ring, slot));
}

const RequestLimits& Guest::limits() {
  static constexpr RequestLimits kNotTold{};
  auto& known = probe_.request_limits();
  if (known) return *known;
  if (!channel_.has_protocol(kProtocolFConfig)) return kNotTold;
  // A backend that says 0 has not thought of a limit: config/size-max and the like tell it so.
  const auto limit = [this](unsigned feature, std::uint32_t offset) {
    const bool is_told = (channel_.offered() & bit(feature)) != 0;
    const std::uint64_t value = is_told ? config_field(offset, 4) : 0;
    return value != 0 ? value : RequestLimits::kNone;
  };
  known = RequestLimits{
      .segment_bytes = limit(kBlkFSizeMax, kBlkConfigSizeMax),
      .segments = limit(kBlkFSegMax, kBlkConfigSegMax),
      .discard_sectors = limit(kBlkFDiscard, kBlkConfigMaxDiscardSectors),
      .discard_segments = limit(kBlkFDiscard, kBlkConfigMaxDiscardSeg),
      .write_zeroes_sectors = limit(kBlkFWriteZeroes, kBlkConfigMaxWriteZeroesSectors),
      .write_zeroes_segments = limit(kBlkFWriteZeroes, kBlkConfigMaxWriteZeroesSeg)};
  return *known;
}

void Guest::need_segment_bytes(std::size_t bytes) {
  need(bytes, limits().segment_bytes, "bytes in a segment");
}

void Guest::need_segments(std::size_t count) {
  need(count, limits().segments, "segments in a request");
}

void Guest::post(std::size_t index, std::uint16_t slot, std::uint32_t type, std::uint64_t sector,
                 std::span<const std::byte> readable, std::span<std::byte> writable) {
  write_request(index, slot, type, sector, readable, writable);
  offer(index, slot);
}

void Guest::offer(std::size_t index, std::uint16_t slot) {
  ring(index).offer(static_cast<std::uint16_t>(slot * kDescriptorsPerSlot));
  ring(index).publish();
}

void Guest::write_request(std::size_t index, std::uint16_t slot, std::uint32_t type,
                          std::uint64_t sector, std::span<const std::byte> readable,
                          std::span<std::byte> writable) {
  const std::size_t longest = std::max(readable.size(), writable.size());
  if (longest >= kDefaultBlock) need_segment_bytes(longest);
  std::byte* const header = header_of(index, slot);
  store_le<std::uint32_t>(header, type);
  store_le<std::uint32_t>(header + 4, 0);
  store_le<std::uint64_t>(header + 8, sector);
  std::byte* const status = status_byte(index, slot);
  *status = std::byte{kUntouched};
  std::array<Piece, 4> pieces;
  std::size_t count = 0;
  pieces[count++] = {address_of(header), kBlkRequestHeaderBytes, false};
  if (!readable.empty()) {
    pieces[count++] = {address_of(readable.data()), static_cast<std::uint32_t>(readable.size()),
                       false};
  }
  if (!writable.empty()) {
    pieces[count++] = {address_of(writable.data()), static_cast<std::uint32_t>(writable.size()),
                       true};
  }
  pieces[count++] = {address_of(status), 1, true};
  const auto first = static_cast<std::uint16_t>(slot * kDescriptorsPerSlot);
  ring(index).chain(first, std::span(pieces).first(count));
}

Answer Guest::await(std::size_t index, std::uint16_t slot) {
  if (!ring(index).wait_used()) {
    if (const std::string dead = probe_.death(); !dead.empty()) Probe::fail(dead);
    Probe::fail(fmt::format("a request on queue {} is not answered within {} ms", index,
                            kPatience.count()));
  }
  const auto used = ring(index).take();
  const unsigned head = slot * kDescriptorsPerSlot;
  Probe::expect(used->id == head,
                fmt::format("the used element names buffer {} instead of {}", used->id, head));
  const std::uint8_t status = status_of(index, slot);
  Probe::expect(status != kUntouched, "a request is returned with its status byte not written");
  return {.answered = true, .status = status, .used_length = used->length_bytes};
}

Answer Guest::request(std::uint32_t type, std::uint64_t sector, std::span<const std::byte> readable,
                      std::span<std::byte> writable, std::size_t index) {
  post(index, 0, type, sector, readable, writable);
  ring(index).kick_if_wanted();
  return await(index, 0);
}

Answer Guest::read(std::uint64_t sector, std::size_t bytes, std::size_t index) {
  return request(kBlkTIn, sector, {}, data_.first(bytes), index);
}

Answer Guest::write(std::uint64_t sector, std::size_t bytes, std::size_t index) {
  return request(kBlkTOut, sector, data_.first(bytes), {}, index);
}

Answer Guest::flush(std::size_t index) { return request(kBlkTFlush, 0, {}, {}, index); }

Answer Guest::segments(std::uint32_t type, std::span<const Segment> list) {
  Probe::expect(list.size() <= kSegmentsMax, "the suite has no room for so many segments");
  const bool zeroes = type == kBlkTWriteZeroes;
  if (zeroes || type == kBlkTDiscard) {
    const RequestLimits& most = limits();
    need(list.size(), zeroes ? most.write_zeroes_segments : most.discard_segments,
         "segments of a range each");
    for (const Segment& segment : list)
      need(segment.sector_count, zeroes ? most.write_zeroes_sectors : most.discard_sectors,
           "sectors in a range");
  }
  std::byte* at = segments_.data();
  for (const Segment& segment : list) {
    store_le<std::uint64_t>(at, segment.sector);
    store_le<std::uint32_t>(at + 8, segment.sector_count);
    store_le<std::uint32_t>(at + 12, segment.flags);
    at += kBlkDiscardSegmentBytes;
  }
  return request(type, 0, segments_.first(list.size() * kBlkDiscardSegmentBytes), {});
}

void Guest::must_read(std::uint64_t sector, std::size_t bytes, std::size_t index) {
  const Answer answer = read(sector, bytes, index);
  Probe::expect(
      answer.status == kBlkSOk,
      fmt::format("a read of {} bytes at sector {} has status {}", bytes, sector, answer.status));
}

void Guest::must_write(std::uint64_t sector, std::size_t bytes, std::size_t index) {
  const Answer answer = write(sector, bytes, index);
  Probe::expect(
      answer.status == kBlkSOk,
      fmt::format("a write of {} bytes at sector {} has status {}", bytes, sector, answer.status));
}

void Guest::must_flush(std::size_t index) {
  const Answer answer = flush(index);
  Probe::expect(answer.status == kBlkSOk, fmt::format("a flush has status {}", answer.status));
}

void Guest::fill(std::size_t bytes, std::uint64_t stamp) {
  for (std::size_t i = 0; i < bytes; ++i) data_[i] = byte_of(stamp, i);
}

std::optional<std::size_t> Guest::differs(std::size_t bytes, std::uint64_t stamp) const {
  for (std::size_t i = 0; i < bytes; ++i) {
    if (data_[i] != byte_of(stamp, i)) return i;
  }
  return std::nullopt;
}

void Guest::expect_data(std::size_t bytes, std::uint64_t stamp, const std::string& what) const {
  if (const auto wrong = differs(bytes, stamp))
    Probe::fail(fmt::format("byte {} of {} is wrong", *wrong, what));
}

std::uint16_t Guest::post_reads() {
  const auto count = static_cast<std::uint16_t>(ring().size() / kDescriptorsPerSlot);
  for (std::uint16_t i = 0; i < count; ++i)
    post(0, i, kBlkTIn, i * (kDefaultBlock / kSectorBytes), {},
         data_.subspan(i * kDefaultBlock, kDefaultBlock));
  ring().kick();
  return count;
}

void Guest::await_reads(std::uint16_t count, const char* under_what) {
  for (std::uint16_t i = 0; i < count; ++i) {
    if (!ring().wait_used())
      Probe::fail(fmt::format("{} of {} requests come back under {}", i, count, under_what));
    ring().take();
  }
  for (std::uint16_t i = 0; i < count; ++i) {
    Probe::expect(status_of(0, i) == kBlkSOk,
                  fmt::format("request {} under {} has status {}", i, under_what, status_of(0, i)));
  }
}

std::uint64_t Guest::config_field(std::uint32_t offset, std::size_t bytes) {
  if (!channel_.has_protocol(kProtocolFConfig)) Probe::skip("the backend offers no CONFIG");
  // From the start, as most frontends read it; no further, for a device may have no more.
  const auto size_bytes = static_cast<std::uint32_t>(offset + bytes);
  const auto config = channel_.read_config(0, size_bytes);
  if (!config) Probe::fail(fmt::format("GET_CONFIG of the first {} bytes is refused", size_bytes));
  std::uint64_t value = 0;
  for (std::size_t i = bytes; i > 0; --i)
    value = value << 8 | std::to_integer<std::uint64_t>((*config)[offset + i - 1]);
  return value;
}

std::uint16_t queues_of(Probe& probe, std::uint16_t most) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  if (!channel.has_protocol(kProtocolFMq)) return 1;
  return static_cast<std::uint16_t>(
      std::min<std::uint64_t>(channel.call_u64(Request::kGetQueueNum), most));
}

void need_packed(Probe& probe) {
  Channel channel(probe);
  if ((channel.call_u64(Request::kGetFeatures) & bit(kFRingPacked)) == 0)
    Probe::skip("no RING_PACKED is offered");
}

void need_queues(Probe& probe, std::uint16_t count) {
  const std::uint16_t there = queues_of(probe);
  if (there < count)
    Probe::skip(fmt::format("takes {} queues, and the backend has {}", count, there));
}

std::uint64_t Guest::capacity_sectors() { return config_field(kBlkConfigCapacity, 8); }

std::size_t Guest::block_bytes() {
  if (!has(kBlkFBlkSize)) return kSectorBytes;
  return config_field(kBlkConfigBlkSize, 4);
}

}  // namespace vblk::conform
