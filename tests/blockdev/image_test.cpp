// Opening images: what is taken, what is refused and in which words, and what happens to an image
// whose file changes its size under it.
#include "blockdev/image.h"

#include <cerrno>
#include <cstdint>
#include <fstream>
#include <memory>
#include <string>
#include <string_view>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "aio/engine_set.h"
#include "blockdev/image/open_image.h"
#include "tests/blockdev/disk_fixture.h"
#include "tests/support/temp_dir.h"

namespace vblk::blockdev {
namespace {

using testing::Bytes;
using testing::Context;
using testing::TestRequest;

// Acts as a user without privileges for a while, if started by root.
class Unprivileged {
 public:
  Unprivileged() {
    if (::geteuid() == 0) changed_ = ::seteuid(kNobody) == 0;
  }
  ~Unprivileged() {
    if (changed_ && ::seteuid(0) != 0) ADD_FAILURE() << "cannot become root again";
  }
  Unprivileged(const Unprivileged&) = delete;
  Unprivileged& operator=(const Unprivileged&) = delete;

 private:
  static constexpr uid_t kNobody = 65534;
  bool changed_{false};
};

class OpenImage : public ::testing::Test {
 protected:
  [[nodiscard]] std::string path() const { return dir_.file("disk"); }
  void make_file(std::uint64_t size_bytes) {
    std::ofstream(path()) << std::string(size_bytes, 'x');
  }
  // Opens, expects a refusal of `kind` that names the path, and returns its message.
  std::string refusal(ErrorKind kind, const ImageOptions& options) {
    const auto node = open_image(options);
    if (node) {
      ADD_FAILURE() << "opened";
      return {};
    }
    EXPECT_EQ(node.error().kind, kind) << node.error().message;
    EXPECT_NE(node.error().message.find("'" + options.path + "'"), std::string::npos)
        << node.error().message;
    EXPECT_EQ(node.error().message.find('\n'), std::string::npos);
    return node.error().message;
  }
  // The same, opened for reading and writing, for reading only, and in every cache mode.
  void expect_refusal(ErrorKind kind, std::string_view words) {
    for (const bool read_only : {false, true}) {
      for (const CacheMode cache : {CacheMode::kNone, CacheMode::kWriteback}) {
        const std::string message =
            refusal(kind, {.path = path(), .cache = cache, .read_only = read_only});
        EXPECT_NE(message.find(words), std::string::npos) << message;
      }
    }
  }

