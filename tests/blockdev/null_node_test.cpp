// The disk that moves no data.
#include "blockdev/null_node.h"

#include <cerrno>
#include <cstdint>
#include <limits>
#include <memory>

#include <gtest/gtest.h>

#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "tests/blockdev/disk_fixture.h"

namespace vblk::blockdev {
namespace {

using testing::Bytes;
using testing::Context;
using testing::TestRequest;

class NullDisk : public ::testing::Test {
 protected:
  aio::SimulatedDisk disk_{{.size_bytes = 4096}};
  Context context_{std::make_unique<aio::EngineSet>(*aio::SimulatedEngine::create(disk_))};
};

TEST_F(NullDisk, succeeds_at_everything_and_touches_nothing) {
  const auto node = NullNode::create(std::uint64_t{1} << 40, false).value();
  EXPECT_EQ(node->size_bytes(), std::uint64_t{1} << 40);
  EXPECT_EQ(node->name(), "null");
  TestRequest read(BlockOperation::kRead, std::uint64_t{1} << 39, 4096);
  read.use_plain_memory();
  read.fill(Bytes(4096, std::byte{0x5a}));
  EXPECT_EQ(context_.run(*node, read), 0);
  EXPECT_EQ(read.bytes(), Bytes(4096, std::byte{0x5a})) << "the guest's memory stays as it was";
  EXPECT_EQ(context_.write(*node, 0, Bytes(512), true), 0);
  EXPECT_EQ(context_.write_zeroes(*node, 0, std::uint64_t{1} << 40, true), 0);
  EXPECT_EQ(context_.discard(*node, 512, 512), 0);
  EXPECT_EQ(context_.flush(*node), 0);
  EXPECT_TRUE(disk_.operations().empty()) << "no engine is asked";
}

TEST_F(NullDisk, has_an_end_like_any_disk) {
  const auto node = NullNode::create(4096, false).value();
  EXPECT_EQ(context_.write(*node, 4096, Bytes(512)), EINVAL);
  EXPECT_EQ(context_.write(*node, 3584, Bytes(512)), 0);
}

TEST_F(NullDisk, can_be_read_only) {
  const auto node = NullNode::create(4096, true).value();
  EXPECT_TRUE(node->limits().read_only);
  EXPECT_EQ(context_.write(*node, 0, Bytes(512)), EROFS);
  EXPECT_EQ(context_.write_zeroes(*node, 0, 512, false), EROFS);
  EXPECT_EQ(context_.discard(*node, 0, 512), EROFS);
  EXPECT_EQ(context_.flush(*node), 0);
}

TEST(NullNode, refuses_sizes_that_are_not_whole_sectors) {
  for (const std::uint64_t size : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{511},
                                   std::uint64_t{513}, std::numeric_limits<std::uint64_t>::max()}) {
    const auto node = NullNode::create(size, false);
    ASSERT_FALSE(node) << size;
    EXPECT_EQ(node.error().kind, ErrorKind::kInvalidArgument);
    EXPECT_NE(node.error().message.find("--size " + std::to_string(size)), std::string::npos);
  }
  EXPECT_TRUE(NullNode::create(512, false));
}

}  // namespace
}  // namespace vblk::blockdev
