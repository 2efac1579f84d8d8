// Loads and stores on memory that a guest may change at any time, little-endian where the name says
// so: each reads or writes its bytes once, as a unit where the alignment allows, and never through
// a cast struct.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstring>

namespace vblk::virtio {

// Called behind each store, so that a test can take the memory as a process that was killed there
// would leave it (tests/virtio/inflight_steps_test.cpp).
#ifdef VBLK_OBSERVE_STORES
void observe_store();
#else
inline void observe_store() {}
#endif

template <std::unsigned_integral T>
constexpr T little_endian(T value) {
  if constexpr (std::endian::native == std::endian::big) return std::byteswap(value);
  return value;
}

template <std::unsigned_integral T>
T load_le(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return little_endian(value);
}

template <std::unsigned_integral T>
void store_le(std::byte* to, T value) {
  value = little_endian(value);
  std::memcpy(to, &value, sizeof(T));
  observe_store();
}

// Aligned, in the byte order of the machine: what two processes on it share.
template <std::unsigned_integral T>
T load_acquire(const std::byte* from) {
  return __atomic_load_n(reinterpret_cast<const T*>(from), __ATOMIC_ACQUIRE);
}

template <std::unsigned_integral T>
void store_release(std::byte* to, T value) {
  __atomic_store_n(reinterpret_cast<T*>(to), value, __ATOMIC_RELEASE);
  observe_store();
}

// Ring indices, flags and events: aligned by the ring's own alignment rules, shared with the other
// side.
template <std::unsigned_integral T>
T load_acquire_le(const std::byte* from) {
  return little_endian(load_acquire<T>(from));
}

template <std::unsigned_integral T>
void store_release_le(std::byte* to, T value) {
  store_release<T>(to, little_endian(value));
}

}  // namespace vblk::virtio