  test::TempDir dir_;
};

TEST_F(OpenImage, refuses_what_is_not_there) {
  expect_refusal(ErrorKind::kNotFound, "No such file or directory (ENOENT)");
}

TEST_F(OpenImage, refuses_a_path_through_a_file) {
  make_file(512);
  refusal(ErrorKind::kNotFound, {.path = path() + "/disk"});
}

TEST_F(OpenImage, refuses_an_empty_file_and_says_how_to_fill_it) {
  make_file(0);
  expect_refusal(ErrorKind::kInvalidArgument, "is empty");
}

TEST_F(OpenImage, refuses_a_directory) {
  ASSERT_EQ(::mkdir(path().c_str(), 0700), 0);
  expect_refusal(ErrorKind::kNotSupported, "regular file or a block device");
}

// Opening a pipe would wait for its other end.
TEST_F(OpenImage, refuses_a_pipe_without_waiting_for_its_other_end) {
  ASSERT_EQ(::mkfifo(path().c_str(), 0600), 0);
  expect_refusal(ErrorKind::kNotSupported, "a pipe");
}

TEST_F(OpenImage, refuses_a_socket) {
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  ASSERT_GE(fd, 0);
  sockaddr_un address{.sun_family = AF_UNIX};
  path().copy(address.sun_path, sizeof address.sun_path - 1);
  ASSERT_EQ(::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  expect_refusal(ErrorKind::kNotSupported, "a socket");
  ::close(fd);
}

TEST_F(OpenImage, refuses_a_character_device) {
  for (const bool read_only : {false, true}) {
    const std::string message =
        refusal(ErrorKind::kNotSupported, {.path = "/dev/zero", .read_only = read_only});
    EXPECT_NE(message.find("a character device"), std::string::npos) << message;
  }
}

TEST_F(OpenImage, refuses_what_the_user_may_not_read) {
  ASSERT_EQ(::chmod(dir_.file("").c_str(), 0755), 0);
  make_file(4096);
  ASSERT_EQ(::chmod(path().c_str(), 0000), 0);
  const Unprivileged unprivileged;
  expect_refusal(ErrorKind::kPermission, "Permission denied (EACCES)");
}

TEST_F(OpenImage, refuses_to_write_what_the_user_may_only_read_and_says_so) {
  ASSERT_EQ(::chmod(dir_.file("").c_str(), 0755), 0);
  make_file(4096);
  ASSERT_EQ(::chmod(path().c_str(), 0444), 0);
  const Unprivileged unprivileged;
  const std::string message = refusal(ErrorKind::kPermission, {.path = path()});
  EXPECT_NE(message.find("for reading and writing"), std::string::npos) << message;
  EXPECT_NE(message.find("--read-only"), std::string::npos) << message;
  const auto node = open_image({.path = path(), .read_only = true});
  ASSERT_TRUE(node) << node.error().message;
  EXPECT_TRUE((*node)->limits().read_only);
}

TEST_F(OpenImage, rounds_the_size_up_to_whole_sectors) {
  for (const auto& [bytes, seen] : {std::pair<std::uint64_t, std::uint64_t>{1, 512},
                                    {512, 512},
                                    {513, 1024},
                                    {1048577, 1049088}}) {
    make_file(bytes);
    const auto node = open_image({.path = path(), .cache = CacheMode::kWriteback});
    ASSERT_TRUE(node) << node.error().message;
    EXPECT_EQ((*node)->size_bytes(), seen);
  }
}

TEST_F(OpenImage, leaves_the_file_alone_until_it_is_written) {
  make_file(513);
  struct stat before{};
  ASSERT_EQ(::stat(path().c_str(), &before), 0);
  ASSERT_TRUE(open_image({.path = path(), .cache = CacheMode::kWriteback}));
  struct stat after{};
  ASSERT_EQ(::stat(path().c_str(), &after), 0);
  EXPECT_EQ(after.st_size, before.st_size);
  EXPECT_EQ(after.st_mtim.tv_sec, before.st_mtim.tv_sec);
  EXPECT_EQ(after.st_mtim.tv_nsec, before.st_mtim.tv_nsec);
}

TEST_F(OpenImage, makes_a_null_disk_of_the_given_size_without_a_path) {
  const auto node = open_image({.format = ImageFormat::kNull, .null_size_bytes = 4096});
  ASSERT_TRUE(node) << node.error().message;
  EXPECT_EQ((*node)->size_bytes(), 4096U);
  EXPECT_FALSE(open_image({.format = ImageFormat::kNull}));
}

TEST_F(OpenImage, offers_no_unmapping_where_the_user_wants_no_discard) {
  make_file(4096);
  const auto node =
      open_image({.path = path(), .cache = CacheMode::kWriteback, .discard = false}).value();
  EXPECT_FALSE(node->limits().can_discard);
  EXPECT_TRUE(node->limits().can_write_zeroes);
  EXPECT_FALSE(node->limits().write_zeroes_may_unmap);
}

// ---- Names.

TEST(CacheMode, names_read_back) {
  for (const CacheMode mode : {CacheMode::kNone, CacheMode::kWriteback, CacheMode::kWritethrough,
                               CacheMode::kDirectsync, CacheMode::kUnsafe}) {
    EXPECT_EQ(parse_cache_mode(to_string(mode)), mode);
  }
  EXPECT_EQ(to_string(CacheMode::kDirectsync), "directsync");
}

TEST(CacheMode, knows_direct_io_and_the_write_cache) {
  EXPECT_TRUE(uses_direct_io(CacheMode::kNone));
  EXPECT_TRUE(uses_direct_io(CacheMode::kDirectsync));
  EXPECT_FALSE(uses_direct_io(CacheMode::kWriteback));
  EXPECT_FALSE(uses_direct_io(CacheMode::kWritethrough));
  EXPECT_FALSE(uses_direct_io(CacheMode::kUnsafe));
  EXPECT_TRUE(has_write_cache(CacheMode::kNone));
  EXPECT_TRUE(has_write_cache(CacheMode::kWriteback));
  EXPECT_TRUE(has_write_cache(CacheMode::kUnsafe));
  EXPECT_FALSE(has_write_cache(CacheMode::kWritethrough));
  EXPECT_FALSE(has_write_cache(CacheMode::kDirectsync));
}

TEST(CacheMode, refuses_other_names_and_lists_the_right_ones) {
  for (const std::string_view text : {"", "None", "none ", "write-back", "writebac", "off"}) {
    const auto mode = parse_cache_mode(text);
    ASSERT_FALSE(mode) << text;
    EXPECT_EQ(mode.error().kind, ErrorKind::kInvalidArgument);
    EXPECT_NE(mode.error().message.find("'" + std::string(text) + "'"), std::string::npos);
    EXPECT_NE(mode.error().message.find("writethrough"), std::string::npos);
  }
}

TEST(ImageFormat, is_raw_qcow2_or_null) {
  EXPECT_EQ(parse_image_format("raw"), ImageFormat::kRaw);
  EXPECT_EQ(parse_image_format("qcow2"), ImageFormat::kQcow2);
  EXPECT_EQ(parse_image_format("null"), ImageFormat::kNull);
  const auto format = parse_image_format("qcow3");
  ASSERT_FALSE(format);
  EXPECT_NE(format.error().message.find("'qcow3'"), std::string::npos);
}

// ---- A file that changes its size while it is served. The disk keeps the size it was opened with.

class ResizedImage : public OpenImage, public ::testing::WithParamInterface<CacheMode> {
 protected:
  static constexpr std::uint64_t kSize = 65536;

  void SetUp() override {
    make_file(kSize);
    auto node = open_image({.path = path(), .cache = GetParam()});
    if (!node && node.error().kind == ErrorKind::kNotSupported)
      GTEST_SKIP() << node.error().message;
    ASSERT_TRUE(node) << node.error().message;
    node_ = std::move(*node);
  }
  int read_error(std::uint64_t offset, std::uint64_t length) {
    TestRequest request(BlockOperation::kRead, offset, length);
    request.use_plain_memory();
    return context_.run(*node_, request);
  }

  Context context_{*aio::EngineSet::create({}, {})};
  std::unique_ptr<BlockNode> node_;
};

TEST_P(ResizedImage, that_grows_stays_as_large_as_it_was) {
  ASSERT_EQ(::truncate(path().c_str(), 2 * kSize), 0);
  EXPECT_EQ(node_->size_bytes(), kSize);
  EXPECT_EQ(context_.write(*node_, kSize, Bytes(4096)), EINVAL);
  EXPECT_EQ(read_error(kSize, 4096), EINVAL);
  EXPECT_EQ(context_.write(*node_, kSize - 4096, Bytes(4096)), 0);
}

TEST_P(ResizedImage, that_shrinks_fails_reads_of_what_is_gone_until_it_is_written_again) {
  ASSERT_EQ(::truncate(path().c_str(), kSize / 2), 0);
  EXPECT_EQ(node_->size_bytes(), kSize);
  EXPECT_EQ(read_error(0, kSize / 2), 0);
  EXPECT_NE(read_error(kSize / 2, 4096), 0) << "what is gone is an error, not zeroes";
  EXPECT_NE(read_error(0, kSize), 0);
  EXPECT_EQ(context_.write(*node_, kSize - 4096, Bytes(4096, std::byte{0x5a})), 0);
  EXPECT_EQ(context_.read(*node_, kSize - 4096, 4096), Bytes(4096, std::byte{0x5a}));
  EXPECT_EQ(read_error(0, kSize), 0);
}

INSTANTIATE_TEST_SUITE_P(Modes, ResizedImage,
                         ::testing::Values(CacheMode::kNone, CacheMode::kWriteback),
                         [](const auto& variant) { return std::string(to_string(variant.param)); });

}  // namespace
}  // namespace vblk::blockdev
