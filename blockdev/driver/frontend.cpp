#include "blockdev/driver/frontend.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <thread>
#include <utility>

#include <fmt/core.h>

namespace vblk::driver {

using namespace vhost_user;

namespace {

constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }

// What a frontend that does no more than this one can accept. QEMU's would be more.
constexpr std::uint64_t kUsableProtocolFeatures =
    bit(kProtocolFMq) | bit(kProtocolFReplyAck) | bit(kProtocolFConfig) |
    bit(kProtocolFInflightShmfd) | bit(kProtocolFConfigureMemSlots) |
    bit(kProtocolFGetVringBaseInflight);

constexpr std::chrono::milliseconds kConnectRetry{5};

template <typename T>
std::vector<std::byte> payload_with(const T& value) {
  std::vector<std::byte> payload;
  append(payload, value);
  return payload;
}

}  // namespace

Expected<std::unique_ptr<Frontend>> Frontend::connect(const std::string& path,
                                                      const FrontendOptions& options) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("the path '{}' is too long for a Unix socket", path));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const auto deadline = std::chrono::steady_clock::now() + options.timeout;
  while (!socket || ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address),
                              sizeof address) != 0) {
    const int error = errno;
    // A Unix socket whose backlog is full says EAGAIN; there is nothing to poll for.
    if (error == EAGAIN && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(kConnectRetry);
      continue;
    }
    if (error == EINTR) continue;
    return make_error(
        error == EAGAIN ? ErrorKind::kBusy : kind_of_errno(error),
        fmt::format("cannot connect to the backend at '{}': {}", path, describe_errno(error)),
        error);
  }
  return adopt(std::move(socket), options);
}

std::unique_ptr<Frontend> Frontend::adopt(UniqueFd socket, const FrontendOptions& options) {
  ::fcntl(socket.get(), F_SETFL, ::fcntl(socket.get(), F_GETFL) | O_NONBLOCK);
  return std::unique_ptr<Frontend>(new Frontend(std::move(socket), options));
}

Frontend::Frontend(UniqueFd socket, const FrontendOptions& options)
    : socket_(std::move(socket)), options_(options) {}

Expected<void> Frontend::send(Request request, std::span<const std::byte> payload,
                              std::span<const int> fds, std::uint32_t flags) {
  return send_message(socket_.get(), {static_cast<std::uint32_t>(request), flags, 0}, payload, fds);
}

Expected<Message> Frontend::receive(Request expected) {
  const auto deadline = std::chrono::steady_clock::now() + options_.timeout;
  for (;;) {
    Message message;
    const auto outcome = reader_.read(socket_.get(), message);
    if (!outcome) return std::unexpected(outcome.error());
    if (*outcome == MessageReader::Outcome::kClosed) {
      return make_error(ErrorKind::kIo,
                        fmt::format("the backend closed the connection instead of answering {}",
                                    name_of(expected)));
    }
    if (*outcome == MessageReader::Outcome::kMessage) {
      const bool is_reply = (message.header.flags & kFlagReply) != 0;
      if (message.request() == expected && is_reply) return message;
      return make_error(
          ErrorKind::kCorrupt,
          fmt::format("the backend answers {} with message {}, flags {:#x}", name_of(expected),
                      message.header.request, message.header.flags));
    }
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    pollfd descriptor{.fd = socket_.get(), .events = POLLIN, .revents = 0};
    if (left.count() <= 0 || ::poll(&descriptor, 1, static_cast<int>(left.count())) == 0) {
      return make_error(ErrorKind::kBusy, fmt::format("the backend does not answer {} within {} ms",
                                                      name_of(expected), options_.timeout.count()));
    }
  }
}

Expected<Message> Frontend::exchange(Request request, std::span<const std::byte> payload,
                                     std::span<const int> fds, std::uint32_t flags) {
  if (auto sent = send(request, payload, fds, flags); !sent)
    return std::unexpected(std::move(sent.error()));
  return receive(request);
}

