#include "tests/bench/request_path.h"

#include <algorithm>
#include <cassert>
#include <cstdlib>
#include <fcntl.h>
#include <future>
#include <pthread.h>
#include <stdexcept>
#include <string>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include "blockdev/image.h"
#include "blockdev/image/open_image.h"
#include "blockdev/null_node.h"
#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::measure {

namespace {

constexpr std::size_t kPieceBytes = 4096;
constexpr std::size_t kPiecesMax = 16;
constexpr std::size_t kMemoryBytes = std::size_t{16} << 20;  // 64 queues take 5 MiB

// A failure here is one of the machine: no memory, no descriptors, no O_DIRECT.
template <typename T>
T value_of(Expected<T> expected) {
  if (!expected) throw std::runtime_error(expected.error().message);
  return std::move(*expected);
}

std::shared_ptr<const virtio::GuestMemory> map(const driver::DriverMemory& memory) {
  std::vector<std::shared_ptr<const virtio::MemoryRegion>> regions;
  for (const auto& [fd, region] : memory.regions()) {
    regions.push_back(value_of(virtio::MemoryRegion::map(
        fd, region.guest_address, region.size_bytes, region.user_address, region.mmap_offset)));
  }
  return value_of(virtio::GuestMemory::create(std::move(regions)));
}

clockid_t clock_of_this_thread() {
  clockid_t clock{};
  ::pthread_getcpuclockid(::pthread_self(), &clock);
  return clock;
}

class InstantEngine final : public aio::Engine {
 public:
  InstantEngine() : event_fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

  [[nodiscard]] std::string_view name() const override { return "instant"; }
  [[nodiscard]] bool supports(aio::IoKind /*kind*/) const override { return true; }
  void queue(aio::IoRequest& request) override {
    accept(request);
    queued_.push_back(request);
  }
  void submit() override {}
  std::size_t reap() override {
    std::size_t count = 0;
    while (threadpool::Work* const work = queued_.pop_front()) {
      ++count;
      finish(static_cast<aio::IoRequest&>(*work), 0);
    }
    return count;
  }
  [[nodiscard]] int completion_fd() const override { return event_fd_.get(); }
  [[nodiscard]] bool prepare_to_sleep() override { return in_flight_ == 0; }
  void wake_up() override {}

 private:
  vhost_user::UniqueFd event_fd_;
  threadpool::WorkList queued_;
};

}  // namespace

const char* name_of(Shape shape) {
  constexpr std::array kNames{"read 4k", "read 64k in 16 pieces", "write 4k", "flush"};
  return kNames[static_cast<std::size_t>(shape)];
}

Driver::Driver(std::uint16_t queue_count, RingKind ring)
    : memory_(value_of(driver::DriverMemory::create({kMemoryBytes}))),
      guest_memory_(map(*memory_)) {
  for (std::uint16_t i = 0; i < queue_count; ++i) {
    queues_.push_back(
        value_of(driver::DriverQueue::create(*memory_, {.size = kQueueSize,
                                                        .packed = ring == RingKind::kPacked,
                                                        .event_idx = true,
                                                        .indirect = true,
                                                        .indirect_max = kPiecesMax + 2})));
  }
  lay_out();
}

