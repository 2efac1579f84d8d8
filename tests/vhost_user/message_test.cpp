// Every message: what it does when it is right, and that whatever is wrong with it costs its
// connection at most.
#include <algorithm>
#include <array>
#include <sys/eventfd.h>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/driver_memory.h"
#include "blockdev/driver/driver_queue.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/guest_memory.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using test::bit;
using test::Bytes;
using test::eventually;
using test::HoldingDisk;
using test::kDiskBytes;
using test::open_fds;
using test::payload_of;
using test::RawFrontend;
using test::Served;

constexpr std::size_t kRegionBytes = std::size_t{1} << 16;
constexpr std::uint64_t kNoAcknowledgements = ~bit(kProtocolFReplyAck);

class Messages : public ::testing::Test {
 protected:
  // Negotiated, and the memory shared.
  RawFrontend connect(std::uint64_t protocol_features_mask = ~std::uint64_t{0}) {
    RawFrontend frontend(served.path(), protocol_features_mask);
    EXPECT_TRUE(frontend.polite().negotiate().has_value());
    EXPECT_TRUE(frontend.polite().set_memory(*memory).has_value());
    return frontend;
  }
  [[nodiscard]] SingleMemoryRegion region(std::uint64_t shift = 0) const {
    SingleMemoryRegion single{.padding = 0, .region = memory->regions()[0].description};
    single.region.guest_address += shift;
    single.region.user_address += shift;
    return single;
  }
  // A message's descriptors live until the server is through with it, which is after its answer.
  std::size_t settled_fds() {
    EXPECT_TRUE(served.server().status().has_value());
    return open_fds();
  }
  bool gone() {
    return eventually([this] { return !served.connected(); });
  }

  std::unique_ptr<driver::DriverMemory> memory =
      driver::DriverMemory::create({kRegionBytes}).value();
  UniqueFd event{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  HoldingDisk disk{kDiskBytes};
  Served served{disk};
};

// ---- What is right

TEST_F(Messages, offers_features_and_protocol_features) {
  RawFrontend frontend(served.path());
  const auto features = frontend.call_u64(Request::kGetFeatures);
  EXPECT_EQ(features, served.device().offered_features() | bit(kFProtocolFeatures));
  EXPECT_EQ(frontend.call_u64(Request::kGetProtocolFeatures),
            bit(kProtocolFMq) | bit(kProtocolFReplyAck) | bit(kProtocolFBackendReq) |
                bit(kProtocolFConfig) | bit(kProtocolFInflightShmfd) | bit(kProtocolFResetDevice) |
                bit(kProtocolFConfigureMemSlots) | bit(kProtocolFStatus) |
                bit(kProtocolFGetVringBaseInflight));
  EXPECT_EQ(frontend.call_u64(Request::kGetQueueNum), 2U);
  EXPECT_EQ(frontend.call_u64(Request::kGetMaxMemSlots), virtio::GuestMemory::kMaxRegions);
}

TEST_F(Messages, acknowledges_what_it_has_done_only_when_asked) {
  RawFrontend frontend = connect();
  EXPECT_EQ(frontend.acknowledged(Request::kSetOwner), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kResetOwner), 0U) << "deprecated, to be ignored";
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringNum, payload_of(VringState{1, 64})), 0U);
  frontend.send(Request::kSetVringNum, payload_of(VringState{1, 64}));
  EXPECT_EQ(frontend.call_u64(Request::kGetQueueNum), 2U) << "the next answer is the next one's";
}

TEST_F(Messages, adds_no_acknowledgement_to_a_message_with_an_answer_of_its_own) {
  RawFrontend frontend = connect();
  EXPECT_NE(frontend.acknowledged(Request::kGetFeatures), 0U);
  EXPECT_EQ(frontend.call_u64(Request::kGetQueueNum), 2U);
}

TEST_F(Messages, acknowledges_nothing_before_it_was_negotiated) {
  RawFrontend frontend(served.path());
  ASSERT_TRUE(
      frontend.polite().send(Request::kSetOwner, {}, {}, kVersion | kFlagNeedReply).has_value());
  EXPECT_EQ(frontend.call_u64(Request::kGetQueueNum), 2U);
}

