// Guest memory: tables, slots, regions that meet, and memory that is taken away.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/test.h"
#include "blockdev/driver/blk_driver.h"

namespace vblk::conform {

using namespace vhost_user;
using namespace virtio;

namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::uint64_t kTestSector = 128;

GuestOptions with_slots(std::vector<std::size_t> memory_bytes) {
  return {.protocol_features = kPlainProtocol | bit(kProtocolFConfigureMemSlots),
          .memory_bytes = std::move(memory_bytes)};
}

void needs_slots(Guest& guest) {
  need_protocol(guest.channel(), kProtocolFConfigureMemSlots, "CONFIGURE_MEM_SLOTS");
}

// A memory of its own at a guest address that no DriverMemory uses.
class Extra {
 public:
  explicit Extra(std::size_t bytes, std::uint64_t mmap_offset = 0)
      : fd_(::memfd_create("vblk-conform-extra", MFD_CLOEXEC)), bytes_(bytes) {
    if (::ftruncate(fd_.get(), static_cast<off_t>(bytes + mmap_offset)) != 0)
      Probe::fail("the suite itself: no memory");
    void* const mapping = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(),
                                 static_cast<off_t>(mmap_offset));
    if (mapping == MAP_FAILED) Probe::fail("the suite itself: no memory");
    begin_ = static_cast<std::byte*>(mapping);
    description_ = {.guest_address = kGuestAddress,
                    .size_bytes = bytes,
                    .user_address = reinterpret_cast<std::uint64_t>(begin_),
                    .mmap_offset = mmap_offset};
  }
  ~Extra() { ::munmap(begin_, bytes_); }
  Extra(const Extra&) = delete;
  Extra& operator=(const Extra&) = delete;

  static constexpr std::uint64_t kGuestAddress = std::uint64_t{1} << 42;
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] std::span<std::byte> bytes() const { return {begin_, bytes_}; }
  [[nodiscard]] const MemoryRegionDescription& description() const { return description_; }
  [[nodiscard]] Bytes message() const {
    return payload_of(SingleMemoryRegion{.padding = 0, .region = description_});
  }

 private:
  UniqueFd fd_;
  std::size_t bytes_;
  std::byte* begin_{nullptr};
  MemoryRegionDescription description_{};
};

// A read of one block to a guest address.
Answer read_to(Guest& guest, std::uint64_t guest_address, std::uint32_t bytes = kDefaultBlock) {
  guest.write_request(0, 0, kBlkTIn, kTestSector, {}, guest.data().first(kDefaultBlock));
  guest.ring().write_descriptor(1, {guest_address, bytes, kDescFWrite | kDescFNext, 2});
  guest.offer(0, 0);
  guest.ring().kick();
  return guest.await(0, 0);
}

void slots_are_added(Probe& probe) {
  Guest guest(probe, with_slots({8 * kMiB}));
  needs_slots(guest);
  const Extra extra(kMiB);
  const int fds[] = {extra.fd()};
  guest.channel().command(Request::kAddMemReg, extra.message(), fds);
  std::ranges::fill(extra.bytes(), std::byte{0xaa});
  const Answer answer = read_to(guest, Extra::kGuestAddress + 8192);
  Probe::expect(answer.status == kBlkSOk,
                fmt::format("a read into a region that was added has status {}", answer.status));
  guest.must_read(kTestSector, kDefaultBlock);
  Probe::expect(std::memcmp(extra.bytes().data() + 8192, guest.data().data(), kDefaultBlock) == 0,
                "a read into a region that was added brings other data");
}

void slots_are_removed(Probe& probe) {
  Guest guest(probe, with_slots({8 * kMiB}));
  needs_slots(guest);
  const Extra extra(kMiB);
  const int fds[] = {extra.fd()};
  guest.channel().command(Request::kAddMemReg, extra.message(), fds);
  guest.must_read(0, kDefaultBlock);
  guest.channel().command(Request::kRemMemReg, extra.message());
  guest.must_read(0, kDefaultBlock);
  std::ranges::fill(extra.bytes(), std::byte{0xaa});
  // Its address lies nowhere now: hostile, and harmless.
  guest.write_request(0, 0, kBlkTIn, kTestSector, {}, guest.data().first(kDefaultBlock));
  guest.ring().write_descriptor(1,
                                {Extra::kGuestAddress, kDefaultBlock, kDescFWrite | kDescFNext, 2});
  guest.offer(0, 0);
  guest.ring().kick();
  const bool answered = guest.ring().wait_used(kQuiet);
  Probe::expect(!answered || guest.status_of(0, 0) != kBlkSOk,
                "a read into a region that was removed has status 0");
  Probe::expect(
      std::ranges::all_of(extra.bytes(), [](std::byte b) { return b == std::byte{0xaa}; }),
      "a region that was removed is written");
}

