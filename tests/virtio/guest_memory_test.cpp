// Guest memory: mapping, checked translation, and survival of a file that shrinks.
#include "blockdev/virtio/guest_memory.h"

#include <csignal>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

constexpr std::uint64_t kMax = ~std::uint64_t{0};

using testing::MemFd;

TEST(MemoryRegion, maps_from_an_offset_that_is_not_page_aligned) {
  const MemFd file(65536);
  const char mark = 'x';
  ASSERT_EQ(::pwrite(file.fd(), &mark, 1, 5000), 1);
  const auto region = MemoryRegion::map(file.fd(), 0x1000, 8192, 0x2000, 5000);
  ASSERT_TRUE(region.has_value()) << region.error().message;
  EXPECT_EQ(*(*region)->host(), std::byte{'x'});
  *(*region)->host() = std::byte{'y'};
  char back = 0;
  ASSERT_EQ(::pread(file.fd(), &back, 1, 5000), 1);
  EXPECT_EQ(back, 'y') << "the mapping is not shared";
}

TEST(MemoryRegion, refuses_what_does_not_lie_in_the_file_or_wraps) {
  const MemFd file(8192);
  const auto kind = [&](std::uint64_t guest, std::uint64_t size, std::uint64_t user,
                        std::uint64_t offset) {
    const auto region = MemoryRegion::map(file.fd(), guest, size, user, offset);
    return region ? std::optional<ErrorKind>() : region.error().kind;
  };
  EXPECT_EQ(kind(0, 8192, 0, 0), std::nullopt);
  EXPECT_EQ(kind(kMax - 8191, 8191, kMax - 8191, 1), std::nullopt);
  for (const auto& [guest, size, user, offset] :
       std::vector<std::array<std::uint64_t, 4>>{{0, 0, 0, 0},
                                                 {0, 8193, 0, 0},
                                                 {0, 8192, 0, 1},
                                                 {0, 1, 0, 8192},
                                                 {0, 4096, 0, kMax - 4095},
                                                 {0, kMax, 0, 0},
                                                 {kMax, 4096, 0, 0},
                                                 {0, 4096, kMax, 0}})
    EXPECT_EQ(kind(guest, size, user, offset), ErrorKind::kInvalidArgument)
        << guest << " " << size << " " << user << " " << offset;
}

TEST(MemoryRegion, refuses_descriptors_that_are_no_files) {
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  EXPECT_FALSE(MemoryRegion::map(ends[0], 0, 4096, 0, 0).has_value());
  EXPECT_FALSE(MemoryRegion::map(-1, 0, 4096, 0, 0).has_value());
  const int zero = ::open("/dev/zero", O_RDWR | O_CLOEXEC);
  EXPECT_FALSE(MemoryRegion::map(zero, 0, 4096, 0, 0).has_value());
  for (const int fd : {ends[0], ends[1], zero}) ::close(fd);
}

TEST(MemoryRegion, unmaps_huge_pages_whole) {
  const int fd = ::memfd_create("guest-memory", MFD_CLOEXEC | MFD_HUGETLB);
  if (fd < 0) GTEST_SKIP() << "no hugetlbfs on this kernel";
  constexpr std::size_t kHugePage = std::size_t{2} << 20;
  ASSERT_EQ(::ftruncate(fd, static_cast<off_t>(2 * kHugePage)), 0);
  const auto region = MemoryRegion::map(fd, 0, kHugePage / 2, 0, kHugePage + 4096);
  ::close(fd);
  if (!region) GTEST_SKIP() << "no huge pages are reserved: " << region.error().message;
  EXPECT_NE((*region)->host(), nullptr);
}

