// Messages as no frontend sends them: wrong sizes, wrong descriptors, wrong moments, garbage. It
// may cost the frontend its connection; the backend serves the next one (Probe::check_aftermath()).
#include <algorithm>
#include <array>
#include <cstdint>
#include <fcntl.h>
#include <filesystem>
#include <functional>
#include <iterator>
#include <optional>
#include <span>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/test.h"

namespace vblk::conform {

using namespace vhost_user;
using namespace virtio;

namespace {

constexpr std::uint32_t kLastRequest = 44;

// What unlocks the most messages: LOG_SHMFD and so on, with RESET_DEVICE (13) and STATUS (16).
constexpr std::uint64_t kEveryProtocol = kPlainProtocol | bit(kProtocolFLogShmfd) |
                                         bit(kProtocolFBackendReq) | bit(kProtocolFInflightShmfd) |
                                         bit(kProtocolFConfigureMemSlots) | bit(13) | bit(16);

Bytes header(std::uint32_t request, std::uint32_t flags, std::uint32_t payload_bytes) {
  return payload_of(Header{.request = request, .flags = flags, .payload_bytes = payload_bytes});
}

// A backend that is cut off in the middle of a message must not wait for the rest with everybody
// else waiting for it: the connection ends right after.
void messages_are_truncated(Probe& probe) {
  for (std::uint32_t request = 1; request <= kLastRequest; ++request) {
    Channel channel(probe);
    Bytes bytes = header(request, kVersion, 40);
    bytes.resize(bytes.size() + 20);
    channel.send_raw(bytes);
  }
  Channel channel(probe);
  channel.send_raw(Bytes(5));
}

void sizes_are_wrong(Probe& probe) {
  for (std::uint32_t request = 1; request <= kLastRequest; ++request) {
    for (const std::uint32_t size : {0U, 1U, 7U, 9U, 41U, 256U, 512U}) {
      Channel channel(probe);
      channel.negotiate(kPlainFeatures, kEveryProtocol);
      Bytes bytes = header(request, kVersion | kFlagNeedReply, size);
      bytes.resize(bytes.size() + size, std::byte{0xff});
      channel.send_raw(bytes);
      channel.send(Request::kGetFeatures);
      channel.is_closed(std::chrono::milliseconds(1));
    }
  }
}

void sizes_are_huge(Probe& probe) {
  for (const std::uint32_t size : {4096U, 0x10000U, 0x7fff'ffffU, 0xffff'ffffU}) {
    Channel channel(probe);
    channel.send_raw(header(1, kVersion, size));
    channel.send_raw(Bytes(8192));
    channel.is_closed(kQuiet);
  }
}

void versions_are_wrong(Probe& probe) {
  for (const std::uint32_t flags : {0U, 2U, 3U}) {
    Channel channel(probe);
    channel.send_raw(header(1, flags, 0));
    const auto answer = channel.receive(kQuiet);
    Probe::expect(!answer, fmt::format("a message of version {} is answered", flags));
  }
}

void requests_are_unknown(Probe& probe) {
  for (const std::uint32_t request : {0U, 77U, 1000U, 0xffff'ffffU}) {
    Channel channel(probe);
    channel.negotiate(kPlainFeatures, kPlainProtocol);
    const auto taken = channel.try_command(static_cast<Request>(request), Bytes(8));
    if (!channel.has_protocol(kProtocolFReplyAck)) continue;
    Probe::expect(taken == Channel::Taken::kRefused || taken == Channel::Taken::kClosed,
                  fmt::format("message {} is {}", request, to_string(taken)));
  }
}

UniqueFd file_of(std::size_t bytes) {
  UniqueFd fd(::memfd_create("vblk-conform", MFD_CLOEXEC));
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0)
    Probe::fail("the suite itself: no memory for a file");
  return fd;
}

constexpr MemoryRegionDescription kSmallRegion{
    .guest_address = 0, .size_bytes = 1 << 20, .user_address = 0, .mmap_offset = 0};

// A payload of the right size for each message that has one; none for the others.
Bytes payload_for(Request request) {
  switch (request) {
    case Request::kSetFeatures:
    case Request::kSetProtocolFeatures:
    case Request::kSetVringKick:
    case Request::kSetVringCall:
    case Request::kSetVringErr:
    case Request::kSetStatus:
      return payload_of(std::uint64_t{0});
    case Request::kSetVringNum:
      return payload_of(VringState{0, 64});
    case Request::kSetVringBase:
    case Request::kGetVringBase:
    case Request::kSetVringEnable:
      return payload_of(VringState{0, 0});
    case Request::kSetVringAddr:
      return payload_of(VringAddress{0, 0, 0, 0, 0, 0});
    case Request::kSetMemTable:
      return payload_of(MemoryTableHead{.region_count = 1, .padding = 0}, kSmallRegion);
    case Request::kAddMemReg:
    case Request::kRemMemReg:
      return payload_of(SingleMemoryRegion{.padding = 0, .region = kSmallRegion});
    case Request::kSetLogBase:
      return payload_of(LogDescription{.size_bytes = 4096, .mmap_offset = 0});
    case Request::kGetConfig:
    case Request::kSetConfig: {
      Bytes bytes = payload_of(ConfigHead{.offset = 0, .size_bytes = 8, .flags = 0});
      bytes.resize(bytes.size() + 8);
      return bytes;
    }
    case Request::kGetInflightFd:
    case Request::kSetInflightFd:
      return payload_of(Inflight{
          .mmap_size = 4096, .mmap_offset = 0, .queue_count = 1, .queue_size = 64, .padding = 0});
    default:
      return {};
  }
}

// Sends a message, and one behind it, and waits a moment for either the end of the connection or an
// answer to the second: by then the first has been dealt with. Its own answer may come before.
void send_and_see(Channel& channel, Request request, std::span<const int> fds) {
  if (!channel.send(request, payload_for(request), fds)) return;
  if (!channel.send(Request::kGetFeatures)) return;
  while (const auto answer = channel.receive(kQuiet)) {
    if (answer->request() == Request::kGetFeatures) return;
  }
}

// Messages that come with a descriptor. "Communication".
constexpr std::array kWithDescriptor{
    Request::kSetMemTable, Request::kAddMemReg,       Request::kSetLogBase,
    Request::kSetLogFd,    Request::kSetVringKick,    Request::kSetVringCall,
    Request::kSetVringErr, Request::kSetBackendReqFd, Request::kSetInflightFd};

void descriptors_are_wrong(Probe& probe) {
  const UniqueFd folder(::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  const UniqueFd empty = file_of(0);
  for (const UniqueFd* fd : {&folder, &null, &empty}) {
    const int fds[] = {fd->get()};
    for (const Request request : kWithDescriptor) {
      Guest guest(probe, {.protocol_features = kEveryProtocol});
      send_and_see(guest.channel(), request, fds);
      guest.ring().kick();
    }
  }
}

void descriptors_are_missing(Probe& probe) {
  for (const Request request : kWithDescriptor) {
    Guest guest(probe, {.protocol_features = kEveryProtocol});
    send_and_see(guest.channel(), request, {});
    guest.ring().kick();
  }
  // Memory that nobody has is not mapped.
  for (const Request request : {Request::kSetMemTable, Request::kAddMemReg}) {
    Guest guest(probe, {.protocol_features = kEveryProtocol});
    if (!guest.channel().has_protocol(kProtocolFReplyAck)) continue;
    const auto taken = guest.channel().try_command(request, payload_for(request));
    Probe::expect(taken != Channel::Taken::kOk,
                  fmt::format("{} without a descriptor is accepted", name_of(request)));
  }
}

// Each message with more descriptors than it has, in every state up to rings that run.
void descriptors_are_too_many(Probe& probe) {
  const UniqueFd event(::eventfd(0, EFD_CLOEXEC));
  for (const std::size_t count : std::to_array<std::size_t>({1, 9, 32})) {
    const std::vector<int> fds(count, event.get());
    for (std::uint32_t number = 1; number <= kLastRequest; ++number) {
      const auto request = static_cast<Request>(number);
      if (count == 1 && std::ranges::find(kWithDescriptor, request) != kWithDescriptor.end())
        continue;
      Guest guest(probe, {.protocol_features = kEveryProtocol, .starts_rings = number % 2 == 0});
      send_and_see(guest.channel(), request, fds);
    }
  }
}

// How many descriptors the backend has open; nothing if we may not look.
std::optional<std::size_t> open_descriptors(int pid) {
  std::error_code error;
  std::filesystem::directory_iterator entries(fmt::format("/proc/{}/fd", pid), error);
  if (error || pid == 0) return std::nullopt;
  return static_cast<std::size_t>(std::distance(begin(entries), end(entries)));
}

void descriptors_do_not_leak(Probe& probe) {
  if (probe.options().target.ends_with_frontend)
    Probe::skip("the backend ends with each frontend, and its descriptors with it");
  constexpr std::size_t kSent = 8;
  const UniqueFd event(::eventfd(0, EFD_CLOEXEC));
  const std::vector<int> fds(kSent, event.get());
  const auto round = [&](Request request) {
    Channel channel(probe);
    channel.negotiate(kPlainFeatures, kEveryProtocol);
    send_and_see(channel, request, fds);
  };
  const int pid = probe.backend_pid();
  // Fewest within some time: what a backend closes late is not lost.
  const auto settled = [&]() -> std::optional<std::size_t> {
    {
      Guest guest(probe);
      guest.must_read(0, kDefaultBlock);
    }
    std::optional<std::size_t> fewest;
    for (int i = 0; i < 10; ++i) {
      const auto now = open_descriptors(pid);
      if (!now) return std::nullopt;
      fewest = std::min(fewest.value_or(*now), *now);
      ::usleep(10'000);
    }
    return fewest;
  };
  // What is made once and kept is there after a few rounds.
  for (int i = 0; i < 5; ++i) round(Request::kGetFeatures);
  const auto before = settled();
  if (!before) Probe::skip("the backend's descriptors cannot be seen (/proc/PID/fd)");
  for (std::uint32_t number = 1; number <= kLastRequest; ++number)
    round(static_cast<Request>(number));
  const auto after = settled();
  // What one message has too many, less one that it may have had.
  Probe::expect(after && *after < *before + kSent - 1,
                fmt::format("{} descriptors are open, and {} after each message was sent with {}",
                            *before, after.value_or(0), kSent));
}

void bytes_are_random(Probe& probe) {
  for (int round = 0; round < 60; ++round) {
    Channel channel(probe);
    if (round % 2 == 0) channel.negotiate(kPlainFeatures, kPlainProtocol);
    for (int i = 0; i < 20; ++i) {
      const auto size = static_cast<std::uint32_t>(probe.random()() % 80);
      // Half of them with a header that is believable.
      Bytes bytes = i % 2 == 0
                        ? header(static_cast<std::uint32_t>(1 + probe.random()() % kLastRequest),
                                 kVersion | (probe.random()() % 2 == 0 ? kFlagNeedReply : 0), size)
                        : Bytes{};
      for (std::uint32_t k = 0; k < size; ++k)
        bytes.push_back(static_cast<std::byte>(probe.random()()));
      if (!channel.send_raw(bytes)) break;
    }
    channel.is_closed(std::chrono::milliseconds(1));
  }
}

void order_is_wrong(Probe& probe) {
  const UniqueFd event(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  const int fds[] = {event.get()};
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(event.get(), &one, sizeof one);
  const std::array<std::function<void(Channel&)>, 8> moves{
      [&](Channel& channel) {
        channel.send(Request::kSetVringKick, payload_of(std::uint64_t{0}), fds);
      },
      [&](Channel& channel) {
        channel.send(Request::kSetVringEnable, payload_of(VringState{0, 1}));
      },
      [&](Channel& channel) {
        channel.send(Request::kSetVringAddr, payload_of(VringAddress{0, 0, 4096, 8192, 12288, 0}));
      },
      [&](Channel& channel) { channel.send(Request::kGetVringBase, payload_of(VringState{0, 0})); },
      [&](Channel& channel) {
        channel.send(Request::kSetVringNum, payload_of(VringState{0, 128}));
      },
      [&](Channel& channel) {
        channel.send(Request::kSetMemTable, payload_of(MemoryTableHead{0, 0}));
      },
      [&](Channel& channel) { channel.send(Request::kSetFeatures, payload_of(std::uint64_t{0})); },
      [&](Channel& channel) {
        channel.send(Request::kSetProtocolFeatures, payload_of(std::uint64_t{0}));
      }};
  for (int round = 0; round < 60; ++round) {
    Channel channel(probe);
    if (round % 3 != 0) channel.negotiate(kPlainFeatures, kPlainProtocol);
    for (int i = 0; i < 8; ++i) moves[probe.random()() % moves.size()](channel);
    channel.is_closed(std::chrono::milliseconds(1));
  }
}

// The outcome of a command on a connection of its own.
Channel::Taken outcome(Probe& probe, Request request, const Bytes& payload) {
  Guest guest(probe, {.starts_rings = false});
  guest.share_memory();
  return guest.channel().try_command(request, payload);
}

void expect_refused(Probe& probe, Request request, const Bytes& payload, const std::string& what) {
  const Channel::Taken taken = outcome(probe, request, payload);
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocol);
  if (!channel.has_protocol(kProtocolFReplyAck)) return;
  Probe::expect(taken != Channel::Taken::kOk, what + " is accepted");
}

void queue_indices_are_checked(Probe& probe) {
  std::uint64_t count = 1;
  {
    Channel channel(probe);
    channel.negotiate(kPlainFeatures, kPlainProtocol);
    if (channel.has_protocol(kProtocolFMq)) count = channel.call_u64(Request::kGetQueueNum);
  }
  for (const std::uint32_t index :
       {static_cast<std::uint32_t>(count) + 1000, 0x7fff'ffffU, 0xffff'ffffU}) {
    expect_refused(probe, Request::kSetVringNum, payload_of(VringState{index, 64}),
                   fmt::format("SET_VRING_NUM of queue {} of {}", index, count));
    expect_refused(probe, Request::kSetVringBase, payload_of(VringState{index, 0}),
                   fmt::format("SET_VRING_BASE of queue {} of {}", index, count));
    expect_refused(probe, Request::kSetVringEnable, payload_of(VringState{index, 1}),
                   fmt::format("SET_VRING_ENABLE of queue {} of {}", index, count));
    expect_refused(probe, Request::kSetVringAddr, payload_of(VringAddress{index, 0, 0, 0, 0, 0}),
                   fmt::format("SET_VRING_ADDR of queue {} of {}", index, count));
    Channel channel(probe);
    channel.negotiate(kPlainFeatures, kPlainProtocol);
    channel.send(Request::kGetVringBase, payload_of(VringState{index, 0}));
    channel.is_closed(std::chrono::milliseconds(10));
  }
}

// A ring of a size or at an address that it cannot have: refused at one of the messages, or never
// served; what happens in memory is what counts.
void ring_sizes_are_checked(Probe& probe) {
  for (const std::uint32_t size : {0U, 3U, 100U, 65535U, 65536U, 0x8000'0000U}) {
    Guest guest(probe, {.starts_rings = false});
    guest.share_memory();
    Ring& ring = guest.ring();
    const RingStart start{.size = size, .base = 0, .addresses = ring.addresses(0)};
    if (!try_start_ring(guest.channel(), ring, start)) continue;
    guest.post(0, 0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
    ring.kick();
    ring.wait_used(std::chrono::milliseconds(30));
  }
}

void ring_addresses_are_checked(Probe& probe) {
  for (int which = 0; which < 9; ++which) {
    Guest guest(probe, {.starts_rings = false});
    guest.share_memory();
    Ring& ring = guest.ring();
    VringAddress addresses = ring.addresses(0);
    std::uint64_t* const parts[] = {&addresses.descriptor_user_address,
                                    &addresses.avail_user_address, &addresses.used_user_address};
    std::uint64_t& address = *parts[which % 3];
    if (which / 3 == 0) address = 0x7777'0000;             // nowhere
    if (which / 3 == 1) address = ~std::uint64_t{0} - 63;  // wraps
    if (which / 3 == 2)
      address = guest.memory().regions()[0].description.user_address + guest.memory().size_bytes() -
                16;  // leaves memory
    const RingStart start{.size = ring.size(), .base = 0, .addresses = addresses};
    if (!try_start_ring(guest.channel(), ring, start)) continue;
    ring.kick();
    ring.wait_used(std::chrono::milliseconds(30));
  }
}

void memory_tables_are_checked(Probe& probe) {
  const UniqueFd file = file_of(1 << 20);
  const std::array<MemoryRegionDescription, 6> regions{{
      {.guest_address = 0, .size_bytes = 0, .user_address = 0x1000, .mmap_offset = 0},
      {.guest_address = 0,
       .size_bytes = ~std::uint64_t{0},
       .user_address = 0x1000,
       .mmap_offset = 0},
      {.guest_address = ~std::uint64_t{0} - 4095,
       .size_bytes = 1 << 20,
       .user_address = 0x1000,
       .mmap_offset = 0},
      {.guest_address = 0,
       .size_bytes = 1 << 20,
       .user_address = ~std::uint64_t{0} - 4095,
       .mmap_offset = 0},
      {.guest_address = 0,
       .size_bytes = 1 << 20,
       .user_address = 0x1000,
       .mmap_offset = ~std::uint64_t{0} - 4095},
      {.guest_address = 0, .size_bytes = 1 << 20, .user_address = 0x1000, .mmap_offset = 1 << 30},
  }};
  const int fds[] = {file.get()};
  for (const auto& region : regions) {
    Guest guest(probe);
    guest.channel().try_command(
        Request::kSetMemTable, payload_of(MemoryTableHead{.region_count = 1, .padding = 0}, region),
        fds);
    guest.ring().kick();
  }
  for (const std::uint32_t count : {9U, 1000U, 0xffff'ffffU}) {
    Guest guest(probe);
    Bytes table = payload_of(MemoryTableHead{.region_count = count, .padding = 0});
    table.resize(table.size() + 8 * sizeof(MemoryRegionDescription));
    guest.channel().try_command(Request::kSetMemTable, table, fds);
  }
}

// The rings' memory is replaced by nothing while they run.
void memory_goes_from_under_the_rings(Probe& probe) {
  Guest guest(probe);
  guest.must_read(0, kDefaultBlock);
  guest.channel().try_command(Request::kSetMemTable, payload_of(MemoryTableHead{0, 0}));
  for (int i = 0; i < 10; ++i) guest.ring().kick();
  ::usleep(50'000);
}

void config_sizes_lie(Probe& probe) {
  for (const std::uint32_t announced : {0U, 61U, 257U, 0xffff'ffffU}) {
    for (const std::size_t sent :
         {std::size_t{0}, std::size_t{1}, std::size_t{60}, std::size_t{256}}) {
      for (const Request request : {Request::kGetConfig, Request::kSetConfig}) {
        Channel channel(probe);
        channel.negotiate(kPlainFeatures, kPlainProtocol);
        if (!channel.has_protocol(kProtocolFConfig)) Probe::skip("the backend offers no CONFIG");
        Bytes payload = payload_of(ConfigHead{.offset = 0, .size_bytes = announced, .flags = 0});
        payload.resize(payload.size() + sent);
        channel.send(request, payload);
        channel.is_closed(std::chrono::milliseconds(1));
      }
    }
  }
}

// Sends without ever reading a reply, until the backend does not take any more; then goes.
void replies_are_not_read(Probe& probe) {
  Channel channel(probe);
  const Bytes one = header(1, kVersion, 0);
  for (int i = 0; i < 20'000; ++i) {
    if (::send(channel.socket(), one.data(), one.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) break;
  }
  ::usleep(20'000);
}

void inflight_areas_are_checked(Probe& probe) {
  const UniqueFd small = file_of(16);
  const UniqueFd right = file_of(1 << 20);
  const std::array<Inflight, 6> wrong{{{0, 0, 1, 64, 0},
                                       {1 << 20, 0, 0, 64, 0},
                                       {1 << 20, 0, 1, 0, 0},
                                       {1 << 20, 0, 65535, 65535, 0},
                                       {~std::uint64_t{0}, 0, 1, 64, 0},
                                       {1 << 20, ~std::uint64_t{0} - 7, 1, 64, 0}}};
  for (const Inflight& inflight : wrong) {
    for (const UniqueFd* fd : {&small, &right}) {
      Channel channel(probe);
      channel.negotiate(kPlainFeatures, kPlainProtocol | bit(kProtocolFInflightShmfd));
      need_protocol(channel, kProtocolFInflightShmfd, "INFLIGHT_SHMFD");
      const int fds[] = {fd->get()};
      channel.try_command(Request::kSetInflightFd, payload_of(inflight), fds);
    }
  }
}

constexpr Test robust(const char* name, const char* section, const char* text,
                      void (*run)(Probe&)) {
  return {.name = name, .statement = {kVhostUser, section, Force::kRobust, text}, .run = run};
}

constexpr const char* kSpecification = "Message Specification";
constexpr const char* kMessages = "Front-end message types";

constexpr std::array kTests{
    robust("hostile-message/truncated", kSpecification,
           "a connection that ends within a message is survived", messages_are_truncated),
    robust("hostile-message/wrong-size", kSpecification,
           "each message with payloads of wrong sizes is survived", sizes_are_wrong),
    robust("hostile-message/huge-size", kSpecification,
           "a header that announces up to 4 GiB is survived", sizes_are_huge),
    Test{.name = "hostile-message/version",
         .statement = {kVhostUser, kSpecification, Force::kRobust,
                       "a message of another version is not answered"},
         .run = versions_are_wrong},
    Test{.name = "hostile-message/unknown",
         .statement = {kVhostUser, "VHOST_USER_PROTOCOL_F_REPLY_ACK", Force::kMust,
                       "a message that is not known is told to have failed"},
         .run = requests_are_unknown},
    robust("hostile-message/wrong-descriptors", kMessages,
           "descriptors of the wrong kind are survived", descriptors_are_wrong),
    robust("hostile-message/no-descriptors", kMessages,
           "messages without their descriptors are survived", descriptors_are_missing),
    robust("hostile-message/many-descriptors", kMessages,
           "messages with too many descriptors are survived", descriptors_are_too_many),
    robust("hostile-message/descriptor-leak", "Communication",
           "descriptors that a message should not have had are closed", descriptors_do_not_leak),
    robust("hostile-message/random", kSpecification, "random bytes are survived", bytes_are_random),
    robust("hostile-message/order", "Communication", "messages in any order are survived",
           order_is_wrong),
    robust("hostile-message/queue-index", kMessages,
           "messages for queues that there are not are refused", queue_indices_are_checked),
    robust("hostile-message/ring-size", kMessages, "sizes that no ring has are survived",
           ring_sizes_are_checked),
    robust("hostile-message/ring-address", kMessages, "rings outside guest memory are survived",
           ring_addresses_are_checked),
    robust("hostile-message/memory-table", kMessages,
           "memory tables that make no sense are survived", memory_tables_are_checked),
    robust("hostile-message/memory-gone", kMessages,
           "an empty memory table under running rings is survived",
           memory_goes_from_under_the_rings),
    robust("hostile-message/config-size", kMessages,
           "config messages whose sizes contradict each other are survived", config_sizes_lie),
    robust("hostile-message/replies-unread", "Communication",
           "a frontend that reads no replies is survived", replies_are_not_read),
    robust("hostile-message/inflight", "Inflight I/O tracking",
           "in-flight areas that make no sense are survived", inflight_areas_are_checked),
};

}  // namespace

std::span<const Test> hostile_message_tests() { return kTests; }

}  // namespace vblk::conform
