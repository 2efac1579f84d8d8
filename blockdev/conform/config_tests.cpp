// The config space, its reads and writes, and what it says of the features.
#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/backend_channel.h"
#include "blockdev/conform/guest.h"
#include "blockdev/conform/test.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace vhost_user;
using namespace virtio;

namespace {

constexpr std::uint32_t kUnused0 = 33;
constexpr std::uint32_t kUnused1 = 57;
constexpr std::size_t kUnused1Bytes = 3;
constexpr std::uint64_t kResizeStepBytes = std::uint64_t{16} << 20;

// Up to the last field that a feature on offer brings, and as QEMU asks for at least. Fields of
// features that are not there need not be there.
std::uint32_t config_bytes_of(std::uint64_t offered) {
  if ((offered & bit(kBlkFWriteZeroes)) != 0) return kBlkConfigBytes;
  if ((offered & bit(kBlkFDiscard)) != 0) return kBlkConfigMaxWriteZeroesSectors;
  return kBlkConfigMaxDiscardSectors;
}

Bytes whole_config(Channel& channel) {
  if (!channel.has_protocol(kProtocolFConfig)) Probe::skip("the backend offers no CONFIG");
  const std::uint32_t bytes = config_bytes_of(channel.offered());
  auto config = channel.read_config(0, bytes);
  if (!config) Probe::fail(fmt::format("GET_CONFIG of the first {} bytes is refused", bytes));
  return std::move(*config);
}

void every_range_reads_alike(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  const Bytes whole = whole_config(channel);
  for (std::uint32_t offset = 0; offset < whole.size(); ++offset) {
    for (std::uint32_t size = 1; offset + size <= whole.size(); ++size) {
      const auto part = channel.read_config(offset, size);
      if (!part) Probe::fail(fmt::format("{} bytes at {} are refused", size, offset));
      Probe::expect(
          std::equal(part->begin(), part->end(), whole.begin() + offset),
          fmt::format("{} bytes at {} differ from the same bytes of the whole", size, offset));
    }
  }
}

// Any answer will do, of a size that was asked for or of none.
void reads_beyond_are_answered(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  whole_config(channel);
  const std::array<std::pair<std::uint32_t, std::uint32_t>, 7> ranges{
      {{59, 2}, {60, 4}, {200, 8}, {256, 1}, {4096, 4}, {0x7fff'fffcU, 8}, {0xffff'fffcU, 8}}};
  for (const auto& [offset, size] : ranges) channel.read_config(offset, size);
  whole_config(channel);
}

void config_reads_before_features(Probe& probe) {
  Channel channel(probe);
  const std::uint64_t offered = channel.call_u64(Request::kGetFeatures);
  if ((offered & bit(kFProtocolFeatures)) == 0) Probe::skip("no PROTOCOL_FEATURES are offered");
  const std::uint64_t protocol = channel.call_u64(Request::kGetProtocolFeatures);
  if ((protocol & bit(kProtocolFConfig)) == 0) Probe::skip("the backend offers no CONFIG");
  channel.send(Request::kSetProtocolFeatures, payload_of(protocol & kPlainProtocol));
  const auto before = channel.read_config(0, config_bytes_of(offered));
  if (!before) Probe::fail("GET_CONFIG before SET_FEATURES is refused");
  channel.send(Request::kSetFeatures, payload_of(offered & kPlainFeatures));
  const auto after = channel.read_config(0, config_bytes_of(offered));
  if (!after) Probe::fail("GET_CONFIG after SET_FEATURES is refused");
  const auto field = [](const Bytes& bytes, std::uint32_t offset, std::size_t size) {
    return Bytes(bytes.begin() + offset, bytes.begin() + offset + static_cast<long>(size));
  };
  Probe::expect(field(*before, kBlkConfigCapacity, 8) == field(*after, kBlkConfigCapacity, 8) &&
                    field(*before, kBlkConfigBlkSize, 4) == field(*after, kBlkConfigBlkSize, 4),
                "capacity or blk_size differ before and after SET_FEATURES");
}

void padding_is_zero(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  const Bytes config = whole_config(channel);
  Probe::expect(config[kUnused0] == std::byte{0},
                fmt::format("unused0 is {}", std::to_integer<int>(config[kUnused0])));
  for (std::size_t i = 0; i < kUnused1Bytes && kUnused1 + i < config.size(); ++i)
    Probe::expect(config[kUnused1 + i] == std::byte{0},
                  fmt::format("byte {} of unused1 is not 0", i));
}

void capacity_is_right(Probe& probe) {
  Guest guest(probe);
  const std::uint64_t capacity = guest.capacity_sectors();
  Probe::expect(capacity > 0, "the capacity is 0");
  if (probe.has_own_backend()) {
    const std::uint64_t expected = probe.options().target.image_bytes / kSectorBytes;
    Probe::expect(capacity == expected,
                  fmt::format("{} sectors; the image has {}", capacity, expected));
  }
  const std::size_t block = guest.block_bytes();
  const std::uint64_t last = capacity - block / kSectorBytes;
  guest.must_read(last, block);
  const Answer beyond = guest.read(capacity, block);
  Probe::expect(beyond.status == kBlkSIoErr,
                fmt::format("a read at the capacity has status {}", beyond.status));
}

void block_size_makes_sense(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFBlkSize, "BLK_SIZE");
  const std::uint64_t block = guest.config_field(kBlkConfigBlkSize, 4);
  Probe::expect(block >= kSectorBytes && std::has_single_bit(block),
                fmt::format("blk_size is {}", block));
  Probe::expect(guest.capacity_sectors() * kSectorBytes % block == 0,
                fmt::format("the capacity is no multiple of blk_size {}", block));
}