TEST_F(Messages, reads_the_config_space_at_any_offset_and_length_and_zero_beyond_it) {
  RawFrontend frontend = connect();
  const auto whole = frontend.polite().read_config(0, 256);
  ASSERT_TRUE(whole.has_value());
  EXPECT_TRUE(std::all_of(whole->begin() + virtio::kBlkConfigBytes, whole->end(),
                          [](std::byte byte) { return byte == std::byte{0}; }));
  EXPECT_EQ(decode<std::uint64_t>(*whole), kDiskBytes / 512);
  for (std::uint32_t offset = 0; offset <= 256; offset += 7) {
    for (std::uint32_t size = 0; size <= 256 - offset; size += 5) {
      const auto part = frontend.polite().read_config(offset, size);
      ASSERT_TRUE(part.has_value()) << offset << "+" << size;
      ASSERT_TRUE(std::equal(part->begin(), part->end(), whole->begin() + offset));
    }
  }
}

TEST_F(Messages, answers_a_config_read_beyond_256_bytes_with_an_empty_payload) {
  RawFrontend frontend = connect();
  for (const ConfigHead head : {ConfigHead{0, 257, 0}, ConfigHead{256, 1, 0},
                                ConfigHead{0xffffffff, 2, 0}, ConfigHead{0, 0xffffffff, 0}}) {
    const auto answer = frontend.call(Request::kGetConfig, payload_of(head));
    ASSERT_TRUE(answer.has_value());
    EXPECT_TRUE(answer->empty()) << head.offset << "+" << head.size_bytes;
  }
}

TEST_F(Messages, reads_the_config_space_before_anything_is_negotiated) {
  RawFrontend frontend(served.path());
  EXPECT_TRUE(frontend.polite().read_config(0, virtio::kBlkConfigBytes).has_value());
}

TEST_F(Messages, writes_writeback_and_reads_it_back) {
  RawFrontend frontend = connect();
  for (const std::byte value : {std::byte{0}, std::byte{1}}) {
    const std::array bytes{value};
    ASSERT_TRUE(frontend.polite().write_config(virtio::kBlkConfigWriteback, bytes).has_value());
    EXPECT_EQ(frontend.polite().read_config(virtio::kBlkConfigWriteback, 1)->front(), value);
    EXPECT_EQ(served.device().write_through(), value == std::byte{0});
  }
}

TEST_F(Messages, adds_and_removes_memory_regions) {
  RawFrontend frontend = connect();
  const std::array fds{memory->regions()[0].fd};
  const auto second = payload_of(region(kRegionBytes));
  EXPECT_EQ(frontend.acknowledged(Request::kAddMemReg, second, fds), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kRemMemReg, second), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kAddMemReg, second, fds), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kRemMemReg, second, fds), 0U)
      << "the descriptor once more, as some frontends do";
  EXPECT_EQ(frontend.acknowledged(Request::kRemMemReg, second), 1U) << "there is none any more";
}

// QEMU on unplug and plug: it forgets its regions, and does not remove them.
TEST_F(Messages, a_second_owner_begins_without_the_memory_of_the_first) {
  RawFrontend frontend = connect();
  const std::array fds{memory->regions()[0].fd};
  EXPECT_EQ(frontend.acknowledged(Request::kAddMemReg, payload_of(region()), fds), 1U)
      << "it is there already";
  EXPECT_EQ(frontend.acknowledged(Request::kSetOwner, {}), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kAddMemReg, payload_of(region()), fds), 0U);
}

TEST_F(Messages, a_second_owner_finds_a_fresh_device) {
  RawFrontend frontend = connect();
  const std::array off{std::byte{0}};
  ASSERT_TRUE(frontend.polite().write_config(virtio::kBlkConfigWriteback, off).has_value());
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringNum, payload_of(VringState{1, 16})), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringBase, payload_of(VringState{1, 7})), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringEnable, payload_of(VringState{1, 1})), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetOwner, {}), 0U);
  EXPECT_EQ(served.device().negotiated_features(), 0U);
  EXPECT_EQ(frontend.polite().read_config(virtio::kBlkConfigWriteback, 1)->front(), std::byte{1});
  EXPECT_EQ(frontend.polite().stop_ring(1).value(), 0U) << "the base of the first one's ring";
  // As long as it is not enabled, a ring may be kicked before it has a size.
  const std::array kick{event.get()};
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringKick, payload_of(std::uint64_t{1}), kick), 0U);
}

