// Which engine does which kind of operation, for one I/O thread.
//
// The user's choice (`--aio native`, `--aio read=io_uring,write=native,flush=threads`) becomes an
// AioSelection; create() turns it into engines on the calling thread, each engine made once however
// many kinds it serves. What the chosen engine cannot do on this kernel goes to the thread pool,
// and the reason is kept as data: it is logged at start and answered when asked. An engine that the
// kernel refuses altogether (io_uring disabled, aio-max-nr exhausted) is an error, never a silent
// replacement: the user named it.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "aio/engine.h"
#include "aio/engine_options.h"
#include "aio/error.h"

namespace vblk::aio {

enum class EngineName : std::uint8_t { kThreads, kNative, kIoUring };
inline constexpr std::array kAllEngineNames{EngineName::kThreads, EngineName::kNative,
                                            EngineName::kIoUring};

[[nodiscard]] std::string_view to_string(EngineName name);
[[nodiscard]] std::string_view to_string(
    IoKind kind);  // "read", "write", "flush", "discard", "write-zeroes"

// The engine wanted for each kind, indexed by IoKind.
struct AioSelection {
  std::array<EngineName, kIoKindCount> engine_of_kind{};  // all kThreads, QEMU's default

  // Parses one engine name for all kinds, or a comma-separated list of kind=engine. In a list,
  // "discard" also stands for write-zeroes unless that is named; kinds that are not named use
  // threads. Error: kInvalidArgument, naming the word that is wrong and the words that are right.
  static Expected<AioSelection> parse(std::string_view text);
  [[nodiscard]] std::string to_string() const;  // parses back to itself
};

// What became of the selection for one kind.
struct EngineRoute {
  IoKind kind;
  std::string requested;
  std::string chosen;
  std::string reason;  // empty where chosen == requested
};

class EngineSet {
 public:
  // Creates the engines on the calling thread, which becomes their owner.
  // Errors: kExhausted (aio-max-nr, locked memory, descriptors), kPermission or kNotSupported
  // (io_uring disabled); the message says how to lift it.
  static Expected<std::unique_ptr<EngineSet>> create(const AioSelection& selection,
                                                     const EngineOptions& options);
  // One engine for every kind; for tests and for the simulated disk.
  explicit EngineSet(std::unique_ptr<Engine> engine);
  ~EngineSet();

  void queue(IoRequest& request) {
    const bool block_device_discard = request.kind == IoKind::kDiscard && request.on_block_device;
    Engine* const engine = block_device_discard
                               ? block_device_discard_engine_
                               : engine_of_kind_[static_cast<std::size_t>(request.kind)];
    engine->queue(request);
  }
  // The calls of Engine, on every engine of the set. Of several errors the first.
  Expected<void> register_file(int fd);
  void unregister_file(int fd);
  Expected<void> register_memory(const iovec& range);
  void unregister_memory(const iovec& range);
  void submit();
  std::size_t reap();
  [[nodiscard]] bool prepare_to_sleep();
  void wake_up();
  [[nodiscard]] std::size_t in_flight() const;
  [[nodiscard]] bool is_worth_looking() const;
  // Blocks until nothing is in flight, running completions on this thread.
  void drain();

  // One per distinct engine, in a stable order, for the loop to watch.
  [[nodiscard]] std::span<const std::unique_ptr<Engine>> engines() const { return engines_; }
  [[nodiscard]] std::span<const EngineRoute> routes() const { return routes_; }

 private:
  EngineSet() = default;
  std::vector<std::unique_ptr<Engine>> engines_;
  std::array<Engine*, kIoKindCount> engine_of_kind_{};
  Engine* block_device_discard_engine_{nullptr};  // BLKDISCARD has no asynchronous form here
  std::vector<EngineRoute> routes_;
};

}  // namespace vblk::aio
