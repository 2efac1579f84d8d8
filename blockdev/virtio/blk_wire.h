// virtio-blk on the wire: feature bits, request types, status bytes and the config space.
// virtio 1.2, "Block Device". All fields are little-endian; converted by the helpers of
// little_endian.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vblk::virtio {

// Feature bits ("Feature bits" of the block device, and "Reserved Feature Bits").
inline constexpr unsigned kBlkFSizeMax = 1;
inline constexpr unsigned kBlkFSegMax = 2;
inline constexpr unsigned kBlkFGeometry = 4;
inline constexpr unsigned kBlkFRo = 5;
inline constexpr unsigned kBlkFBlkSize = 6;
inline constexpr unsigned kBlkFFlush = 9;
inline constexpr unsigned kBlkFTopology = 10;
inline constexpr unsigned kBlkFConfigWce = 11;
inline constexpr unsigned kBlkFMq = 12;
inline constexpr unsigned kBlkFDiscard = 13;
inline constexpr unsigned kBlkFWriteZeroes = 14;
inline constexpr unsigned kFIndirectDesc = 28;
inline constexpr unsigned kFEventIdx = 29;
inline constexpr unsigned kFVersion1 = 32;
inline constexpr unsigned kFRingPacked = 34;

constexpr std::uint64_t feature_bit(unsigned bit) { return std::uint64_t{1} << bit; }

// Request types ("Device Operation").
inline constexpr std::uint32_t kBlkTIn = 0;
inline constexpr std::uint32_t kBlkTOut = 1;
inline constexpr std::uint32_t kBlkTFlush = 4;
inline constexpr std::uint32_t kBlkTGetId = 8;
inline constexpr std::uint32_t kBlkTDiscard = 11;
inline constexpr std::uint32_t kBlkTWriteZeroes = 13;

// Status bytes ("Device Operation").
inline constexpr std::uint8_t kBlkSOk = 0;
inline constexpr std::uint8_t kBlkSIoErr = 1;
inline constexpr std::uint8_t kBlkSUnsupp = 2;

inline constexpr std::size_t kSectorBytes = 512;
inline constexpr std::size_t kBlkIdBytes = 20;

// struct virtio_blk_req, the driver-written head: type, reserved, sector.
inline constexpr std::size_t kBlkRequestHeaderBytes = 16;
// struct virtio_blk_discard_write_zeroes: sector (8), num_sectors (4), flags (4); flag bit 0 is
// unmap.
inline constexpr std::size_t kBlkDiscardSegmentBytes = 16;
inline constexpr std::uint32_t kBlkWriteZeroesFlagUnmap = 1;

// Offsets in struct virtio_blk_config ("Device configuration layout").
inline constexpr std::uint32_t kBlkConfigCapacity = 0;                 // le64, in 512-byte sectors
inline constexpr std::uint32_t kBlkConfigSizeMax = 8;                  // le32
inline constexpr std::uint32_t kBlkConfigSegMax = 12;                  // le32
inline constexpr std::uint32_t kBlkConfigBlkSize = 20;                 // le32
inline constexpr std::uint32_t kBlkConfigPhysicalBlockExp = 24;        // u8
inline constexpr std::uint32_t kBlkConfigAlignmentOffset = 25;         // u8
inline constexpr std::uint32_t kBlkConfigMinIoSize = 26;               // le16, logical blocks
inline constexpr std::uint32_t kBlkConfigOptIoSize = 28;               // le32, logical blocks
inline constexpr std::uint32_t kBlkConfigWriteback = 32;               // u8
inline constexpr std::uint32_t kBlkConfigNumQueues = 34;               // le16
inline constexpr std::uint32_t kBlkConfigMaxDiscardSectors = 36;       // le32
inline constexpr std::uint32_t kBlkConfigMaxDiscardSeg = 40;           // le32
inline constexpr std::uint32_t kBlkConfigDiscardSectorAlignment = 44;  // le32
inline constexpr std::uint32_t kBlkConfigMaxWriteZeroesSectors = 48;   // le32
inline constexpr std::uint32_t kBlkConfigMaxWriteZeroesSeg = 52;       // le32
inline constexpr std::uint32_t kBlkConfigWriteZeroesMayUnmap = 56;     // u8
inline constexpr std::size_t kBlkConfigBytes = 60;

}  // namespace vblk::virtio
