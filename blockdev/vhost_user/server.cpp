#include "blockdev/vhost_user/server.h"

#include <cassert>
#include <cerrno>
#include <chrono>
#include <fcntl.h>
#include <functional>
#include <future>
#include <optional>
#include <sys/socket.h>
#include <utility>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <fmt/core.h>

#include "blockdev/bell.h"
#include "blockdev/flush_now.h"
#include "blockdev/log.h"
#include "blockdev/unix_listener.h"

namespace vblk::vhost_user {

namespace asio = boost::asio;

namespace {
constexpr std::chrono::milliseconds kAcceptPause{500};
}  // namespace

// Other threads reach the server's by post(), which also rings a bell (bell.h).
struct Server::State {
  State(virtio::BlkDevice& blk_device,
        const std::vector<std::unique_ptr<blockdev::IoThread>>& threads, blockdev::Bell server_bell)
      : device(blk_device), io_threads(threads), bell(std::move(server_bell)) {}
  ~State() {
    disconnect();
    for (auto* watch : {&ringing, &listening}) {
      if (watch->is_open()) watch->release();
    }
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  // Has `function` run on the server's thread. Any thread.
  template <typename Function>
  void post(Function function) {
    asio::post(io, std::move(function));
    bell.ring();
  }
  void listen_to_bell();
  void wait_for_frontend();
  void accept();
  void accept_later();
  void connect(UniqueFd socket);
  void wait_for_message();
  void serve_message();
  void disconnect();
  void stop();

  virtio::BlkDevice& device;
  const std::vector<std::unique_ptr<blockdev::IoThread>>& io_threads;
  BackendOptions backend_options;
  std::optional<blockdev::UnixListener> listener;
  UniqueFd inherited;  // listening
  int listening_fd{-1};
  const blockdev::Bell bell;
  asio::io_context io{1};
  asio::posix::stream_descriptor ringing{io};     // watches the bell; owns nothing
  asio::posix::stream_descriptor listening{io};   // watches; owns nothing
  asio::posix::stream_descriptor connection{io};  // watches; the backend owns the socket
  asio::steady_timer pause{io};
  std::unique_ptr<Backend> backend;
  bool only_one_frontend{false};
  bool stopping{false};
  std::optional<Error> failure;
};

namespace {

// What kind of socket has been inherited: true if it listens.
Expected<bool> is_listening(int fd) {
  int domain = 0;
  int type = 0;
  int listens = 0;
  socklen_t length = sizeof(int);
  if (::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) != 0 ||
      ::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) != 0 ||
      ::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length) != 0 || domain != AF_UNIX ||
      type != SOCK_STREAM) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("descriptor {} is no Unix stream socket; pass a listening or a connected one",
                    fd));
  }
  return listens != 0;
}

}  // namespace

Expected<std::unique_ptr<Server>> Server::create(
    const ServerOptions& options, virtio::BlkDevice& device,
    const std::vector<std::unique_ptr<blockdev::IoThread>>& io_threads) {
  assert(!io_threads.empty());
  auto bell = blockdev::Bell::make("the server");
  if (!bell) return std::unexpected(std::move(bell.error()));
  auto state = std::make_unique<State>(device, io_threads, std::move(*bell));
  state->ringing.assign(state->bell.fd());
  state->listen_to_bell();
  state->backend_options = options.backend;
  state->backend_options.on_broken = [broken = state.get()] {
    broken->post([broken] {
      if (broken->backend != nullptr) broken->backend->tell_needs_reset();
    });
  };
  if (options.socket_fd >= 0) {
    const auto listens = is_listening(options.socket_fd);
    if (!listens) return std::unexpected(listens.error());
    if (!*listens && options.socket_must_listen) {
      return make_error(
          ErrorKind::kInvalidArgument,
          fmt::format("descriptor {} is a socket that does not listen; let the socket "
                      "unit have ListenStream= and Accept=no",
                      options.socket_fd));
    }
    if (*listens) {
      // Somebody else who has the socket may accept first.
      ::fcntl(options.socket_fd, F_SETFL, ::fcntl(options.socket_fd, F_GETFL) | O_NONBLOCK);
      state->inherited.reset(options.socket_fd);
      state->listening_fd = options.socket_fd;
    } else {
      state->only_one_frontend = true;
      state->connect(UniqueFd(options.socket_fd));
    }
  } else {
    auto listener = blockdev::UnixListener::listen(options.socket_path, "socket");
    if (!listener) return std::unexpected(std::move(listener.error()));
    state->listener.emplace(std::move(*listener));
    state->listening_fd = state->listener->fd();
  }
  if (state->listening_fd >= 0) {
    state->listening.assign(state->listening_fd);
    state->wait_for_frontend();
  }
  return std::unique_ptr<Server>(new Server(std::move(state)));
}

