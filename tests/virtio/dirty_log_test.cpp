// The log of dirty pages: which bits, how far it reaches, and two sides at once.
#include "blockdev/virtio/dirty_log.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "tests/virtio/packed_fixture.h"
#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

using testing::MemFd;

constexpr std::uint64_t kPage = DirtyLog::kPageBytes;
constexpr std::uint64_t kMax = ~std::uint64_t{0};

// A log in a file, and the frontend's view of it.
struct Logged {
  explicit Logged(std::uint64_t size_bytes = 4096, std::uint64_t offset_bytes = 0)
      : file(8192), log(DirtyLog::map(file.fd(), size_bytes, offset_bytes).value()) {}
  [[nodiscard]] std::vector<std::uint64_t> pages() const {
    std::vector<std::uint8_t> bytes(8192);
    EXPECT_EQ(::pread(file.fd(), bytes.data(), bytes.size(), 0), 8192);
    std::vector<std::uint64_t> set;
    for (std::uint64_t bit = 0; bit < 8 * bytes.size(); ++bit) {
      if ((bytes[bit / 8] >> bit % 8 & 1) != 0) set.push_back(bit);
    }
    return set;
  }
  MemFd file;
  std::shared_ptr<const DirtyLog> log;
};

TEST(DirtyLog, marks_each_page_that_a_range_touches) {
  const Logged logged;
  logged.log->mark(3 * kPage, 1);
  logged.log->mark(7 * kPage - 1, 2);
  logged.log->mark(9 * kPage, kPage);
  logged.log->mark(11 * kPage, 0);
  logged.log->mark(3 * kPage + 5, 8);
  EXPECT_EQ(logged.pages(), (std::vector<std::uint64_t>{3, 6, 7, 9}));
}

TEST(DirtyLog, begins_at_its_offset_in_the_file) {
  const Logged logged(16, 24);
  logged.log->mark(0, 1);
  EXPECT_EQ(logged.pages(), std::vector<std::uint64_t>{24 * 8});
}

TEST(DirtyLog, reaches_as_far_as_its_bits) {
  const Logged logged(2);
  EXPECT_TRUE(logged.log->covers(0, 16 * kPage));
  EXPECT_TRUE(logged.log->covers(16 * kPage - 1, 1));
  EXPECT_FALSE(logged.log->covers(0, 16 * kPage + 1));
  EXPECT_FALSE(logged.log->covers(16 * kPage, 0));
  EXPECT_FALSE(logged.log->covers(kPage, kMax));
  EXPECT_FALSE(logged.log->covers(kMax, kMax));
}

TEST(DirtyLog, must_lie_in_its_file) {
  const MemFd file(8192);
  EXPECT_FALSE(DirtyLog::map(file.fd(), 8193, 0).has_value());
  EXPECT_FALSE(DirtyLog::map(file.fd(), 1, 8192).has_value());
  EXPECT_FALSE(DirtyLog::map(file.fd(), 0, 0).has_value());
  EXPECT_FALSE(DirtyLog::map(-1, 8, 0).has_value());
}

// The device writes a page and marks it; the frontend takes the bit and copies. What it copied last
// must be what was written last.
TEST(DirtyLog, loses_no_write_to_a_frontend_that_takes_bits_meanwhile) {
  const Logged logged;
  void* const view = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, logged.file.fd(), 0);
  ASSERT_NE(view, MAP_FAILED);
  const std::atomic_ref<std::uint64_t> bits(*static_cast<std::uint64_t*>(view));
  constexpr std::uint64_t kWrites = 200'000;
  std::atomic<std::uint64_t> page{0};
  std::atomic<bool> done{false};
  std::uint64_t copied = 0;
  std::thread device([&] {
    for (std::uint64_t i = 1; i <= kWrites; ++i) {
      page.store(i, std::memory_order_relaxed);
      logged.log->mark(5 * kPage, 1);
    }
    done.store(true);
  });
  const auto take = [&] {
    if (bits.exchange(0) != 0) copied = page.load();
  };
  while (!done.load()) take();
  take();
  device.join();
  EXPECT_EQ(copied, kWrites);
  ::munmap(view, 4096);
}

// ---- What queues mark.

constexpr std::uint64_t kMemoryBytes = 2 * testing::kRegionBytes;

// A queue whose writes are logged, on a rig of either kind.
template <typename SomeRig>
class Watched {
 public:
  explicit Watched(SomeRig& rig) : rig_(rig) {
    rig.queue.reset();
    BlkQueueSetup setup = rig.ring->setup();
    setup.call_fd = rig.call.fd();
    setup.kick_fd = rig.kick.fd();
    setup.logging = {.log = logged_.log,
                     .marks_ring = true,
                     .ring_address = setup.used_address - testing::kUserBase + testing::kGuestBase};
    before_ = memory();
    auto started = BlkQueue::start(*rig.device, *rig.context, rig.memory.shared(), setup);
    EXPECT_TRUE(started.has_value()) << started.error().message;
    rig.queue = std::move(*started);
    check();
  }
  // The driver has prepared something: lets the device do it. The pages that it marked.
  std::set<std::uint64_t> run() {
    before_ = memory();
    rig_.run();
    return check();
  }

