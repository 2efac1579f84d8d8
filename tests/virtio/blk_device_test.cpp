// The device as a whole: features offered and negotiated, config space, write stability.
#include "blockdev/virtio/blk_device.h"

#include "tests/virtio/ring_fixture.h"

namespace vblk::virtio {
namespace {

using testing::MemoryNode;

constexpr std::size_t kDiskBytes = std::size_t{4} << 20;
constexpr std::uint64_t kFlush = feature_bit(kBlkFFlush);
constexpr std::uint64_t kWce = feature_bit(kBlkFConfigWce);

template <std::unsigned_integral T>
T config_field(const BlkDevice& device, std::uint32_t offset) {
  std::array<std::byte, sizeof(T)> bytes{};
  EXPECT_TRUE(device.read_config(offset, bytes).has_value());
  return load_le<T>(bytes.data());
}
unsigned writeback(const BlkDevice& device) {
  return config_field<std::uint8_t>(device, kBlkConfigWriteback);
}
bool set_writeback(BlkDevice& device, unsigned value) {
  const std::array bytes{static_cast<std::byte>(value)};
  return device.write_config(kBlkConfigWriteback, bytes).has_value();
}

TEST(BlkDevice, offers_what_the_node_can_do) {
  MemoryNode node(kDiskBytes);
  const std::uint64_t all = BlkDevice::create(node, {}).value()->offered_features();
  for (const unsigned bit :
       {kBlkFSizeMax, kBlkFSegMax, kBlkFBlkSize, kBlkFFlush, kBlkFTopology, kBlkFConfigWce, kBlkFMq,
        kBlkFDiscard, kBlkFWriteZeroes, kFIndirectDesc, kFEventIdx, kFVersion1, kFRingPacked})
    EXPECT_NE(all & feature_bit(bit), 0U) << bit;
  EXPECT_EQ(all & feature_bit(kBlkFRo), 0U);
  constexpr unsigned kInOrder = 35;
  constexpr unsigned kNotificationData = 38;
  constexpr unsigned kRingReset = 40;
  for (const unsigned bit : {kBlkFGeometry, kInOrder, kNotificationData, kRingReset})
    EXPECT_EQ(all & feature_bit(bit), 0U) << bit;

  const std::uint64_t kept =
      BlkDevice::create(node, {.discard = false}).value()->offered_features();
  EXPECT_EQ(kept, all & ~feature_bit(kBlkFDiscard));

  node.mutable_limits().can_write_zeroes = false;
  EXPECT_EQ(BlkDevice::create(node, {}).value()->offered_features(),
            all & ~feature_bit(kBlkFWriteZeroes));
}

TEST(BlkDevice, offers_flush_but_no_changes_for_a_read_only_disk) {
  MemoryNode node(kDiskBytes, true);
  const std::uint64_t offered = BlkDevice::create(node, {}).value()->offered_features();
  EXPECT_NE(offered & feature_bit(kBlkFRo), 0U);
  EXPECT_NE(offered & kFlush, 0U);
  EXPECT_EQ(offered & feature_bit(kBlkFDiscard), 0U);
  EXPECT_EQ(offered & feature_bit(kBlkFWriteZeroes), 0U);
}

TEST(BlkDevice, refuses_options_that_do_not_fit) {
  MemoryNode node(kDiskBytes);
  const auto refused = [&](BlkDeviceOptions options) {
    const auto device = BlkDevice::create(node, std::move(options));
    return !device && device.error().kind == ErrorKind::kInvalidArgument;
  };
  EXPECT_TRUE(refused({.queue_count = 0}));
  EXPECT_TRUE(refused({.queue_size_max = 0}));
  EXPECT_TRUE(refused({.queue_size_max = 1}));
  EXPECT_TRUE(refused({.queue_size_max = 100}));
  EXPECT_TRUE(refused({.queue_size_max = 1}));
  EXPECT_TRUE(refused({.queue_size_max = 48 * 1024}));
  EXPECT_TRUE(refused({.logical_block_bytes = 256}));
  EXPECT_TRUE(refused({.logical_block_bytes = 1000}));
  EXPECT_TRUE(refused({.logical_block_bytes = 8192}));
  EXPECT_TRUE(refused({.serial = std::string(21, 's')}));
  EXPECT_FALSE(refused({.serial = std::string(20, 's')}));
  MemoryNode odd(kDiskBytes + 512);
  EXPECT_FALSE(BlkDevice::create(odd, {.logical_block_bytes = 4096}).has_value());
  EXPECT_TRUE(BlkDevice::create(odd, {.logical_block_bytes = 512}).has_value());
}

TEST(BlkDevice, refuses_features_that_were_not_offered) {
  MemoryNode node(kDiskBytes);
  const auto device = BlkDevice::create(node, {}).value();
  EXPECT_FALSE(device->set_features(feature_bit(kBlkFGeometry)).has_value());
  EXPECT_FALSE(device->set_features(feature_bit(35)).has_value());
  EXPECT_EQ(device->negotiated_features(), 0U);
  EXPECT_TRUE(device->set_features(device->offered_features()).has_value());
  EXPECT_EQ(device->negotiated_features(), device->offered_features());
}

TEST(BlkDevice, config_space_says_what_the_disk_is) {
  MemoryNode node(kDiskBytes);
  const auto device = BlkDevice::create(node, {.queue_count = 3, .queue_size_max = 256}).value();
  EXPECT_EQ(config_field<std::uint64_t>(*device, kBlkConfigCapacity), kDiskBytes / 512);
  EXPECT_GE(config_field<std::uint32_t>(*device, kBlkConfigSizeMax), 4096U);
  EXPECT_EQ(config_field<std::uint32_t>(*device, kBlkConfigSegMax), 254U);
  EXPECT_EQ(config_field<std::uint32_t>(*device, kBlkConfigBlkSize), 512U);
  EXPECT_EQ(config_field<std::uint8_t>(*device, kBlkConfigPhysicalBlockExp), 3U);
  EXPECT_EQ(config_field<std::uint8_t>(*device, kBlkConfigAlignmentOffset), 0U);
  EXPECT_EQ(config_field<std::uint16_t>(*device, kBlkConfigMinIoSize), 8U);
  EXPECT_EQ(config_field<std::uint16_t>(*device, kBlkConfigNumQueues), 3U);
  EXPECT_GT(config_field<std::uint32_t>(*device, kBlkConfigMaxDiscardSectors), 0U);
  EXPECT_EQ(config_field<std::uint32_t>(*device, kBlkConfigMaxDiscardSeg), 32U);
  EXPECT_EQ(config_field<std::uint32_t>(*device, kBlkConfigDiscardSectorAlignment), 8U);
  EXPECT_GT(config_field<std::uint32_t>(*device, kBlkConfigMaxWriteZeroesSectors), 0U);
  EXPECT_EQ(config_field<std::uint32_t>(*device, kBlkConfigMaxWriteZeroesSeg), 32U);
  EXPECT_EQ(config_field<std::uint8_t>(*device, kBlkConfigWriteZeroesMayUnmap), 1U);
}

TEST(BlkDevice, announces_segments_that_a_chain_and_a_kernel_io_can_hold) {
  MemoryNode node(kDiskBytes);
  for (const std::uint16_t size : std::to_array<std::uint16_t>({2, 4, 128, 1024, 2048, 32768})) {
    const auto device = BlkDevice::create(node, {.queue_size_max = size}).value();
    const auto segments = config_field<std::uint32_t>(*device, kBlkConfigSegMax);
    EXPECT_GE(segments, 1U);
    EXPECT_LE(segments, 1022U);
    EXPECT_LE(segments, std::max(1, size - 2));
  }
}

TEST(BlkDevice, config_space_hides_the_limits_of_what_is_not_offered) {
  MemoryNode node(kDiskBytes, true);
  const auto device = BlkDevice::create(node, {}).value();
  EXPECT_EQ(config_field<std::uint32_t>(*device, kBlkConfigMaxDiscardSectors), 0U);
  EXPECT_EQ(config_field<std::uint32_t>(*device, kBlkConfigMaxDiscardSeg), 0U);
  EXPECT_EQ(config_field<std::uint32_t>(*device, kBlkConfigMaxWriteZeroesSeg), 0U);
  EXPECT_EQ(config_field<std::uint8_t>(*device, kBlkConfigWriteZeroesMayUnmap), 0U);
}

TEST(BlkDevice, config_space_can_be_read_in_any_piece_and_ends_in_zeroes) {
  MemoryNode node(kDiskBytes);
  const auto device = BlkDevice::create(node, {}).value();
  std::array<std::byte, 256> whole{};
  ASSERT_TRUE(device->read_config(0, whole).has_value());
  for (std::size_t i = kBlkConfigBytes; i < whole.size(); ++i) ASSERT_EQ(whole[i], std::byte{0});
  for (const std::size_t padding : {16U, 17U, 18U, 19U, 33U, 57U, 58U, 59U})
    EXPECT_EQ(whole[padding], std::byte{0}) << padding;
  std::array<std::byte, 258> piece;
  for (std::uint32_t offset = 0; offset <= 256; ++offset) {
    for (std::size_t length = 0; length <= 256; ++length) {
      piece.fill(testing::kUntouched);
      const auto read = device->read_config(offset, std::span(piece).subspan(1, length));
      ASSERT_EQ(read.has_value(), offset + length <= 256) << offset << "+" << length;
      ASSERT_EQ(piece[0], testing::kUntouched);
      ASSERT_EQ(piece[length + 1], testing::kUntouched);
      if (!read) continue;
      const auto expected = std::span(whole).subspan(offset, length);
      ASSERT_TRUE(std::ranges::equal(expected, std::span(piece).subspan(1, length)));
    }
  }
  EXPECT_FALSE(device->read_config(0xffffffff, std::span(piece).first(2)).has_value());
}

TEST(BlkDevice, capacity_follows_the_node) {
  struct Growing final : blockdev::BlockNode {
    Growing() { size_bytes_ = 4096; }
    void grow() { size_bytes_ = 8192; }
    void do_submit(blockdev::BlockRequest&, blockdev::IoContext&) override {}
  } node;
  const auto device = BlkDevice::create(node, {}).value();
  EXPECT_EQ(config_field<std::uint64_t>(*device, kBlkConfigCapacity), 8U);
  node.grow();
  EXPECT_EQ(config_field<std::uint64_t>(*device, kBlkConfigCapacity), 16U);
}

// virtio 1.2, "Device Operation": the three cases of when a write is stable, for every negotiation,
// initial cache mode and value that the driver sets.
TEST(BlkDevice, writes_are_stable_exactly_in_the_cases_of_the_specification) {
  struct Case {
    std::uint64_t features;
    bool write_cache;
    int set_to;  // -1: the driver does not touch it
    bool write_through;
  };
  const std::vector<Case> cases{
      // Case 1: neither negotiated.
      {0, true, -1, true},
      {0, false, -1, true},
      // FLUSH alone: only a flush makes stable, unless the user wants no cache.
      {kFlush, true, -1, false},
      {kFlush, false, -1, true},
      // Case 2: CONFIG_WCE, as writeback says.
      {kFlush | kWce, true, -1, false},
      {kFlush | kWce, false, -1, true},
      {kFlush | kWce, true, 0, true},
      {kFlush | kWce, false, 0, true},
      {kFlush | kWce, true, 1, false},
      {kFlush | kWce, false, 1, false},
      // CONFIG_WCE without FLUSH MUST begin with 0.
      {kWce, true, -1, true},
      {kWce, false, -1, true},
      {kWce, true, 0, true},
      {kWce, true, 1, false},
  };
  for (const Case& c : cases) {
    MemoryNode node(kDiskBytes);
    const auto device = BlkDevice::create(node, {.write_cache = c.write_cache}).value();
    ASSERT_TRUE(device->set_features(feature_bit(kFVersion1) | c.features).has_value());
    if (c.set_to >= 0) {
      ASSERT_TRUE(set_writeback(*device, static_cast<unsigned>(c.set_to)));
    }
    EXPECT_EQ(device->write_through(), c.write_through)
        << std::hex << c.features << " cache " << c.write_cache << " set " << c.set_to;
    EXPECT_EQ(writeback(*device), c.write_through ? 0U : 1U)
        << "the config space says something else than what is done";
  }
}

TEST(BlkDevice, shows_the_initial_cache_mode_before_negotiation) {
  MemoryNode node(kDiskBytes);
  EXPECT_EQ(writeback(*BlkDevice::create(node, {.write_cache = true}).value()), 1U);
  EXPECT_EQ(writeback(*BlkDevice::create(node, {.write_cache = false}).value()), 0U);
  EXPECT_TRUE(BlkDevice::create(node, {}).value()->write_through());
}

TEST(BlkDevice, toggling_writeback_takes_effect_and_survives_the_same_negotiation_again) {
  MemoryNode node(kDiskBytes);
  const auto device = BlkDevice::create(node, {}).value();
  ASSERT_TRUE(device->set_features(kFlush | kWce).has_value());
  ASSERT_TRUE(set_writeback(*device, 0));
  EXPECT_TRUE(device->write_through());
  ASSERT_TRUE(device->set_features(kFlush | kWce | feature_bit(kFEventIdx)).has_value());
  EXPECT_TRUE(device->write_through()) << "a repeated SET_FEATURES undid the driver's choice";
  ASSERT_TRUE(set_writeback(*device, 1));
  EXPECT_FALSE(device->write_through());
}

TEST(BlkDevice, reset_forgets_features_and_cache_mode) {
  MemoryNode node(kDiskBytes);
  const auto device = BlkDevice::create(node, {}).value();
  ASSERT_TRUE(device->set_features(kFlush | kWce).has_value());
  ASSERT_TRUE(set_writeback(*device, 0));
  device->reset();
  EXPECT_EQ(device->negotiated_features(), 0U);
  EXPECT_EQ(writeback(*device), 1U);
  ASSERT_TRUE(device->set_features(kFlush | kWce).has_value());
  EXPECT_FALSE(device->write_through());
}

TEST(BlkDevice, only_writeback_can_be_written_and_only_when_negotiated) {
  MemoryNode node(kDiskBytes);
  const auto device = BlkDevice::create(node, {}).value();
  EXPECT_FALSE(set_writeback(*device, 0)) << "nothing negotiated";
  ASSERT_TRUE(device->set_features(kFlush).has_value());
  EXPECT_FALSE(set_writeback(*device, 0)) << "CONFIG_WCE not negotiated";
  ASSERT_TRUE(device->set_features(kFlush | kWce).has_value());
  EXPECT_FALSE(set_writeback(*device, 2));
  EXPECT_FALSE(set_writeback(*device, 255));
  const std::array<std::byte, 2> two{};
  EXPECT_FALSE(device->write_config(kBlkConfigWriteback, two).has_value());
  EXPECT_FALSE(device->write_config(kBlkConfigWriteback, {}).has_value());
  for (std::uint32_t offset = 0; offset < 300; ++offset) {
    if (offset == kBlkConfigWriteback) continue;
    EXPECT_FALSE(device->write_config(offset, std::span(two).first(1)).has_value()) << offset;
  }
  EXPECT_EQ(writeback(*device), 1U);
}

}  // namespace
}  // namespace vblk::virtio