TEST_F(Messages, takes_as_many_regions_as_it_says_and_keeps_no_descriptor_of_them) {
  RawFrontend frontend = connect();
  const std::size_t before = settled_fds();
  const std::array fds{memory->regions()[0].fd};
  for (std::uint64_t i = 1; i < virtio::GuestMemory::kMaxRegions; ++i) {
    ASSERT_EQ(frontend.acknowledged(Request::kAddMemReg, payload_of(region(i * kRegionBytes)), fds),
              0U)
        << i;
  }
  const auto surplus = payload_of(region(virtio::GuestMemory::kMaxRegions * kRegionBytes));
  EXPECT_EQ(frontend.acknowledged(Request::kAddMemReg, surplus, fds), 1U);
  EXPECT_EQ(settled_fds(), before);
}

TEST_F(Messages, replaces_the_whole_table) {
  RawFrontend frontend = connect();
  const MemoryTableHead head{.region_count = 2, .padding = 0};
  const std::array fds{memory->regions()[0].fd, memory->regions()[0].fd};
  EXPECT_EQ(
      frontend.acknowledged(Request::kSetMemTable,
                            payload_of(head, region().region, region(kRegionBytes).region), fds),
      0U);
}

TEST_F(Messages, tells_the_base_that_was_set) {
  RawFrontend frontend = connect();
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringBase, payload_of(VringState{1, 0xffff})), 0U);
  const auto answer = frontend.call(Request::kGetVringBase, payload_of(VringState{1, 0}));
  ASSERT_TRUE(answer.has_value());
  const auto state = decode<VringState>(*answer);
  ASSERT_TRUE(state.has_value());
  EXPECT_EQ(state->index, 1U);
  EXPECT_EQ(state->value, 0xffffU);
}

TEST_F(Messages, takes_and_forgets_call_and_error_descriptors) {
  RawFrontend frontend = connect();
  const std::size_t before = settled_fds();
  const std::array fds{event.get()};
  for (const Request request : {Request::kSetVringCall, Request::kSetVringErr}) {
    EXPECT_EQ(frontend.acknowledged(request, payload_of(std::uint64_t{1}), fds), 0U);
    EXPECT_EQ(frontend.acknowledged(request, payload_of(std::uint64_t{1}), fds), 0U);
    EXPECT_EQ(settled_fds(), before + 1) << "one, however often";
    EXPECT_EQ(frontend.acknowledged(request, payload_of(kVringNoFd | 1)), 0U);
    EXPECT_EQ(settled_fds(), before);
  }
}

// ---- What is wrong

struct Violation {
  const char* name;
  Request request;
  Bytes payload;
  std::size_t fd_count{0};
};