std::shared_ptr<const MemoryRegion> wrapped(std::byte* host, std::uint64_t guest,
                                            std::uint64_t size) {
  return MemoryRegion::wrap(host, guest, size, guest + 0x1000'0000);
}

TEST(AddressTranslator, translates_only_what_lies_in_one_region) {
  std::vector<std::byte> storage(3000);
  const auto memory = GuestMemory::create({wrapped(storage.data() + 1000, 5000, 1000),
                                           wrapped(storage.data(), 1000, 1000)})
                          .value();
  AddressTranslator translator(*memory);
  EXPECT_EQ(translator.translate(1000, 1000), storage.data());
  EXPECT_EQ(translator.translate(1999, 1), storage.data() + 999);
  EXPECT_EQ(translator.translate(5500, 500), storage.data() + 1500);
  EXPECT_EQ(translator.translate(999, 1), nullptr);
  EXPECT_EQ(translator.translate(2000, 1), nullptr);
  EXPECT_EQ(translator.translate(1000, 1001), nullptr);
  EXPECT_EQ(translator.translate(5500, kMax), nullptr);
  EXPECT_EQ(translator.translate(kMax, 1), nullptr);
  EXPECT_EQ(memory->translate_user(0x1000'0000 + 5500, 500), storage.data() + 1500);
  EXPECT_EQ(memory->translate_user(0x1000'0000 + 5500, 501), nullptr);
  EXPECT_EQ(memory->translate_user(5500, 1), nullptr);
  EXPECT_EQ(memory->translate_user(kMax, kMax), nullptr);
}

TEST(AddressTranslator, splits_a_range_where_regions_meet) {
  std::vector<std::byte> storage(3000);
  const auto memory = GuestMemory::create({wrapped(storage.data() + 2000, 2000, 1000),
                                           wrapped(storage.data(), 1000, 1000)})
                          .value();
  AddressTranslator translator(*memory);
  std::array<iovec, 3> room{};
  ASSERT_EQ(translator.translate(1900, 200, room), 2U);
  EXPECT_EQ(room[0].iov_base, storage.data() + 900);
  EXPECT_EQ(room[0].iov_len, 100U);
  EXPECT_EQ(room[1].iov_base, storage.data() + 2000);
  EXPECT_EQ(room[1].iov_len, 100U);
  EXPECT_EQ(translator.translate(1900, 200, std::span(room).first(1)), 0U) << "no room";
  EXPECT_EQ(translator.translate(1900, 1101, room), 0U) << "beyond the end";
  EXPECT_EQ(translator.translate(1000, 1, std::span(room).first(0)), 0U);
}

TEST(AddressTranslator, takes_a_region_at_the_very_end_of_the_address_space) {
  std::vector<std::byte> storage(4096);
  const auto memory = GuestMemory::create({wrapped(storage.data(), kMax - 4095, 4096)}).value();
  AddressTranslator translator(*memory);
  EXPECT_EQ(translator.translate(kMax, 1), storage.data() + 4095);
  std::array<iovec, 2> room{};
  EXPECT_EQ(translator.translate(kMax, 1, room), 1U);
  EXPECT_EQ(translator.translate(kMax, 2, room), 0U);
}

TEST(GuestMemory, refuses_overlaps_and_too_many_regions) {
  std::vector<std::byte> storage(4096);
  EXPECT_FALSE(GuestMemory::create(
                   {wrapped(storage.data(), 1000, 1000), wrapped(storage.data(), 1999, 1000)})
                   .has_value());
  EXPECT_FALSE(
      GuestMemory::create({wrapped(storage.data(), 1000, 1000), wrapped(storage.data(), 1000, 1)})
          .has_value());
  std::vector<std::shared_ptr<const MemoryRegion>> regions;
  regions.reserve(GuestMemory::kMaxRegions + 1);
  for (std::size_t i = 0; i < GuestMemory::kMaxRegions; ++i)
    regions.push_back(wrapped(storage.data(), i * 1000, 1000));
  EXPECT_TRUE(GuestMemory::create(regions).has_value());
  regions.push_back(wrapped(storage.data(), 1'000'000, 1000));
  EXPECT_FALSE(GuestMemory::create(regions).has_value());
  EXPECT_TRUE(GuestMemory::create({}).has_value());
}

TEST(GuestMemoryGuard, memory_that_a_frontend_takes_away_reads_as_zeroes_and_is_marked) {
  constexpr std::size_t kPage = 4096;
  const MemFd file(4 * kPage);
  const auto region = MemoryRegion::map(file.fd(), 0, 4 * kPage, 0, 0).value();
  const auto memory = GuestMemory::create({region}).value();
  volatile std::byte* const host = region->host();
  host[0] = std::byte{1};
  host[3 * kPage] = std::byte{2};
  EXPECT_FALSE(memory->faulted());
  ASSERT_EQ(::ftruncate(file.fd(), 4096), 0);
  EXPECT_EQ(std::byte{host[3 * kPage]}, std::byte{0});
  EXPECT_TRUE(region->faulted());
  EXPECT_TRUE(memory->faulted());
  host[2 * kPage + 7] = std::byte{9};
  EXPECT_EQ(std::byte{host[0]}, std::byte{1}) << "what is still there stays";
}

TEST(GuestMemoryGuard, another_mapping_is_not_marked) {
  const MemFd file(8192);
  const auto first = MemoryRegion::map(file.fd(), 0, 4096, 0, 0).value();
  const auto second = MemoryRegion::map(file.fd(), 4096, 4096, 4096, 4096).value();
  ASSERT_EQ(::ftruncate(file.fd(), 4096), 0);
  volatile std::byte* const host = second->host();
  EXPECT_EQ(std::byte{*host}, std::byte{0});
  EXPECT_TRUE(second->faulted());
  EXPECT_FALSE(first->faulted());
}

TEST(GuestMemoryGuard, has_room_for_the_regions_of_many_devices) {
  const MemFd file(8192);
  std::vector<std::shared_ptr<const MemoryRegion>> regions;
  for (std::size_t i = 0; i < 6 * GuestMemory::kMaxRegions; ++i) {
    auto region = MemoryRegion::map(file.fd(), 0, 4096, 0, 4096);
    ASSERT_TRUE(region.has_value()) << i << ": " << region.error().message;
    regions.push_back(std::move(*region));
  }
  ASSERT_EQ(::ftruncate(file.fd(), 4096), 0);
  volatile std::byte* const host = regions.back()->host();
  EXPECT_EQ(std::byte{*host}, std::byte{0}) << "one of the last is guarded as well";
  EXPECT_TRUE(regions.back()->faulted());
  EXPECT_FALSE(regions.front()->faulted());
}

TEST(GuestMemoryGuard, a_fault_anywhere_else_is_still_fatal) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(
      {
        const MemFd guarded(4096);
        const auto region = MemoryRegion::map(guarded.fd(), 0, 4096, 0, 0);
        const MemFd file(4096);
        auto* const mapping = static_cast<volatile char*>(
            ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0));
        if (::ftruncate(file.fd(), 0) == 0) mapping[0] = 1;
      },
      "");
}

}  // namespace
}  // namespace vblk::virtio
