// libFuzzer's entry: hostile frontends (hostile_frontend.h). ./dev fuzz builds and runs it.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>

#include "tests/fuzz/hostile_frontend.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const vblk::fuzz::FrontendOutcome outcome =
      vblk::fuzz::run_hostile_frontend(std::span(data, size));
  if (!outcome.failure.empty()) {
    std::fprintf(stderr, "frontend_fuzzer: %s\n", outcome.failure.c_str());
    std::abort();
  }
  return 0;
}
