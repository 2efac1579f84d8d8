// The log of dirty pages: what is written to guest memory is marked before the driver is told.
// vhost-user.rst, "Migration".
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/packed_guest.h"
#include "blockdev/conform/test.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace vhost_user;
using namespace virtio;

namespace {

constexpr std::uint64_t kPageBytes = 4096;  // VHOST_LOG_PAGE
constexpr std::uint64_t kTestSector = 64;
constexpr std::uint64_t kPlainProtocolAndLog = kPlainProtocol | bit(kProtocolFLogShmfd);
// Behind all guest memory: where a ring says that its used ring is logged.
constexpr std::uint64_t kElsewhere = driver::DriverMemory::kGuestBase + (std::uint64_t{64} << 20);

// A log for all guest addresses of the suite's, and some behind.
class DirtyLog {
 public:
  DirtyLog() : fd_(::memfd_create("vblk-conform-log", MFD_CLOEXEC)) {
    if (::ftruncate(fd_.get(), kOffset + static_cast<off_t>(kBytes)) != 0)
      Probe::fail("the suite itself: no memory");
    void* const mapping =
        ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), kOffset);
    if (mapping == MAP_FAILED) Probe::fail("the suite itself: no memory");
    begin_ = static_cast<std::uint8_t*>(mapping);
  }
  ~DirtyLog() { ::munmap(begin_, kBytes); }
  DirtyLog(const DirtyLog&) = delete;
  DirtyLog& operator=(const DirtyLog&) = delete;

  [[nodiscard]] int fd() const { return fd_.get(); }
  static LogDescription description() { return {.size_bytes = kBytes, .mmap_offset = kOffset}; }

  [[nodiscard]] bool is_marked(std::uint64_t address) const {
    const std::uint64_t page = address / kPageBytes;
    return (unsigned{word(page).load()} >> page % 8 & 1U) != 0;
  }
  // Takes the marks, as whoever copies the pages does.
  void clear() {
    for (std::uint64_t i = kFirst; i < kBytes; ++i)
      std::atomic_ref<std::uint8_t>(begin_[i]).exchange(0);
  }
  // Whether any page of guest memory is marked.
  [[nodiscard]] bool is_any_marked() const {
    return std::any_of(begin_ + kFirst, begin_ + kBytes, [](std::uint8_t b) { return b != 0; });
  }
  [[nodiscard]] std::atomic_ref<std::uint8_t> word(std::uint64_t page) const {
    return std::atomic_ref<std::uint8_t>(begin_[page / 8]);
  }

 private:
  // So that it is seen whether the offset is respected.
  static constexpr off_t kOffset = 65536;
  static constexpr std::uint64_t kFirst = driver::DriverMemory::kGuestBase / kPageBytes / 8;
  static constexpr std::uint64_t kBytes = kElsewhere / kPageBytes / 8 + kPageBytes;

  UniqueFd fd_;
  std::uint8_t* begin_{nullptr};
};

void needs_logging(Channel& channel) {
  need_protocol(channel, kProtocolFLogShmfd, "LOG_SHMFD");
  if ((channel.offered() & bit(kFLogAll)) == 0) Probe::skip("no LOG_ALL is offered");
}

Message set_log_base(Channel& channel, const DirtyLog& log) {
  const int fds[] = {log.fd()};
  return channel.call(Request::kSetLogBase, payload_of(DirtyLog::description()), fds);
}

// "To start/stop logging of data/used ring writes".
enum class Logging : std::uint8_t { kOff, kData, kDataAndRing };

void switch_to(Channel& channel, VringAddress addresses, Logging logging) {
  const std::uint64_t log_all = logging == Logging::kOff ? 0 : bit(kFLogAll);
  channel.command(Request::kSetFeatures, payload_of(channel.features() | log_all));
  addresses.flags = logging == Logging::kDataAndRing ? kVringAddressFLog : 0;
  addresses.log_guest_address = kElsewhere;
  channel.command(Request::kSetVringAddr, payload_of(addresses));
}

// A guest whose writes are logged.
struct Logged {
  explicit Logged(Probe& probe, Logging logging = Logging::kDataAndRing,
                  const GuestOptions& options = {.protocol_features = kPlainProtocolAndLog})
      : guest(probe, options) {
    needs_logging(guest.channel());
    guest.must_read(0, kDefaultBlock);
    set_log_base(guest.channel(), log);
    for (std::uint16_t i = 0; i < guest.ring_count(); ++i)
      switch_to(guest.channel(), guest.ring(i).addresses(i), logging);
    log.clear();
  }
  DirtyLog log;
  Guest guest;
};