Server::Server(std::unique_ptr<State> state) : state_(std::move(state)) {}

Server::~Server() = default;

// What was posted runs behind this, in the same round of the loop.
void Server::State::listen_to_bell() {
  ringing.async_wait(asio::posix::stream_descriptor::wait_read,
                     [this](const boost::system::error_code& error) {
                       if (error) return;
                       bell.silence();
                       listen_to_bell();
                     });
}

void Server::State::wait_for_frontend() {
  listening.async_wait(asio::posix::stream_descriptor::wait_read,
                       [this](const boost::system::error_code& error) {
                         if (!error) accept();
                       });
}

void Server::State::accept() {
  UniqueFd socket(::accept4(listening_fd, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (socket) return connect(std::move(socket));
  const int error = errno;
  // The one who connected has gone again.
  if (error == EAGAIN || error == ECONNABORTED || error == EINTR) return wait_for_frontend();
  if (error == EBADF || error == EINVAL || error == ENOTSOCK) {
    failure = Error{ErrorKind::kIo, error,
                    fmt::format("the socket is unusable: {}", describe_errno(error))};
    return stop();
  }
  log::warning("cannot accept a frontend: {}", describe_errno(error));
  accept_later();
}

// What this process is short of, such as descriptors, is not back at once; the frontend waits.
void Server::State::accept_later() {
  pause.expires_after(kAcceptPause);
  pause.async_wait([this](const boost::system::error_code& error) {
    if (!error) wait_for_frontend();
  });
}

void Server::State::connect(UniqueFd socket) {
  if (log::peer_line_allowed()) log::info("a frontend has connected");
  connection.assign(socket.get());
  backend = std::make_unique<Backend>(std::move(socket), device, io_threads, backend_options);
  wait_for_message();
}

void Server::State::wait_for_message() {
  connection.async_wait(asio::posix::stream_descriptor::wait_read,
                        [this](const boost::system::error_code& error) {
                          if (!error) serve_message();
                        });
}

void Server::State::serve_message() {
  const auto alive = backend->serve();
  if (alive && *alive) return wait_for_message();
  if (!alive) {
    if (log::peer_line_allowed())
      log::warning("the frontend is disconnected: {}", alive.error().message);
  } else if (log::peer_line_allowed()) {
    log::info("the frontend has left");
  }
  disconnect();
  if (only_one_frontend) {
    stop();
  } else if (!stopping) {
    wait_for_frontend();
  }
}

void Server::State::disconnect() {
  if (backend == nullptr) return;
  connection.release();
  backend.reset();
}

// Ends run(): nothing is waited for any more once the frontend's requests are done.
void Server::State::stop() {
  if (std::exchange(stopping, true)) return;
  if (listening.is_open()) listening.release();
  disconnect();
  io.stop();
}

Expected<void> Server::run() {
  const auto work = asio::make_work_guard(state_->io);
  state_->io.run();
  // What completed writes are still volatile must not be lost by an orderly end.
  auto flushed = blockdev::flush_now(state_->device.node(), *state_->io_threads.front());
  state_->listener.reset();
  if (state_->failure) return std::unexpected(*state_->failure);
  return flushed;
}

void Server::request_stop() {
  state_->post([state = state_.get()] { state->stop(); });
}

void Server::notify_config_change() {
  state_->post([state = state_.get()] {
    if (state->backend != nullptr) state->backend->notify_config_change();
  });
}

std::optional<ServerStatus> Server::status() {
  constexpr std::chrono::seconds kPatience{2};
  const auto answer = std::make_shared<std::promise<ServerStatus>>();
  state_->post([state = state_.get(), answer] {
    ServerStatus status;
    if (state->backend != nullptr) {
      status = {.connected = true,
                .features = state->backend->features(),
                .device_status = state->backend->device_status(),
                .rings = state->backend->ring_status()};
    }
    answer->set_value(std::move(status));
  });
  auto future = answer->get_future();
  if (future.wait_for(kPatience) != std::future_status::ready) return std::nullopt;
  return future.get();
}

}  // namespace vblk::vhost_user