 private:
  std::vector<std::byte> memory() {
    std::vector<std::byte> copy(kMemoryBytes);
    for (std::uint64_t offset = 0; offset < kMemoryBytes; offset += testing::kRegionBytes) {
      std::memcpy(copy.data() + offset, rig_.memory.at(testing::kGuestBase + offset),
                  testing::kRegionBytes);
    }
    return copy;
  }
  // Every page that is not as it was is marked. Takes the marks.
  std::set<std::uint64_t> check() {
    const auto pages = logged_.pages();
    const std::set<std::uint64_t> marked(pages.begin(), pages.end());
    const auto after = memory();
    for (std::uint64_t offset = 0; offset < kMemoryBytes; offset += kPage) {
      const auto page = (testing::kGuestBase + offset) / kPage;
      const bool changed = std::memcmp(after.data() + offset, before_.data() + offset, kPage) != 0;
      EXPECT_TRUE(!changed || marked.contains(page)) << "page " << page << " is not marked";
    }
    const std::vector<std::byte> zeroes(8192);
    EXPECT_EQ(::pwrite(logged_.file.fd(), zeroes.data(), zeroes.size(), 0), 8192);
    return marked;
  }

  SomeRig& rig_;
  Logged logged_;
  std::vector<std::byte> before_;
};

std::set<std::uint64_t> pages_of(std::uint64_t address, std::uint64_t bytes) {
  std::set<std::uint64_t> pages;
  for (std::uint64_t page = address / kPage; page <= (address + bytes - 1) / kPage; ++page)
    pages.insert(page);
  return pages;
}

void submit(testing::Rig& rig, const std::vector<testing::Rig::Piece>& pieces, std::uint16_t id) {
  rig.submit(pieces, static_cast<std::uint16_t>(4 * id));
}
void submit(testing::PackedRig& rig, const std::vector<testing::Rig::Piece>& pieces,
            std::uint16_t id) {
  rig.put(pieces, id);
}

template <typename SomeRig>
void read_and_write(SomeRig& rig) {
  Watched watched(rig);
  for (std::uint64_t i = 0; i < 100; ++i) {
    const std::uint64_t sectors = 1 + i % 40;
    const bool is_read = i % 3 != 0;
    // Apart, so that nothing of one lies on a page of the other.
    const std::uint64_t at = rig.allocate(kPage + sectors * 512 + kPage, std::byte(i)) + kPage;
    const auto length = static_cast<std::uint32_t>(sectors * 512);
    const std::uint64_t request =
        rig.place(testing::header(is_read ? kBlkTIn : kBlkTOut, i % 64 * 64));
    const std::uint64_t status = rig.allocate(1 + 2 * kPage) + kPage;
    const auto id = static_cast<std::uint16_t>(i % 4);
    submit(rig, {{request, 16}, {at, length, is_read}, {status, 1, true}}, id);
    // What the device writes otherwise must not look as if it were there already.
    rig.memory.write(status, std::vector<std::byte>{std::byte{0x77}});
    const auto marked = watched.run();
    EXPECT_TRUE(marked.contains(status / kPage));
    for (const std::uint64_t page : pages_of(at, length))
      EXPECT_EQ(marked.contains(page), is_read) << "page " << page << " of request " << i;
    rig.ring->take_used();
    rig.forget_buffers();
  }
}

TEST(DirtyMarker, marks_all_that_requests_write_on_a_split_ring) {
  for (const std::uint64_t more : {std::uint64_t{0}, feature_bit(kFEventIdx)}) {
    testing::Rig rig({.features = testing::RigOptions{}.features | more});
    read_and_write(rig);
  }
}

TEST(DirtyMarker, marks_all_that_requests_write_on_a_packed_ring) {
  for (const std::uint64_t more : {std::uint64_t{0}, feature_bit(kFEventIdx)}) {
    testing::PackedRig rig({.size = 21, .features = testing::kPackedFeatures | more});
    read_and_write(rig);
  }
}

// A status byte behind pieces that lie nowhere is written all the same.
TEST(DirtyMarker, marks_the_status_of_a_request_that_cannot_be_carried_out) {
  testing::Rig rig;
  Watched watched(rig);
  const std::uint64_t request = rig.place(testing::header(kBlkTIn, 0));
  const std::uint64_t status = rig.allocate(1 + 2 * kPage) + kPage;
  rig.submit({{request, 16}, {1, 512, true}, {status, 1, true}});
  EXPECT_TRUE(watched.run().contains(status / kPage));
}

TEST(DirtyMarker, refuses_a_log_that_does_not_reach_to_the_end) {
  testing::Rig rig;
  rig.queue.reset();
  BlkQueueSetup setup = rig.ring->setup();
  const auto starts = [&] {
    return BlkQueue::start(*rig.device, *rig.context, rig.memory.shared(), setup).has_value();
  };
  const std::uint64_t pages = (testing::kGuestBase + kMemoryBytes) / kPage;
  const Logged enough(pages / 8);
  const Logged short_one(pages / 8 - 1);
  setup.logging = {.log = short_one.log};
  EXPECT_FALSE(starts());
  setup.logging = {.log = enough.log};
  EXPECT_TRUE(starts());
  setup.logging.marks_ring = true;
  setup.logging.ring_address = pages * kPage;
  EXPECT_FALSE(starts());
  rig.start({});
}

}  // namespace
}  // namespace vblk::virtio
