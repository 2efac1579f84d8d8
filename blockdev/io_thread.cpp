#include "blockdev/io_thread.h"

#include <future>
#include <optional>
#include <pthread.h>
#include <utility>

namespace vblk::blockdev {

namespace {

// The kernel takes 15 characters and a terminating zero.
constexpr std::size_t kThreadNameLengthMax = 15;

}  // namespace

Expected<std::unique_ptr<IoThread>> IoThread::start(const std::string& name,
                                                    IoLoopOptions loop_options,
                                                    const EngineSetFactory& make_engines) {
  std::unique_ptr<IoThread> io_thread(new IoThread(loop_options));
  std::promise<std::optional<Error>> started;
  auto outcome = started.get_future();
  io_thread->thread_ = std::thread(
      [&thread = *io_thread, &make_engines, &started, name = name.substr(0, kThreadNameLengthMax)] {
        pthread_setname_np(pthread_self(), name.c_str());
        auto engines = make_engines();
        if (!engines) {
          started.set_value(std::move(engines.error()));
          return;
        }
        thread.context_ = std::make_unique<IoContext>(thread.loop_, std::move(*engines));
        started.set_value(std::nullopt);
        thread.loop_.run();
        thread.context_.reset();  // on the thread that owns the engines
      });
  if (auto error = outcome.get()) return std::unexpected(std::move(*error));
  return io_thread;
}

IoThread::~IoThread() {
  loop_.stop();
  if (thread_.joinable()) thread_.join();
}

}  // namespace vblk::blockdev