void Driver::lay_out() {
  const auto header = [this](std::uint32_t type) {
    const auto bytes = memory_->allocate(virtio::kBlkRequestHeaderBytes, 16);
    virtio::store_le<std::uint32_t>(bytes.data(), type);
    return driver::Buffer{memory_->guest_address(bytes.data()), virtio::kBlkRequestHeaderBytes,
                          false};
  };
  const auto data = memory_->allocate(kPieceBytes * kPiecesMax, kPieceBytes);
  const auto piece = [&](std::size_t index, bool writable) {
    return driver::Buffer{memory_->guest_address(data.data() + index * kPieceBytes), kPieceBytes,
                          writable};
  };
  const driver::Buffer status{memory_->guest_address(memory_->allocate(1, 1).data()), 1, true};
  const auto chain = [this](Shape shape) -> auto& {
    return chains_[static_cast<std::size_t>(shape)];
  };
  chain(Shape::kRead4k) = {header(virtio::kBlkTIn), piece(0, true), status};
  chain(Shape::kRead64k) = {header(virtio::kBlkTIn)};
  // Every other page first, so that no two pieces could be taken for one.
  for (std::size_t i = 0; i < kPiecesMax; ++i)
    chain(Shape::kRead64k).push_back(piece((i * 2) % kPiecesMax + i * 2 / kPiecesMax, true));
  chain(Shape::kRead64k).push_back(status);
  chain(Shape::kWrite4k) = {header(virtio::kBlkTOut), piece(0, false), status};
  chain(Shape::kFlush) = {header(virtio::kBlkTFlush), status};
}

virtio::BlkQueueSetup Driver::setup(std::uint16_t queue) const {
  const driver::DriverQueue& ring = *queues_[queue];
  const auto addresses = ring.addresses(queue);
  return {.index = queue,
          .size = kQueueSize,
          .next_avail = ring.initial_base(),
          .descriptor_address = addresses.descriptor_user_address,
          .avail_address = addresses.avail_user_address,
          .used_address = addresses.used_user_address,
          .kick_fd = ring.kick_fd(),
          .call_fd = ring.call_fd()};
}

void Driver::submit(std::uint16_t queue, Shape shape, unsigned count) {
  driver::DriverQueue& ring = *queues_[queue];
  for (unsigned i = 0; i < count; ++i) {
    [[maybe_unused]] const auto token = ring.add(chains_[static_cast<std::size_t>(shape)]);
    assert(token.has_value());
  }
  ring.publish();
}

bool Driver::take_used(std::uint16_t queue) {
  driver::DriverQueue& ring = *queues_[queue];
  while (value_of(ring.take_used())) {
  }
  return ring.in_flight() == 0;
}

