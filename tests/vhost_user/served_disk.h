// A disk served in this process, and a frontend that says anything at all to it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <poll.h>
#include <span>
#include <string>
#include <sys/socket.h>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "aio/engine_set.h"
#include "blockdev/block_node.h"
#include "blockdev/driver/frontend.h"
#include "blockdev/handover_node.h"
#include "blockdev/io_context.h"
#include "blockdev/io_thread.h"
#include "blockdev/log.h"
#include "blockdev/vhost_user/server.h"
#include "blockdev/virtio/blk_device.h"
#include "tests/support/temp_dir.h"

namespace vblk::test {

// Long enough for any machine; nothing waits it out unless it fails.
inline constexpr std::chrono::seconds kPatience{30};

// Of the disk and the rings of tests that have no wish of their own.
inline constexpr std::size_t kDiskBytes = std::size_t{1} << 20;
inline constexpr std::uint16_t kQueueSize = 64;

constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }

// Waits until `condition` holds. False: it never did.
inline bool eventually(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

inline std::size_t entries_of(const char* directory) {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory)) ++count;
  return count;
}
inline std::size_t open_fds() { return entries_of("/proc/self/fd"); }
inline std::size_t threads() { return entries_of("/proc/self/task"); }

// A disk in memory that keeps requests in hand for as long as it is told to. Several I/O threads.
class HoldingDisk final : public blockdev::BlockNode {
 public:
  explicit HoldingDisk(std::size_t size_bytes) : bytes_(size_bytes) {
    size_bytes_ = size_bytes;
    name_ = "holding";
  }

  void hold(bool hold) { hold_ = hold; }
  // Changes and flushes end with this errno value until it is 0 again.
  void fail(int error) { error_ = error; }
  // Requests that have arrived and are not completed.
  [[nodiscard]] std::size_t in_hand() const { return in_hand_; }
  [[nodiscard]] std::size_t writes() const { return writes_; }
  // Whether a flush has completed since the last write did.
  [[nodiscard]] bool flushed() const { return flushed_; }
  [[nodiscard]] std::byte at(std::size_t offset_bytes) {
    const std::scoped_lock lock(mutex_);
    return bytes_[offset_bytes];
  }

 protected:
  void do_submit(blockdev::BlockRequest& request, blockdev::IoContext& context) override {
    ++in_hand_;
    wait_for_release(request, context);
  }

 private:
  void wait_for_release(blockdev::BlockRequest& request, blockdev::IoContext& context) {
    context.loop().post([this, &request, &context] {
      if (hold_) return wait_for_release(request, context);
      const int error = request.operation == blockdev::BlockOperation::kRead ? 0 : error_.load();
      if (error == 0) carry_out(request);
      --in_hand_;
      context.complete_later(request, error);
    });
  }
  void carry_out(const blockdev::BlockRequest& request) {
    const std::scoped_lock lock(mutex_);
    if (request.operation == blockdev::BlockOperation::kFlush) flushed_ = true;
    std::byte* at = bytes_.data() + request.offset_bytes;
    const bool is_write = request.operation == blockdev::BlockOperation::kWrite;
    if (is_write) {
      flushed_ = false;
      ++writes_;
    }
    for (std::uint32_t i = 0; i < request.iov_count; ++i) {
      const iovec& piece = request.iov[i];
      if (is_write) {
        std::memcpy(at, piece.iov_base, piece.iov_len);
      } else {
        std::memcpy(piece.iov_base, at, piece.iov_len);
      }
      at += piece.iov_len;
    }
  }

  std::mutex mutex_;
  std::vector<std::byte> bytes_;
  std::atomic<bool> hold_{false};
  std::atomic<int> error_{0};
  std::atomic<bool> flushed_{true};
  std::atomic<std::size_t> in_hand_{0};
  std::atomic<std::size_t> writes_{0};
};

struct ServedOptions {
  std::uint16_t queue_count{2};
  unsigned io_thread_count{2};
  int socket_fd{-1};  // inherited, instead of a path
  bool offers_recovery{true};
  blockdev::HandoverNode* handover{nullptr};
  std::uint16_t queue_size_max{128};
  virtio::InterruptOptions interrupts;
  blockdev::EngineSetFactory make_engines = [] { return aio::EngineSet::create({}, {}); };
};