// By its addresses and its size; the mmap offset of the message is ignored.
void slots_are_removed_by_address(Probe& probe) {
  Guest guest(probe, with_slots({8 * kMiB}));
  needs_slots(guest);
  const Extra extra(kMiB);
  const int fds[] = {extra.fd()};
  guest.channel().command(Request::kAddMemReg, extra.message(), fds);
  SingleMemoryRegion named{.padding = 0, .region = extra.description()};
  named.region.mmap_offset = 12345;
  guest.channel().command(Request::kRemMemReg, payload_of(named));
  // Where it was is room for another.
  guest.channel().command(Request::kAddMemReg, extra.message(), fds);
  Probe::expect(read_to(guest, Extra::kGuestAddress).status == kBlkSOk,
                "a read into a region that was added again fails");
}

bool maps(int pid, std::string_view name) {
  std::ifstream file(fmt::format("/proc/{}/maps", pid));
  if (!file) Probe::skip("the backend's mappings cannot be seen (/proc/PID/maps)");
  std::string line;
  bool any = false;
  while (std::getline(file, line)) {
    any = true;
    if (line.find(name) != std::string::npos) return true;
  }
  if (!any) Probe::skip("the backend's mappings cannot be seen (/proc/PID/maps)");
  return false;
}

void removed_slots_are_unmapped(Probe& probe) {
  const int pid = probe.backend_pid();
  Guest guest(probe, with_slots({8 * kMiB}));
  needs_slots(guest);
  const Extra extra(kMiB);
  const int fds[] = {extra.fd()};
  guest.channel().command(Request::kAddMemReg, extra.message(), fds);
  if (!maps(pid, "vblk-conform-extra")) Probe::skip("the backend maps regions in its own time");
  guest.channel().command(Request::kRemMemReg, extra.message());
  Probe::expect(!maps(pid, "vblk-conform-extra"), "the region is still mapped after REM_MEM_REG");
}

void removal_closes_descriptors(Probe& probe) {
  const int pid = probe.backend_pid();
  Guest guest(probe, with_slots({8 * kMiB}));
  needs_slots(guest);
  const Extra extra(kMiB);
  const int fds[] = {extra.fd()};
  const auto open_count = [pid] {
    std::size_t count = 0;
    std::error_code error;
    for (std::filesystem::directory_iterator entry(fmt::format("/proc/{}/fd", pid), error), end;
         !error && entry != end; entry.increment(error))
      ++count;
    if (error || count == 0) Probe::skip("the backend's descriptors cannot be seen (/proc/PID/fd)");
    return count;
  };
  const auto round = [&] {
    guest.channel().command(Request::kAddMemReg, extra.message(), fds);
    guest.channel().try_command(Request::kRemMemReg, extra.message(), fds);
  };
  round();
  const std::size_t before = open_count();
  for (int i = 0; i < 20; ++i) round();
  const std::size_t after = open_count();
  Probe::expect(after < before + 10,
                fmt::format("{} descriptors before and {} after 20 REM_MEM_REG that sent one",
                            before, after));
}

void regions_may_meet(Probe& probe) {
  Guest guest(probe, {.memory_bytes = {4 * kMiB, 4 * kMiB, 4 * kMiB}});
  guest.must_read(kTestSector, kDefaultBlock);
  const Bytes expected(guest.data().begin(), guest.data().begin() + kDefaultBlock);
  for (const std::size_t before : {std::size_t{1}, std::size_t{512}, kDefaultBlock - 1}) {
    const std::uint64_t address = driver::DriverMemory::kGuestBase + 8 * kMiB - before;
    std::byte* const place = guest.memory().begin() + 8 * kMiB - before;
    std::memset(place, 0x77, kDefaultBlock);
    const Answer answer = read_to(guest, address);
    Probe::expect(answer.status == kBlkSOk,
                  fmt::format("a read into two regions that meet has status {}", answer.status));
    Probe::expect(std::memcmp(place, expected.data(), kDefaultBlock) == 0,
                  "a read into two regions that meet brings other data");
  }
}

void regions_are_used_to_their_ends(Probe& probe) {
  Guest guest(probe, {.memory_bytes = {8 * kMiB}});
  const Answer first = read_to(guest, driver::DriverMemory::kGuestBase + 8 * kMiB - kDefaultBlock);
  Probe::expect(first.status == kBlkSOk,
                fmt::format("a read to the end of a region has status {}", first.status));
}

void offsets_in_files_are_respected(Probe& probe) {
  Guest guest(probe, with_slots({8 * kMiB}));
  needs_slots(guest);
  const Extra extra(kMiB, 16 * 4096);
  const int fds[] = {extra.fd()};
  guest.channel().command(Request::kAddMemReg, extra.message(), fds);
  guest.must_read(kTestSector, kDefaultBlock);
  std::ranges::fill(extra.bytes(), std::byte{0xaa});
  Probe::expect(read_to(guest, Extra::kGuestAddress).status == kBlkSOk, "the read fails");
  Probe::expect(std::memcmp(extra.bytes().data(), guest.data().data(), kDefaultBlock) == 0,
                "a read into a region with an mmap offset lands elsewhere");
}