std::vector<Violation> violations(const SingleMemoryRegion& shared) {
  using enum Request;
  const auto with = [&shared](auto change) {
    SingleMemoryRegion region = shared;
    change(region.region);
    return payload_of(region);
  };
  const MemoryRegionDescription& known = shared.region;
  const auto u64 = [](std::uint64_t value) { return payload_of(value); };
  const auto ring = [](std::uint32_t index, std::uint32_t value) {
    return payload_of(VringState{index, value});
  };
  // Of one queue of 64 entries, which takes 1088 bytes.
  const auto inflight = [](auto change) {
    Inflight area{.mmap_size = 1088, .mmap_offset = 0, .queue_count = 1, .queue_size = 64};
    change(area);
    return payload_of(area);
  };
  const auto as_it_is = [](auto& /*area*/) {};
  const auto table = [](std::uint32_t count) { return MemoryTableHead{count, 0}; };
  const std::byte one{1};
  const std::byte two{2};
  return {
      {"no message at all", static_cast<Request>(0), {}},
      {"a message of the future", static_cast<Request>(99), u64(0)},
      {"dirty logging", kSetLogBase, payload_of(std::uint64_t{0}, std::uint64_t{0})},
      {"features too short", kSetFeatures, Bytes(4)},
      {"features too long", kSetFeatures, Bytes(16)},
      {"features that were not offered", kSetFeatures, u64(bit(63))},
      {"features with a descriptor", kSetFeatures, u64(0), 1},
      {"an owner with a payload", kSetOwner, u64(0)},
      {"an owner with a descriptor", kSetOwner, {}, 1},
      {"protocol features that were not offered", kSetProtocolFeatures, u64(bit(40))},
      {"protocol features too short", kSetProtocolFeatures, Bytes(7)},
      {"a table without a head", kSetMemTable, Bytes(4)},
      {"a table that announces more than it brings", kSetMemTable, payload_of(table(2), known), 2},
      {"a table that brings more than it announces", kSetMemTable,
       payload_of(table(1), known, known), 1},
      {"a table of billions", kSetMemTable, payload_of(table(0xffffffff), known), 1},
      {"a table with a descriptor too few", kSetMemTable, payload_of(table(1), known)},
      {"a table with a descriptor too many", kSetMemTable, payload_of(table(1), known), 2},
      {"a table of overlapping regions", kSetMemTable, payload_of(table(2), known, known), 2},
      {"a region without a descriptor", kAddMemReg,
       with([](auto& region) { region.guest_address += kRegionBytes; })},
      {"a region with two descriptors", kAddMemReg,
       with([](auto& region) { region.guest_address += kRegionBytes; }), 2},
      {"a region that overlaps", kAddMemReg,
       with([](auto& region) { region.guest_address += 512; }), 1},
      {"an empty region", kAddMemReg, with([](auto& region) {
         region.guest_address += kRegionBytes;
         region.size_bytes = 0;
       }),
       1},
      {"a region beyond the end of its file", kAddMemReg, with([](auto& region) {
         region.guest_address += kRegionBytes;
         region.mmap_offset = 4096;
       }),
       1},
      {"a region that wraps around", kAddMemReg,
       with([](auto& region) { region.guest_address = ~std::uint64_t{0} - 100; }), 1},
      {"the removal of a region that is not there", kRemMemReg,
       with([](auto& region) { region.guest_address += 4096; })},
      {"the removal of half a region", kRemMemReg,
       with([](auto& region) { region.size_bytes /= 2; })},
      {"a size for a queue that is not there", kSetVringNum, ring(2, 64)},
      {"a size of 0", kSetVringNum, ring(0, 0)},
      {"a size that is no power of two", kSetVringNum, ring(0, 65)},
      {"a size that is too large", kSetVringNum, ring(0, 256)},
      {"a size beyond 16 bits", kSetVringNum, ring(0, 0x10000)},
      {"addresses for a queue that is not there", kSetVringAddr,
       payload_of(VringAddress{.index = 2})},
      {"addresses too short", kSetVringAddr, Bytes(39)},
      {"a base for a queue that is not there", kSetVringBase, ring(0xffffffff, 0)},
      {"a base beyond 16 bits", kSetVringBase, ring(0, 0x10000)},
      {"a kick for a queue that is not there", kSetVringKick, u64(2), 1},
      {"a kick without descriptor or flag", kSetVringKick, u64(0)},
      {"a kick with descriptor and flag", kSetVringKick, u64(kVringNoFd), 1},
      {"a ring to be polled", kSetVringKick, u64(kVringNoFd)},
      {"a kick with two descriptors", kSetVringKick, u64(0), 2},
      {"a call for a queue that is not there", kSetVringCall, u64(0xff), 1},
      {"a call without descriptor or flag", kSetVringCall, u64(0)},
      {"a call with descriptor and flag", kSetVringCall, u64(kVringNoFd), 1},
      {"an error for a queue that is not there", kSetVringErr, u64(2), 1},
      {"an error without descriptor or flag", kSetVringErr, u64(0)},
      {"enabling a queue that is not there", kSetVringEnable, ring(2, 1)},
      {"neither enabled nor disabled", kSetVringEnable, ring(0, 2)},
      {"a channel that was not negotiated", kSetBackendReqFd, {}, 1},
      {"an in-flight area without a descriptor", kSetInflightFd, inflight(as_it_is)},
      {"an in-flight area with two descriptors", kSetInflightFd, inflight(as_it_is), 2},
      {"an in-flight area that is described in part", kSetInflightFd, Bytes(19), 1},
      {"an in-flight area of no queues", kSetInflightFd,
       inflight([](auto& area) { area.queue_count = 0; }), 1},
      {"an in-flight area of more queues than there are", kSetInflightFd, inflight([](auto& area) {
         area.queue_count = 3;
         area.mmap_size = 4096;
       }),
       1},
      {"an in-flight area of queues without entries", kSetInflightFd,
       inflight([](auto& area) { area.queue_size = 0; }), 1},
      {"an in-flight area of queues that are too large", kSetInflightFd, inflight([](auto& area) {
         area.queue_size = 256;
         area.mmap_size = 8192;
       }),
       1},
      {"an in-flight area that is too small", kSetInflightFd,
       inflight([](auto& area) { area.mmap_size = 1087; }), 1},
      {"an in-flight area beyond the end of its file", kSetInflightFd,
       inflight([](auto& area) { area.mmap_offset = kRegionBytes - 1024; }), 1},
      {"an in-flight area that is larger than its file", kSetInflightFd,
       inflight([](auto& area) { area.mmap_size = ~std::uint64_t{0}; }), 1},
      {"an in-flight area that is not aligned", kSetInflightFd,
       inflight([](auto& area) { area.mmap_offset = 12; }), 1},
      {"a capacity", kSetConfig, payload_of(ConfigHead{0, 8, 0}, std::uint64_t{1})},
      {"a writeback of 2", kSetConfig,
       payload_of(ConfigHead{virtio::kBlkConfigWriteback, 1, 0}, two)},
      {"a writeback for migration", kSetConfig,
       payload_of(ConfigHead{virtio::kBlkConfigWriteback, 1, 1}, one)},
      {"a writeback with flags nobody knows", kSetConfig,
       payload_of(ConfigHead{virtio::kBlkConfigWriteback, 1, 2}, one)},
      {"a config that announces more than it brings", kSetConfig,
       payload_of(ConfigHead{virtio::kBlkConfigWriteback, 2, 0}, one)},
  };
}

