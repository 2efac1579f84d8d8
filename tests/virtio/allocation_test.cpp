// The steady state allocates nothing: every call of operator new in this program is counted.
#include <atomic>
#include <cstdlib>
#include <new>

#include "blockdev/null_node.h"
#include "tests/virtio/packed_fixture.h"
#include "tests/virtio/ring_fixture.h"

namespace {
std::atomic<std::uint64_t> allocation_count{0};
}  // namespace

void* operator new(std::size_t bytes) {
  allocation_count.fetch_add(1, std::memory_order_relaxed);
  if (void* const memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
// NOLINTBEGIN(clang-analyzer-cplusplus.NewDelete): these are the operators themselves.
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*bytes*/) noexcept { std::free(memory); }
// NOLINTEND(clang-analyzer-cplusplus.NewDelete)

namespace vblk::virtio {
namespace {

TEST(Allocation, is_counted_by_this_program) {
  const std::uint64_t before = allocation_count.load();
  const auto canary = std::make_unique<std::array<int, 100>>();
  ASSERT_NE(canary, nullptr);
  EXPECT_GT(allocation_count.load(), before);
}

TEST(Allocation, ten_thousand_requests_allocate_nothing) {
  testing::Rig rig;
  const auto node = blockdev::NullNode::create(testing::Rig::kDiskBytes, false).value();
  const auto device = BlkDevice::create(*node, {}).value();
  ASSERT_TRUE(device->set_features(testing::kUsualFeatures).has_value());
  rig.queue.reset();
  BlkQueueSetup setup = rig.ring->setup();
  setup.call_fd = rig.call.fd();
  rig.queue = BlkQueue::start(*device, *rig.context, rig.memory.shared(), setup).value();

  // The chains stay as they are; only their heads are made available again and again.
  constexpr std::uint16_t kRequests = 16;
  for (std::uint16_t i = 0; i < kRequests; ++i) {
    constexpr std::array kTypes{kBlkTIn, kBlkTOut, kBlkTFlush};
    const std::uint32_t type = kTypes[i % kTypes.size()];
    const bool readable = type == kBlkTOut;
    rig.submit({{rig.place(testing::header(type, i)), 16},
                {rig.allocate(512), type == kBlkTFlush ? 0U : 512U, !readable},
                {rig.allocate(1), 1, true}},
               static_cast<std::uint16_t>(3 * i));
  }
  rig.run();
  std::uint64_t during = 0;
  for (int round = 0; round < 10000 / kRequests; ++round) {
    for (std::uint16_t i = 0; i < kRequests; ++i)
      rig.ring->make_available(static_cast<std::uint16_t>(3 * i));
    const std::uint64_t before = allocation_count.load();
    while (rig.cycle()) {
    }
    during += allocation_count.load() - before;
  }
  EXPECT_EQ(during, 0U);
  EXPECT_EQ(rig.queue->statistics().requests, kRequests * (1U + 10000U / kRequests));
  EXPECT_EQ(rig.queue->statistics().errors, 0U);
  rig.queue.reset();
  rig.start({});
}

TEST(Allocation, ten_thousand_requests_on_a_packed_ring_allocate_nothing_tracked_or_not) {
  const testing::MemFd file(8192);
  const InflightDescription description{.size_bytes = InflightArea::bytes_for(1, 64, true),
                                        .queue_count = 1,
                                        .queue_size = 64,
                                        .is_packed = true};
  const auto area = InflightArea::map(file.fd(), description).value();
  for (const bool is_tracked : {false, true}) {
    testing::PackedRig rig;
    const auto node = blockdev::NullNode::create(testing::Rig::kDiskBytes, false).value();
    const auto device = BlkDevice::create(*node, {}).value();
    ASSERT_TRUE(device->set_features(testing::kPackedFeatures).has_value());
    rig.queue.reset();
    BlkQueueSetup setup = rig.ring->setup();
    setup.call_fd = rig.call.fd();
    if (is_tracked) setup.inflight = area;
    rig.queue = BlkQueue::start(*device, *rig.context, rig.memory.shared(), setup).value();
    constexpr std::uint16_t kRequests = 16;
    const std::vector<testing::Rig::Piece> pieces{{rig.place(testing::header(kBlkTIn, 0)), 16},
                                                  {rig.allocate(512), 512, true},
                                                  {rig.allocate(1), 1, true}};
    std::uint64_t during = 0;
    for (int round = 0; round < 10000 / kRequests; ++round) {
      for (std::uint16_t i = 0; i < kRequests; ++i) rig.ring->put(pieces, i);
      const std::uint64_t before = allocation_count.load();
      while (rig.cycle()) {
      }
      // The loop's own room for requests that complete later grows in the first round.
      if (round > 0) during += allocation_count.load() - before;
      ASSERT_EQ(rig.ring->take_used().size(), kRequests);
    }
    EXPECT_EQ(during, 0U);
    EXPECT_EQ(rig.queue->statistics().errors, 0U);
    rig.queue.reset();
    ASSERT_TRUE(rig.device->set_features(testing::kPackedFeatures).has_value());
  }
}

}  // namespace
}  // namespace vblk::virtio
