#include "blockdev/cli/monitor.h"

#include <chrono>
#include <istream>
#include <memory>
#include <optional>
#include <string_view>
#include <thread>
#include <unistd.h>
#include <utility>

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/streambuf.hpp>
#include <boost/asio/write.hpp>
#include <boost/json.hpp>
#include <fmt/core.h>

#include "blockdev/bell.h"
#include "blockdev/log.h"
#include "blockdev/unix_listener.h"

namespace vblk::cli {

namespace asio = boost::asio;
namespace json = boost::json;
using UnixSocket = asio::local::stream_protocol;

namespace {

// Longest line taken from a client: a command is a few dozen bytes.
constexpr std::size_t kLineBytesMax = 4096;
// Longest answer taken from a server: counters of 64 queues are some 20 KiB.
constexpr std::size_t kAnswerBytesMax = std::size_t{1} << 20;
constexpr std::chrono::seconds kAnswerTimeout{10};
constexpr std::chrono::milliseconds kAcceptPause{500};

json::value error_answer(std::string_view description) {
  return {{"error", {{"desc", description}}}};
}

json::value answer_line(const MonitorHandlers& handlers, std::string_view line) {
  boost::system::error_code error;
  const json::value message = json::parse(json::string_view(line.data(), line.size()), error);
  if (error || !message.is_object())
    return error_answer("expected a line such as {\"execute\": \"query-aio\"}");
  const json::value* const command = message.as_object().if_contains("execute");
  if (command == nullptr || !command->is_string())
    return error_answer("the member 'execute' is missing");
  const auto name = std::string_view(command->as_string().data(), command->as_string().size());
  const auto handler = handlers.find(name);
  if (handler == handlers.end()) {
    std::string known;
    for (const auto& [known_name, unused] : handlers)
      known += (known.empty() ? "" : ", ") + known_name;
    return error_answer(fmt::format("unknown command '{}'; there are: {}", name, known));
  }
  const json::value* const given = message.as_object().if_contains("arguments");
  if (given != nullptr && !given->is_object())
    return error_answer("the member 'arguments' is no object");
  auto answer = handler->second(given != nullptr ? given->as_object() : json::object{});
  if (!answer) return error_answer(answer.error().message);
  return {{"return", std::move(*answer)}};
}

// One client: read a line, answer it, again. Lives as long as an operation of its socket is
// pending.
class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(UnixSocket::socket socket, const MonitorHandlers& handlers)
      : socket_(std::move(socket)), input_(kLineBytesMax), handlers_(handlers) {}

  void read() {
    asio::async_read_until(
        socket_, input_, '\n',
        [self = shared_from_this()](const boost::system::error_code& error, std::size_t) {
          // Also a line beyond kLineBytesMax: the connection is all it costs.
          if (!error) self->answer();
        });
  }

 private:
  void answer() {
    std::istream stream(&input_);
    std::string line;
    std::getline(stream, line);
    output_ = json::serialize(answer_line(handlers_, line)) + "\n";
    asio::async_write(
        socket_, asio::buffer(output_),
        [self = shared_from_this()](const boost::system::error_code& error, std::size_t) {
          if (!error) self->read();
        });
  }

  UnixSocket::socket socket_;
  asio::streambuf input_;
  std::string output_;
  const MonitorHandlers& handlers_;
};

}  // namespace

