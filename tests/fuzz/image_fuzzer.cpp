// libFuzzer's entry: hostile images (hostile_image.h). ./dev fuzz builds and runs it.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sanitizer/allocator_interface.h>
#include <span>

#include <gtest/gtest.h>

#include "tests/fuzz/hostile_image.h"

namespace {

// Heap at one time, in one input: the simulated disk's copies of the file (what it holds, what is
// durable, and what is on its way there) and what vblk takes for an image of 1 MiB
// (image_memory_test.cpp counts that alone).
constexpr std::size_t kHeapBytesMax = std::size_t{96} << 20;

std::size_t live_bytes = 0;
std::size_t live_bytes_max = 0;

void allocated(const volatile void* /*address*/, std::size_t bytes) {
  live_bytes += bytes;
  live_bytes_max = std::max(live_bytes_max, live_bytes);
}
void freed(const volatile void* address) {
  if (address == nullptr) return;
  live_bytes -= __sanitizer_get_allocated_size(address);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  // What the rig expects of each request is an abort here.
  GTEST_FLAG_SET(break_on_failure, true);
  __sanitizer_install_malloc_and_free_hooks(&allocated, &freed);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::size_t before = live_bytes;
  live_bytes_max = before;
  const vblk::fuzz::Outcome outcome = vblk::fuzz::run_hostile_image(std::span(data, size));
  if (!outcome.failure.empty()) {
    std::fprintf(stderr, "image_fuzzer: %s\n", outcome.failure.c_str());
    std::abort();
  }
  if (live_bytes_max - before > kHeapBytesMax) {
    std::fprintf(stderr, "image_fuzzer: %zu bytes of heap at one time\n", live_bytes_max - before);
    std::abort();
  }
  return 0;
}
