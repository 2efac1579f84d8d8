#include "blockdev/driver/blk_driver.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <utility>

#include <fmt/core.h>

#include "blockdev/virtio/blk_wire.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::driver {

using namespace virtio;

namespace {

// Header, data, status.
constexpr std::size_t kChainLength = 3;
constexpr std::size_t kScratchBytes = 4096;

// The features this driver knows what to do with.
constexpr std::uint64_t kUsableFeatures =
    feature_bit(kBlkFSizeMax) | feature_bit(kBlkFSegMax) | feature_bit(kBlkFRo) |
    feature_bit(kBlkFBlkSize) | feature_bit(kBlkFFlush) | feature_bit(kBlkFTopology) |
    feature_bit(kBlkFConfigWce) | feature_bit(kBlkFMq) | feature_bit(kBlkFDiscard) |
    feature_bit(kBlkFWriteZeroes) | feature_bit(kFIndirectDesc) | feature_bit(kFEventIdx) |
    feature_bit(kFVersion1) | feature_bit(vhost_user::kFProtocolFeatures);

FrontendOptions frontend_options(const BlkDriverOptions& options) {
  FrontendOptions frontend = options.frontend;
  frontend.features_mask &= kUsableFeatures;
  if (options.packed) frontend.features_mask |= feature_bit(kFRingPacked);
  if (!options.indirect) frontend.features_mask &= ~feature_bit(kFIndirectDesc);
  if (!options.event_idx) frontend.features_mask &= ~feature_bit(kFEventIdx);
  // Who accepts it has to use it: some backends take it for granted.
  if (!options.inflight) {
    frontend.protocol_features_mask &= ~(std::uint64_t{1} << vhost_user::kProtocolFInflightShmfd);
  }
  return frontend;
}

}  // namespace

Expected<std::unique_ptr<BlkDriver>> BlkDriver::connect(const std::string& socket_path,
                                                        const BlkDriverOptions& options) {
  auto frontend = Frontend::connect(socket_path, frontend_options(options));
  if (!frontend) return std::unexpected(std::move(frontend.error()));
  return start(std::move(*frontend), options);
}

Expected<std::unique_ptr<BlkDriver>> BlkDriver::adopt(vhost_user::UniqueFd socket,
                                                      const BlkDriverOptions& options) {
  return start(Frontend::adopt(std::move(socket), frontend_options(options)), options);
}

Expected<std::unique_ptr<BlkDriver>> BlkDriver::start(std::unique_ptr<Frontend> frontend,
                                                      const BlkDriverOptions& options) {
  auto memory = DriverMemory::create(
      std::vector<std::size_t>(options.memory_region_count, options.memory_bytes));
  if (!memory) return std::unexpected(std::move(memory.error()));
  std::unique_ptr<BlkDriver> driver(new BlkDriver);
  driver->timeout_ = options.frontend.timeout;
  driver->memory_ = std::move(*memory);
  driver->scratch_ = driver->memory_->allocate(kScratchBytes, kScratchBytes);
  driver->frontend_ = std::move(frontend);
  driver->frontend_options_ = frontend_options(options);
  auto done = driver->frontend_->negotiate();
  if (done && options.packed && (driver->frontend_->features() & feature_bit(kFRingPacked)) == 0)
    done = make_error(ErrorKind::kNotSupported, "the backend has no packed rings");
  if (done && options.inflight) {
    auto inflight = driver->frontend_->get_inflight(options.queue_count, options.queue_size);
    if (!inflight) return std::unexpected(std::move(inflight.error()));
    driver->inflight_ = std::move(*inflight);
    done = driver->frontend_->set_inflight(*driver->inflight_);
  }
  if (done) done = driver->frontend_->set_memory(*driver->memory_);
  if (done) done = driver->start_queues(options);
  if (!done) return std::unexpected(std::move(done.error()));
  auto config = driver->read_config();
  if (!config) return std::unexpected(std::move(config.error()));
  driver->config_ = *config;
  return driver;
}

Expected<void> BlkDriver::check_queue_count(std::uint16_t wanted) {
  std::uint64_t offered = 1;
  if ((frontend_->protocol_features() & (std::uint64_t{1} << vhost_user::kProtocolFMq)) != 0) {
    const auto count = frontend_->queue_count();
    if (!count) return std::unexpected(count.error());
    offered = *count;
  }
  if (wanted <= offered) return {};
  return make_error(ErrorKind::kInvalidArgument,
                    fmt::format("{} queues are asked for and the backend has {}", wanted, offered));
}

