#include "tests/fuzz/hostile_frontend.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "aio/engine_set.h"
#include "blockdev/block_node.h"
#include "blockdev/handover_node.h"
#include "blockdev/io_context.h"
#include "blockdev/io_limits.h"
#include "blockdev/io_thread.h"
#include "blockdev/log.h"
#include "blockdev/vhost_user/backend.h"
#include "blockdev/virtio/blk_device.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/inflight_area.h"
#include "blockdev/virtio/little_endian.h"
#include "blockdev/virtio/packed_ring.h"
#include "blockdev/virtio/split_ring.h"
#include "tests/fuzz/input.h"

namespace vblk::fuzz {

namespace {

using namespace vhost_user;
using virtio::kBlkRequestHeaderBytes;
using virtio::kDescriptorBytes;
using virtio::store_le;
using virtio::store_release_le;

constexpr int kStepsMax = 120;
constexpr int kConnectionsMax = 8;
constexpr std::uint16_t kQueues = 2;
constexpr std::uint16_t kQueueSizeMax = 64;
constexpr std::uint16_t kUsualSize = 16;
constexpr std::uint64_t kDiskBytes = std::uint64_t{1} << 18;

// Guest memory: a ring for each queue, then buffers.
constexpr std::size_t kMemoryBytes = std::size_t{1} << 16;
constexpr std::size_t kRingBytes = 0x2000;
constexpr std::size_t kAvailOffset = 0x1000;
constexpr std::size_t kUsedOffset = 0x1800;
constexpr std::size_t kHeaders = 0x8000;
constexpr std::size_t kStatuses = 0x9000;
constexpr std::size_t kData = 0xa000;
constexpr std::uint64_t kGuestAddress = 0x100000;
constexpr std::size_t kAreaBytes = 16384;
constexpr std::size_t kLogBytes = 4096;

constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }

// A disk that answers after so many turns of the loop, by itself: nobody else could while the
// server's thread waits for a ring to stop.
class SlowDisk final : public blockdev::BlockNode {
 public:
  SlowDisk() : bytes_(kDiskBytes) {
    size_bytes_ = kDiskBytes;
    name_ = "slow";
    limits_.can_discard = true;
    limits_.can_write_zeroes = true;
  }
  static inline std::atomic<int> turns{0};
  static inline std::atomic<int> error{0};
  static inline std::atomic<std::uint64_t> requests{0};
  static inline std::atomic<std::uint64_t> in_hand{0};

 protected:
  void do_submit(blockdev::BlockRequest& request, blockdev::IoContext& context) override {
    ++requests;
    ++in_hand;
    wait(request, context, turns);
  }

 private:
  void wait(blockdev::BlockRequest& request, blockdev::IoContext& context, int left) {
    if (left > 0) {
      context.loop().post([this, &request, &context, left] { wait(request, context, left - 1); });
      return;
    }
    const int failed = request.operation == blockdev::BlockOperation::kRead ? 0 : error.load();
    // Every byte of memory that the request names is touched.
    const std::scoped_lock lock(mutex_);
    std::byte* at = bytes_.data() + request.offset_bytes % kDiskBytes / 2;
    for (std::uint32_t i = 0; failed == 0 && i < request.iov_count; ++i) {
      const std::size_t length = std::min<std::size_t>(request.iov[i].iov_len, kDiskBytes / 2);
      if (request.operation == blockdev::BlockOperation::kRead) {
        std::memcpy(request.iov[i].iov_base, at, length);
      } else {
        std::memcpy(at, request.iov[i].iov_base, length);
      }
    }
    --in_hand;
    context.complete_later(request, failed);
  }
  std::mutex mutex_;
  std::vector<std::byte> bytes_;
};

UniqueFd memory_file(const char* name, std::size_t bytes) {
  UniqueFd fd(::memfd_create(name, MFD_CLOEXEC));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) std::abort();
  return fd;
}

