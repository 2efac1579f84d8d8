// Which engine does which kind of operation, for one I/O thread.
//
// The user's choice (`--aio native`, `--aio read=io_uring,write=native,flush=threads`) becomes an
// AioSelection; create() turns it into engines, each made once however many kinds it serves. What
// the chosen engine cannot do on this kernel goes to the thread pool, and the reason is kept as
// data: it is logged at start and answered when asked. An engine that the kernel refuses altogether
// (io_uring disabled, aio-max-nr exhausted) is an error, never a silent replacement: the user named
// it. Only a kind that is left to vblk (`auto`) does without such an engine, and says so.
//
// The choice may change while requests are in flight, without a pause
// (docs/decisions/0007-engines-change-under-way.md):
//
//   begin_change()   owner        what is lacking; engines about to leave stay if they are wanted
//   make()           any thread   makes it: what takes time, or fails, does so here
//   commit()         owner        new requests go the new way; or cancel(): nothing has happened
//   take_retired()   owner        an engine that serves no kind, when its last request has
//   completed
//
// An engine in the set is one of:
//
//   serving    some kind is routed to it, or may be (auto)
//   wanted     a change that is under way may route to it; otherwise it would retire
//   retired    no new requests; its own complete as ever
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "aio/engine.h"
#include "aio/engine_name.h"
#include "aio/engine_options.h"
#include "aio/engine_tuner.h"
#include "aio/error.h"

namespace vblk::aio {

// The engine wanted for each kind, indexed by IoKind.
struct AioSelection {
  std::array<EngineName, kIoKindCount> engine_of_kind{};  // all kThreads, QEMU's default

  // Parses one engine name for all kinds, or a comma-separated list of kind=engine. In a list,
  // "discard" also stands for write-zeroes unless that is named; kinds that are not named stay as
  // they are in `base`. Error: kInvalidArgument, naming `option`, the word that is wrong and the
  // words that are right.
  static Expected<AioSelection> parse(std::string_view text, std::string_view option,
                                      const AioSelection& base);
  // As the option --aio: kinds that are not named use threads.
  static Expected<AioSelection> parse(std::string_view text) { return parse(text, "--aio", {}); }
  [[nodiscard]] std::string to_string() const;  // parses back to itself
  [[nodiscard]] bool has(EngineName name) const;
  bool operator==(const AioSelection&) const = default;
};

// Makes an engine, on any thread. EngineSet::make_engine() with options; tests have others.
using EngineMaker = std::function<Expected<std::unique_ptr<Engine>>(EngineName name)>;

// What became of the selection for one kind.
struct EngineRoute {
  IoKind kind;
  std::string requested;
  std::string chosen;
  std::string reason;  // empty where chosen == requested
};

// What an engine is told that joins a set: the files and the memory that requests will use.
struct EngineRegistrations {
  struct File {
    std::uint64_t id;  // of this registration: a number or an address may come back for another
    int fd;
    unsigned users;
  };
  struct Memory {
    std::uint64_t id;
    iovec range;
    unsigned users;
  };
  std::vector<File> files;
  std::vector<Memory> memory;
};

// A change of the selection under way. Made by begin_change(), used up by commit() or cancel() of
// the same set.
class EngineChange {
 public:
  // Makes the engines that are lacking, and has them prepare for the set's files and memory, which
  // may take long (pinned memory). Any thread. Error: as EngineSet::create(); cancel it then.
  Expected<void> make(const EngineMaker& maker);
  // One line per thing the user should know: auto does without an engine, memory is not registered.
  [[nodiscard]] const std::vector<std::string>& notes() const { return notes_; }
  // Of the engines made, in the order in which they join the set.
  [[nodiscard]] std::vector<int> completion_fds() const;