void size_max_works(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFSizeMax, "SIZE_MAX");
  const std::uint64_t size_max = guest.config_field(kBlkConfigSizeMax, 4);
  Probe::expect(
      size_max >= kSectorBytes,
      fmt::format("SIZE_MAX is offered and size_max is {}: drivers cut every request into "
                  "the smallest pieces",
                  size_max));
  const std::size_t bytes =
      std::min<std::uint64_t>(size_max, guest.data().size()) / kDefaultBlock * kDefaultBlock;
  if (bytes > 0) guest.must_read(0, bytes);
}

// A request of as many segments as are announced.
void seg_max_works(Probe& probe) {
  std::uint64_t seg_max = 0;
  {
    Guest guest(probe, {.starts_rings = false});
    need_feature(guest, kBlkFSegMax, "SEG_MAX");
    seg_max = guest.config_field(kBlkConfigSegMax, 4);
  }
  Probe::expect(seg_max >= 1, "SEG_MAX is offered and seg_max is 0");
  constexpr std::size_t kMost = 1022;
  const std::size_t count = std::min<std::uint64_t>(seg_max, kMost);
  GuestOptions options{.queue_size = 128};
  const bool fits = count + 2 <= options.queue_size;
  if (!fits) options.features |= bit(kFIndirectDesc);
  Guest guest(probe, options);
  if (!fits && !guest.has(kFIndirectDesc))
    Probe::skip(
        fmt::format("seg_max {} needs indirect descriptors, which are not offered", seg_max));
  const std::size_t block = guest.block_bytes();
  const auto room = guest.allocate(count * block);
  guest.write_request(0, 0, kBlkTIn, 0, {}, {});  // for its header and status
  std::vector<Piece> pieces{
      {guest.address_of(guest.header_of(0, 0)), kBlkRequestHeaderBytes, false}};
  for (std::size_t i = 0; i < count; ++i) {
    pieces.push_back(
        {guest.address_of(room.data() + i * block), static_cast<std::uint32_t>(block), true});
  }
  pieces.push_back({guest.address_of(guest.status_byte(0, 0)), 1, true});
  if (fits) {
    guest.ring().chain(0, pieces);
  } else {
    const auto table = guest.allocate(pieces.size() * kDescriptorBytes, 16);
    Ring::chain_in(table.data(), 0, pieces);
    const Piece whole{guest.address_of(table.data()), static_cast<std::uint32_t>(table.size()),
                      false, kDescFIndirect};
    guest.ring().chain(0, {&whole, 1});
  }
  guest.offer(0, 0);
  guest.ring().kick();
  const Answer answer = guest.await(0, 0);
  Probe::expect(answer.status == kBlkSOk,
                fmt::format("a read of {} segments has status {}; seg_max is {}", count,
                            answer.status, seg_max));
}