void Driver::finish(std::uint16_t queue) {
  constexpr std::chrono::milliseconds kPatience{10'000};
  while (!take_used(queue)) {
    if (!queues_[queue]->wait(kPatience).by_device)
      throw std::runtime_error("the device does not answer");
  }
}

std::unique_ptr<virtio::BlkDevice> make_device(blockdev::BlockNode& node, std::uint16_t queue_count,
                                               RingKind ring) {
  auto device = value_of(
      virtio::BlkDevice::create(node, {.queue_count = queue_count, .queue_size_max = kQueueSize}));
  const std::uint64_t packed = virtio::feature_bit(virtio::kFRingPacked);
  const auto negotiated = device->set_features(
      device->offered_features() & (ring == RingKind::kPacked ? ~std::uint64_t{0} : ~packed));
  assert(negotiated.has_value());
  return device;
}

ServedPath::ServedPath(blockdev::BlockNode& node, const ServedPathOptions& options)
    : driver_(options.queue_count),
      device_(make_device(node, options.queue_count)),
      queues_(options.queue_count) {
  for (unsigned i = 0; i < options.io_thread_count; ++i) {
    threads_.push_back(value_of(blockdev::IoThread::start("io", {}, options.make_engines)));
    threads_.back()->loop().run_and_wait([this] { clocks_.push_back(clock_of_this_thread()); });
  }
  for (std::uint16_t i = 0; i < options.queue_count; ++i) {
    blockdev::IoThread& thread = thread_of(i);
    thread.loop().run_and_wait([&] {
      queues_[i] = value_of(virtio::BlkQueue::start(*device_, thread.context(),
                                                    driver_.guest_memory(), driver_.setup(i)));
    });
  }
}

ServedPath::~ServedPath() {
  for (std::uint16_t i = 0; i < driver_.queue_count(); ++i) {
    std::promise<void> stopped;
    thread_of(i).loop().post([&] {
      queues_[i]->stop(virtio::BlkQueue::Unfinished::kLeave, [&] {
        queues_[i].reset();
        stopped.set_value();
      });
    });
    stopped.get_future().wait();
  }
}

void ServedPath::round(std::uint16_t first_queue, std::uint16_t queue_count, unsigned depth,
                       Shape shape) {
  const auto end = static_cast<std::uint16_t>(first_queue + queue_count);
  for (std::uint16_t i = first_queue; i < end; ++i) driver_.submit(i, shape, depth);
  for (std::uint16_t i = first_queue; i < end; ++i) driver_.finish(i);
}

std::chrono::nanoseconds ServedPath::cpu_time() const {
  std::chrono::nanoseconds sum{0};
  for (const clockid_t clock : clocks_) {
    timespec time{};
    ::clock_gettime(clock, &time);
    sum += std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  }
  return sum;
}

SteppedPath::SteppedPath(blockdev::BlockNode& node, std::unique_ptr<aio::EngineSet> engines,
                         RingKind ring, std::shared_ptr<const virtio::InflightArea> inflight)
    : driver_(1, ring), device_(make_device(node, 1, ring)), context_(loop_, std::move(engines)) {
  virtio::BlkQueueSetup setup = driver_.setup(0);
  setup.inflight = std::move(inflight);
  queue_ = value_of(virtio::BlkQueue::start(*device_, context_, driver_.guest_memory(), setup));
}

void SteppedPath::finish() {
  while (!driver_.take_used(0)) {
    dispatch();
    complete();
  }
}

std::unique_ptr<aio::EngineSet> instant_engine() {
  return std::make_unique<aio::EngineSet>(std::make_unique<InstantEngine>());
}

std::unique_ptr<aio::EngineSet> engine(aio::EngineName name) {
  aio::AioSelection selection;
  selection.engine_of_kind.fill(name);
  return value_of(aio::EngineSet::create(selection, {}));
}

std::shared_ptr<const virtio::InflightArea> inflight_area(RingKind ring) {
  const bool is_packed = ring == RingKind::kPacked;
  const virtio::InflightDescription description{
      .size_bytes = virtio::InflightArea::bytes_for(1, kQueueSize, is_packed),
      .offset_bytes = 0,
      .queue_count = 1,
      .queue_size = kQueueSize,
      .is_packed = is_packed};
  const vhost_user::UniqueFd fd(::memfd_create("inflight", MFD_CLOEXEC));
  if (::ftruncate(fd.get(), static_cast<off_t>(description.size_bytes)) != 0)
    throw std::runtime_error("no memory for what is in flight");
  return value_of(virtio::InflightArea::map(fd.get(), description));
}

ScratchFile::ScratchFile()
    : fd_(::open(path().c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600)) {
  constexpr std::size_t kAlignment = 4096;
  const std::unique_ptr<std::byte, decltype(&std::free)> bytes(
      static_cast<std::byte*>(std::aligned_alloc(kAlignment, kDiskBytes)), &std::free);
  std::fill_n(bytes.get(), kDiskBytes, std::byte{0x5a});
  if (::write(fd_.get(), bytes.get(), kDiskBytes) != static_cast<ssize_t>(kDiskBytes) ||
      ::fsync(fd_.get()) != 0)
    throw std::runtime_error("cannot write " + path() + " with O_DIRECT");
}

std::unique_ptr<blockdev::BlockNode> null_node() {
  return value_of(blockdev::NullNode::create(kDiskBytes, false));
}

std::unique_ptr<blockdev::BlockNode> raw_node(const ScratchFile& file) {
  return value_of(blockdev::open_image({.path = file.path(), .cache = blockdev::CacheMode::kNone}));
}

std::unique_ptr<blockdev::BlockNode> qcow2_node(const std::string& path) {
  return value_of(blockdev::open_image({.path = path, .format = blockdev::ImageFormat::kQcow2}));
}

}  // namespace vblk::measure