 private:
  friend class EngineSet;
  struct Made {
    EngineName name;
    std::unique_ptr<Engine> engine;
  };
  AioSelection selection_;
  std::vector<EngineName> lacking_;
  EngineRegistrations known_;  // to the engines made
  std::vector<Made> made_;
  std::vector<std::string> notes_;
};

class EngineSet {
 public:
  // Creates the engines; the set belongs to the calling thread.
  // Errors: kExhausted (aio-max-nr, locked memory, descriptors), kPermission or kNotSupported
  // (io_uring disabled); the message says how to lift it.
  static Expected<std::unique_ptr<EngineSet>> create(const AioSelection& selection,
                                                     const EngineOptions& options);
  static Expected<std::unique_ptr<EngineSet>> create_by(const AioSelection& selection,
                                                        const EngineMaker& maker);
  static Expected<std::unique_ptr<Engine>> make_engine(EngineName name,
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
  // The calls of Engine, on every engine of the set and on those that join it. Of several errors
  // the first.
  Expected<void> register_file(int fd);
  void unregister_file(int fd);
  Expected<void> register_memory(const iovec& range);
  void unregister_memory(const iovec& range);
  void submit();
  std::size_t reap();
  [[nodiscard]] bool prepare_to_sleep();
  void wake_up();
  // Where only one engine has anything in flight.
  [[nodiscard]] bool sleep(std::chrono::nanoseconds timeout);
  [[nodiscard]] std::size_t in_flight() const;
  [[nodiscard]] bool is_worth_looking() const;
  // Whether engines are being tried, one after the other, for a kind that is left to vblk.
  [[nodiscard]] bool is_exploring() const { return tuner_ != nullptr && tuner_->is_exploring(); }
  // Blocks until nothing is in flight, running completions on this thread.
  void drain();

  // The four steps above; one change at a time (asserted). commit() may come while requests are in
  // flight, not from a completion.
  [[nodiscard]] EngineChange begin_change(const AioSelection& selection);
  void commit(EngineChange change);
  void cancel(EngineChange change);
  [[nodiscard]] bool has_retired() const { return has_retired_; }
  // Nothing, or one that has left the set. Better destroyed on another thread: io_destroy(2) waits
  // for tens of milliseconds. Not from a completion.
  [[nodiscard]] std::unique_ptr<Engine> take_retired();

  // Those in the set, for the loop to watch; changed by commit() and take_retired().
  [[nodiscard]] std::span<const std::unique_ptr<Engine>> engines() const { return engines_; }
  [[nodiscard]] std::span<const EngineRoute> routes() const { return routes_; }
  [[nodiscard]] const AioSelection& selection() const { return selection_; }
  // What has been decided of the kinds that are left to vblk: for the log, once; and all that has
  // been learned, one line per kind and class of load.
  [[nodiscard]] bool has_news() const { return !news_.empty(); }
  [[nodiscard]] std::vector<std::string> take_news() { return std::exchange(news_, {}); }
  [[nodiscard]] std::vector<std::string> auto_report() const;

 private:
  // Of the engine with the same index.
  struct Standing {
    EngineName name;
    bool is_retired{false};
    bool is_wanted{false};
    bool is_prepared{false};            // to sleep
    std::uint64_t requests_at_wake{0};  // that had ended when its descriptor was emptied last
  };
  EngineSet() = default;
  void join(EngineName name, std::unique_ptr<Engine> engine);
  [[nodiscard]] Engine* engine_named(EngineName name) const;
  void update_registrations(EngineChange& change) const;
  void route(const std::vector<std::string>& notes);
  void retire_unused();
  void take_over_auto();
  void follow_tuner();
  [[nodiscard]] EngineName name_of(const Engine* engine) const;

  AioSelection selection_;
  std::vector<std::unique_ptr<Engine>> engines_;
  std::vector<Standing> standings_;
  std::array<Engine*, kIoKindCount> engine_of_kind_{};
  Engine* block_device_discard_engine_{nullptr};  // BLKDISCARD has no asynchronous form here
  std::vector<EngineRoute> routes_;
  EngineRegistrations registrations_;
  std::uint64_t next_registration_id_{1};
  std::unique_ptr<EngineTuner> tuner_;  // where a kind is left to vblk
  std::vector<std::string> news_;
  bool is_changing_{false};
  bool has_retired_{false};
};

}  // namespace vblk::aio
