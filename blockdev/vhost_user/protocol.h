// vhost-user on the wire, for both sides: message numbers, features, and payloads decoded from
// bytes. Source: QEMU's docs/interop/vhost-user.rst, "Message Specification" and "Front-end message
// types". All numbers are in the byte order of the machine; both ends run on it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace vblk::vhost_user {

// "Front-end message types". Their width is the wire's.
// NOLINTNEXTLINE(performance-enum-size)
enum class Request : std::uint32_t {
  kGetFeatures = 1,
  kSetFeatures = 2,
  kSetOwner = 3,
  kResetOwner = 4,
  kSetMemTable = 5,
  kSetLogBase = 6,
  kSetLogFd = 7,
  kSetVringNum = 8,
  kSetVringAddr = 9,
  kSetVringBase = 10,
  kGetVringBase = 11,
  kSetVringKick = 12,
  kSetVringCall = 13,
  kSetVringErr = 14,
  kGetProtocolFeatures = 15,
  kSetProtocolFeatures = 16,
  kGetQueueNum = 17,
  kSetVringEnable = 18,
  kSetBackendReqFd = 21,
  kGetConfig = 24,
  kSetConfig = 25,
  kGetInflightFd = 31,
  kSetInflightFd = 32,
  kResetDevice = 34,
  kGetMaxMemSlots = 36,
  kAddMemReg = 37,
  kRemMemReg = 38,
  kSetStatus = 39,
  kGetStatus = 40,
};

// "Back-end message types".
// NOLINTNEXTLINE(performance-enum-size)
enum class BackendRequest : std::uint32_t {
  kConfigChange = 2,
};

// "SET_MEM_TABLE" and so on, or "an unknown message".
[[nodiscard]] std::string_view name_of(Request request);

// VHOST_USER_F_PROTOCOL_FEATURES, a virtio feature bit that only vhost-user uses.
inline constexpr unsigned kFProtocolFeatures = 30;
// VHOST_F_LOG_ALL, likewise: what is written to guest memory is marked in the log ("Migration").
inline constexpr unsigned kFLogAll = 26;

// "Protocol features".
inline constexpr unsigned kProtocolFMq = 0;
inline constexpr unsigned kProtocolFLogShmfd = 1;
inline constexpr unsigned kProtocolFReplyAck = 3;
inline constexpr unsigned kProtocolFBackendReq = 5;
inline constexpr unsigned kProtocolFConfig = 9;
inline constexpr unsigned kProtocolFInflightShmfd = 12;
inline constexpr unsigned kProtocolFResetDevice = 13;
inline constexpr unsigned kProtocolFConfigureMemSlots = 15;
inline constexpr unsigned kProtocolFStatus = 16;
// Since QEMU 11.0: a ring may be stopped with requests in flight, which are in the in-flight area
// then ("VHOST_USER_GET_VRING_BASE").
inline constexpr unsigned kProtocolFGetVringBaseInflight = 20;

// "Header": request, flags, size; 32 bits each.
struct Header {
  std::uint32_t request;
  std::uint32_t flags;
  std::uint32_t payload_bytes;
};
inline constexpr std::size_t kHeaderBytes = 12;
inline constexpr std::uint32_t kVersion = 1;
inline constexpr std::uint32_t kVersionMask = 3;
inline constexpr std::uint32_t kFlagReply = 4;
inline constexpr std::uint32_t kFlagNeedReply = 8;

// Regions in one SET_MEM_TABLE, and so descriptors in one message ("Multiple Memory regions
// description").
inline constexpr std::size_t kMemoryTableRegionsMax = 8;
// Longest payload taken: a config message has 12 bytes and at most 256 of config space; a memory
// table 264.
inline constexpr std::size_t kPayloadBytesMax = 512;

// SET_VRING_KICK, CALL and ERR: index in the low bits, bit 8 "no descriptor comes along".
inline constexpr std::uint64_t kVringIndexMask = 0xff;
inline constexpr std::uint64_t kVringNoFd = 0x100;

// Payloads. Each is the wire layout in the machine's byte order, padding included; they are copied
// in and out of messages whole, never cast.
struct VringState {
  std::uint32_t index;
  std::uint32_t value;
};
struct VringAddress {
  std::uint32_t index;
  std::uint32_t flags;
  std::uint64_t descriptor_user_address;
  std::uint64_t used_user_address;
  std::uint64_t avail_user_address;
  std::uint64_t log_guest_address;
};
// VHOST_VRING_F_LOG: writes to the used ring are marked, at log_guest_address.
inline constexpr std::uint32_t kVringAddressFLog = 1;
// "Log description".
struct LogDescription {
  std::uint64_t size_bytes;
  std::uint64_t mmap_offset;
};
struct MemoryRegionDescription {
  std::uint64_t guest_address;
  std::uint64_t size_bytes;
  std::uint64_t user_address;
  std::uint64_t mmap_offset;
};
struct SingleMemoryRegion {
  std::uint64_t padding;
  MemoryRegionDescription region;
};
struct MemoryTableHead {
  std::uint32_t region_count;
  std::uint32_t padding;
};
struct ConfigHead {
  std::uint32_t offset;
  std::uint32_t size_bytes;
  std::uint32_t flags;
};
// "Inflight description": 20 bytes, or 24 where its C structure is sent with the padding at its
// end, as QEMU does, which also takes no other answer. kInflightBytesMin says which are looked at.
struct Inflight {
  std::uint64_t mmap_size;
  std::uint64_t mmap_offset;
  std::uint16_t queue_count;
  std::uint16_t queue_size;
  std::uint32_t padding;
};
inline constexpr std::size_t kInflightBytesMin = 20;
static_assert(sizeof(VringState) == 8 && sizeof(VringAddress) == 40 &&
              sizeof(LogDescription) == 16 && sizeof(MemoryRegionDescription) == 32);
static_assert(sizeof(SingleMemoryRegion) == 40 && sizeof(MemoryTableHead) == 8 &&
              sizeof(ConfigHead) == 12 && sizeof(Inflight) == 24);

// A payload as bytes, front to back.
template <typename T>
  requires std::is_trivially_copyable_v<T>
std::optional<T> decode(std::span<const std::byte> bytes) {
  if (bytes.size() < sizeof(T)) return std::nullopt;
  T value;
  std::memcpy(&value, bytes.data(), sizeof(T));
  return value;
}

template <typename T>
  requires std::is_trivially_copyable_v<T>
void append(std::vector<std::byte>& bytes, const T& value) {
  const auto* const begin = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), begin, begin + sizeof(T));
}

}  // namespace vblk::vhost_user
