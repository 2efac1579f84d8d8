#include "aio/engine_set.h"

#include <algorithm>
#include <cassert>
#include <optional>
#include <poll.h>
#include <ranges>
#include <utility>

#include <fmt/core.h>

#include "aio/inline_engine.h"
#include "aio/io_uring_engine.h"
#include "aio/native_engine.h"
#include "aio/threads_engine.h"

namespace vblk::aio {

namespace {

// In a set there is one of each name.
constexpr std::size_t kEngineCount = 4;
static_assert(kEngineCount == kAllEngineNames.size() + 1, "those, and kInline");

constexpr std::size_t index_of(IoKind kind) { return static_cast<std::size_t>(kind); }

std::optional<EngineName> parse_engine_name(std::string_view text) {
  for (const EngineName name : kAllEngineNames) {
    if (to_string(name) == text) return name;
  }
  if (text == to_string(EngineName::kAuto)) return EngineName::kAuto;
  return std::nullopt;
}

std::optional<IoKind> kind_named(std::string_view text) {
  for (const IoKind kind : kAllKinds) {
    if (to_string(kind) == text) return kind;
  }
  return std::nullopt;
}

std::unexpected<Error> unknown_engine(std::string_view option, std::string_view text) {
  return make_error(
      ErrorKind::kInvalidArgument,
      fmt::format("{}: unknown engine '{}'; there are threads, native, io_uring and auto", option,
                  text));
}

// Takes the text up to `separator` off the front of `rest`.
std::string_view next_word(std::string_view& rest, char separator) {
  const std::size_t end = rest.find(separator);
  const std::string_view word = rest.substr(0, end);
  rest = end == std::string_view::npos ? std::string_view{} : rest.substr(end + 1);
  return word;
}

std::string_view why_not(EngineName engine, IoKind kind) {
  if (engine == EngineName::kNative) {
    if (kind == IoKind::kFlush) return "this kernel has no IOCB_CMD_FDSYNC (Linux 4.18)";
    if (kind == IoKind::kWriteBehind) return "Linux AIO has no sync_file_range";
    return "Linux AIO has no fallocate";
  }
  return "this kernel has no IORING_OP_FALLOCATE (Linux 5.6)";
}

auto find_range(std::vector<EngineRegistrations::Memory>& memory, const iovec& range) {
  return std::ranges::find_if(memory, [&range](const EngineRegistrations::Memory& known) {
    return known.range.iov_base == range.iov_base && known.range.iov_len == range.iov_len;
  });
}

template <typename Made>
Expected<std::unique_ptr<Engine>> as_engine(Expected<std::unique_ptr<Made>> made) {
  if (!made) return std::unexpected(std::move(made.error()));
  return std::unique_ptr<Engine>(std::move(*made));
}

}  // namespace

Expected<AioSelection> AioSelection::parse(std::string_view text, std::string_view option,
                                           const AioSelection& base) {
  AioSelection selection = base;
  if (text.find('=') == std::string_view::npos) {
    const auto engine = parse_engine_name(text);
    if (!engine) return unknown_engine(option, text);
    selection.engine_of_kind.fill(*engine);
    return selection;
  }
  std::array<bool, kIoKindCount> named{};
  for (const auto part : std::views::split(text, ',')) {
    std::string_view pair(part.begin(), part.end());
    const std::string_view kind_text = next_word(pair, '=');
    const auto kind = kind_named(kind_text);
    if (!kind) {
      return make_error(
          ErrorKind::kInvalidArgument,
          fmt::format("{}: unknown kind of operation '{}'; there are read, write, flush, discard, "
                      "write-zeroes and write-behind",
                      option, kind_text));
    }
    const auto engine = parse_engine_name(pair);
    if (!engine) return unknown_engine(option, pair);
    if (std::exchange(named[index_of(*kind)], true)) {
      return make_error(ErrorKind::kInvalidArgument,
                        fmt::format("{}: '{}' is named twice", option, kind_text));
    }
    selection.engine_of_kind[index_of(*kind)] = *engine;
  }
  if (named[index_of(IoKind::kDiscard)] && !named[index_of(IoKind::kWriteZeroes)]) {
    selection.engine_of_kind[index_of(IoKind::kWriteZeroes)] =
        selection.engine_of_kind[index_of(IoKind::kDiscard)];
  }
  return selection;
}

bool AioSelection::has(EngineName name) const {
  return std::ranges::find(engine_of_kind, name) != engine_of_kind.end();
}

std::string AioSelection::to_string() const {
  if (std::ranges::all_of(engine_of_kind,
                          [this](EngineName name) { return name == engine_of_kind[0]; })) {
    return std::string(aio::to_string(engine_of_kind[0]));
  }
  std::string text;
  for (const IoKind kind : kAllKinds) {
    text += fmt::format("{}{}={}", text.empty() ? "" : ",", aio::to_string(kind),
                        aio::to_string(engine_of_kind[index_of(kind)]));
  }
  return text;
}

Expected<void> EngineChange::make(const EngineMaker& maker) {
  for (const EngineName name : lacking_) {
    auto engine = maker(name);
    if (!engine) {
      const bool can_do_without = name != EngineName::kThreads && !selection_.has(name);
      if (!can_do_without) return std::unexpected(std::move(engine.error()));
      notes_.push_back(
          fmt::format("auto does without {}: {}", to_string(name), engine.error().message));
      continue;
    }
    const auto note_refusal = [this](const Expected<void>& registered) {
      if (!registered) notes_.push_back(registered.error().message);
    };
    for (const auto& file : known_.files) note_refusal((*engine)->register_file(file.fd));
    for (const auto& memory : known_.memory) note_refusal((*engine)->register_memory(memory.range));
    made_.push_back({.name = name, .engine = std::move(*engine)});
  }
  return {};
}

std::vector<int> EngineChange::completion_fds() const {
  std::vector<int> fds;
  for (const auto& [name, engine] : made_) fds.push_back(engine->completion_fd());
  return fds;
}

Expected<std::unique_ptr<Engine>> EngineSet::make_engine(EngineName name,
                                                         const EngineOptions& options) {
  switch (name) {
    case EngineName::kThreads:
      return as_engine(ThreadsEngine::create(options));
    case EngineName::kNative:
      return as_engine(NativeEngine::create(options));
    case EngineName::kIoUring:
      return as_engine(IoUringEngine::create(options));
    case EngineName::kInline:
      return as_engine(InlineEngine::create());
    case EngineName::kAuto:
      break;
  }
  assert(false && "auto is no engine");
  std::unreachable();
}

Expected<std::unique_ptr<EngineSet>> EngineSet::create(const AioSelection& selection,
                                                       const EngineOptions& options) {
  return create_by(selection, [&](EngineName name) { return make_engine(name, options); });
}

Expected<std::unique_ptr<EngineSet>> EngineSet::create_by(const AioSelection& selection,
                                                          const EngineMaker& maker) {
  std::unique_ptr<EngineSet> set(new EngineSet);
  EngineChange change = set->begin_change(selection);
  if (auto made = change.make(maker); !made) return std::unexpected(std::move(made.error()));
  set->commit(std::move(change));
  return set;
}

EngineSet::EngineSet(std::unique_ptr<Engine> engine) {
  engine_of_kind_.fill(engine.get());
  block_device_discard_engine_ = engine.get();
  for (const IoKind kind : kAllKinds) {
    routes_.push_back({.kind = kind,
                       .requested = std::string(engine->name()),
                       .chosen = std::string(engine->name()),
                       .reason = {}});
  }
  join(EngineName::kThreads, std::move(engine));
}

EngineSet::~EngineSet() = default;

void EngineSet::join(EngineName name, std::unique_ptr<Engine> engine) {
  engines_.push_back(std::move(engine));
  standings_.push_back({.name = name});
}

Engine* EngineSet::engine_named(EngineName name) const {
  const auto found = std::ranges::find(standings_, name, &Standing::name);
  return found == standings_.end()
             ? nullptr
             : engines_[static_cast<std::size_t>(found - standings_.begin())].get();
}

// The thread pool is always there: for what others cannot do, and for BLKDISCARD.
EngineChange EngineSet::begin_change(const AioSelection& selection) {
  assert(!is_changing_ && "one change at a time");
  is_changing_ = true;
  EngineChange change;
  change.selection_ = selection;
  change.known_ = registrations_;
  // The pool last: where it is there only for what others cannot do, it is not the first of the
  // set.
  const bool any = selection.has(EngineName::kAuto);
  for (const auto& [name, is_needed] :
       {std::pair{EngineName::kInline, selection.has(EngineName::kInline)},
        std::pair{EngineName::kNative, any || selection.has(EngineName::kNative)},
        std::pair{EngineName::kIoUring, any || selection.has(EngineName::kIoUring)},
        std::pair{EngineName::kThreads, true}}) {
    if (!is_needed) continue;
    const auto standing = std::ranges::find(standings_, name, &Standing::name);
    if (standing == standings_.end()) {
      change.lacking_.push_back(name);
    } else {
      standing->is_wanted = true;
    }
  }
  retire_unused();
  return change;
}

void EngineSet::commit(EngineChange change) {
  assert(is_changing_);
  is_changing_ = false;
  update_registrations(change);
  // An engine that auto had to do without is there now: what was learned did not know it.
  if (!change.made_.empty()) tuner_.reset();
  for (auto& [name, engine] : change.made_) join(name, std::move(engine));
  selection_ = change.selection_;
  route(change.notes_);
  take_over_auto();
  for (Standing& standing : standings_) standing.is_wanted = false;
  retire_unused();
}

// NOLINTNEXTLINE(performance-unnecessary-value-param): what was made for it goes with it.
void EngineSet::cancel(EngineChange /*change*/) {
  assert(is_changing_);
  is_changing_ = false;
  for (Standing& standing : standings_) standing.is_wanted = false;
  retire_unused();
}

// Tells the engines made what has been registered, and what no more, since the change began.
void EngineSet::update_registrations(EngineChange& change) const {
  const auto is_in = [](const auto& list, std::uint64_t id) {
    return std::ranges::any_of(list, [id](const auto& entry) { return entry.id == id; });
  };
  for (const auto& [name, engine] : change.made_) {
    for (const auto& file : change.known_.files) {
      if (!is_in(registrations_.files, file.id)) engine->unregister_file(file.fd);
    }
    for (const auto& memory : change.known_.memory) {
      if (!is_in(registrations_.memory, memory.id)) engine->unregister_memory(memory.range);
    }
    // Who registered it has been told by the other engines whether it pays; here it is advice.
    for (const auto& file : registrations_.files) {
      if (is_in(change.known_.files, file.id)) continue;
      [[maybe_unused]] const auto advice = engine->register_file(file.fd);
    }
    for (const auto& memory : registrations_.memory) {
      if (is_in(change.known_.memory, memory.id)) continue;
      [[maybe_unused]] const auto advice = engine->register_memory(memory.range);
    }
  }
}

// Follows the selection, with the engines that there are.
void EngineSet::route(const std::vector<std::string>& notes) {
  Engine* const threads = engine_named(EngineName::kThreads);
  routes_.clear();
  for (const IoKind kind : kAllKinds) {
    const EngineName requested = selection_.engine_of_kind[index_of(kind)];
    Engine*& engine = engine_of_kind_[index_of(kind)];
    EngineRoute route{.kind = kind,
                      .requested = std::string(aio::to_string(requested)),
                      .chosen = {},
                      .reason = {}};
    if (requested == EngineName::kAuto) {
      // It starts where the kind is, or by the default.
      if (engine == nullptr) engine = threads;
      route.reason = "no load has been seen yet";
      for (const auto& note : notes) route.reason += "; " + note;
    } else {
      engine = engine_named(requested);
      if (!engine->supports(kind)) {
        route.reason = why_not(requested, kind);
        engine = threads;
      }
    }
    route.chosen = engine->name();
    routes_.push_back(std::move(route));
  }
  block_device_discard_engine_ = threads;
}

EngineName EngineSet::name_of(const Engine* engine) const {
  const auto found = std::ranges::find(engines_, engine, &std::unique_ptr<Engine>::get);
  return standings_[static_cast<std::size_t>(found - engines_.begin())].name;
}

void EngineSet::take_over_auto() {
  if (!selection_.has(EngineName::kAuto)) return tuner_.reset();
  if (tuner_ == nullptr) tuner_ = std::make_unique<EngineTuner>();
  for (const IoKind kind : kAllKinds) {
    if (selection_.engine_of_kind[index_of(kind)] != EngineName::kAuto) {
      tuner_->leave(kind);
      continue;
    }
    std::vector<EngineName> candidates;
    for (const EngineName name : kAllEngineNames) {
      const Engine* const engine = engine_named(name);
      if (engine != nullptr && engine->supports(kind)) candidates.push_back(name);
    }
    tuner_->take(kind, std::move(candidates), name_of(engine_of_kind_[index_of(kind)]));
  }
}

void EngineSet::follow_tuner() {
  for (const IoKind kind : kAllKinds) {
    if (selection_.engine_of_kind[index_of(kind)] != EngineName::kAuto) continue;
    Engine* const engine = engine_named(tuner_->engine_of(kind));
    engine_of_kind_[index_of(kind)] = engine;
    routes_[index_of(kind)].chosen = engine->name();
    routes_[index_of(kind)].reason = tuner_->reason_of(kind);
  }
  for (auto& line : tuner_->take_news()) news_.push_back(std::move(line));
}

std::vector<std::string> EngineSet::auto_report() const {
  std::vector<std::string> lines;
  for (const IoKind kind : kAllKinds) {
    if (selection_.engine_of_kind[index_of(kind)] != EngineName::kAuto) continue;
    for (const auto& line : tuner_->report_of(kind))
      lines.push_back(fmt::format("{} {}", aio::to_string(kind), line));
  }
  return lines;
}

void EngineSet::retire_unused() {
  has_retired_ = false;
  for (std::size_t i = 0; i < engines_.size(); ++i) {
    Standing& standing = standings_[i];
    const bool serves =
        engines_[i].get() == block_device_discard_engine_ || selection_.has(EngineName::kAuto) ||
        std::ranges::find(engine_of_kind_, engines_[i].get()) != engine_of_kind_.end();
    standing.is_retired = !serves && !standing.is_wanted;
    has_retired_ |= standing.is_retired;
  }
}

std::unique_ptr<Engine> EngineSet::take_retired() {
  for (std::size_t i = 0; i < engines_.size(); ++i) {
    if (!standings_[i].is_retired || engines_[i]->in_flight() > 0) continue;
    std::unique_ptr<Engine> engine = std::move(engines_[i]);
    engines_.erase(engines_.begin() + static_cast<std::ptrdiff_t>(i));
    standings_.erase(standings_.begin() + static_cast<std::ptrdiff_t>(i));
    has_retired_ = std::ranges::any_of(standings_, &Standing::is_retired);
    return engine;
  }
  return nullptr;
}

Expected<void> EngineSet::register_file(int fd) {
  auto& files = registrations_.files;
  if (const auto known = std::ranges::find(files, fd, &EngineRegistrations::File::fd);
      known != files.end()) {
    ++known->users;
    return {};
  }
  files.push_back({.id = next_registration_id_++, .fd = fd, .users = 1});
  Expected<void> outcome;
  for (const auto& engine : engines_) {
    auto registered = engine->register_file(fd);
    if (outcome) outcome = std::move(registered);
  }
  return outcome;
}

void EngineSet::unregister_file(int fd) {
  auto& files = registrations_.files;
  const auto known = std::ranges::find(files, fd, &EngineRegistrations::File::fd);
  if (known == files.end() || --known->users > 0) return;
  files.erase(known);
  for (const auto& engine : engines_) engine->unregister_file(fd);
}

Expected<void> EngineSet::register_memory(const iovec& range) {
  auto& memory = registrations_.memory;
  if (const auto known = find_range(memory, range); known != memory.end()) {
    ++known->users;
    return {};
  }
  memory.push_back({.id = next_registration_id_++, .range = range, .users = 1});
  Expected<void> outcome;
  for (const auto& engine : engines_) {
    auto registered = engine->register_memory(range);
    if (outcome) outcome = std::move(registered);
  }
  return outcome;
}

void EngineSet::unregister_memory(const iovec& range) {
  auto& memory = registrations_.memory;
  const auto known = find_range(memory, range);
  if (known == memory.end() || --known->users > 0) return;
  memory.erase(known);
  for (const auto& engine : engines_) engine->unregister_memory(range);
}

// An engine with nothing in flight is left alone: it has nothing to submit, to reap or to wait for.
void EngineSet::submit() {
  if (tuner_ != nullptr) tuner_->before_submit(engines_);
  for (const auto& engine : engines_) {
    if (engine->in_flight() > 0) engine->submit();
  }
}

std::size_t EngineSet::reap() {
  std::size_t count = 0;
  for (const auto& engine : engines_) {
    if (engine->in_flight() > 0) count += engine->reap();
  }
  if (tuner_ != nullptr && tuner_->after_reap(engines_, count)) follow_tuner();
  return count;
}

// An engine with nothing in flight may have signalled what was taken without a sleep: its
// descriptor must be emptied once more, or no sleep would be one.
bool EngineSet::prepare_to_sleep() {
  for (std::size_t i = 0; i < engines_.size(); ++i) {
    const bool has_signalled = standings_[i].requests_at_wake != engines_[i]->statistics().requests;
    if (engines_[i]->in_flight() == 0 && !has_signalled) continue;
    standings_[i].is_prepared = true;
    if (!engines_[i]->prepare_to_sleep()) return false;
  }
  return true;
}

void EngineSet::wake_up() {
  for (std::size_t i = 0; i < engines_.size(); ++i) {
    if (!std::exchange(standings_[i].is_prepared, false)) continue;
    // What is in flight still has not signalled for the last time.
    const std::uint64_t ended = engines_[i]->statistics().requests - engines_[i]->in_flight();
    standings_[i].requests_at_wake = ended;
    engines_[i]->wake_up();
  }
}

bool EngineSet::sleep(std::chrono::nanoseconds timeout) {
  Engine* only = nullptr;
  for (const auto& engine : engines_) {
    if (engine->in_flight() == 0) continue;
    if (only != nullptr) return false;
    only = engine.get();
  }
  return only != nullptr && only->sleep(timeout);
}

std::size_t EngineSet::in_flight() const {
  std::size_t count = 0;
  for (const auto& engine : engines_) count += engine->in_flight();
  return count;
}

bool EngineSet::is_worth_looking() const {
  return std::ranges::all_of(engines_,
                             [](const auto& engine) { return engine->is_worth_looking(); });
}

void EngineSet::drain() {
  while (in_flight() > 0) {
    submit();
    if (reap() > 0) continue;
    if (prepare_to_sleep()) {
      std::array<pollfd, kEngineCount> descriptors{};
      for (std::size_t i = 0; i < engines_.size(); ++i)
        descriptors[i] = {engines_[i]->completion_fd(), POLLIN, 0};
      ::poll(descriptors.data(), engines_.size(), -1);
    }
    wake_up();
  }
}

}  // namespace vblk::aio
