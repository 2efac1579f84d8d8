// From a descriptor chain to a block operation: pure parsing, no I/O, no state.
//
// virtio 1.2, "Block Device", "Device Operation", and "Message Framing": the driver may cut header,
// data and status into descriptors as it likes. The header is the first 16 readable bytes, the
// status the last writable byte, wherever the cuts are.
//
// What is wrong with a request, and what it gets:
//
//   IOERR    driver errors: a short header, data that is no multiple of 512, a range beyond
//            capacity, a change of a read-only disk (MUST), no or a torn discard segment, a segment
//            longer than announced, more pieces than one kernel I/O takes
//   UNSUPP   what this device does not do: unknown types, DISCARD or WRITE_ZEROES not offered,
//            unknown flags and unmap on a discard (both MUST), more segments than announced
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <sys/uio.h>

#include "blockdev/virtio/virtqueue.h"

namespace vblk::virtio {

// Segments of one discard or write zeroes (max_discard_seg, max_write_zeroes_seg): a slot keeps
// room for them, 32 x 24 bytes.
inline constexpr std::size_t kBlkSegmentsMax = 32;
// Sectors of one segment: 1 GiB, so that one request occupies an engine for a bounded time.
inline constexpr std::uint32_t kBlkSegmentSectorsMax = (std::uint32_t{1} << 30) / 512;

// What a request is judged by.
struct BlkRequestLimits {
  std::uint64_t capacity_bytes{0};
  bool read_only{false};
  bool can_discard{false};
  bool can_write_zeroes{false};
};

// One segment of a discard or write zeroes, in range.
struct BlkSegment {
  std::uint64_t offset_bytes{0};
  std::uint64_t length_bytes{0};
  bool may_unmap{false};
};

enum class BlkCommandKind : std::uint8_t {
  kRefused,  // `refusal` is the status to give
  kRead,
  kWrite,
  kFlush,
  kGetId,
  kDiscard,
  kWriteZeroes,
};

// A parsed request.
struct BlkCommand {
  BlkCommandKind kind{BlkCommandKind::kRefused};
  std::uint8_t refusal{0};
  std::uint64_t offset_bytes{0};  // kRead, kWrite
  std::uint64_t length_bytes{0};  // kRead, kWrite, kGetId: bytes of `data`
  std::span<iovec> data;          // kRead, kWrite, kGetId; the chain's room, trimmed
  std::size_t segment_count{0};   // kDiscard, kWriteZeroes
};

// Parses `chain`, which has no problem and at least one writable byte (asserted): the caller keeps
// last_writable_byte for the status. Trims the chain's iovecs in place.
BlkCommand parse_blk_request(const Chain& chain, const BlkRequestLimits& limits,
                             std::span<BlkSegment, kBlkSegmentsMax> segments);

// Value of `len` in the used element: "The Virtqueue Used Ring" counts from the first writable byte
// and allows an underestimate, never an overestimate. `data_bytes` were written there; the status
// byte behind them counts if there is no gap. So a failed read has written nothing that counts.
[[nodiscard]] std::uint32_t used_length(std::uint64_t writable_bytes, std::uint64_t data_bytes);

}  // namespace vblk::virtio