TEST_F(Messages, answers_each_violation_with_an_error_and_goes_on) {
  RawFrontend frontend = connect();
  const std::size_t before = settled_fds();
  for (const Violation& violation : violations(region())) {
    const std::vector<int> fds(violation.fd_count, memory->regions()[0].fd);
    EXPECT_EQ(frontend.acknowledged(violation.request, violation.payload, fds), 1U)
        << violation.name;
    EXPECT_EQ(frontend.call_u64(Request::kGetQueueNum), 2U) << violation.name;
  }
  EXPECT_EQ(settled_fds(), before);
}

TEST_F(Messages, ends_the_connection_after_each_violation_without_acknowledgements) {
  const std::size_t before = settled_fds();
  for (const Violation& violation : violations(region())) {
    {
      const std::vector<int> fds(violation.fd_count, memory->regions()[0].fd);
      RawFrontend frontend = connect(kNoAcknowledgements);
      frontend.send(violation.request, violation.payload, fds);
      EXPECT_TRUE(frontend.cut_off()) << violation.name;
    }
    EXPECT_TRUE(gone());
  }
  EXPECT_EQ(settled_fds(), before);
}

TEST_F(Messages, ends_the_connection_after_a_wrong_message_that_expects_an_answer) {
  const Violation wrong[] = {
      {"features with a payload", Request::kGetFeatures, Bytes(8)},
      {"features with a descriptor", Request::kGetFeatures, {}, 1},
      {"the base of a queue that is not there", Request::kGetVringBase,
       payload_of(VringState{2, 0})},
      {"a base too short", Request::kGetVringBase, Bytes(4)},
      {"an in-flight area of no queues", Request::kGetInflightFd,
       payload_of(Inflight{.queue_count = 0, .queue_size = 64})},
      {"an in-flight area of queues without entries", Request::kGetInflightFd,
       payload_of(Inflight{.queue_count = 1, .queue_size = 0})},
      {"an in-flight area of more queues than there are", Request::kGetInflightFd,
       payload_of(Inflight{.queue_count = 0xffff, .queue_size = 64})},
      {"an in-flight area of queues that are too large", Request::kGetInflightFd,
       payload_of(Inflight{.queue_count = 1, .queue_size = 0xffff})},
      {"an in-flight area that is described in part", Request::kGetInflightFd, Bytes(19)},
      {"an in-flight area with a descriptor", Request::kGetInflightFd,
       payload_of(Inflight{.queue_count = 1, .queue_size = 64}), 1},
      {"a config without a head", Request::kGetConfig, Bytes(11)},
      {"a config that is too long", Request::kGetConfig, Bytes(12 + 257)},
  };
  for (const Violation& violation : wrong) {
    const std::vector<int> fds(violation.fd_count, event.get());
    RawFrontend frontend = connect();
    frontend.send(violation.request, violation.payload, fds);
    EXPECT_TRUE(frontend.cut_off()) << violation.name;
  }
}