void wce_comes_with_flush(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  const bool wce = (channel.offered() & bit(kBlkFConfigWce)) != 0;
  const bool flush = (channel.offered() & bit(kBlkFFlush)) != 0;
  Probe::expect(!wce || flush, "CONFIG_WCE is offered without FLUSH");
}

void flush_is_offered(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  Probe::expect((channel.offered() & bit(kBlkFFlush)) != 0, "FLUSH is not offered");
}

std::uint64_t writeback_of(Guest& guest) { return guest.config_field(kBlkConfigWriteback, 1); }

void writeback_can_be_set(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFConfigWce, "CONFIG_WCE");
  for (const unsigned value : {0U, 1U, 0U, 1U}) {
    const auto taken =
        guest.channel().write_config(kBlkConfigWriteback, {static_cast<std::byte>(value)});
    Probe::expect(taken == Channel::Taken::kOk,
                  fmt::format("writeback = {} is {}", value, to_string(taken)));
    const std::uint64_t now = writeback_of(guest);
    Probe::expect(now == value, fmt::format("writeback is {} after it was set to {}", now, value));
  }
}

void writeback_starts_at_zero_without_flush(Probe& probe) {
  Guest guest(probe, {.features = kPlainFeatures & ~bit(kBlkFFlush)});
  need_feature(guest, kBlkFConfigWce, "CONFIG_WCE");
  const std::uint64_t writeback = writeback_of(guest);
  Probe::expect(writeback == 0, fmt::format("writeback is {}", writeback));
}

void read_only_fields_stay(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  const Bytes before = whole_config(channel);
  const std::array<std::pair<std::uint32_t, std::size_t>, 4> fields{{{kBlkConfigCapacity, 8},
                                                                     {kBlkConfigBlkSize, 4},
                                                                     {kBlkConfigSegMax, 4},
                                                                     {kBlkConfigNumQueues, 2}}};
  for (const auto& [offset, size] : fields) {
    const auto taken = channel.write_config(offset, Bytes(size, std::byte{0x11}));
    if (taken == Channel::Taken::kClosed) return;  // refused in the strongest way
    Probe::expect(
        !channel.has_protocol(kProtocolFReplyAck) || taken == Channel::Taken::kRefused,
        fmt::format("SET_CONFIG of the read-only field at {} is {}", offset, to_string(taken)));
    Probe::expect(
        whole_config(channel) == before,
        fmt::format("SET_CONFIG of {} bytes at {} changes the config space", size, offset));
  }
}

void set_config_flags_are_checked(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFConfigWce, "CONFIG_WCE");
  const std::uint64_t before = writeback_of(guest);
  const auto taken = guest.channel().write_config(kBlkConfigWriteback,
                                                  {static_cast<std::byte>(before ^ 1U)}, 0x70);
  if (taken == Channel::Taken::kClosed) return;
  Probe::expect(
      !guest.channel().has_protocol(kProtocolFReplyAck) || taken == Channel::Taken::kRefused,
      fmt::format("SET_CONFIG with the flags 0x70 is {}", to_string(taken)));
  Probe::expect(writeback_of(guest) == before,
                "SET_CONFIG with unknown flags changes writeback all the same");
}

// "Vhost front-end messages used for live migration".
constexpr std::uint32_t kForMigration = 1;