Expected<std::vector<std::byte>> Frontend::call(Request request, std::span<const std::byte> payload,
                                                std::span<const int> fds, std::uint32_t flags) {
  auto answer = exchange(request, payload, fds, flags);
  if (!answer) return std::unexpected(std::move(answer.error()));
  return std::move(answer->payload);
}

Expected<std::uint64_t> Frontend::call_u64(Request request) {
  const auto answer = call(request, {});
  if (!answer) return std::unexpected(answer.error());
  const auto value = decode<std::uint64_t>(*answer);
  if (!value) {
    return make_error(ErrorKind::kCorrupt, fmt::format("the backend answers {} with {} bytes",
                                                       name_of(request), answer->size()));
  }
  return *value;
}

Expected<void> Frontend::command(Request request, std::span<const std::byte> payload,
                                 std::span<const int> fds) {
  if ((protocol_features_ & bit(kProtocolFReplyAck)) == 0) return send(request, payload, fds);
  const auto answer = call(request, payload, fds, kVersion | kFlagNeedReply);
  if (!answer) return std::unexpected(answer.error());
  const auto status = decode<std::uint64_t>(*answer);
  if (status && *status == 0) return {};
  return make_error(ErrorKind::kNotSupported,
                    fmt::format("the backend refuses {}", name_of(request)));
}

Expected<void> Frontend::negotiate() {
  const auto offered = call_u64(Request::kGetFeatures);
  if (!offered) return std::unexpected(offered.error());
  offered_features_ = *offered;
  features_ = *offered & options_.features_mask;
  if (auto done = send(Request::kSetOwner, {}); !done) return done;
  if ((features_ & bit(kFProtocolFeatures)) != 0) {
    const auto protocol = call_u64(Request::kGetProtocolFeatures);
    if (!protocol) return std::unexpected(protocol.error());
    std::uint64_t chosen = *protocol & kUsableProtocolFeatures & options_.protocol_features_mask;
    // The one says nothing without the other.
    if ((chosen & bit(kProtocolFInflightShmfd)) == 0)
      chosen &= ~bit(kProtocolFGetVringBaseInflight);
    if (auto done = send(Request::kSetProtocolFeatures, payload_with(chosen)); !done) return done;
    protocol_features_ = chosen;
  }
  return command(Request::kSetFeatures, payload_with(features_));
}

Expected<std::vector<std::byte>> Frontend::read_config(std::uint32_t offset,
                                                       std::uint32_t size_bytes) {
  auto payload = payload_with(ConfigHead{.offset = offset, .size_bytes = size_bytes, .flags = 0});
  payload.resize(payload.size() + size_bytes);
  const auto answer = call(Request::kGetConfig, payload);
  if (!answer) return std::unexpected(answer.error());
  if (answer->size() != sizeof(ConfigHead) + size_bytes) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("the backend refuses to tell {} bytes of its configuration "
                                  "at {}",
                                  size_bytes, offset));
  }
  return std::vector<std::byte>(answer->begin() + sizeof(ConfigHead), answer->end());
}

Expected<void> Frontend::write_config(std::uint32_t offset, std::span<const std::byte> bytes) {
  auto payload = payload_with(ConfigHead{
      .offset = offset, .size_bytes = static_cast<std::uint32_t>(bytes.size()), .flags = 0});
  payload.insert(payload.end(), bytes.begin(), bytes.end());
  return command(Request::kSetConfig, payload);
}

Expected<std::uint64_t> Frontend::queue_count() { return call_u64(Request::kGetQueueNum); }

Expected<void> Frontend::set_memory(const DriverMemory& memory) {
  if ((protocol_features_ & bit(kProtocolFConfigureMemSlots)) != 0) {
    for (const auto& region : memory.regions()) {
      if (auto added = add_region(region); !added) return added;
    }
    return {};
  }
  if (memory.regions().size() > kMemoryTableRegionsMax) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("the backend takes {} memory regions and there are {}",
                                  kMemoryTableRegionsMax, memory.regions().size()));
  }
  auto payload = payload_with(MemoryTableHead{
      .region_count = static_cast<std::uint32_t>(memory.regions().size()), .padding = 0});
  std::vector<int> fds;
  for (const auto& region : memory.regions()) {
    append(payload, region.description);
    fds.push_back(region.fd);
  }
  return command(Request::kSetMemTable, payload, fds);
}