// What takes longer to make than an input to run.
struct World {
  World() {
    log::set_level(log::Level::kOff);
    for (int i = 0; i < 2; ++i) {
      threads.push_back(blockdev::IoThread::start("io", {}, [] {
                          return aio::EngineSet::create({}, {});
                        }).value());
    }
    mapping = static_cast<std::byte*>(
        ::mmap(nullptr, kMemoryBytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0));
    std::array<int, 2> pipe_ends{};
    if (mapping == MAP_FAILED || ::pipe2(pipe_ends.data(), O_CLOEXEC | O_NONBLOCK) != 0)
      std::abort();
    pipe_out.reset(pipe_ends[0]);
    pipe_in.reset(pipe_ends[1]);
    std::array<int, 2> sockets{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sockets.data()) != 0)
      std::abort();
    channel_near.reset(sockets[0]);
    channel_far.reset(sockets[1]);
  }
  static World& get() {
    static World world;
    return world;
  }

  // As it was before the first input.
  void refresh() {
    for (const auto& [fd, bytes] :
         {std::pair{memory.get(), kMemoryBytes}, std::pair{area.get(), kAreaBytes},
          std::pair{log.get(), kLogBytes}}) {
      // What is cut off and grown again is zero.
      if (::ftruncate(fd, 0) != 0 || ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) std::abort();
    }
    std::array<std::byte, 4096> rest{};
    for (const UniqueFd* fd : {&kicks[0], &kicks[1], &call, &error, &pipe_out, &channel_near}) {
      while (::read(fd->get(), rest.data(), rest.size()) == static_cast<ssize_t>(rest.size())) {
      }
    }
    SlowDisk::error = 0;
    SlowDisk::turns = 0;
    SlowDisk::requests = 0;
  }
  // Of every kind that a frontend may hand over, right or wrong.
  [[nodiscard]] int descriptor(std::uint8_t what) const {
    const std::array fds{memory.get(), kicks[0].get(),  call.get(),       error.get(),
                         area.get(),   log.get(),       pipe_out.get(),   pipe_in.get(),
                         null.get(),   directory.get(), channel_far.get()};
    return fds[what % fds.size()];
  }

  std::vector<std::unique_ptr<blockdev::IoThread>> threads;
  UniqueFd memory = memory_file("memory", kMemoryBytes);
  UniqueFd area = memory_file("area", kAreaBytes);
  UniqueFd log = memory_file("log", kLogBytes);
  std::array<UniqueFd, kQueues> kicks{UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
                                      UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))};
  UniqueFd call{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  UniqueFd error{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  UniqueFd null{::open("/dev/null", O_RDWR | O_CLOEXEC)};
  UniqueFd directory{::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  UniqueFd pipe_out, pipe_in, channel_near, channel_far;
  std::byte* mapping{nullptr};
};

std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    ++count;
  return count;
}

// The frontend, and the guest behind it.
class Hostile {
 public:
  explicit Hostile(Input& input) : input_(input) {
    const std::uint8_t flags = input.byte();
    is_packed_ = (flags & 1) != 0;
    features_ = bit(virtio::kFVersion1) | bit(virtio::kFIndirectDesc) | bit(virtio::kBlkFFlush) |
                bit(kFProtocolFeatures);
    if (is_packed_) features_ |= bit(virtio::kFRingPacked);
    if ((flags & 2) != 0) features_ |= bit(virtio::kFEventIdx);
    const bool is_handed_over = (flags & 4) != 0;
    backend_options_.offers_recovery = (flags & 8) == 0;
    virtio::BlkDeviceOptions options{
        .queue_count = kQueues, .queue_size_max = kQueueSizeMax, .config_wce = !is_handed_over};
    if ((flags & 16) != 0)
      options.interrupts = {.hold_max = std::chrono::microseconds(50), .batch_max = 3};
    // One goes on at once, and the others wait until their ring stops.
    if ((flags & 32) != 0)
      options.limits = blockdev::IoLimits::parse("iops-total=1", "", {}).value();
    SlowDisk::turns = input.byte() % 16;
    if (is_handed_over) {
      features_ |= bit(kFLogAll);
      auto node = std::make_unique<blockdev::HandoverNode>(
          blockdev::DiskShape{.size_bytes = kDiskBytes, .limits = disk_.limits(), .name = "slow"},
          []() -> Expected<std::unique_ptr<blockdev::BlockNode>> {
            return std::make_unique<SlowDisk>();
          });
      backend_options_.handover = node.get();
      handed_over_ = std::move(node);
    }
    device_ =
        virtio::BlkDevice::create(
            is_handed_over ? static_cast<blockdev::BlockNode&>(*handed_over_) : disk_, options)
            .value();
    connect();
  }

  FrontendOutcome run() {
    for (int steps = 0; steps < kStepsMax && !input_.is_empty() && outcome_.failure.empty();
         ++steps)
      step();
    backend_.reset();
    if (SlowDisk::in_hand != 0) fail("a request never ended");
    if (device_->negotiated_features() != 0) fail("features are left for the next frontend");
    outcome_.requests = SlowDisk::requests;
    if (outcome_.requests > 0 && std::getenv("VBLK_FUZZ_CANARY") != nullptr)
      fail("a request is lost");
    return outcome_;
  }

 private:
  void fail(std::string why) {
    if (outcome_.failure.empty()) outcome_.failure = std::move(why);
  }

  // ---- The connection

  void connect() {
    backend_.reset();
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) != 0)
      std::abort();
    socket_.reset(ends[0]);
    reader_ = {};
    is_in_step_ = true;
    backend_ =
        std::make_unique<Backend>(UniqueFd(ends[1]), *device_, world_.threads, backend_options_);
    ++outcome_.connections;
  }

  // Has the server handle what was said. `request`: the one message that it is; nothing if it may
  // be part of one, or several, and from then on what is a message is the server's to tell.
  void serve(std::optional<std::uint32_t> request) {
    if (!request) is_in_step_ = false;
    bool is_alive = true;
    std::byte byte{};
    do {
      const auto served = backend_->serve();
      is_alive = served.has_value() && *served;
    } while (is_alive && ::recv(backend_->socket(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0);
    int answers = 0;
    for (Message answer;; answer = Message()) {
      const auto read = reader_.read(socket_.get(), answer);
      if (!read || *read != MessageReader::Outcome::kMessage) break;
      ++answers;
      if (answer.header.flags != (kVersion | kFlagReply)) fail("an answer is not marked as one");
      if (is_in_step_ && answer.header.request != *request) fail("an answer is to another message");
      if (answer.payload.size() == 8 && *decode<std::uint64_t>(answer.payload) == 1)
        ++outcome_.refused;
      // What it was given comes back to it later.
      if (answer.request() == Request::kGetInflightFd && !answer.fds.empty())
        given_area_ = std::move(answer.fds.front());
    }
    if (is_in_step_ && answers > 1) fail("a message has several answers");
    if (is_alive) return;
    if (outcome_.connections < kConnectionsMax) {
      connect();
    } else {
      is_over_ = true;
    }
  }

  void send(std::uint32_t request, std::uint32_t flags, std::span<const std::byte> payload,
            std::span<const int> fds) {
    if (is_over_) return;
    ++outcome_.messages;
    if (send_message(socket_.get(), {request, flags, 0}, payload, fds).has_value()) serve(request);
  }
  template <typename... Parts>
  void say(Request request, std::span<const int> fds, const Parts&... parts) {
    std::vector<std::byte> payload;
    (append(payload, parts), ...);
    send(static_cast<std::uint32_t>(request), kVersion | kFlagNeedReply, payload, fds);
  }

  // ---- Messages that are nearly right

  [[nodiscard]] std::uint64_t user_address(std::size_t offset) const {
    return reinterpret_cast<std::uint64_t>(world_.mapping) + offset;
  }
  MemoryRegionDescription region() {
    const std::uint8_t what = input_.byte();
    MemoryRegionDescription region{.guest_address = kGuestAddress,
                                   .size_bytes = kMemoryBytes,
                                   .user_address = user_address(0),
                                   .mmap_offset = 0};
    if ((what & 1) != 0) region.guest_address += std::uint64_t{4096} * input_.byte();
    if ((what & 2) != 0) region.size_bytes = input_.take<std::uint32_t>();
    if ((what & 4) != 0) region.mmap_offset = std::uint64_t{512} * input_.byte();
    if ((what & 8) != 0) region.user_address += std::uint64_t{4096} * input_.byte();
    if ((what & 128) != 0) region.guest_address = input_.take<std::uint64_t>();
    return region;
  }
  // Mostly a queue that there is.
  std::uint32_t index() {
    const std::uint8_t what = input_.byte();
    return what < 250 ? what % kQueues : input_.take<std::uint32_t>();
  }
  std::uint32_t number() {
    const std::uint8_t what = input_.byte();
    if (what < 64) return what;
    if (what < 128) return 1U << (what % 18);
    return input_.take<std::uint32_t>();
  }
  [[nodiscard]] VringAddress addresses(std::uint32_t index, std::uint32_t flags = 0) const {
    const std::size_t ring = kRingBytes * (index % kQueues);
    return {.index = index,
            .flags = flags,
            .descriptor_user_address = user_address(ring),
            .used_user_address = user_address(ring + kUsedOffset),
            .avail_user_address = user_address(ring + kAvailOffset),
            .log_guest_address = kGuestAddress + ring + kUsedOffset};
  }
  Inflight area() {
    const std::uint8_t what = input_.byte();
    Inflight area{.mmap_size = virtio::InflightArea::bytes_for(kQueues, kUsualSize, is_packed_),
                  .mmap_offset = 0,
                  .queue_count = kQueues,
                  .queue_size = kUsualSize,
                  .padding = 0};
    if ((what & 1) != 0) area.mmap_size = input_.take<std::uint32_t>();
    if ((what & 2) != 0) area.mmap_offset = std::uint64_t{8} * input_.byte();
    if ((what & 4) != 0) area.queue_count = input_.take<std::uint16_t>();
    if ((what & 8) != 0) area.queue_size = input_.take<std::uint16_t>();
    return area;
  }

  void compose(Request request, std::vector<std::byte>& payload, std::vector<int>& fds) {
    using enum Request;
    switch (request) {
      case kSetFeatures: {
        const std::uint8_t what = input_.byte();
        std::uint64_t features = features_ ^ (std::uint64_t{what} << 26 & ~bit(32));
        if (what == 255) features = input_.take<std::uint64_t>();
        return append(payload, features);
      }
      case kSetProtocolFeatures: {
        const std::uint8_t what = input_.byte();
        const std::uint64_t others = input_.take<std::uint32_t>();
        return append(payload,
                      what < 200 ? protocol_features() & ~bit(what % 21) : others % bit(21));
      }
      case kSetMemTable: {
        const std::uint32_t count = input_.byte() % 10;
        append(payload, MemoryTableHead{count, 0});
        for (std::uint32_t i = 0; i < count; ++i) {
          append(payload, region());
          if (fds.size() < kMemoryTableRegionsMax) fds.push_back(world_.memory.get());
        }
        return;
      }
      case kAddMemReg:
      case kRemMemReg:
        append(payload, SingleMemoryRegion{0, region()});
        return fds.push_back(world_.memory.get());
      case kSetLogBase:
        append(payload, LogDescription{input_.take<std::uint16_t>(), input_.byte() * 512U});
        return fds.push_back(world_.log.get());
      case kSetLogFd:
        return fds.push_back(world_.call.get());
      case kSetVringNum:
      case kSetVringBase:
      case kGetVringBase:
      case kSetVringEnable: {
        const std::uint32_t of_ring = index();
        const std::uint32_t value = number();
        return append(payload, VringState{of_ring, request == kSetVringEnable ? value % 3 : value});
      }
      case kSetVringAddr: {
        const std::uint32_t of_ring = index();
        VringAddress where = addresses(of_ring, input_.byte() % 4);
        const std::uint8_t what = input_.byte();
        if ((what & 1) != 0) where.descriptor_user_address += input_.take<std::uint16_t>();
        if ((what & 2) != 0) where.used_user_address += input_.take<std::uint16_t>();
        if ((what & 4) != 0) where.avail_user_address += input_.take<std::uint16_t>();
        if ((what & 8) != 0) where.log_guest_address = input_.take<std::uint64_t>();
        return append(payload, where);
      }
      case kSetVringKick:
      case kSetVringCall:
      case kSetVringErr: {
        const std::uint64_t of_ring = index();
        const bool has_none = input_.byte() % 16 == 0;
        append(payload, of_ring | (has_none ? kVringNoFd : 0));
        if (has_none) return;
        const UniqueFd& usual = request == kSetVringKick   ? world_.kicks[of_ring % kQueues]
                                : request == kSetVringCall ? world_.call
                                                           : world_.error;
        return fds.push_back(usual.get());
      }
      case kSetBackendReqFd:
        return fds.push_back(world_.channel_far.get());
      case kGetConfig:
      case kSetConfig: {
        const std::uint32_t offset =
            input_.flag() ? virtio::kBlkConfigWriteback : std::uint32_t{input_.byte()};
        const std::uint32_t size = request == kSetConfig ? 1 : input_.byte();
        append(payload, ConfigHead{offset, size, input_.byte() / 250U});
        if (request == kSetConfig) append(payload, input_.byte());
        return;
      }
      case kGetInflightFd:
        return append(payload, area());
      case kSetInflightFd: {
        append(payload, area());
        const bool is_given = given_area_ && input_.flag();
        return fds.push_back(is_given ? given_area_.get() : world_.area.get());
      }
      case kSetStatus: {
        constexpr std::array kUsual{0U, 1U, 3U, 8U, 11U, 15U, 79U};
        const std::uint8_t what = input_.byte();
        return append(payload, what < 224 ? std::uint64_t{kUsual[what % kUsual.size()]}
                                          : input_.take<std::uint64_t>());
      }
      default:
        return;
    }
  }

  // By what is wrong with it: nothing most of the time.
  void message() {
    const auto request = static_cast<Request>(input_.byte() % 44);
    std::vector<std::byte> payload;
    std::vector<int> fds;
    compose(request, payload, fds);
    std::uint32_t flags = kVersion | kFlagNeedReply;
    const std::uint8_t wrong = input_.byte();
    if ((wrong & 0xc0) == 0) {
      if ((wrong & 1) != 0) flags = input_.byte();
      if ((wrong & 2) != 0) payload.resize(input_.take<std::uint16_t>() % (kPayloadBytesMax + 8));
      if ((wrong & 4) != 0 && !payload.empty())
        payload[input_.take<std::uint16_t>() % payload.size()] = std::byte{input_.byte()};
      if ((wrong & 8) != 0) fds.resize(input_.byte() % (kMemoryTableRegionsMax + 1), -1);
      for (int& fd : fds) {
        if ((wrong & 8) != 0 || (wrong & 16) != 0) fd = world_.descriptor(input_.byte());
      }
    }
    send(static_cast<std::uint32_t>(request), flags, payload, fds);
  }

  // Bytes that are no whole message, or more than one.
  void bytes() {
    if (is_over_) return;
    const auto some = input_.bytes(1 + input_.byte() % 64);
    if (some.empty()) return;
    [[maybe_unused]] const auto sent =
        ::send(socket_.get(), some.data(), some.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    serve(std::nullopt);
  }

  [[nodiscard]] std::uint64_t protocol_features() const {
    std::uint64_t features = bit(kProtocolFMq) | bit(kProtocolFReplyAck) |
                             bit(kProtocolFBackendReq) | bit(kProtocolFConfig) |
                             bit(kProtocolFResetDevice) | bit(kProtocolFConfigureMemSlots) |
                             bit(kProtocolFStatus);
    if (backend_options_.offers_recovery)
      features |= bit(kProtocolFInflightShmfd) | bit(kProtocolFGetVringBaseInflight);
    if (backend_options_.handover != nullptr) features |= bit(kProtocolFLogShmfd);
    return features;
  }

  // What QEMU does, up to rings that run.
  void set_up() {
    const std::uint8_t what = input_.byte();
    const std::array memory{world_.memory.get()};
    const std::array area_fd{world_.area.get()};
    const std::array log{world_.log.get()};
    say(Request::kSetOwner, {});
    say(Request::kSetProtocolFeatures, {}, protocol_features());
    const bool logs = backend_options_.handover != nullptr && (what & 1) != 0;
    say(Request::kSetFeatures, {}, logs ? features_ : features_ & ~bit(kFLogAll));
    say(Request::kSetMemTable, memory, MemoryTableHead{1, 0},
        MemoryRegionDescription{kGuestAddress, kMemoryBytes, user_address(0), 0});
    if (logs) say(Request::kSetLogBase, log, LogDescription{kLogBytes, 0});
    if (backend_options_.offers_recovery && (what & 2) != 0) {
      say(Request::kSetInflightFd, area_fd,
          Inflight{virtio::InflightArea::bytes_for(kQueues, kUsualSize, is_packed_), 0, kQueues,
                   kUsualSize, 0});
    }
    if ((what & 4) != 0) {
      const std::array channel{world_.channel_far.get()};
      say(Request::kSetBackendReqFd, channel);
    }
    for (std::uint32_t i = 0; i < kQueues; ++i) start_ring(i, (what & 8) != 0);
    if ((what & 16) != 0) say(Request::kSetStatus, {}, std::uint64_t{15});
  }
  void start_ring(std::uint32_t index, bool marks_ring) {
    const std::array kick{world_.kicks[index].get()};
    const std::array call{world_.call.get()};
    const std::array error{world_.error.get()};
    const Ring& ring = rings_[index];
    const std::uint32_t base = is_packed_ ? virtio::packed_base(ring.position, ring.position)
                                          : std::uint32_t{ring.avail_index};
    say(Request::kSetVringNum, {}, VringState{index, kUsualSize});
    say(Request::kSetVringBase, {}, VringState{index, base});
    say(Request::kSetVringAddr, {}, addresses(index, marks_ring ? kVringAddressFLog : 0));
    say(Request::kSetVringCall, call, std::uint64_t{index});
    say(Request::kSetVringErr, error, std::uint64_t{index});
    say(Request::kSetVringKick, kick, std::uint64_t{index});
    say(Request::kSetVringEnable, {}, VringState{index, 1});
  }

  // ---- The guest

  // The memory itself may be shorter at the moment; nothing is written then.
  [[nodiscard]] bool has_memory() const { return memory_bytes_ == kMemoryBytes; }
  [[nodiscard]] std::byte* at(std::size_t offset) const { return world_.mapping + offset; }
  [[nodiscard]] static std::uint64_t guest(std::size_t offset) { return kGuestAddress + offset; }

  // A request in three pieces that is likely to be taken.
  void request() {
    const std::uint32_t of_ring = input_.byte() % kQueues;
    const std::uint8_t what = input_.byte();
    if (!has_memory()) return;
    constexpr std::array kTypes{virtio::kBlkTIn,      virtio::kBlkTOut,         virtio::kBlkTFlush,
                                virtio::kBlkTDiscard, virtio::kBlkTWriteZeroes, virtio::kBlkTGetId};
    const std::uint32_t type = kTypes[what % kTypes.size()];
    const std::size_t slot = what / kTypes.size() % kUsualSize;
    std::byte* const header = at(kHeaders + 64 * slot);
    store_le<std::uint32_t>(header, type);
    store_le<std::uint64_t>(header + 8, what);
    const bool device_writes = type == virtio::kBlkTIn || type == virtio::kBlkTGetId;
    const std::array<std::uint32_t, 6> lengths{512, 1024, 0, 16, 16, 20};
    const std::array<Piece, 3> pieces{
        Piece{guest(kHeaders + 64 * slot), kBlkRequestHeaderBytes, false},
        Piece{guest(kData + 1024 * slot), lengths[what % kTypes.size()], device_writes},
        Piece{guest(kStatuses + slot), 1, true}};
    is_packed_ ? put_packed(of_ring, pieces) : put_split(of_ring, pieces, slot);
    kick(of_ring);
  }
  struct Piece {
    std::uint64_t address;
    std::uint32_t length;
    bool device_writes;
  };
  void put_split(std::uint32_t of_ring, std::span<const Piece, 3> pieces, std::size_t slot) {
    Ring& ring = rings_[of_ring];
    const std::size_t table = kRingBytes * of_ring;
    const std::size_t head = slot * 3 % (kUsualSize - 2);
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      std::byte* const to = at(table + kDescriptorBytes * (head + i));
      store_le<std::uint64_t>(to, pieces[i].address);
      store_le<std::uint32_t>(to + 8, pieces[i].length);
      store_le<std::uint16_t>(
          to + 12, static_cast<std::uint16_t>((i < 2 ? 1 : 0) | (pieces[i].device_writes ? 2 : 0)));
      store_le<std::uint16_t>(to + 14, static_cast<std::uint16_t>(head + i + 1));
    }
    const std::size_t avail = table + kAvailOffset;
    store_le<std::uint16_t>(at(avail + 4 + std::size_t{2} * (ring.avail_index % kUsualSize)),
                            static_cast<std::uint16_t>(head));
    store_release_le<std::uint16_t>(at(avail + 2), ++ring.avail_index);
  }
  void put_packed(std::uint32_t of_ring, std::span<const Piece, 3> pieces) {
    Ring& ring = rings_[of_ring];
    virtio::PackedPosition position = ring.position;
    std::array<std::uint16_t, 3> flags{};
    std::array<std::byte*, 3> places{};
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      places[i] = at(kRingBytes * of_ring + kDescriptorBytes * position.index);
      flags[i] = static_cast<std::uint16_t>((position.wrap ? 0x0080 : 0x8000) | (i < 2 ? 1 : 0) |
                                            (pieces[i].device_writes ? 2 : 0));
      store_le<std::uint64_t>(places[i], pieces[i].address);
      store_le<std::uint32_t>(places[i] + 8, pieces[i].length);
      store_le<std::uint16_t>(places[i] + 12, ring.next_id);
      position.advance(1, kUsualSize);
    }
    for (std::size_t i = pieces.size(); i > 0; --i)
      store_release_le<std::uint16_t>(places[i - 1] + 14, flags[i - 1]);
    ring.position = position;
    ring.next_id = static_cast<std::uint16_t>((ring.next_id + 1) % kUsualSize);
  }
  void garbage() {
    const std::uint32_t of_ring = input_.byte() % kQueues;
    for (unsigned i = 0; i < 4; ++i) {
      const std::size_t offset = input_.take<std::uint16_t>() % kRingBytes;
      const std::byte value{input_.byte()};
      if (has_memory()) *at(kRingBytes * of_ring + offset) = value;
    }
    kick(of_ring);
  }
  // Then the device has time to look, most of the time: what it takes and what comes next would
  // race otherwise, which no input could repeat.
  void kick(std::uint32_t of_ring) {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(world_.kicks[of_ring].get(), &one, sizeof one);
    if (input_.byte() % 8 == 0) return;
    for (int turn = 0; turn < 3; ++turn) {
      for (const auto& thread : world_.threads) thread->loop().run_and_wait([] {});
    }
  }
  // Files that come and go under the server.
  void shorten() {
    const std::uint8_t what = input_.byte();
    if (what % 4 == 0) {
      memory_bytes_ = what < 128 ? kMemoryBytes : std::size_t{4096} * (what % 16);
      [[maybe_unused]] const int done =
          ::ftruncate(world_.memory.get(), static_cast<off_t>(memory_bytes_));
    } else {
      const bool is_log = what % 4 == 1;
      const std::size_t bytes = what >= 128 ? 0 : is_log ? kLogBytes : kAreaBytes;
      [[maybe_unused]] const int done =
          ::ftruncate((is_log ? world_.log : world_.area).get(), static_cast<off_t>(bytes));
    }
  }

  void step() {
    switch (input_.byte() % 16) {
      case 0:
      case 1:
      case 2:
      case 3:
      case 4:
      case 5:
        return message();
      case 6:
        return bytes();
      case 7:
        return set_up();
      case 8:
      case 9:
      case 10:
        return request();
      case 11:
        return garbage();
      case 12:
        return shorten();
      case 13: {
        constexpr std::array kErrors{0, 0, ENOSPC, EIO};
        SlowDisk::error = kErrors[input_.byte() % kErrors.size()];
        return;
      }
      case 14:
        if (input_.flag()) {
          device_->gate().pause();
        } else {
          device_->gate().resume();
        }
        return;
      default:
        if (outcome_.connections == kConnectionsMax) return;
        connect();
        is_over_ = false;
    }
  }

  struct Ring {
    std::uint16_t avail_index{0};
    virtio::PackedPosition position{.index = 0, .wrap = true};
    std::uint16_t next_id{0};
  };

  World& world_{World::get()};
  Input& input_;
  FrontendOutcome outcome_;
  bool is_packed_{false};
  bool is_over_{false};
  bool is_in_step_{true};  // the server takes for messages what were sent as such
  std::uint64_t features_{0};
  std::size_t memory_bytes_{kMemoryBytes};
  std::array<Ring, kQueues> rings_;
  SlowDisk disk_;
  std::unique_ptr<blockdev::BlockNode> handed_over_;
  BackendOptions backend_options_;
  std::unique_ptr<virtio::BlkDevice> device_;
  UniqueFd socket_;
  UniqueFd given_area_;
  MessageReader reader_;
  std::unique_ptr<Backend> backend_;
};

}  // namespace

FrontendOutcome run_hostile_frontend(std::span<const std::uint8_t> bytes) {
  World& world = World::get();
  world.refresh();
  const std::size_t before = open_descriptors();
  FrontendOutcome outcome;
  {
    Input input(bytes);
    Hostile hostile(input);
    outcome = hostile.run();
  }
  const std::size_t after = open_descriptors();
  if (outcome.failure.empty() && after != before)
    outcome.failure = fmt::format("{} descriptors are open, and were {}", after, before);
  return outcome;
}

}  // namespace vblk::fuzz