// A frontend on the destination host may set all fields. Whether they are taken over is the
// backend's choice; that it says which, and does not say yes and do nothing, is not.
void config_of_a_migration_is_taken_or_refused(Probe& probe) {
  Guest guest(probe);
  Channel& channel = guest.channel();
  const Bytes before = whole_config(channel);
  Bytes wanted = before;
  if (guest.has(kBlkFConfigWce)) wanted[kBlkConfigWriteback] ^= std::byte{1};
  for (const Bytes& bytes : {before, wanted}) {
    const auto taken = channel.write_config(0, bytes, kForMigration);
    if (taken == Channel::Taken::kClosed) return;
    Probe::expect(taken != Channel::Taken::kSilent, "SET_CONFIG for migration is not answered");
    channel.send(Request::kGetFeatures);
    Probe::expect(
        channel.receive().has_value(),
        fmt::format("SET_CONFIG for migration is {}, and the connection ends", to_string(taken)));
    const Bytes now = whole_config(channel);
    if (taken == Channel::Taken::kRefused) {
      Probe::expect(now == before,
                    "SET_CONFIG for migration is refused, and the config space has changed");
    } else if (channel.has_protocol(kProtocolFReplyAck)) {
      Probe::expect(now == bytes,
                    "SET_CONFIG for migration is accepted, and the config space is another one");
    }
  }
  guest.must_read(0, kDefaultBlock);
}

// What a driver computes with: sizes that fit its own limits, an offset within a physical block.
void topology_makes_sense(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFTopology, "TOPOLOGY");
  const std::uint64_t block = guest.block_bytes();
  const std::uint64_t exponent = guest.config_field(kBlkConfigPhysicalBlockExp, 1);
  constexpr std::uint64_t kPhysicalBlockMax = std::uint64_t{1} << 31;
  Probe::expect(
      exponent < 32 && block << exponent <= kPhysicalBlockMax,
      fmt::format("physical_block_exp is {}, with logical blocks of {} bytes", exponent, block));
  const std::uint64_t offset = guest.config_field(kBlkConfigAlignmentOffset, 1);
  Probe::expect(offset < std::uint64_t{1} << exponent,
                fmt::format("alignment_offset is {}, and a physical block has {} logical ones",
                            offset, std::uint64_t{1} << exponent));
  const std::uint64_t least = guest.config_field(kBlkConfigMinIoSize, 2);
  const std::uint64_t best = guest.config_field(kBlkConfigOptIoSize, 4);
  Probe::expect(best == 0 || best >= least,
                fmt::format("opt_io_size is {}, and min_io_size {}", best, least));
}

void num_queues_agree(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFMq, "MQ");
  const std::uint64_t told = guest.config_field(kBlkConfigNumQueues, 2);
  need_protocol(guest.channel(), kProtocolFMq, "protocol feature MQ");
  const std::uint64_t count = guest.channel().call_u64(Request::kGetQueueNum);
  Probe::expect(told == count && told > 0,
                fmt::format("num_queues is {}, GET_QUEUE_NUM {}", told, count));
}

void discard_limits_are_told(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFDiscard, "DISCARD");
  const std::uint64_t sectors = guest.config_field(kBlkConfigMaxDiscardSectors, 4);
  const std::uint64_t segments = guest.config_field(kBlkConfigMaxDiscardSeg, 4);
  Probe::expect(sectors > 0 && segments > 0,
                fmt::format("max_discard_sectors {}, max_discard_seg {}", sectors, segments));
}

void write_zeroes_limits_are_told(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kBlkFWriteZeroes, "WRITE_ZEROES");
  const std::uint64_t sectors = guest.config_field(kBlkConfigMaxWriteZeroesSectors, 4);
  const std::uint64_t segments = guest.config_field(kBlkConfigMaxWriteZeroesSeg, 4);
  Probe::expect(
      sectors > 0 && segments > 0,
      fmt::format("max_write_zeroes_sectors {}, max_write_zeroes_seg {}", sectors, segments));
}

void version_1_is_offered(Probe& probe) {
  Channel channel(probe);
  Probe::expect((channel.call_u64(Request::kGetFeatures) & bit(kFVersion1)) != 0,
                "VERSION_1 is not offered");
}