// Everything of `vblk serve` but the program.
class Served {
 public:
  explicit Served(blockdev::BlockNode& node, const ServedOptions& options = {}) {
    log::set_level(log::Level::kOff);
    device_ = virtio::BlkDevice::create(node, {.queue_count = options.queue_count,
                                               .queue_size_max = options.queue_size_max,
                                               .serial = "served",
                                               .interrupts = options.interrupts})
                  .value();
    for (unsigned i = 0; i < options.io_thread_count; ++i)
      threads_.push_back(blockdev::IoThread::start("io", {}, options.make_engines).value());
    server_ =
        vhost_user::Server::create(
            {.socket_path = options.socket_fd < 0 ? path() : "",
             .socket_fd = options.socket_fd,
             .backend = {.offers_recovery = options.offers_recovery, .handover = options.handover}},
            *device_, threads_)
            .value();
    thread_ = std::thread([this] { outcome_ = server_->run(); });
  }
  ~Served() { EXPECT_TRUE(stop().has_value()); }
  Served(const Served&) = delete;
  Served& operator=(const Served&) = delete;

  Expected<void> stop() {
    server_->request_stop();
    return wait();
  }
  // For run() to end by itself.
  Expected<void> wait() {
    if (thread_.joinable()) thread_.join();
    return outcome_;
  }

  [[nodiscard]] std::string path() const { return dir_.file("socket"); }
  [[nodiscard]] vhost_user::Server& server() { return *server_; }
  [[nodiscard]] virtio::BlkDevice& device() { return *device_; }
  [[nodiscard]] bool connected() {
    const auto status = server_->status();
    return !status || status->connected;
  }

 private:
  TempDir dir_;
  std::unique_ptr<virtio::BlkDevice> device_;
  std::vector<std::unique_ptr<blockdev::IoThread>> threads_;
  std::unique_ptr<vhost_user::Server> server_;
  std::thread thread_;
  Expected<void> outcome_;
};

using Bytes = std::vector<std::byte>;

template <typename... Parts>
Bytes payload_of(const Parts&... parts) {
  Bytes bytes((std::size_t{0} + ... + sizeof(Parts)));
  std::byte* at = bytes.data();
  ((std::memcpy(at, &parts, sizeof(Parts)), at += sizeof(Parts)), ...);
  return bytes;
}

// A frontend without manners.
class RawFrontend {
 public:
  explicit RawFrontend(const std::string& path,
                       std::uint64_t protocol_features_mask = ~std::uint64_t{0})
      : frontend_(
            driver::Frontend::connect(
                path, {.timeout = kPatience, .protocol_features_mask = protocol_features_mask})
                .value()) {}

  [[nodiscard]] driver::Frontend& polite() { return *frontend_; }

  void send(vhost_user::Request request, const Bytes& payload = {}, std::span<const int> fds = {}) {
    // It may have been cut off already, which is for the test to see by another way.
    [[maybe_unused]] const auto sent = frontend_->send(request, payload, fds);
  }
  void send_bytes(std::span<const std::byte> bytes) {
    [[maybe_unused]] const auto sent =
        ::send(frontend_->socket(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  // The answer to a message that has one; nothing if the connection ended instead.
  std::optional<Bytes> call(vhost_user::Request request, const Bytes& payload = {},
                            std::span<const int> fds = {}) {
    auto answer = frontend_->call(request, payload, fds);
    if (!answer) return std::nullopt;
    return std::move(*answer);
  }
  std::optional<std::uint64_t> call_u64(vhost_user::Request request, const Bytes& payload = {}) {
    const auto answer = call(request, payload);
    return answer ? vhost_user::decode<std::uint64_t>(*answer) : std::nullopt;
  }
  // What REPLY_ACK says: 0 is success.
  std::optional<std::uint64_t> acknowledged(vhost_user::Request request, const Bytes& payload = {},
                                            std::span<const int> fds = {}) {
    const auto answer =
        frontend_->call(request, payload, fds, vhost_user::kVersion | vhost_user::kFlagNeedReply);
    return answer ? vhost_user::decode<std::uint64_t>(*answer) : std::nullopt;
  }
  // Whether the backend has ended the connection, or does so soon.
  [[nodiscard]] bool cut_off() const {
    pollfd descriptor{.fd = frontend_->socket(), .events = POLLIN, .revents = 0};
    if (::poll(&descriptor, 1, static_cast<int>(kPatience.count() * 1000)) <= 0) return false;
    std::byte byte{};
    return ::recv(frontend_->socket(), &byte, 1, MSG_DONTWAIT) <= 0;
  }

 private:
  std::unique_ptr<driver::Frontend> frontend_;
};

}  // namespace vblk::test