TEST_F(Messages, ends_the_connection_after_bytes_that_are_no_message) {
  const Bytes wrong[] = {payload_of(Header{1, 0, 0}), payload_of(Header{1, 2, 0}),
                         payload_of(Header{1, 3, 0}), payload_of(Header{2, kVersion, 513}),
                         payload_of(Header{2, kVersion, 0xffffffff})};
  for (const Bytes& bytes : wrong) {
    RawFrontend frontend = connect();
    frontend.send_bytes(bytes);
    EXPECT_TRUE(frontend.cut_off());
  }
}

// ---- Out of order

TEST_F(Messages, refuses_to_start_a_ring_before_its_memory_size_and_addresses) {
  const std::array kick{event.get()};
  RawFrontend frontend(served.path());
  ASSERT_TRUE(frontend.polite().negotiate().has_value());
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringEnable, payload_of(VringState{0, 1})), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringKick, payload_of(std::uint64_t{0}), kick), 1U);
  // What was refused has left nothing behind that could make the rest fail.
  auto queue = driver::DriverQueue::create(*memory, {.size = 16}).value();
  ASSERT_TRUE(frontend.polite().set_memory(*memory).has_value());
  EXPECT_TRUE(frontend.polite().start_ring(0, *queue).has_value());
  EXPECT_TRUE(served.server().status()->rings[0].running);
}

TEST_F(Messages, an_owner_while_rings_run_changes_nothing) {
  RawFrontend frontend = connect();
  auto queue = driver::DriverQueue::create(*memory, {.size = 16}).value();
  ASSERT_TRUE(frontend.polite().start_ring(0, *queue).has_value());
  EXPECT_EQ(frontend.acknowledged(Request::kSetOwner, {}), 0U);
  EXPECT_TRUE(served.server().status()->rings[0].running);
  const std::array fds{memory->regions()[0].fd};
  EXPECT_EQ(frontend.acknowledged(Request::kAddMemReg, payload_of(region()), fds), 1U)
      << "its memory is there";
}

TEST_F(Messages, a_ring_whose_memory_is_taken_away_goes_on_when_it_is_back) {
  const std::array fds{memory->regions()[0].fd};
  RawFrontend frontend = connect();
  auto queue = driver::DriverQueue::create(*memory, {.size = 16}).value();
  ASSERT_TRUE(frontend.polite().start_ring(0, *queue).has_value());
  EXPECT_EQ(frontend.acknowledged(Request::kRemMemReg, payload_of(region())), 1U);
  EXPECT_FALSE(served.server().status()->rings[0].running);
  const auto more = driver::DriverMemory::create({kRegionBytes}).value();
  SingleMemoryRegion elsewhere{.padding = 0, .region = more->regions()[0].description};
  elsewhere.region.guest_address += std::uint64_t{1} << 30;
  const std::array more_fds{more->regions()[0].fd};
  EXPECT_EQ(frontend.acknowledged(Request::kAddMemReg, payload_of(elsewhere), more_fds), 0U)
      << "no change of memory fails for a ring that waits";
  EXPECT_EQ(frontend.acknowledged(Request::kAddMemReg, payload_of(region()), fds), 0U);
  EXPECT_TRUE(served.server().status()->rings[0].running);
}