Expected<void> BlkDriver::start_queues(const BlkDriverOptions& options) {
  if (auto done = check_queue_count(options.queue_count); !done) return done;
  const bool indirect = (frontend_->features() & feature_bit(kFIndirectDesc)) != 0;
  const DriverQueueOptions ring_options{
      .size = options.queue_size,
      .packed = options.packed,
      .event_idx = (frontend_->features() & feature_bit(kFEventIdx)) != 0,
      .indirect = indirect,
      .indirect_max = kChainLength};
  const std::size_t chains = indirect ? options.queue_size : options.queue_size / kChainLength;
  for (std::uint16_t i = 0; i < options.queue_count; ++i) {
    Queue queue;
    auto ring = DriverQueue::create(*memory_, ring_options);
    if (!ring) return std::unexpected(std::move(ring.error()));
    queue.ring = std::move(*ring);
    queue.heads = memory_->allocate(chains * kBlkRequestHeaderBytes, kBlkRequestHeaderBytes);
    queue.statuses = memory_->allocate(chains, 1);
    if (queue.heads.empty() || queue.statuses.empty()) {
      return make_error(ErrorKind::kExhausted,
                        "no guest memory left for request headers; raise memory_bytes");
    }
    for (std::size_t slot = chains; slot > 0; --slot)
      queue.free.push_back(static_cast<std::uint16_t>(slot - 1));
    queue.io_of_token.resize(options.queue_size);
    queue.slot_of_token.resize(options.queue_size);
    if (auto done = frontend_->start_ring(i, *queue.ring); !done) return done;
    queues_.push_back(std::move(queue));
  }
  return {};
}

Expected<void> BlkDriver::reconnect(const std::string& socket_path) {
  assert(inflight_.has_value());
  auto frontend = Frontend::connect(socket_path, frontend_options_);
  if (!frontend) return std::unexpected(std::move(frontend.error()));
  if (auto resumed = resume(**frontend); !resumed) return resumed;
  frontend_ = std::move(*frontend);
  return {};
}

Expected<void> BlkDriver::resume(Frontend& frontend) {
  auto done = frontend.negotiate();
  if (!done) return done;
  // The rings are laid out, and the requests in them made, for what was negotiated then.
  if (frontend.features() != frontend_->features()) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("the backend has features {:#x}; the one before had {:#x}",
                                  frontend.features(), frontend_->features()));
  }
  done = frontend.set_inflight(*inflight_);
  if (done) done = frontend.set_memory(*memory_);
  for (std::size_t i = 0; i < queues_.size() && done; ++i) {
    const DriverQueue& ring = *queues_[i].ring;
    done = frontend.start_ring(static_cast<std::uint16_t>(i), ring, ring.resume_base());
  }
  return done;
}

BlkDriver::~BlkDriver() {
  for (std::size_t i = 0; i < queues_.size(); ++i) {
    // Best effort: the connection ends right after, which stops the rings as well.
    if (!frontend_->stop_ring(static_cast<std::uint16_t>(i))) return;
  }
}

Expected<BlkConfig> BlkDriver::read_config() {
  const auto bytes = frontend_->read_config(0, kBlkConfigBytes);
  if (!bytes) return std::unexpected(bytes.error());
  const std::byte* const config = bytes->data();
  return BlkConfig{
      .capacity_sectors = load_le<std::uint64_t>(config + kBlkConfigCapacity),
      .size_max_bytes = load_le<std::uint32_t>(config + kBlkConfigSizeMax),
      .seg_max = load_le<std::uint32_t>(config + kBlkConfigSegMax),
      .block_bytes = load_le<std::uint32_t>(config + kBlkConfigBlkSize),
      .writeback = config[kBlkConfigWriteback] != std::byte{0},
      .queue_count = load_le<std::uint16_t>(config + kBlkConfigNumQueues),
      .max_discard_sectors = load_le<std::uint32_t>(config + kBlkConfigMaxDiscardSectors),
      .max_discard_segments = load_le<std::uint32_t>(config + kBlkConfigMaxDiscardSeg),
      .max_write_zeroes_sectors = load_le<std::uint32_t>(config + kBlkConfigMaxWriteZeroesSectors),
      .write_zeroes_may_unmap = config[kBlkConfigWriteZeroesMayUnmap] != std::byte{0}};
}

bool BlkDriver::submit(std::uint16_t index, BlkIo& io) {
  Queue& queue = queues_[index];
  if (queue.free.empty()) return false;
  const std::uint16_t slot = queue.free.back();
  std::byte* const head = queue.heads.data() + slot * kBlkRequestHeaderBytes;
  std::byte* const status = queue.statuses.data() + slot;
  store_le<std::uint32_t>(head, io.type);
  store_le<std::uint32_t>(head + 4, 0);
  store_le<std::uint64_t>(head + 8, io.sector);
  *status = std::byte{0xff};
  const bool device_writes = io.type == kBlkTIn || io.type == kBlkTGetId;
  std::array<Buffer, kChainLength> chain;
  std::size_t length = 0;
  chain[length++] = {memory_->guest_address(head), kBlkRequestHeaderBytes, false};
  if (!io.data.empty()) {
    chain[length++] = {memory_->guest_address(io.data.data()),
                       static_cast<std::uint32_t>(io.data.size()), device_writes};
  }
  chain[length++] = {memory_->guest_address(status), 1, true};
  const auto token = queue.ring->add(std::span(chain).first(length));
  if (!token) return false;
  queue.free.pop_back();
  queue.io_of_token[*token] = &io;
  queue.slot_of_token[*token] = slot;
  return true;
}

