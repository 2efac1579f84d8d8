#include "blockdev/conform/probe.h"

#include <sys/socket.h>
#include <thread>

#include <fmt/core.h>

#include "blockdev/conform/channel.h"
#include "blockdev/conform/guest.h"
#include "blockdev/virtio/blk_wire.h"

namespace vblk::conform {

Probe::Probe(const ProbeOptions& options, std::string folder)
    : options_(options), folder_(std::move(folder)), random_(options.seed) {}

void Probe::start() {
  auto started = Backend::start(options_.target, folder_, read_only_);
  if (!started) fail("the backend cannot be started: " + started.error().message);
  backend_ = std::move(*started);
}

const std::string& Probe::socket_path() {
  if (!has_own_backend()) return options_.target.socket_path;
  if (backend_ == nullptr) start();
  start_for_the_next();
  connected_launch_ = backend_->launches();
  return backend_->socket_path();
}

void Probe::start_for_the_next() {
  if (end_expected_) return;
  if (options_.target.ends_with_frontend && connected_launch_ == backend_->launches()) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (backend_->end().empty()) {
      if (std::chrono::steady_clock::now() > deadline)
        skip("takes two connections, and the backend serves one at a time and ends with it");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  if (backend_->end() == kEndedInOrder)
    value(backend_->restart(), "starting it again after the frontend with which it ended");
}

Backend& Probe::own_backend(const char* why_needed) {
  if (!has_own_backend()) skip(fmt::format("{}: takes --backend-command or --profile", why_needed));
  if (backend_ == nullptr) start();
  return *backend_;
}

void Probe::use_read_only() {
  if (!has_own_backend()) skip("a read-only disk is needed: takes --profile or commands");
  if (options_.target.read_only_command.empty())
    skip("a read-only disk is needed: takes --read-only-command");
  read_only_ = true;
}

int Probe::backend_pid() {
  if (has_own_backend()) return own_backend("its process is looked at").pid();
  const Channel channel(*this);
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(channel.socket(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return 0;
  return credentials.pid;
}

std::string Probe::image_path() const {
  return backend_ != nullptr ? backend_->image_path() : options_.target.image_path;
}

std::string Probe::death() {
  if (backend_ == nullptr || end_expected_) return "";
  const std::string end = backend_->end();
  if (end.empty()) return "";
  const std::string words = backend_->last_words();
  return fmt::format("the backend {}{}", end, words.empty() ? "" : ", saying: " + words);
}

bool Probe::ends_in_order_soon() {
  if (backend_ == nullptr || end_expected_) return false;
  for (auto left = kQuiet; left.count() > 0; left -= std::chrono::milliseconds(1)) {
    if (!backend_->end().empty()) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return backend_->end() == kEndedInOrder;
}

void Probe::check_aftermath() {
  if (end_expected_ || (has_own_backend() && backend_ == nullptr)) return;
  // Some programs end with a frontend, in good order; socket_path() starts them again.
  const bool ended_in_order = backend_ != nullptr && backend_->end() == kEndedInOrder;
  if (const std::string dead = death(); !dead.empty() && !ended_in_order) fail(dead);
  try {
    Guest next(*this);
    const Answer answer = next.read(0, kDefaultBlock);
    expect(answer.status == virtio::kBlkSOk,
           fmt::format("a read has status {} instead of 0", answer.status));
  } catch (Verdict& verdict) {
    if (verdict.outcome == Outcome::kFailed)
      verdict.text = "afterwards, for the next frontend: " + verdict.text;
    throw;
  }
}

}  // namespace vblk::conform