void no_unknown_feature_is_offered(Probe& probe) {
  Channel channel(probe);
  const std::uint64_t offered = channel.call_u64(Request::kGetFeatures);
  std::uint64_t known = 0;
  // Of the block device with its legacy ones, of vhost, and the reserved ones up to virtio 1.4.
  for (const unsigned number :
       {0U,  1U,  2U,  4U,  5U,  6U,  7U,  9U,  10U, 11U, 12U, 13U, 14U, 15U, 16U, 17U, 24U,
        26U, 27U, 28U, 29U, 30U, 32U, 33U, 34U, 35U, 36U, 37U, 38U, 39U, 40U, 41U, 42U, 43U})
    known |= bit(number);
  Probe::expect((offered & ~known) == 0, fmt::format("bits {:#x} are offered", offered & ~known));
}

void resize(Backend& backend, std::uint64_t bytes) {
  const auto resized = backend.resize(bytes);
  if (!resized && resized.error().kind == ErrorKind::kNotSupported)
    Probe::skip(resized.error().message);
  if (!resized) Probe::fail(resized.error().message);
}

void expect_capacity(Guest& guest, std::uint64_t bytes) {
  const std::uint64_t capacity = guest.capacity_sectors();
  Probe::expect(
      capacity == bytes / kSectorBytes,
      fmt::format("the capacity is {} sectors instead of {}", capacity, bytes / kSectorBytes));
}

void resize_is_told(Probe& probe) {
  Backend& backend = probe.own_backend("the disk's size is changed");
  Guest guest(probe, {.protocol_features = kPlainProtocol | bit(kProtocolFBackendReq)});
  BackendChannel backend_channel(guest.channel());
  expect_capacity(guest, probe.options().target.image_bytes);
  for (std::uint64_t step = 1; step <= 2; ++step) {
    const std::uint64_t bytes = probe.options().target.image_bytes + step * kResizeStepBytes;
    resize(backend, bytes);
    backend_channel.await_config_change("the disk's size has changed");
    expect_capacity(guest, bytes);
    guest.must_read(bytes / kSectorBytes - 8, kDefaultBlock);
  }
}

// Requests that are in flight meanwhile, within the old end, are answered as ever.
void resize_is_harmless_under_load(Probe& probe) {
  Backend& backend = probe.own_backend("the disk's size is changed");
  Guest guest(probe);
  for (std::uint64_t step = 1; step <= 3; ++step) {
    const std::uint16_t count = guest.post_reads();
    resize(backend, probe.options().target.image_bytes + step * kResizeStepBytes);
    guest.await_reads(count, "a change of size");
  }
}

// A frontend that has no channel for it, or none at all, must not cost the others their disk.
void resize_without_listener(Probe& probe, bool connected) {
  Backend& backend = probe.own_backend("the disk's size is changed");
  std::optional<Guest> guest;
  if (connected) {
    guest.emplace(probe);
    guest->must_read(0, kDefaultBlock);
  }
  const std::uint64_t bytes = probe.options().target.image_bytes + kResizeStepBytes;
  resize(backend, bytes);
  if (!guest) guest.emplace(probe);
  expect_capacity(*guest, bytes);
  guest->must_read(bytes / kSectorBytes - 8, kDefaultBlock);
}

constexpr const char* kConfigSpace = "Basic Facilities / Device Configuration Space";
constexpr const char* kLayout = "Block Device / Device configuration layout";
constexpr const char* kInit = "Block Device / Device Initialization";
constexpr const char* kFeatures = "Block Device / Feature bits";
constexpr const char* kOperation = "Block Device / Device Operation";
constexpr const char* kMessages = "Front-end message types";

