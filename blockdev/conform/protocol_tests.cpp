// What the messages of vhost-user do, said properly.
#include <algorithm>
#include <array>
#include <cstdint>
#include <unistd.h>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/test.h"

namespace vblk::conform {

using namespace vhost_user;
using namespace virtio;

namespace {

void features_are_renegotiated(Probe& probe) {
  std::uint64_t first = 0;
  for (int round = 0; round < 3; ++round) {
    Guest guest(probe);
    guest.must_read(0, kDefaultBlock);
    if (round == 0) first = guest.channel().offered();
    Probe::expect(guest.channel().offered() == first,
                  fmt::format("offered {:#x} at first and {:#x} in connection {}", first,
                              guest.channel().offered(), round + 1));
  }
}

void protocol_features_come_early(Probe& probe) {
  Channel channel(probe);
  const std::uint64_t features = channel.call_u64(Request::kGetFeatures);
  if ((features & bit(kFProtocolFeatures)) == 0) Probe::skip("no PROTOCOL_FEATURES are offered");
  const std::uint64_t offered = channel.call_u64(Request::kGetProtocolFeatures);
  channel.send(Request::kSetProtocolFeatures, payload_of(offered & kPlainProtocol));
  const std::uint64_t again = channel.call_u64(Request::kGetProtocolFeatures);
  Probe::expect(again == offered, fmt::format("offered {:#x}, then {:#x}", offered, again));
}

// Each of what is offered left out in turn, and all but what is needed.
void any_subset_is_accepted(Probe& probe) {
  constexpr std::uint64_t kNeeded = bit(kFVersion1) | bit(kFProtocolFeatures);
  std::uint64_t offered = 0;
  {
    Channel channel(probe);
    offered = channel.call_u64(Request::kGetFeatures);
  }
  const std::uint64_t usable = kPlainFeatures | bit(kFIndirectDesc) | bit(kFEventIdx);
  for (unsigned number = 0; number < 64; ++number) {
    const std::uint64_t left_out = bit(number) & ~kNeeded;
    if ((offered & usable & left_out) == 0) continue;
    Guest guest(probe, {.features = usable & ~left_out});
    guest.must_read(0, kDefaultBlock);
  }
  Guest guest(probe, {.features = kNeeded});
  guest.must_read(0, kDefaultBlock);
}

void unoffered_features_are_refused(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  need_protocol(channel, kProtocolFReplyAck, "REPLY_ACK");
  std::uint64_t unknown = 0;
  for (unsigned number = 63; number > 40 && unknown == 0; --number)
    unknown = bit(number) & ~channel.offered();
  const auto taken =
      channel.try_command(Request::kSetFeatures, payload_of(channel.features() | unknown));
  Probe::expect(taken != Channel::Taken::kOk,
                fmt::format("SET_FEATURES with {:#x}, which was not offered, is {}", unknown,
                            to_string(taken)));
}

void replies_have_their_header(Probe& probe) {
  Channel channel(probe);
  channel.send(Request::kGetFeatures);
  const auto answer = channel.receive();
  if (!answer) Probe::fail("GET_FEATURES is not answered");
  const std::uint32_t flags = answer->header.flags;
  Probe::expect((flags & kVersionMask) == kVersion,
                fmt::format("version {}", flags & kVersionMask));
  Probe::expect((flags & kFlagReply) != 0, fmt::format("flags {:#x}", flags));
  Probe::expect(
      answer->request() == Request::kGetFeatures && answer->payload.size() == 8,
      fmt::format("message {} with {} bytes", answer->header.request, answer->payload.size()));
}

void ack_is_given(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  need_protocol(channel, kProtocolFReplyAck, "REPLY_ACK");
  channel.send(Request::kSetVringNum, payload_of(VringState{0, 64}), {}, kVersion | kFlagNeedReply);
  const auto answer = channel.receive();
  if (!answer) Probe::fail("SET_VRING_NUM with need_reply is not answered");
  const auto status = decode<std::uint64_t>(answer->payload);
  Probe::expect(answer->request() == Request::kSetVringNum && status == 0U,
                fmt::format("answered by message {}, {}", answer->header.request,
                            status ? *status : ~std::uint64_t{0}));
}

void ack_only_where_asked(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  need_protocol(channel, kProtocolFReplyAck, "REPLY_ACK");
  channel.send(Request::kSetVringNum, payload_of(VringState{0, 64}));
  channel.call(Request::kGetFeatures);  // fails if something else is answered first
}

void ack_does_not_double_a_reply(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  need_protocol(channel, kProtocolFReplyAck, "REPLY_ACK");
  channel.send(Request::kGetFeatures, {}, {}, kVersion | kFlagNeedReply);
  channel.send(Request::kGetProtocolFeatures);
  const auto first = channel.receive();
  const auto second = channel.receive();
  if (!first || !second) Probe::fail("two messages that have replies do not get two");
  Probe::expect(
      first->request() == Request::kGetFeatures && first->payload.size() == 8 &&
          second->request() == Request::kGetProtocolFeatures,
      fmt::format("answered by {} and then by {}", first->header.request, second->header.request));
}

void queue_num_is_told(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  Probe::expect(channel.has_protocol(kProtocolFMq), "no MQ is offered");
  const std::uint64_t count = channel.call_u64(Request::kGetQueueNum);
  Probe::expect(count >= 1 && count <= 65535, fmt::format("{} queues", count));
}

void every_queue_works(Probe& probe) {
  const std::uint16_t count = queues_of(probe);
  Guest guest(probe, {.queue_count = count});
  for (std::uint16_t i = 0; i < count; ++i) guest.must_read(0, kDefaultBlock, i);
  for (std::uint16_t i = count; i > 0; --i) guest.must_read(8, kDefaultBlock, i - 1U);
}

void base_is_told(Probe& probe) {
  Guest guest(probe);
  constexpr std::uint16_t kCount = 7;
  for (unsigned i = 0; i < kCount; ++i) guest.must_read(0, kDefaultBlock);
  const std::uint16_t base = guest.stop_ring(0);
  Probe::expect(base == kCount, fmt::format("after {} requests the base is {}", kCount, base));
}

// Posts as many reads as there are slots.
std::uint16_t post_many(Guest& guest, std::size_t bytes) {
  const auto count = static_cast<std::uint16_t>(guest.ring().size() / 3);
  for (std::uint16_t i = 0; i < count; ++i) {
    const auto part = guest.data().subspan((i * bytes) % guest.data().size(), bytes);
    guest.post(0, i, kBlkTIn, 0, {}, part);
  }
  return count;
}

void stop_drains(Probe& probe) {
  for (int round = 0; round < 20; ++round) {
    Guest guest(probe);
    post_many(guest, 32768);
    guest.ring().kick();
    const std::uint16_t base = guest.stop_ring(0);
    const std::uint16_t used = guest.ring().device_used_index();
    Probe::expect(base == used,
                  fmt::format("GET_VRING_BASE says {} with the used index at {}: {} requests were "
                              "taken and not returned",
                              base, used, base - used));
    ::usleep(20'000);
    Probe::expect(guest.ring().device_used_index() == used,
                  "the used ring moves after GET_VRING_BASE is answered");
  }
}

void stopped_ring_is_left_alone(Probe& probe) {
  Guest guest(probe);
  guest.must_read(0, kDefaultBlock);
  guest.stop_ring(0);
  guest.post(0, 0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
  guest.ring().kick();
  Probe::expect(!guest.ring().wait_used(kQuiet), "a request is served on a stopped ring");
}

void ring_goes_on_at_its_base(Probe& probe) {
  Guest guest(probe);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 3; ++i) guest.must_read(0, kDefaultBlock);
    const std::uint16_t base = guest.stop_ring(0);
    Probe::expect(
        base == guest.ring().avail_index(),
        fmt::format("the base is {} and the avail index {}", base, guest.ring().avail_index()));
    guest.start_ring(0);
  }
  guest.must_read(0, kDefaultBlock);
}

void waiting_request_is_seen_at_start(Probe& probe) {
  Guest guest(probe);
  guest.must_read(0, kDefaultBlock);
  guest.stop_ring(0);
  guest.post(0, 0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
  guest.ring().kick();  // before the ring is started: the descriptor stays readable
  guest.start_ring(0);
  guest.await(0, 0);
}

void indices_wrap(Probe& probe) {
  Guest guest(probe, {.base = 65533});
  for (int i = 0; i < 70; ++i) guest.must_read(0, kDefaultBlock);
  const std::uint16_t base = guest.stop_ring(0);
  Probe::expect(base == static_cast<std::uint16_t>(65533 + 70),
                fmt::format("the base is {} instead of 67", base));
}

constexpr std::uint64_t kTestSector = 64;
constexpr std::uint64_t kStamp = 0x70;

// A read on ring 0, which is disabled: it must not have an effect, and is done, whole, once the
// ring is enabled, unless the backend has given it back as failed. `knows_data`: write_stamp() has
// written what it reads.
void expect_no_effect_until_enabled(Guest& guest, bool knows_data, const char* when) {
  guest.fill(kDefaultBlock, kStamp + 1);
  guest.post(0, 0, kBlkTIn, kTestSector, {}, guest.data().first(kDefaultBlock));
  guest.ring().kick();
  const bool served = guest.ring().wait_used(kQuiet) && guest.status_of(0, 0) == kBlkSOk;
  Probe::expect(!served, fmt::format("a read is carried out {}", when));
  Probe::expect(!guest.differs(kDefaultBlock, kStamp + 1),
                fmt::format("a read's data is written {}", when));
  enable_ring(guest.channel(), 0);
  guest.ring().kick();
  const Answer answer = guest.await(0, 0);
  if (answer.status != kBlkSOk || !knows_data) return;
  guest.expect_data(kDefaultBlock, kStamp, "a read that has waited for its ring to be enabled");
}

// Writes what expect_no_effect_until_enabled() reads; whether it could.
bool write_stamp(Probe& probe, Guest& guest) {
  if (!probe.options().target.may_write) return false;
  guest.fill(kDefaultBlock, kStamp);
  guest.must_write(kTestSector, kDefaultBlock);
  return true;
}

void disabled_ring_has_no_effects(Probe& probe) {
  Guest guest(probe);
  need_feature(guest, kFProtocolFeatures, "PROTOCOL_FEATURES");
  guest.must_read(0, kDefaultBlock);
  const bool knows_data = write_stamp(probe, guest);
  enable_ring(guest.channel(), 0, false);
  expect_no_effect_until_enabled(guest, knows_data, "on a disabled ring");
}

// Another ring, which is enabled, sees whether the disk has changed.
void disabled_ring_writes_nothing(Probe& probe) {
  need_queues(probe, 2);
  Guest guest(probe, {.queue_count = 2});
  need_feature(guest, kFProtocolFeatures, "PROTOCOL_FEATURES");
  write_stamp(probe, guest);
  enable_ring(guest.channel(), 0, false);
  const auto own = guest.data().subspan(kDefaultBlock, kDefaultBlock);
  std::ranges::fill(own, std::byte{0x3c});
  guest.post(0, 0, kBlkTOut, kTestSector, own, {});
  guest.ring(0).kick();
  guest.ring(0).wait_used(kQuiet);
  guest.must_read(kTestSector, kDefaultBlock, 1);
  const auto changed = guest.differs(kDefaultBlock, kStamp);
  Probe::expect(!changed, fmt::format("a write on a disabled ring has changed byte {} of the disk",
                                      changed.value_or(0)));
  enable_ring(guest.channel(), 0);
  guest.ring(0).kick();
  if (guest.await(0, 0).status != kBlkSOk) return;
  guest.must_read(kTestSector, kDefaultBlock, 1);
  Probe::expect(std::ranges::equal(guest.data().first(kDefaultBlock), own),
                "a write that has waited for its ring to be enabled is not on the disk");
}

void ring_starts_disabled(Probe& probe) {
  bool knows_data = false;
  {
    Guest writer(probe);
    knows_data = write_stamp(probe, writer);
  }
  Guest guest(probe, {.starts_rings = false});
  need_feature(guest, kFProtocolFeatures, "PROTOCOL_FEATURES");
  guest.share_memory();
  set_up_ring(guest.channel(), guest.ring(), 0, 0);
  expect_no_effect_until_enabled(guest, knows_data, "before SET_VRING_ENABLE");
}

void ring_is_enabled_without_protocol_features(Probe& probe) {
  Guest guest(probe, {.features = kPlainFeatures & ~bit(kFProtocolFeatures)});
  guest.must_read(0, kDefaultBlock);
}

void call_descriptor_changes(Probe& probe) {
  Guest guest(probe);
  guest.must_read(0, kDefaultBlock);
  Ring& ring = guest.ring();
  ring.replace_call_fd();
  const std::uint64_t number = 0;
  const int call[] = {ring.call_fd()};
  guest.channel().command(Request::kSetVringCall, payload_of(number), call);
  ring.take_calls();
  guest.must_read(0, kDefaultBlock);
  Probe::expect(ring.wait_call(kPatience), "a used buffer is not told to the new call descriptor");
}

void call_descriptor_is_optional(Probe& probe) {
  Guest guest(probe, {.has_call_fd = false});
  for (int i = 0; i < 5; ++i) guest.must_read(0, kDefaultBlock);
}

// Without a kick descriptor the backend has to poll: it does, or it says that it does not.
void kick_descriptor_is_optional(Probe& probe) {
  Guest guest(probe, {.starts_rings = false});
  guest.share_memory();
  const Ring& ring = guest.ring();
  Channel& channel = guest.channel();
  const std::uint64_t number = 0;
  const int call[] = {ring.call_fd()};
  channel.command(Request::kSetVringNum, payload_of(VringState{0, ring.size()}));
  channel.command(Request::kSetVringAddr, payload_of(ring.addresses(0)));
  channel.command(Request::kSetVringCall, payload_of(number), call);
  if (channel.try_command(Request::kSetVringKick, payload_of(number | kVringNoFd)) !=
      Channel::Taken::kOk)
    return;
  if (channel.has(kFProtocolFeatures)) enable_ring(channel, 0);
  guest.post(0, 0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
  guest.await(0, 0);
}

void error_descriptor_is_optional(Probe& probe) {
  Guest guest(probe);
  const std::uint64_t number = 0;
  guest.channel().command(Request::kSetVringErr, payload_of(number | kVringNoFd));
  guest.must_read(0, kDefaultBlock);
}

void unoffered_protocol_features_are_refused(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  need_protocol(channel, kProtocolFReplyAck, "REPLY_ACK");
  const std::uint64_t unknown = bit(63);
  const auto taken =
      channel.try_command(Request::kSetProtocolFeatures,
                          payload_of((channel.offered_protocol() & kPlainProtocol) | unknown));
  Probe::expect(taken != Channel::Taken::kOk,
                fmt::format("SET_PROTOCOL_FEATURES with {:#x}, which was not offered, is {}",
                            unknown, to_string(taken)));
}

// With all rings stopped the device is suspended: it answers its frontend, and lets the guest be.
void suspended_device_answers(Probe& probe) {
  Guest guest(probe);
  guest.must_read(0, kDefaultBlock);
  guest.stop_ring(0);
  guest.ring().take_calls();
  const Bytes memory(guest.memory().begin(), guest.memory().begin() + guest.memory().size_bytes());
  Channel& channel = guest.channel();
  channel.call(Request::kGetFeatures);
  channel.call(Request::kGetProtocolFeatures);
  if (channel.has_protocol(kProtocolFMq)) channel.call(Request::kGetQueueNum);
  if (channel.has_protocol(kProtocolFConfig)) channel.read_config(0, kBlkConfigBytes);
  guest.ring().kick();
  ::usleep(30'000);
  Probe::expect(std::equal(memory.begin(), memory.end(), guest.memory().begin()),
                "guest memory is written with all rings stopped");
  Probe::expect(guest.ring().take_calls() == 0, "the guest is notified with all rings stopped");
}

// Not the backend's fault: a list of what this suite does not look into.
void everything_is_exercised(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  // VERSION_1 and the legacy bits that go without saying: NOTIFY_ON_EMPTY, ANY_LAYOUT.
  const std::uint64_t features = kPlainFeatures | bit(kFIndirectDesc) | bit(kFEventIdx) |
                                 bit(kFRingPacked) | bit(kFLogAll) | bit(24) | bit(27);
  const std::uint64_t protocol = kPlainProtocol | bit(kProtocolFLogShmfd) |
                                 bit(kProtocolFBackendReq) | bit(kProtocolFInflightShmfd) |
                                 bit(kProtocolFConfigureMemSlots) |
                                 bit(kProtocolFGetVringBaseInflight) | bit(13) | bit(16);
  std::string left;
  for (unsigned number = 0; number < 64; ++number) {
    if ((channel.offered() & ~features & bit(number)) != 0)
      left += fmt::format(" feature {}", number);
  }
  for (unsigned number = 0; number < 64; ++number) {
    if ((channel.offered_protocol() & ~protocol & bit(number)) != 0)
      left += fmt::format(" protocol feature {}", number);
  }
  if (!left.empty()) Probe::skip("offered, and not looked into by this suite:" + left);
}

void memory_slots_are_told(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol | bit(kProtocolFConfigureMemSlots));
  need_protocol(channel, kProtocolFConfigureMemSlots, "CONFIGURE_MEM_SLOTS");
  const std::uint64_t slots = channel.call_u64(Request::kGetMaxMemSlots);
  Probe::expect(slots >= 1, "no slots");
}

void reset_owner_is_harmless(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  channel.send(Request::kResetOwner);
  channel.call(Request::kGetFeatures);
}

void messages_come_in_pieces(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  Bytes bytes = payload_of(Header{.request = static_cast<std::uint32_t>(Request::kSetVringNum),
                                  .flags = kVersion,
                                  .payload_bytes = sizeof(VringState)});
  const Bytes payload = payload_of(VringState{0, 64});
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  for (const std::byte& byte : bytes) {
    Probe::expect(channel.send_raw({&byte, 1}), "the backend closes after a part of a message");
    ::usleep(1000);
  }
  channel.call(Request::kGetFeatures);
}

void messages_come_together(Probe& probe) {
  Channel channel(probe);
  const Bytes one = payload_of(Header{.request = static_cast<std::uint32_t>(Request::kGetFeatures),
                                      .flags = kVersion,
                                      .payload_bytes = 0});
  constexpr int kCount = 50;
  Bytes all;
  for (int i = 0; i < kCount; ++i) all.insert(all.end(), one.begin(), one.end());
  channel.send_raw(all);
  for (int i = 0; i < kCount; ++i) {
    const auto answer = channel.receive();
    Probe::expect(answer && answer->request() == Request::kGetFeatures,
                  fmt::format("{} of {} messages sent at once are answered", i, kCount));
  }
}

constexpr const char* kFeatureBits = "Basic Facilities / Feature Bits";
constexpr const char* kMessages = "Front-end message types";
constexpr const char* kRingStates = "Ring states";
constexpr const char* kReplyAck = "VHOST_USER_PROTOCOL_F_REPLY_ACK";

constexpr std::array kTests{
    Test{"protocol/features-renegotiated",
         {kVirtio, kFeatureBits, Force::kShould,
          "features that were negotiated once can be negotiated again after a reset"},
         features_are_renegotiated},
    Test{"protocol/features-subset",
         {kVirtio, kFeatureBits, Force::kShould,
          "any valid subset of the offered features is accepted"},
         any_subset_is_accepted},
    Test{"protocol/features-unoffered",
         {kVhostUser, "Communication", Force::kRobust,
          "SET_FEATURES with a bit that was not offered is refused, not ignored"},
         unoffered_features_are_refused},
    Test{"protocol/protocol-features-early",
         {kVhostUser, kMessages, Force::kMust,
          "GET_ and SET_PROTOCOL_FEATURES are supported before SET_FEATURES"},
         protocol_features_come_early},
    Test{"protocol/reply-header",
         {kVhostUser, "Message Specification", Force::kStates,
          "a reply has version 1, the reply flag, and the number of its request"},
         replies_have_their_header},
    Test{"protocol/reply-ack",
         {kVhostUser, kReplyAck, Force::kMust,
          "a command with need_reply is answered with 64 bits that are zero for success"},
         ack_is_given},
    Test{"protocol/reply-ack-unasked",
         {kVhostUser, kReplyAck, Force::kStates, "a command without need_reply has no reply"},
         ack_only_where_asked},
    Test{"protocol/reply-ack-once",
         {kVhostUser, kReplyAck, Force::kStates,
          "need_reply changes nothing for a message that has a reply of its own"},
         ack_does_not_double_a_reply},
    Test{"protocol/queue-num",
         {kVhostUser, "Multiple queue support", Force::kShould,
          "MQ is offered, and GET_QUEUE_NUM tells how many queues there are"},
         queue_num_is_told},
    Test{"protocol/every-queue",
         {kVhostUser, "Multiple queue support", Force::kStates,
          "each of the queues that GET_QUEUE_NUM tells serves requests"},
         every_queue_works},
    Test{"protocol/vring-base",
         {kVhostUser, kMessages, Force::kStates, "GET_VRING_BASE tells the next available index"},
         base_is_told},
    Test{
        "protocol/vring-base-drained",
        {kVhostUser, kRingStates, Force::kMust,
         "a ring is stopped when GET_VRING_BASE is answered: what was taken has been returned, and "
         "nothing comes later"},
        stop_drains},
    Test{"protocol/stopped-ring",
         {kVhostUser, kRingStates, Force::kMust, "a stopped ring is not processed"},
         stopped_ring_is_left_alone},
    Test{"protocol/vring-resumes",
         {kVhostUser, kMessages, Force::kStates, "a ring goes on at its SET_VRING_BASE"},
         ring_goes_on_at_its_base},
    Test{"protocol/kick-before-start",
         {kVhostUser, kRingStates, Force::kMust,
          "a ring is started when its kick descriptor is found readable"},
         waiting_request_is_seen_at_start},
    Test{"protocol/index-wraps",
         {kVirtio, "Supplying Buffers to The Device / Updating idx", Force::kStates,
          "indices run on through 65535 to 0"},
         indices_wrap},
    Test{"protocol/ring-starts-disabled",
         {kVhostUser, kRingStates, Force::kMust,
          "with PROTOCOL_FEATURES a ring has no effects before SET_VRING_ENABLE"},
         ring_starts_disabled},
    Test{"protocol/disabled-ring",
         {kVhostUser, kRingStates, Force::kMust, "a disabled ring has no effects"},
         disabled_ring_has_no_effects},
    Test{.name = "protocol/disabled-ring-write",
         .statement = {kVhostUser, kRingStates, Force::kMust,
                       "a write on a disabled ring does not reach the disk before the ring is "
                       "enabled"},
         .run = disabled_ring_writes_nothing,
         .destructive = true},
    Test{"protocol/enabled-without-protocol-features",
         {kVhostUser, kRingStates, Force::kStates,
          "without PROTOCOL_FEATURES a ring starts enabled"},
         ring_is_enabled_without_protocol_features},
    Test{"protocol/call-descriptor-changes",
         {kVhostUser, kRingStates, Force::kMust,
          "the call descriptor can be changed while the ring is processed"},
         call_descriptor_changes},
    Test{"protocol/call-descriptor-none",
         {kVhostUser, kMessages, Force::kStates,
          "SET_VRING_CALL with bit 8 and no descriptor: the driver polls"},
         call_descriptor_is_optional},
    Test{"protocol/kick-descriptor-none",
         {kVhostUser, kMessages, Force::kStates,
          "SET_VRING_KICK with bit 8 and no descriptor: the backend polls, or refuses"},
         kick_descriptor_is_optional},
    Test{"protocol/error-descriptor-none",
         {kVhostUser, kMessages, Force::kStates, "SET_VRING_ERR with bit 8 needs no descriptor"},
         error_descriptor_is_optional},
    Test{"protocol/protocol-features-unoffered",
         {kVhostUser, "Communication", Force::kRobust,
          "SET_PROTOCOL_FEATURES with a bit that was not offered is refused, not ignored"},
         unoffered_protocol_features_are_refused},
    Test{"protocol/suspended",
         {kVhostUser82, "Suspended device state", Force::kMust,
          "with all rings stopped messages are answered, memory is not written, and nothing is "
          "notified"},
         suspended_device_answers},
    Test{"protocol/everything-exercised",
         {kVhostUser, "Protocol features", Force::kRobust,
          "each feature that is offered is looked into by a test of this suite"},
         everything_is_exercised},
    Test{"protocol/mem-slots",
         {kVhostUser, kMessages, Force::kShould,
          "with CONFIGURE_MEM_SLOTS, GET_MAX_MEM_SLOTS tells at least one"},
         memory_slots_are_told},
    Test{"protocol/reset-owner",
         {kVhostUser, kMessages, Force::kShould, "RESET_OWNER does not end the session"},
         reset_owner_is_harmless},
    Test{"protocol/message-in-pieces",
         {kVhostUser, "Communication", Force::kRobust,
          "a message may arrive byte by byte, for the socket is a stream"},
         messages_come_in_pieces},
    Test{"protocol/messages-together",
         {kVhostUser, "Communication", Force::kRobust,
          "messages that arrive together are each answered"},
         messages_come_together},
};

}  // namespace

std::span<const Test> protocol_tests() { return kTests; }

}  // namespace vblk::conform
