// The driver against a server of ours on every engine, against QEMU's, and against liars.
#include "blockdev/driver/blk_driver.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <fcntl.h>
#include <random>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/image.h"
#include "blockdev/image/open_image.h"
#include "blockdev/virtio/little_endian.h"
#include "tests/support/seed.h"
#include "tests/vhost_user/served_disk.h"

namespace vblk::driver {
namespace {

using test::kPatience;

constexpr std::size_t kDiskBytes = std::size_t{2} << 20;
constexpr std::size_t kSector = 512;

BlkDriverOptions driver_options(std::uint16_t queue_count = 1) {
  return {.queue_count = queue_count,
          .memory_bytes = std::size_t{4} << 20,
          .frontend = {.timeout = kPatience}};
}

// Random operations on [begin, end) of the disk, one at a time, beside a flat array.
void compare_with_model(BlkDriver& driver, std::uint16_t queue, std::span<std::byte> data,
                        std::uint64_t first_sector, std::uint64_t sector_count,
                        std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> model(sector_count * kSector);
  const auto run = [&](std::uint32_t type, std::uint64_t sector, std::span<std::byte> part) {
    BlkIo io{.type = type, .sector = sector, .data = part};
    ASSERT_TRUE(driver.submit(queue, io));
    driver.kick(queue);
    const auto done = driver.wait(queue, kPatience);
    ASSERT_TRUE(done.has_value()) << done.error().message;
    ASSERT_EQ(io.status, virtio::kBlkSOk) << "type " << type << " at " << sector;
  };
  for (int i = 0; i < 300; ++i) {
    const std::uint64_t sector = random() % sector_count;
    const std::uint64_t count = 1 + random() % std::min<std::uint64_t>(32, sector_count - sector);
    const auto part = data.first(count * kSector);
    const auto expected = std::span(model).subspan(sector * kSector, count * kSector);
    switch (random() % 4) {
      case 0:
        for (std::byte& byte : part) byte = static_cast<std::byte>(random());
        std::ranges::copy(part, expected.begin());
        run(virtio::kBlkTOut, first_sector + sector, part);
        break;
      case 1: {
        virtio::store_le<std::uint64_t>(data.data(), first_sector + sector);
        virtio::store_le<std::uint32_t>(data.data() + 8, static_cast<std::uint32_t>(count));
        virtio::store_le<std::uint32_t>(data.data() + 12,
                                        random() % 2 == 0 ? virtio::kBlkWriteZeroesFlagUnmap : 0);
        std::ranges::fill(expected, std::byte{0});
        run(virtio::kBlkTWriteZeroes, 0, data.first(virtio::kBlkDiscardSegmentBytes));
        break;
      }
      case 2:
        run(virtio::kBlkTFlush, 0, {});
        break;
      default:
        run(virtio::kBlkTIn, first_sector + sector, part);
        ASSERT_TRUE(std::ranges::equal(part, expected)) << "at sector " << sector;
    }
  }
}

class OnEngine : public ::testing::TestWithParam<aio::EngineName> {};

TEST_P(OnEngine, agrees_with_a_flat_array_on_several_queues_of_several_threads) {
  const test::TempDir dir;
  const std::string path = dir.file("disk");
  const vhost_user::UniqueFd file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(file.get(), kDiskBytes), 0);
  aio::AioSelection selection;
  selection.engine_of_kind.fill(GetParam());
  if (const auto probe = aio::EngineSet::create(selection, {}); !probe)
    GTEST_SKIP() << probe.error().message;
  const auto node = blockdev::open_image({.path = path, .cache = blockdev::CacheMode::kWriteback});
  ASSERT_TRUE(node.has_value()) << node.error().message;
  constexpr std::uint16_t kQueues = 4;
  test::Served served(**node, {.queue_count = kQueues, .make_engines = [&selection] {
                                 return aio::EngineSet::create(selection, {});
                               }});
  const auto connected = BlkDriver::connect(served.path(), driver_options(kQueues));
  ASSERT_TRUE(connected.has_value()) << connected.error().message;
  BlkDriver& driver = **connected;
  EXPECT_EQ(driver.config().capacity_sectors, kDiskBytes / kSector);
  EXPECT_EQ(driver.get_id().value(), "served");
  EXPECT_EQ(driver.discard(0, 8).value(), virtio::kBlkSOk);
  const std::uint64_t seed = test::test_seed();
  std::vector<std::thread> threads;
  for (std::uint16_t queue = 0; queue < kQueues; ++queue) {
    const auto data = driver.memory().allocate(32 * kSector, kSector);
    threads.emplace_back([&driver, queue, data, seed] {
      constexpr std::uint64_t kShare = kDiskBytes / kSector / kQueues;
      compare_with_model(driver, queue, data, queue * kShare, kShare, seed + queue);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(driver.flush().value(), virtio::kBlkSOk);
}

INSTANTIATE_TEST_SUITE_P(Every, OnEngine, ::testing::ValuesIn(aio::kAllEngineNames),
                         [](const auto& engine) {
                           return std::string(aio::to_string(engine.param));
                         });

TEST(Driver, refuses_a_backend_with_fewer_queues) {
  test::HoldingDisk disk(kDiskBytes);
  test::Served served(disk);
  const auto driver = BlkDriver::connect(served.path(), driver_options(3));
  ASSERT_FALSE(driver.has_value());
  EXPECT_EQ(driver.error().kind, ErrorKind::kInvalidArgument);
}

TEST(Driver, says_where_nobody_listens) {
  const test::TempDir dir;
  const auto driver = BlkDriver::connect(dir.file("nobody"), driver_options());
  ASSERT_FALSE(driver.has_value());
  EXPECT_EQ(driver.error().kind, ErrorKind::kNotFound);
}

TEST(Driver, gives_up_on_a_request_that_is_never_answered_and_lets_it_come_late) {
  test::HoldingDisk disk(kDiskBytes);
  test::Served served(disk);
  auto options = driver_options();
  options.frontend.timeout = std::chrono::milliseconds(500);
  const auto driver = BlkDriver::connect(served.path(), options).value();
  disk.hold(true);
  const auto flushed = driver->flush();
  ASSERT_FALSE(flushed.has_value());
  EXPECT_EQ(flushed.error().kind, ErrorKind::kBusy);
  disk.hold(false);
  EXPECT_TRUE(test::eventually([&driver] { return driver->poll(0).value() == 1; }));
}

// A backend that answers each message as it is told to, or with silence.
class Liar {
 public:
  using Answer = std::function<std::optional<test::Bytes>(const vhost_user::Message&)>;
  explicit Liar(Answer answer) : answer_(std::move(answer)) {
    std::array<int, 2> ends{};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
    own_.reset(ends[0]);
    other_.reset(ends[1]);
    thread_ = std::thread([this] { serve(); });
  }
  ~Liar() {
    ::shutdown(own_.get(), SHUT_RDWR);
    thread_.join();
  }
  Liar(const Liar&) = delete;
  Liar& operator=(const Liar&) = delete;
  Expected<std::unique_ptr<BlkDriver>> connect(std::chrono::milliseconds timeout = kPatience) {
    auto options = driver_options();
    options.frontend.timeout = timeout;
    return BlkDriver::adopt(std::move(other_), options);
  }

 private:
  void serve() {
    vhost_user::MessageReader reader;
    for (;;) {
      pollfd descriptor{.fd = own_.get(), .events = POLLIN, .revents = 0};
      ::poll(&descriptor, 1, -1);
      vhost_user::Message message;
      const auto outcome = reader.read(own_.get(), message);
      if (!outcome || *outcome == vhost_user::MessageReader::Outcome::kClosed) return;
      if (*outcome == vhost_user::MessageReader::Outcome::kNeedMore) continue;
      const auto answer = answer_(message);
      if (!answer) continue;
      const vhost_user::Header header{message.header.request,
                                      vhost_user::kVersion | vhost_user::kFlagReply, 0};
      if (!vhost_user::send_message(own_.get(), header, *answer)) return;
    }
  }
  Answer answer_;
  vhost_user::UniqueFd own_;
  vhost_user::UniqueFd other_;
  std::thread thread_;
};

TEST(Driver, ends_its_wait_for_a_backend_that_says_nothing) {
  Liar liar([](const auto&) { return std::nullopt; });
  const auto driver = liar.connect(std::chrono::milliseconds(50));
  ASSERT_FALSE(driver.has_value());
  EXPECT_EQ(driver.error().kind, ErrorKind::kBusy);
}

TEST(Driver, calls_an_answer_of_the_wrong_size_corrupt) {
  Liar liar([](const auto&) { return test::Bytes(3); });
  const auto driver = liar.connect();
  ASSERT_FALSE(driver.has_value());
  EXPECT_EQ(driver.error().kind, ErrorKind::kCorrupt);
}

TEST(Driver, reports_a_backend_that_refuses_the_features) {
  Liar liar([](const vhost_user::Message& message) -> std::optional<test::Bytes> {
    using enum vhost_user::Request;
    if (message.request() == kGetFeatures)
      return test::payload_of(std::uint64_t{1} << vhost_user::kFProtocolFeatures);
    if (message.request() == kGetProtocolFeatures)
      return test::payload_of(std::uint64_t{1} << vhost_user::kProtocolFReplyAck);
    if (message.request() == kSetFeatures) return test::payload_of(std::uint64_t{1});
    return std::nullopt;
  });
  const auto driver = liar.connect();
  ASSERT_FALSE(driver.has_value());
  EXPECT_EQ(driver.error().kind, ErrorKind::kNotSupported);
}

// ---- QEMU's backend

class StorageDaemon {
 public:
  StorageDaemon(const std::string& image, const std::string& socket) {
    const std::string blockdev = "driver=file,node-name=disk,discard=unmap,filename=" + image;
    const std::string server =
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,"
        "addr.path=" +
        socket;
    std::vector<std::string> words{"qemu-storage-daemon", "--blockdev", blockdev, "--export",
                                   server};
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    if (::posix_spawnp(&process_, words[0].c_str(), nullptr, nullptr, arguments.data(), environ) !=
        0)
      process_ = -1;
  }
  ~StorageDaemon() {
    if (process_ < 0) return;
    ::kill(process_, SIGTERM);
    ::waitpid(process_, nullptr, 0);
  }
  StorageDaemon(const StorageDaemon&) = delete;
  StorageDaemon& operator=(const StorageDaemon&) = delete;
  [[nodiscard]] bool running() const { return process_ >= 0; }

 private:
  pid_t process_{-1};
};

TEST(Driver, agrees_with_a_flat_array_on_qemus_storage_daemon) {
  const test::TempDir dir;
  const std::string image = dir.file("disk");
  const vhost_user::UniqueFd file(::open(image.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(file.get(), kDiskBytes), 0);
  const std::string socket = dir.file("socket");
  const StorageDaemon daemon(image, socket);
  if (!daemon.running()) GTEST_SKIP() << "qemu-storage-daemon is not installed";
  // The socket is there some time before it is listened on.
  auto driver = BlkDriver::connect(socket, driver_options(2));
  EXPECT_TRUE(test::eventually([&] {
    if (!driver) driver = BlkDriver::connect(socket, driver_options(2));
    return driver.has_value();
  }));
  ASSERT_TRUE(driver.has_value()) << driver.error().message;
  EXPECT_EQ((*driver)->config().capacity_sectors, kDiskBytes / kSector);
  const auto data = (*driver)->memory().allocate(32 * kSector, kSector);
  for (const std::uint16_t queue : {std::uint16_t{0}, std::uint16_t{1}}) {
    constexpr std::uint64_t kShare = kDiskBytes / kSector / 2;
    compare_with_model(**driver, queue, data, queue * kShare, kShare, test::test_seed());
  }
}

}  // namespace
}  // namespace vblk::driver