TEST_F(Messages, a_ring_that_was_refused_while_it_waited_waits_no_more) {
  RawFrontend frontend = connect();
  auto queue = driver::DriverQueue::create(*memory, {.size = 16}).value();
  ASSERT_TRUE(frontend.polite().start_ring(0, *queue).has_value());
  EXPECT_EQ(frontend.acknowledged(Request::kRemMemReg, payload_of(region())), 1U);
  const auto enable = [&frontend](std::uint32_t on) {
    return frontend.acknowledged(Request::kSetVringEnable, payload_of(VringState{0, on}));
  };
  EXPECT_EQ(enable(0), 0U);
  EXPECT_EQ(enable(1), 1U) << "its memory is not there";
  EXPECT_EQ(enable(0), 0U);
  const std::array kick{queue->kick_fd()};
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringKick, payload_of(std::uint64_t{0}), kick), 0U);
  // Enables all rings, this one among them.
  EXPECT_EQ(frontend.acknowledged(Request::kSetFeatures, payload_of(bit(virtio::kFVersion1))), 1U)
      << "who starts it now is told";
}

TEST_F(Messages, refuses_a_started_ring_whose_addresses_are_nowhere) {
  const std::array kick{event.get()};
  RawFrontend frontend = connect();
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringNum, payload_of(VringState{0, 16})), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringAddr,
                                  payload_of(VringAddress{.index = 0, .used_user_address = 4096})),
            0U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringKick, payload_of(std::uint64_t{0}), kick), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringEnable, payload_of(VringState{0, 1})), 1U);
}

TEST_F(Messages, changes_neither_size_nor_base_of_a_running_ring) {
  RawFrontend frontend = connect();
  auto queue = driver::DriverQueue::create(*memory, {.size = 16}).value();
  ASSERT_TRUE(frontend.polite().start_ring(0, *queue).has_value());
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringNum, payload_of(VringState{0, 32})), 1U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringBase, payload_of(VringState{0, 5})), 1U);
  EXPECT_EQ(frontend.polite().stop_ring(0).value(), 0U);
  EXPECT_EQ(frontend.acknowledged(Request::kSetVringNum, payload_of(VringState{0, 32})), 0U);
}

TEST_F(Messages, enables_all_rings_for_a_frontend_without_protocol_features) {
  RawFrontend frontend(served.path());
  frontend.send(Request::kSetFeatures, payload_of(bit(virtio::kFVersion1)));
  ASSERT_TRUE(frontend.polite().set_memory(*memory).has_value());
  auto queue = driver::DriverQueue::create(*memory, {.size = 16}).value();
  ASSERT_TRUE(frontend.polite().start_ring(0, *queue).has_value()) << "sends no SET_VRING_ENABLE";
  EXPECT_EQ(frontend.call_u64(Request::kGetQueueNum), 2U);
  EXPECT_TRUE(served.server().status()->rings[0].running);
}

// ---- One frontend after another

TEST_F(Messages, gives_the_next_frontend_a_fresh_device) {
  {
    RawFrontend frontend = connect();
    const std::array off{std::byte{0}};
    ASSERT_TRUE(frontend.polite().write_config(virtio::kBlkConfigWriteback, off).has_value());
  }
  ASSERT_TRUE(gone());
  EXPECT_EQ(served.device().negotiated_features(), 0U);
  RawFrontend next(served.path());
  EXPECT_EQ(next.polite().read_config(virtio::kBlkConfigWriteback, 1)->front(), std::byte{1});
  ASSERT_TRUE(
      next.polite().send(Request::kSetOwner, {}, {}, kVersion | kFlagNeedReply).has_value());
  EXPECT_EQ(next.call_u64(Request::kGetQueueNum), 2U) << "REPLY_ACK went with the first";
}

TEST_F(Messages, serves_a_second_frontend_when_the_first_has_left) {
  auto first = std::make_unique<RawFrontend>(connect());
  RawFrontend second(served.path());
  second.send(Request::kGetQueueNum);
  EXPECT_EQ(first->call_u64(Request::kGetQueueNum), 2U);
  pollfd descriptor{.fd = second.polite().socket(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(::poll(&descriptor, 1, 0), 0) << "the device has its driver";
  first.reset();
  EXPECT_GT(::poll(&descriptor, 1, 30'000), 0);
}

}  // namespace
}  // namespace vblk::vhost_user
