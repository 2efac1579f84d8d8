// libFuzzer's entry: hostile rings (hostile_ring.h). ./dev fuzz builds and runs it.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>

#include <gtest/gtest.h>

#include "tests/fuzz/hostile_ring.h"

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  // What the rig expects of each queue is an abort here.
  GTEST_FLAG_SET(break_on_failure, true);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const vblk::fuzz::RingOutcome outcome = vblk::fuzz::run_hostile_ring(std::span(data, size));
  if (!outcome.failure.empty()) {
    std::fprintf(stderr, "ring_fuzzer: %s\n", outcome.failure.c_str());
    std::abort();
  }
  return 0;
}
