// Random messages, after which the server must still serve.
#include <array>
#include <random>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/driver/blk_driver.h"
#include "tests/support/seed.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::vhost_user {
namespace {

using test::Bytes;
using test::HoldingDisk;
using test::kPatience;
using test::payload_of;
using test::RawFrontend;
using test::Served;

constexpr int kConnections = 500;
constexpr int kMessagesPerConnection = 150;

// Mostly messages that are nearly right, so that they get past the first check.
class Noise {
 public:
  Noise(std::uint64_t seed, const driver::DriverMemory& memory) : random_(seed), memory_(memory) {}

  std::uint64_t below(std::uint64_t bound) { return random_() % bound; }
  Bytes payload(Request request) {
    Bytes bytes = likely_payload(request);
    if (below(10) == 0) bytes.resize(below(100));
    // Without REPLY_ACK there would be no answer to wait for.
    const bool may_differ = request != Request::kSetProtocolFeatures;
    if (may_differ && below(10) == 0 && !bytes.empty())
      bytes[below(bytes.size())] = static_cast<std::byte>(below(256));
    return bytes;
  }

 private:
  std::uint64_t address() {
    return reinterpret_cast<std::uint64_t>(memory_.begin()) + below(memory_.size_bytes()) / 16 * 16;
  }
  MemoryRegionDescription region() {
    MemoryRegionDescription region = memory_.regions()[0].description;
    if (below(3) == 0) region.guest_address += below(8) * 4096;
    if (below(3) == 0) region.size_bytes -= below(8) * 4096;
    if (below(4) == 0) region.mmap_offset = below(4) * 4096;
    return region;
  }
  VringState state() {
    return {static_cast<std::uint32_t>(below(3)),
            static_cast<std::uint32_t>(below(2) == 0 ? below(3) : 1U << below(18))};
  }
  Bytes likely_payload(Request request) {
    using enum Request;
    switch (request) {
      case kSetMemTable:
        return payload_of(MemoryTableHead{1, 0}, region());
      case kAddMemReg:
      case kRemMemReg:
        return payload_of(SingleMemoryRegion{0, region()});
      case kSetVringNum:
      case kGetVringBase:
      case kSetVringEnable:
        return payload_of(state());
      case kSetVringBase: {
        // Of a packed ring that nothing is in flight on, often.
        const auto half = static_cast<std::uint32_t>(0x8000 | below(3));
        return below(2) == 0 ? payload_of(state())
                             : payload_of(VringState{static_cast<std::uint32_t>(below(3)),
                                                     half << 16 | half});
      }
      case kSetVringAddr:
        return payload_of(VringAddress{.index = static_cast<std::uint32_t>(below(3)),
                                       .descriptor_user_address = address(),
                                       .used_user_address = address(),
                                       .avail_user_address = address()});
      case kGetConfig:
      case kSetConfig:
        return payload_of(ConfigHead{static_cast<std::uint32_t>(below(300)),
                                     static_cast<std::uint32_t>(below(300)), 0});
      case kSetVringKick:
      case kSetVringCall:
      case kSetVringErr:
        return payload_of(below(3));
      case kSetFeatures:
        return payload_of((std::uint64_t{1} << 32) | (below(2) << kFProtocolFeatures) |
                          (below(4) << 28) | (below(2) << virtio::kFRingPacked));
      case kSetProtocolFeatures:
        return payload_of(std::uint64_t{1} << kProtocolFReplyAck | below(2) |
                          below(4) << kProtocolFInflightShmfd | below(2) << kProtocolFStatus);
      case kSetStatus:
        return payload_of(below(3) == 0 ? std::uint64_t{0} : below(16));
      case kGetInflightFd:
      case kSetInflightFd:
        return payload_of(Inflight{.mmap_size = 4096 * below(4),
                                   .mmap_offset = below(2) == 0 ? 0 : below(4096) * 8,
                                   .queue_count = static_cast<std::uint16_t>(1 + below(3)),
                                   .queue_size = static_cast<std::uint16_t>(1U << below(8))});
      default:
        return {};
    }
  }

  std::mt19937_64 random_;
  const driver::DriverMemory& memory_;
};

TEST(Fuzz, serves_a_frontend_with_manners_after_any_number_without) {
  HoldingDisk disk(std::size_t{1} << 20);
  Served served(disk);
  const std::size_t fds_before = test::open_fds();
  {
    const auto memory = driver::DriverMemory::create({std::size_t{1} << 16}).value();
    Noise noise(test::test_seed(), *memory);
    for (int connection = 0; connection < kConnections; ++connection) {
      // Garbage in the rings: hostile, and never the same.
      for (std::size_t i = 0; i < memory->size_bytes(); i += 1 + noise.below(64))
        __atomic_store_n(reinterpret_cast<unsigned char*>(memory->begin() + i),
                         static_cast<unsigned char>(noise.below(256)), __ATOMIC_RELAXED);
      RawFrontend frontend(served.path());
      ASSERT_TRUE(frontend.polite().negotiate().has_value());
      const UniqueFd event(::eventfd(1, EFD_CLOEXEC));
      const UniqueFd area(::memfd_create("area", MFD_CLOEXEC));
      ASSERT_EQ(::ftruncate(area.get(), 16384), 0);
      for (int i = 0; i < kMessagesPerConnection; ++i) {
        const auto request = static_cast<Request>(noise.below(44));
        const bool wants_memory = request == Request::kSetMemTable ||
                                  request == Request::kAddMemReg ||
                                  request == Request::kSetInflightFd || noise.below(20) == 0;
        std::vector<int> fds;
        const bool takes_fd = wants_memory || request == Request::kSetVringKick ||
                              request == Request::kSetVringCall ||
                              request == Request::kSetVringErr ||
                              request == Request::kSetBackendReqFd;
        // Zeroes are an in-flight area that nobody has used; guest memory is one full of lies.
        const bool is_area = request == Request::kSetInflightFd && noise.below(2) == 0;
        if (takes_fd && noise.below(10) > 0) {
          const int shared = is_area ? area.get() : memory->regions()[0].fd;
          fds.push_back(wants_memory ? shared : event.get());
        }
        if (!frontend.polite().command(request, noise.payload(request), fds)) {
          // Refused or cut off: who is cut off starts over.
          if (!frontend.call_u64(Request::kGetQueueNum)) break;
        }
      }
    }
  }
  {
    const auto driver =
        driver::BlkDriver::connect(served.path(), {.frontend = {.timeout = kPatience}});
    ASSERT_TRUE(driver.has_value()) << driver.error().message;
    const auto data = (*driver)->memory().allocate(4096, 4096);
    std::memset(data.data(), 0x5a, data.size());
    EXPECT_EQ((*driver)->write(8, data).value(), virtio::kBlkSOk);
    std::memset(data.data(), 0, data.size());
    EXPECT_EQ((*driver)->read(8, data).value(), virtio::kBlkSOk);
    EXPECT_EQ(data[4095], std::byte{0x5a});
  }
  EXPECT_TRUE(test::eventually([&served] { return !served.connected(); }));
  EXPECT_EQ(test::open_fds(), fds_before);
}

}  // namespace
}  // namespace vblk::vhost_user
