#include "blockdev/io_thread.h"

#include <csignal>
#include <exception>
#include <future>
#include <optional>
#include <pthread.h>
#include <system_error>
#include <utility>

#include <fmt/core.h>

namespace vblk::blockdev {

namespace {

// The kernel takes 15 characters and a terminating zero.
constexpr std::size_t kThreadNameLengthMax = 15;

// Delivered to a thread to make what it is blocked in fail with EINTR.
constexpr int kInterruptSignal = SIGUSR1;

// A handler that does nothing, and without SA_RESTART: the signal itself is the point.
void install_interrupt_handler_once() {
  [[maybe_unused]] static const bool installed = [] {
    struct sigaction action{};
    action.sa_handler = [](int /*signal*/) {};
    sigemptyset(&action.sa_mask);
    return ::sigaction(kInterruptSignal, &action, nullptr) == 0;
  }();
}

}  // namespace

Expected<std::unique_ptr<IoThread>> IoThread::start(const std::string& name,
                                                    IoLoopOptions loop_options,
                                                    const EngineSetFactory& make_engines) {
  install_interrupt_handler_once();
  std::unique_ptr<IoThread> io_thread(new IoThread(loop_options));
  std::promise<std::optional<Error>> started;
  auto outcome = started.get_future();
  const auto body = [&thread = *io_thread, &make_engines, &started,
                     name = name.substr(0, kThreadNameLengthMax)] {
    pthread_setname_np(pthread_self(), name.c_str());
    if (auto error = thread.prepare(make_engines)) return started.set_value(std::move(error));
    started.set_value(std::nullopt);
    thread.loop_.run();
    thread.context_.reset();  // on the thread that owns the engines
  };
  try {
    io_thread->thread_ = std::thread(body);
  } catch (const std::system_error& error) {
    return make_error(ErrorKind::kExhausted,
                      fmt::format("cannot start the I/O thread '{}': {}; raise 'ulimit -u' or "
                                  "'ulimit -v', or lower --iothreads",
                                  name, describe_errno(error.code().value())),
                      error.code().value());
  }
  if (auto error = outcome.get()) return std::unexpected(std::move(*error));
  return io_thread;
}

// Makes what belongs to the thread, on it. Nothing, or why it cannot be made.
std::optional<Error> IoThread::prepare(const EngineSetFactory& make_engines) {
  try {
    auto engines = make_engines();
    if (!engines) return std::move(engines.error());
    context_ = std::make_unique<IoContext>(loop_, std::move(*engines));
    return std::nullopt;
  } catch (const std::exception& exception) {
    // Nothing throws by intention: memory or descriptors have run out.
    return Error{ErrorKind::kExhausted, 0,
                 fmt::format("cannot set up an I/O thread: {}; raise 'ulimit -v' or 'ulimit -n'",
                             exception.what())};
  }
}

void IoThread::interrupt() { ::pthread_kill(thread_.native_handle(), kInterruptSignal); }

IoThread::~IoThread() {
  loop_.stop();
  if (thread_.joinable()) thread_.join();
}

}  // namespace vblk::blockdev
