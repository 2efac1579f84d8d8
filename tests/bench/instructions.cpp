// Takes requests through the device's side of the path, phase by phase, for callgrind to count:
//
//   dispatch   pop, parse, hand to the node
//   submit     give the engine's batch to the kernel, or to the pool
//   complete   take completions, push used, interrupt
//
// Of each case every phase is dumped under the name "CASE|PHASE|REQUESTS". The driver's side, the
// kernel and the pool's workers are not counted. To be run by instructions.py; without callgrind it
// does the same and counts nothing.
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <valgrind/callgrind.h>

#include <fmt/core.h>

#include "blockdev/log.h"
#include "tests/bench/request_path.h"

namespace vblk::measure {
namespace {

constexpr unsigned kWarmUpRounds = 8;
constexpr unsigned kRounds = 32;
// For a disk to answer all requests of a round, so that no phase is spent on looking in vain.
constexpr std::chrono::milliseconds kDiskTime{2};

enum class Phase : std::uint8_t { kDispatch, kSubmit, kComplete };
constexpr std::array kPhases{Phase::kDispatch, Phase::kSubmit, Phase::kComplete};
constexpr const char* name_of(Phase phase) {
  constexpr std::array kNames{"dispatch", "submit", "complete"};
  return kNames[static_cast<std::size_t>(phase)];
}

struct Case {
  // "null", on a packed ring or not, with recovery or not; the engine under a raw image; "qcow2 on"
  // it.
  std::string disk;
  Shape shape;
  unsigned depth;
};

// Counts what `function` does if `wanted`.
void counted(bool wanted, const std::function<void()>& function) {
  if (wanted) CALLGRIND_TOGGLE_COLLECT;
  function();
  if (wanted) CALLGRIND_TOGGLE_COLLECT;
}

void run_round(SteppedPath& path, const Case& each, std::optional<Phase> phase) {
  path.driver().submit(0, each.shape, each.depth);
  // A poll takes a few requests at a time.
  while (!path.driver().take_used(0)) {
    counted(phase == Phase::kDispatch, [&] { path.dispatch(); });
    counted(phase == Phase::kSubmit, [&] { path.submit(); });
    if (!each.disk.starts_with("null")) std::this_thread::sleep_for(kDiskTime);
    counted(phase == Phase::kComplete, [&] { path.complete(); });
  }
}

void run_case(SteppedPath& path, const Case& each) {
  for (unsigned i = 0; i < kWarmUpRounds; ++i) run_round(path, each, std::nullopt);
  for (const Phase phase : kPhases) {
    for (unsigned i = 0; i < kRounds; ++i) run_round(path, each, phase);
    const std::string name = fmt::format("{}, {}, {} at once|{}|{}", each.disk, name_of(each.shape),
                                         each.depth, name_of(phase), kRounds * each.depth);
    CALLGRIND_DUMP_STATS_AT(name.c_str());
  }
}

void run_null() {
  const auto node = null_node();
  SteppedPath path(*node, instant_engine());
  for (const Shape shape : {Shape::kRead4k, Shape::kRead64k, Shape::kWrite4k, Shape::kFlush}) {
    for (const unsigned depth : {1U, 32U}) run_case(path, {"null", shape, depth});
  }
}

// What it costs to keep track of what is in flight, and what the kind of ring does.
void run_null_with_recovery(RingKind ring) {
  const bool is_packed = ring == RingKind::kPacked;
  const auto node = null_node();
  SteppedPath path(*node, instant_engine(), ring, inflight_area(ring));
  const std::string disk = is_packed ? "null, packed, with recovery" : "null with recovery";
  for (const unsigned depth : {1U, 32U}) run_case(path, {disk, Shape::kRead4k, depth});
}

void run_null_packed() {
  const auto node = null_node();
  SteppedPath path(*node, instant_engine(), RingKind::kPacked);
  for (const Shape shape : {Shape::kRead4k, Shape::kRead64k}) {
    for (const unsigned depth : {1U, 32U}) run_case(path, {"null, packed", shape, depth});
  }
}

void run_raw(aio::EngineName name) {
  const ScratchFile file;
  const auto node = raw_node(file);
  SteppedPath path(*node, engine(name));
  for (const unsigned depth : {1U, 32U})
    run_case(path, {std::string(aio::to_string(name)), Shape::kRead4k, depth});
}

// `path`: an image in which all is mapped. The warm-up brings the mapping into the cache.
void run_qcow2(const std::string& path) {
  const auto node = qcow2_node(path);
  const aio::EngineName name = aio::EngineName::kIoUring;
  SteppedPath stepped(*node, engine(name));
  for (const Shape shape : {Shape::kRead4k, Shape::kWrite4k}) {
    for (const unsigned depth : {1U, 32U})
      run_case(stepped, {fmt::format("qcow2 on {}", aio::to_string(name)), shape, depth});
  }
}

}  // namespace
}  // namespace vblk::measure

// QCOW2-IMAGE
int main(int count, char** arguments) {
  using namespace vblk;
  measure::run_null();
  measure::run_null_with_recovery(measure::RingKind::kSplit);
  measure::run_null_packed();
  measure::run_null_with_recovery(measure::RingKind::kPacked);
  for (const aio::EngineName name : aio::kAllEngineNames) {
    try {
      measure::run_raw(name);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", std::string(aio::to_string(name)).c_str(), error.what());
    }
  }
  try {
    if (count > 1) measure::run_qcow2(arguments[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qcow2: %s\n", error.what());
  }
  return 0;
}