Expected<void> Frontend::add_region(const DriverMemory::Region& region) {
  const int fds[] = {region.fd};
  return command(Request::kAddMemReg,
                 payload_with(SingleMemoryRegion{.padding = 0, .region = region.description}), fds);
}

Expected<void> Frontend::remove_region(const DriverMemory::Region& region) {
  return command(Request::kRemMemReg,
                 payload_with(SingleMemoryRegion{.padding = 0, .region = region.description}));
}

Expected<void> Frontend::check_inflight() const {
  if ((protocol_features_ & bit(kProtocolFInflightShmfd)) != 0) return {};
  return make_error(ErrorKind::kNotSupported,
                    "the backend does not keep what is in flight (INFLIGHT_SHMFD)");
}

Expected<InflightFile> Frontend::get_inflight(std::uint16_t queue_count, std::uint16_t queue_size) {
  if (auto possible = check_inflight(); !possible)
    return std::unexpected(std::move(possible.error()));
  auto answer = exchange(Request::kGetInflightFd, payload_with(Inflight{.mmap_size = 0,
                                                                        .mmap_offset = 0,
                                                                        .queue_count = queue_count,
                                                                        .queue_size = queue_size,
                                                                        .padding = 0}));
  if (!answer) return std::unexpected(std::move(answer.error()));
  InflightFile inflight;
  if (answer->payload.size() >= kInflightBytesMin && answer->payload.size() <= sizeof(Inflight))
    std::memcpy(&inflight.description, answer->payload.data(), kInflightBytesMin);
  if (answer->fds.size() != 1 || inflight.description.mmap_size == 0) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("the backend answers GET_INFLIGHT_FD with {} bytes and {} "
                                  "descriptors",
                                  answer->payload.size(), answer->fds.size()));
  }
  inflight.fd = std::move(answer->fds[0]);
  return inflight;
}

Expected<void> Frontend::set_inflight(const InflightFile& inflight) {
  if (auto possible = check_inflight(); !possible) return possible;
  const int fds[] = {inflight.fd.get()};
  return command(Request::kSetInflightFd, payload_with(inflight.description), fds);
}

Expected<void> Frontend::start_ring(std::uint16_t index, const DriverQueue& queue,
                                    std::optional<std::uint32_t> base) {
  const std::uint64_t number = index;
  const int kick[] = {queue.kick_fd()};
  const int call[] = {queue.call_fd()};
  const int error[] = {queue.error_fd()};
  auto done = command(Request::kSetVringNum, payload_with(VringState{index, queue.options().size}));
  if (done)
    done = command(Request::kSetVringBase,
                   payload_with(VringState{index, base.value_or(queue.initial_base())}));
  if (done) done = command(Request::kSetVringAddr, payload_with(queue.addresses(index)));
  if (done) done = command(Request::kSetVringErr, payload_with(number), error);
  if (done) done = command(Request::kSetVringCall, payload_with(number), call);
  if (done) done = command(Request::kSetVringKick, payload_with(number), kick);
  if (done && (features_ & bit(kFProtocolFeatures)) != 0) {
    done = command(Request::kSetVringEnable, payload_with(VringState{index, 1}));
  }
  return done;
}

Expected<std::uint32_t> Frontend::stop_ring(std::uint16_t index) {
  const auto answer = call(Request::kGetVringBase, payload_with(VringState{index, 0}));
  if (!answer) return std::unexpected(answer.error());
  const auto state = decode<VringState>(*answer);
  if (!state || state->index != index) {
    return make_error(ErrorKind::kCorrupt, "the backend answers GET_VRING_BASE for another queue");
  }
  return state->value;
}

pid_t Frontend::backend_process() const {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(socket_.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return 0;
  return credentials.pid;
}

bool Frontend::is_hung_up() const {
  char byte = 0;
  const ssize_t count = ::recv(socket_.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  return count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR);
}

}  // namespace vblk::driver
