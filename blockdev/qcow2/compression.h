// Compressed clusters: deflate without a header, or zstd (qcow2.txt, "Compressed Clusters
// Descriptor"; the window of deflate is 2^12 bytes).
#pragma once

#include <cstddef>
#include <span>

#include "blockdev/qcow2/format.h"

namespace vblk::qcow2 {

// Fills `cluster` from `compressed`, which may hold more than that takes. Returns false if the data
// is damaged or ends too early, or there is no memory. Memory, kept for the thread: some 20 KiB for
// deflate; for zstd the window, which is refused beyond 8 MiB.
[[nodiscard]] bool decompress(Compression compression, std::span<const std::byte> compressed,
                              std::span<std::byte> cluster);

// Compresses `cluster` into `compressed`; how many bytes that took, 0 if they do not fit. Memory,
// kept for the thread: some 50 KiB for deflate, some 5 MiB for zstd. Throws std::bad_alloc.
[[nodiscard]] std::size_t compress(Compression compression, std::span<const std::byte> cluster,
                                   std::span<std::byte> compressed);

}  // namespace vblk::qcow2