void many_slots_work(Probe& probe) {
  std::uint64_t slots = 0;
  {
    Guest guest(probe, with_slots({8 * kMiB}));
    needs_slots(guest);
    slots = guest.channel().call_u64(Request::kGetMaxMemSlots);
  }
  const std::size_t count = std::min<std::uint64_t>(slots, 64);
  std::vector<std::size_t> sizes(count, 4096);
  sizes[0] = 8 * kMiB;
  Guest guest(probe, with_slots(sizes));
  for (std::size_t i = 1; i < count; ++i) {
    const Answer answer =
        read_to(guest, driver::DriverMemory::kGuestBase + 8 * kMiB + (i - 1) * 4096, kDefaultBlock);
    Probe::expect(answer.status == kBlkSOk,
                  fmt::format("a read into slot {} of {} has status {}", i, slots, answer.status));
  }
}

void table_changes_under_load(Probe& probe) {
  Guest guest(probe);
  for (int round = 0; round < 30; ++round) {
    const std::uint16_t count = guest.post_reads();
    guest.share_memory();
    guest.await_reads(count, "SET_MEM_TABLE");
  }
}

// The file behind guest memory is cut off while requests go on in it.
void memory_is_truncated(Probe& probe) {
  Guest guest(probe, {.memory_bytes = {4 * kMiB, 4 * kMiB}});
  guest.need_segment_bytes(65536);
  const int second = guest.memory().regions()[1].fd;
  const std::uint64_t address = driver::DriverMemory::kGuestBase + 4 * kMiB;
  const auto count = static_cast<std::uint16_t>(guest.ring().size() / 3);
  for (std::uint16_t i = 0; i < count; ++i) {
    guest.write_request(0, i, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
    guest.ring().write_descriptor(i * 3U + 1,
                                  {address + i * 65536U, 65536, kDescFWrite | kDescFNext,
                                   static_cast<std::uint16_t>(i * 3 + 2)});
    guest.offer(0, i);
    if (i == count / 2 && ::ftruncate(second, 0) != 0) Probe::fail("the suite itself: ftruncate");
    guest.ring().kick();
  }
  ::usleep(100'000);
}

void ring_memory_is_truncated(Probe& probe) {
  Guest guest(probe);
  guest.must_read(0, kDefaultBlock);
  guest.post(0, 0, kBlkTIn, 0, {}, guest.data().first(kDefaultBlock));
  // From here on this process must not touch it either.
  if (::ftruncate(guest.memory().regions()[0].fd, 0) != 0)
    Probe::fail("the suite itself: ftruncate");
  const std::uint64_t one = 1;
  for (int i = 0; i < 10; ++i) {
    [[maybe_unused]] const auto written = ::write(guest.ring().kick_fd(), &one, sizeof one);
    ::usleep(10'000);
  }
}

constexpr const char* kMessages = "Front-end message types";

constexpr std::array kTests{
    Test{"memory/slot-added",
         {kVhostUser, kMessages, Force::kMust, "a region that ADD_MEM_REG brings can be used"},
         slots_are_added},
    Test{"memory/slot-removed",
         {kVhostUser, kMessages, Force::kMust,
          "a region that REM_MEM_REG removes is not used any more"},
         slots_are_removed},
    Test{"memory/slot-named",
         {kVhostUser, kMessages, Force::kStates,
          "REM_MEM_REG names a region by its addresses and size; its mmap offset is ignored"},
         slots_are_removed_by_address},
    Test{"memory/slot-unmapped",
         {kVhostUser, kMessages, Force::kMust, "a region that REM_MEM_REG removes is unmapped"},
         removed_slots_are_unmapped},
    Test{"memory/removal-descriptor",
         {kVhostUser, kMessages, Force::kMust, "a descriptor that REM_MEM_REG brings is closed"},
         removal_closes_descriptors},
    Test{"memory/slots",
         {kVhostUser, kMessages, Force::kStates,
          "as many regions work as GET_MAX_MEM_SLOTS tells (up to 64)"},
         many_slots_work},
    Test{
        "memory/mmap-offset",
        {kVhostUser, "Message Specification", Force::kStates, "a region begins at its mmap offset"},
        offsets_in_files_are_respected},
    Test{"memory/regions-meet",
         {kVirtio, "The Virtqueue Descriptor Table", Force::kStates,
          "a buffer may lie in two regions that meet"},
         regions_may_meet},
    Test{"memory/region-end",
         {kVhostUser, "Message Specification", Force::kStates,
          "a region can be used to its last byte"},
         regions_are_used_to_their_ends},
    Test{"memory/table-under-load",
         {kVhostUser, "Ring states", Force::kMust,
          "memory may be set again while requests are in flight"},
         table_changes_under_load},
    Test{"memory/truncated",
         {kVhostUser, kMessages, Force::kRobust,
          "guest memory that is taken away under requests is survived"},
         memory_is_truncated},
    Test{"memory/ring-truncated",
         {kVhostUser, kMessages, Force::kRobust,
          "guest memory that is taken away under a ring is survived"},
         ring_memory_is_truncated},
};

}  // namespace

std::span<const Test> memory_tests() { return kTests; }

}  // namespace vblk::conform