// The pages of [address, +bytes) that are not marked: the first one's index, or nothing.
std::optional<std::uint64_t> unmarked(const DirtyLog& log, std::uint64_t address,
                                      std::uint64_t bytes) {
  for (std::uint64_t page = address / kPageBytes; page <= (address + bytes - 1) / kPageBytes;
       ++page) {
    if (!log.is_marked(page * kPageBytes)) return page - address / kPageBytes;
  }
  return std::nullopt;
}

// What the driver learns of by looking at it is marked a moment after it was written.
bool is_marked_soon(const DirtyLog& log, std::uint64_t address) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!log.is_marked(address)) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return true;
}

void log_base_is_answered(Probe& probe) {
  Channel channel(probe);
  channel.negotiate(kPlainFeatures, kPlainProtocolAndLog);
  needs_logging(channel);
  const DirtyLog log;
  set_log_base(channel, log);
  // One reply, and not two.
  channel.call(Request::kGetFeatures);
}

void log_descriptor_is_taken(Probe& probe) {
  Logged logged(probe);
  const UniqueFd event(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  const int fds[] = {event.get()};
  logged.guest.channel().command(Request::kSetLogFd, {}, fds);
  logged.guest.must_read(0, kDefaultBlock);
}

// A read of so many bytes to `begin`, after which each page is to be marked.
void read_and_look(Logged& logged, std::size_t offset, std::size_t bytes, std::size_t ring = 0) {
  const auto place = logged.guest.data().subspan(offset, bytes);
  logged.log.clear();
  const Answer answer = logged.guest.request(kBlkTIn, kTestSector, {}, place, ring);
  Probe::expect(answer.status == kBlkSOk, fmt::format("a read has status {}", answer.status));
  const auto missing = unmarked(logged.log, logged.guest.address_of(place.data()), bytes);
  Probe::expect(!missing,
                fmt::format("a read of {} bytes at {} within its page has completed, and its page "
                            "{} is not marked",
                            bytes, offset % kPageBytes, missing.value_or(0)));
}

void data_is_logged(Probe& probe) {
  Logged logged(probe, Logging::kData);
  for (int i = 0; i < 20; ++i) {
    read_and_look(logged, 0, kDefaultBlock);
    read_and_look(logged, 3 * kPageBytes, 5 * kDefaultBlock);
    // Over the end of a page, by less than a sector.
    read_and_look(logged, 2 * kPageBytes - 8, kDefaultBlock);
  }
}

void data_of_each_queue_is_logged(Probe& probe) {
  const std::uint16_t count = queues_of(probe, 8);
  Logged logged(probe, Logging::kData,
                {.protocol_features = kPlainProtocolAndLog, .queue_count = count});
  for (std::size_t ring = 0; ring < count; ++ring) read_and_look(logged, 0, kDefaultBlock, ring);
}

void indirect_data_is_logged(Probe& probe) {
  Logged logged(probe, Logging::kData,
                {.features = kPlainFeatures | bit(kFIndirectDesc),
                 .protocol_features = kPlainProtocolAndLog});
  Guest& guest = logged.guest;
  need_feature(guest, kFIndirectDesc, "INDIRECT_DESC");
  const auto table = guest.allocate(3 * kDescriptorBytes, 16);
  for (int i = 0; i < 5; ++i) {
    guest.write_request(0, 0, kBlkTIn, kTestSector, {}, guest.data().first(2 * kDefaultBlock));
    const std::array<Piece, 3> list{
        {{guest.address_of(guest.header_of(0, 0)), 16, false},
         {guest.address_of(guest.data().data()), 2 * kDefaultBlock, true},
         {guest.address_of(guest.status_byte(0, 0)), 1, true}}};
    Ring::chain_in(table.data(), 0, list);
    guest.ring().chain(0, std::array{Piece{guest.address_of(table.data()), 3 * kDescriptorBytes,
                                           false, kDescFIndirect}});
    logged.log.clear();
    guest.offer(0, 0);
    guest.ring().kick();
    const Answer answer = guest.await(0, 0);
    Probe::expect(answer.status == kBlkSOk, fmt::format("a read has status {}", answer.status));
    const auto missing =
        unmarked(logged.log, guest.address_of(guest.data().data()), 2 * kDefaultBlock);
    Probe::expect(!missing,
                  "a read by an indirect table has completed, and its page is not marked");
  }
}

// The status alone in its page, of a read, and of what brings no data.
void status_is_logged(Probe& probe) {
  Logged logged(probe, Logging::kData);
  Guest& guest = logged.guest;
  const auto page = guest.allocate(kPageBytes, kPageBytes);
  std::vector<std::uint32_t> types{kBlkTIn, 0x7777};
  if (guest.has(kBlkFFlush)) types.push_back(kBlkTFlush);
  for (const std::uint32_t type : types) {
    const auto data = type == kBlkTIn ? guest.data().first(kDefaultBlock) : std::span<std::byte>();
    std::byte& status = page[type % kPageBytes];
    status = std::byte{0xee};
    guest.write_request(0, 0, type, 0, {}, data);
    guest.ring().write_descriptor(data.empty() ? 1U : 2U,
                                  {guest.address_of(&status), 1, kDescFWrite, 0});
    logged.log.clear();
    guest.offer(0, 0);
    guest.ring().kick();
    if (!guest.ring().wait_used()) Probe::fail("the request is not answered");
    guest.ring().take();
    Probe::expect(status != std::byte{0xee}, "the status is not written");
    Probe::expect(logged.log.is_marked(guest.address_of(&status)),
                  fmt::format("the status of request type {} is written, and its page is not "
                              "marked",
                              type));
  }
}

void used_ring_is_logged(Probe& probe) {
  Logged logged(probe, Logging::kDataAndRing);
  for (int i = 0; i < 10; ++i) {
    logged.log.clear();
    logged.guest.must_read(0, kDefaultBlock);
    Probe::expect(is_marked_soon(logged.log, kElsewhere),
                  "the used ring has changed, and its page at log_guest_addr is not marked");
  }
  switch_to(logged.guest.channel(), logged.guest.ring().addresses(0), Logging::kData);
  logged.log.clear();
  for (int i = 0; i < 10; ++i) logged.guest.must_read(0, kDefaultBlock);
  Probe::expect(!logged.log.is_marked(kElsewhere),
                "the used ring is marked at log_guest_addr without VHOST_VRING_F_LOG");
}

void nothing_is_logged_without_feature(Probe& probe) {
  Logged logged(probe, Logging::kOff);
  for (int i = 0; i < 10; ++i) logged.guest.must_read(0, kDefaultBlock);
  Probe::expect(!logged.log.is_any_marked(), "pages are marked before LOG_ALL is set");
  switch_to(logged.guest.channel(), logged.guest.ring().addresses(0), Logging::kDataAndRing);
  logged.guest.must_read(0, kDefaultBlock);
  switch_to(logged.guest.channel(), logged.guest.ring().addresses(0), Logging::kOff);
  logged.log.clear();
  for (int i = 0; i < 10; ++i) logged.guest.must_read(0, kDefaultBlock);
  Probe::expect(!logged.log.is_any_marked(), "pages are marked after LOG_ALL has been taken back");
}

// Two marks in one byte, one of which is changed by somebody else all the time.
void marks_of_others_stay(Probe& probe) {
  Logged logged(probe, Logging::kData);
  const auto all = logged.guest.data();
  // Two pages of the buffer whose marks share a byte; only the first is written.
  const std::uint64_t begin = logged.guest.address_of(all.data()) / kPageBytes;
  const std::size_t first = begin % 8 == 7 ? kPageBytes : 0;
  const std::uint64_t page = begin + first / kPageBytes;
  const std::uint64_t neighbour = page + 1;
  const auto ours = static_cast<std::uint8_t>(1U << neighbour % 8);
  const auto theirs = static_cast<std::uint8_t>(1U << page % 8);
  std::atomic<bool> ends{false};
  std::atomic<std::uint64_t> lost{0};
  std::thread other([&] {
    const auto byte = logged.log.word(page);
    bool is_set = false;
    while (!ends) {
      // Theirs is taken each time, so that the backend has to write the byte.
      const std::uint8_t before = byte.fetch_xor(ours);
      byte.fetch_and(static_cast<std::uint8_t>(~theirs));
      if (((before & ours) != 0) != is_set) ++lost;
      is_set = (before & ours) == 0;
    }
  });
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
  while (std::chrono::steady_clock::now() < end)
    logged.guest.request(kBlkTIn, 0, {}, all.subspan(first, kDefaultBlock));
  ends = true;
  other.join();
  Probe::expect(lost == 0, fmt::format("{} marks of another page in the same byte have been "
                                       "undone",
                                       lost.load()));
}

void packed_rings_are_logged(Probe& probe) {
  DirtyLog log;
  PackedGuest guest(probe, {.protocol_features = kPlainProtocolAndLog, .size = 16});
  needs_logging(guest.channel());
  guest.must_read(0, kDefaultBlock);
  set_log_base(guest.channel(), log);
  switch_to(guest.channel(), guest.ring().addresses(0), Logging::kDataAndRing);
  for (int i = 0; i < 20; ++i) {
    log.clear();
    guest.must_read(kTestSector, 2 * kDefaultBlock);
    Probe::expect(!unmarked(log, guest.guest().address_of(guest.data().data()), 2 * kDefaultBlock),
                  "a read has completed, and a page of its data is not marked");
    Probe::expect(log.is_marked(guest.guest().address_of(guest.guest().status_byte(0, 0))),
                  "the status is written, and its page is not marked");
    Probe::expect(is_marked_soon(log, guest.guest().address_of(guest.ring().ring())),
                  "a used descriptor is written, and its page of the ring is not marked");
  }
}

// Areas that are no log, or that cease to be one.
void logs_make_no_sense(Probe& probe) {
  const UniqueFd small(::memfd_create("vblk-conform-log", MFD_CLOEXEC));
  if (::ftruncate(small.get(), kPageBytes) != 0) Probe::fail("the suite itself: no memory");
  const std::array<LogDescription, 5> wrong{
      {{.size_bytes = 0, .mmap_offset = 0},
       {.size_bytes = kPageBytes, .mmap_offset = 0},
       {.size_bytes = 64 * kPageBytes, .mmap_offset = 0},
       {.size_bytes = ~std::uint64_t{0}, .mmap_offset = 0},
       {.size_bytes = kPageBytes, .mmap_offset = ~std::uint64_t{0} - 4095}}};
  for (const LogDescription& description : wrong) {
    Guest guest(probe, {.protocol_features = kPlainProtocolAndLog});
    needs_logging(guest.channel());
    const int fds[] = {small.get()};
    Channel& channel = guest.channel();
    channel.send(Request::kSetLogBase, payload_of(description), fds);
    if (!channel.receive(kQuiet)) continue;
    if (channel.try_command(Request::kSetFeatures,
                            payload_of(channel.features() | bit(kFLogAll))) != Channel::Taken::kOk)
      continue;
    guest.post(0, 0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
    guest.ring().kick();
    guest.ring().wait_used(std::chrono::milliseconds(50));
  }
}

void log_is_truncated(Probe& probe) {
  Logged logged(probe);
  if (::ftruncate(logged.log.fd(), 0) != 0) Probe::fail("the suite itself: ftruncate");
  for (int i = 0; i < 5; ++i) {
    logged.guest.post(0, 0, kBlkTIn, 0, {}, logged.guest.data().first(kDefaultBlock));
    logged.guest.ring().kick();
    logged.guest.ring().wait_used(std::chrono::milliseconds(20));
  }
}

constexpr const char* kMigration = "Migration";

constexpr std::array kTests{
    Test{"migration/log-base",
         {kVhostUser, "Communication", Force::kStates,
          "SET_LOG_BASE has a reply where LOG_SHMFD was negotiated"},
         log_base_is_answered},
    Test{"migration/log-fd",
         {kVhostUser, "Front-end message types", Force::kStates, "SET_LOG_FD is accepted"},
         log_descriptor_is_taken},
    Test{"migration/log-data",
         {kVhostUser, kMigration, Force::kShould,
          "each page that a request has written is marked when the request completes"},
         data_is_logged},
    Test{"migration/log-queues",
         {kVhostUser, kMigration, Force::kShould, "the same on each queue"},
         data_of_each_queue_is_logged},
    Test{"migration/log-indirect",
         {kVhostUser, kMigration, Force::kShould, "the same by indirect descriptors"},
         indirect_data_is_logged},
    Test{"migration/log-status",
         {kVhostUser, kMigration, Force::kShould,
          "the page of a status byte is marked, of requests without data as well"},
         status_is_logged},
    Test{"migration/log-used-ring",
         {kVhostUser, kMigration, Force::kShould,
          "with VHOST_VRING_F_LOG, and only then, the used ring is marked at log_guest_addr"},
         used_ring_is_logged},
    Test{"migration/log-off",
         {kVhostUser, kMigration, Force::kStates, "LOG_ALL starts and stops the marks"},
         nothing_is_logged_without_feature},
    Test{"migration/log-atomic",
         {kVhostUser, kMigration, Force::kStates, "marks are made by atomic operations"},
         marks_of_others_stay},
    Test{"migration/log-packed",
         {kVhostUser, kMigration, Force::kShould,
          "data, status and used descriptors of a packed ring are marked"},
         packed_rings_are_logged},
    Test{"migration/log-nonsense",
         {kVhostUser, kMigration, Force::kRobust, "logs of wrong sizes and offsets are survived"},
         logs_make_no_sense},
    Test{"migration/log-truncated",
         {kVhostUser, kMigration, Force::kRobust, "a log that is taken away is survived"},
         log_is_truncated},
};

}  // namespace

std::span<const Test> migration_tests() { return kTests; }

}  // namespace vblk::conform