struct Monitor::State {
  State(blockdev::UnixListener unix_listener, MonitorHandlers monitor_handlers,
        blockdev::Bell monitor_bell)
      : listener(std::move(unix_listener)),
        handlers(std::move(monitor_handlers)),
        bell(std::move(monitor_bell)) {
    ringing.assign(bell.fd());
    // Rung once, at the end: that it is heard is all.
    ringing.async_wait(asio::posix::stream_descriptor::wait_read,
                       [](const boost::system::error_code&) {});
  }
  ~State() { ringing.release(); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  void accept() {
    acceptor.async_accept(
        [this](const boost::system::error_code& error, UnixSocket::socket socket) {
          if (error == asio::error::operation_aborted) return;
          if (error) {
            log::warning("monitor: cannot accept a connection: {}", error.message());
            return accept_later();
          }
          std::make_shared<Session>(std::move(socket), handlers)->read();
          accept();
        });
  }

  // What has run out, such as descriptors, is not back at once.
  void accept_later() {
    pause.expires_after(kAcceptPause);
    pause.async_wait([this](const boost::system::error_code& error) {
      if (!error) accept();
    });
  }

  blockdev::UnixListener listener;
  MonitorHandlers handlers;
  const blockdev::Bell bell;
  asio::io_context io{1};
  asio::posix::stream_descriptor ringing{io};  // watches the bell; owns nothing
  UnixSocket::acceptor acceptor{io};
  asio::steady_timer pause{io};
  std::thread thread;
};

Monitor::Monitor(std::unique_ptr<State> state) : state_(std::move(state)) {}

Expected<std::unique_ptr<Monitor>> Monitor::start(const std::string& path,
                                                  MonitorHandlers handlers) {
  auto listener = blockdev::UnixListener::listen(path, "monitor socket");
  if (!listener) return std::unexpected(std::move(listener.error()));
  auto bell = blockdev::Bell::make("the monitor");
  if (!bell) return std::unexpected(std::move(bell.error()));
  auto state = std::make_unique<State>(std::move(*listener), std::move(handlers), std::move(*bell));
  boost::system::error_code error;
  const int fd = ::dup(state->listener.fd());  // Asio closes what it owns
  if (fd >= 0) state->acceptor.assign(UnixSocket(), fd, error);
  if (fd < 0 || error) {
    return make_error(ErrorKind::kExhausted, fmt::format("cannot use the monitor socket '{}': {}",
                                                         path, describe_errno(errno)));
  }
  state->accept();
  state->thread = std::thread([&io = state->io] { io.run(); });
  return std::unique_ptr<Monitor>(new Monitor(std::move(state)));
}

Monitor::~Monitor() {
  state_->io.stop();
  state_->bell.ring();
  state_->thread.join();
}

Expected<std::string> ask_monitor(const std::string& path, const std::string& command,
                                  const json::object& arguments) {
  asio::io_context io{1};
  UnixSocket::socket socket(io);
  boost::system::error_code error;
  if (path.size() > blockdev::UnixListener::kPathBytesMax) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("the path '{}' is longer than the {} bytes of a Unix socket's address", path,
                    blockdev::UnixListener::kPathBytesMax));
  }
  socket.connect(UnixSocket::endpoint(path), error);
  if (error) {
    return make_error(
        kind_of_errno(error.value()),
        fmt::format("cannot connect to the monitor '{}': {}; is it the path given to vblk serve "
                    "--monitor, and does that still run?",
                    path, describe_errno(error.value())),
        error.value());
  }
  json::object message{{"execute", command}};
  if (!arguments.empty()) message["arguments"] = arguments;
  const std::string request = json::serialize(message) + "\n";
  std::string reply;
  std::optional<boost::system::error_code> outcome;
  asio::async_write(socket, asio::buffer(request),
                    [&](const boost::system::error_code& write_error, std::size_t) {
                      if (write_error) {
                        outcome = write_error;
                        return;
                      }
                      asio::async_read_until(socket, asio::dynamic_buffer(reply, kAnswerBytesMax),
                                             '\n',
                                             [&](const boost::system::error_code& read_error,
                                                 std::size_t) { outcome = read_error; });
                    });
  io.run_for(kAnswerTimeout);
  if (!outcome) {
    return make_error(ErrorKind::kBusy, fmt::format("the monitor '{}' does not answer within {} s",
                                                    path, kAnswerTimeout.count()));
  }
  if (*outcome) {
    return make_error(ErrorKind::kIo,
                      fmt::format("the monitor '{}' broke off: {}", path, outcome->message()));
  }
  const json::value answer = json::parse(reply, error);
  if (error || !answer.is_object()) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("'{}' does not speak the monitor's JSON", path));
  }
  if (const auto* failure = answer.as_object().if_contains("error")) {
    const auto* text = failure->is_object() ? failure->as_object().if_contains("desc") : nullptr;
    return make_error(ErrorKind::kInvalidArgument, text != nullptr && text->is_string()
                                                       ? std::string(text->as_string())
                                                       : json::serialize(*failure));
  }
  const auto* value = answer.as_object().if_contains("return");
  if (value == nullptr) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("'{}' does not speak the monitor's JSON", path));
  }
  return json::serialize(*value) + "\n";
}

}  // namespace vblk::cli