Expected<std::size_t> BlkDriver::poll(std::uint16_t index) {
  Queue& queue = queues_[index];
  std::size_t count = 0;
  for (;;) {
    const auto used = queue.ring->take_used();
    if (!used) return std::unexpected(used.error());
    const auto& element = *used;
    if (!element) return count;
    const std::uint16_t token = element->token;  // the ring has checked that it is in flight
    BlkIo* const io = std::exchange(queue.io_of_token[token], nullptr);
    const std::uint16_t slot = queue.slot_of_token[token];
    queue.free.push_back(slot);
    ++count;
    if (io == nullptr) continue;  // abandoned
    io->status = std::to_integer<std::uint8_t>(queue.statuses[slot]);
    io->used_bytes = element->length_bytes;
    if (io->complete != nullptr) io->complete(*io);
  }
}

Expected<void> BlkDriver::sleep(std::uint16_t index, std::chrono::nanoseconds timeout) {
  DriverQueue& ring = *queues_[index].ring;
  const auto woken = ring.wait(timeout, frontend_->socket());
  // A backend that ends answers first: what it has answered counts.
  if (woken.by_device || !woken.by_other_fd || !frontend_->is_hung_up()) return {};
  return make_error(ErrorKind::kIo,
                    fmt::format("the backend has closed the connection, {} requests "
                                "of queue {} in flight",
                                ring.in_flight(), index));
}

Expected<std::size_t> BlkDriver::wait(std::uint16_t index, std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  for (;;) {
    auto count = poll(index);
    if (!count || *count > 0) return count;
    const std::chrono::nanoseconds left = deadline - std::chrono::steady_clock::now();
    if (left.count() <= 0) {
      return make_error(
          ErrorKind::kBusy,
          fmt::format("queue {}: the backend completes nothing within {} ms, {} requests "
                      "in flight",
                      index, timeout.count(), queues_[index].ring->in_flight()));
    }
    if (auto slept = sleep(index, left); !slept) return std::unexpected(std::move(slept.error()));
  }
}

Expected<std::uint8_t> BlkDriver::run(BlkIo& io) {
  io.context = nullptr;
  io.complete = [](BlkIo& finished) { finished.context = &finished; };
  if (!submit(0, io)) return make_error(ErrorKind::kBusy, "queue 0 is full");
  kick(0);
  while (io.context == nullptr) {
    if (auto count = wait(0, timeout_); !count) {
      abandon(0, io);
      return std::unexpected(std::move(count.error()));
    }
  }
  return io.status;
}

// The caller takes `io` back though the backend still has it: what comes later finds nobody.
void BlkDriver::abandon(std::uint16_t index, const BlkIo& io) {
  std::ranges::replace(queues_[index].io_of_token, &io, nullptr);
}

Expected<std::uint8_t> BlkDriver::read(std::uint64_t sector, std::span<std::byte> data) {
  BlkIo io{.type = kBlkTIn, .sector = sector, .data = data};
  return run(io);
}

Expected<std::uint8_t> BlkDriver::write(std::uint64_t sector, std::span<std::byte> data) {
  BlkIo io{.type = kBlkTOut, .sector = sector, .data = data};
  return run(io);
}

Expected<std::uint8_t> BlkDriver::flush() {
  BlkIo io{.type = kBlkTFlush};
  return run(io);
}

Expected<std::uint8_t> BlkDriver::change_range(std::uint32_t type, std::uint64_t sector,
                                               std::uint32_t sector_count, bool unmap) {
  store_le<std::uint64_t>(scratch_.data(), sector);
  store_le<std::uint32_t>(scratch_.data() + 8, sector_count);
  store_le<std::uint32_t>(scratch_.data() + 12, unmap ? kBlkWriteZeroesFlagUnmap : 0);
  BlkIo io{.type = type, .data = scratch_.first(kBlkDiscardSegmentBytes)};
  return run(io);
}

Expected<std::uint8_t> BlkDriver::discard(std::uint64_t sector, std::uint32_t sector_count) {
  return change_range(kBlkTDiscard, sector, sector_count, false);
}

Expected<std::uint8_t> BlkDriver::write_zeroes(std::uint64_t sector, std::uint32_t sector_count,
                                               bool unmap) {
  return change_range(kBlkTWriteZeroes, sector, sector_count, unmap);
}

Expected<std::string> BlkDriver::get_id() {
  BlkIo io{.type = kBlkTGetId, .data = scratch_.first(kBlkIdBytes)};
  std::ranges::fill(io.data, std::byte{0});
  const auto status = run(io);
  if (!status) return std::unexpected(status.error());
  if (*status != kBlkSOk)
    return make_error(ErrorKind::kNotSupported, "the backend has no serial number");
  const auto* const text = reinterpret_cast<const char*>(io.data.data());
  return std::string(text, std::find(text, text + kBlkIdBytes, '\0'));
}

}  // namespace vblk::driver