constexpr std::array kTests{
    Test{"config/every-range",
         {kVhostUser, kMessages, Force::kStates, "GET_CONFIG returns the bytes at its offset"},
         every_range_reads_alike},
    Test{"config/beyond-end",
         {kVhostUser, kMessages, Force::kMust,
          "a GET_CONFIG reply has the size that was asked for, or none to say that it failed"},
         reads_beyond_are_answered},
    Test{"config/before-features",
         {kVirtio, kConfigSpace, Force::kMust, "every field can be read before features are set"},
         config_reads_before_features},
    Test{"config/padding",
         {kVirtio, kInit, Force::kMust, "unused0 and unused1 are 0"},
         padding_is_zero},
    Test{"config/capacity",
         {kVirtio, kLayout, Force::kStates, "capacity is the disk's size in sectors of 512 bytes"},
         capacity_is_right},
    Test{"config/blk-size",
         {kVirtio, kInit, Force::kRobust,
          "blk_size is a power of two from 512 that divides the capacity"},
         block_size_makes_sense},
    Test{
        "config/size-max",
        {kVirtio, kFeatures, Force::kRobust, "SIZE_MAX that is offered has a size_max that serves"},
        size_max_works},
    Test{"config/seg-max",
         {kVirtio, kFeatures, Force::kStates, "a request may have seg_max segments"},
         seg_max_works},
    Test{"config/flush-offered",
         {kVirtio, kInit, Force::kShould, "FLUSH is offered"},
         flush_is_offered},
    Test{"config/wce-needs-flush",
         {kVirtio, kInit, Force::kMust, "CONFIG_WCE is offered only with FLUSH"},
         wce_comes_with_flush},
    Test{"config/writeback-set",
         {kVirtio, kInit, Force::kStates,
          "with CONFIG_WCE the cache mode can be set and read through writeback"},
         writeback_can_be_set},
    Test{"config/writeback-without-flush",
         {kVirtio, kInit, Force::kMust,
          "with CONFIG_WCE and without FLUSH negotiated, writeback starts as 0"},
         writeback_starts_at_zero_without_flush},
    Test{"config/read-only-fields",
         {kVhostUser, kMessages, Force::kMust, "SET_CONFIG of a read-only field is not accepted"},
         read_only_fields_stay},
    Test{"config/set-config-flags",
         {kVhostUser, kMessages, Force::kMust, "the flags of SET_CONFIG are checked"},
         set_config_flags_are_checked},
    Test{"config/set-config-migration",
         {kVhostUser, kMessages, Force::kRobust,
          "SET_CONFIG for migration is taken over or refused, and nothing between"},
         config_of_a_migration_is_taken_or_refused},
    Test{"config/topology",
         {kVirtio, kLayout, Force::kRobust,
          "TOPOLOGY that is offered has sizes that a driver can compute with"},
         topology_makes_sense},
    Test{"config/num-queues",
         {kVirtio, kLayout, Force::kRobust,
          "num_queues is the number of queues, the same that GET_QUEUE_NUM tells"},
         num_queues_agree},
    Test{"config/discard-limits",
         {kVirtio, kFeatures, Force::kRobust, "DISCARD that is offered has limits above 0"},
         discard_limits_are_told},
    Test{"config/write-zeroes-limits",
         {kVirtio, kFeatures, Force::kRobust, "WRITE_ZEROES that is offered has limits above 0"},
         write_zeroes_limits_are_told},
    Test{"config/version-1",
         {kVirtio, "Reserved Feature Bits", Force::kMust, "VERSION_1 is offered"},
         version_1_is_offered},
    Test{"config/unknown-features",
         {kVirtio, "Basic Facilities / Feature Bits", Force::kStates,
          "no feature is offered that virtio 1.4 still reserves"},
         no_unknown_feature_is_offered},
    Test{"config/resize-told",
         {kVirtio13, kOperation, Force::kShould,
          "each change of the capacity triggers a configuration change notification"},
         resize_is_told},
    Test{"config/resize-under-load",
         {kVirtio, kOperation, Force::kRobust,
          "requests that are in flight while the capacity changes are answered as ever"},
         resize_is_harmless_under_load},
    Test{"config/resize-without-channel",
         {kVhostUser, "Back-end message types", Force::kRobust,
          "a change of the capacity does no harm to a frontend without a back-end channel"},
         [](Probe& probe) { resize_without_listener(probe, true); }},
    Test{"config/resize-unconnected",
         {kVhostUser, "Back-end message types", Force::kRobust,
          "a change of the capacity does no harm before the first frontend connects"},
         [](Probe& probe) { resize_without_listener(probe, false); }},
};

}  // namespace

std::span<const Test> config_tests() { return kTests; }

}  // namespace vblk::conform
