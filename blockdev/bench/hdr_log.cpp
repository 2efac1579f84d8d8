#include "blockdev/bench/hdr_log.h"

#include <array>
#include <bit>
#include <cstdint>
#include <ctime>
#include <iterator>
#include <map>
#include <stdexcept>
#include <vector>
#include <zlib.h>

#include <boost/archive/iterators/base64_from_binary.hpp>
#include <boost/archive/iterators/transform_width.hpp>
#include <fmt/core.h>

namespace vblk::bench {

namespace {

// Of HdrHistogram's AbstractHistogram: cookies of the V2 encodings.
constexpr std::uint32_t kCookie = 0x1c849303 | 0x10;
constexpr std::uint32_t kCompressedCookie = 0x1c849304 | 0x10;
// Three digits need 2048 sub-buckets of unit magnitude 0.
constexpr std::uint32_t kSignificantDigits = 3;
constexpr unsigned kSubBucketBits = 11;
constexpr std::uint64_t kHighestNs = std::uint64_t{3'600} * 1'000'000'000;

using Bytes = std::vector<unsigned char>;

template <typename Integer>
void put_big_endian(Bytes& bytes, Integer value) {
  for (int shift = static_cast<int>(sizeof value) * 8 - 8; shift >= 0; shift -= 8)
    bytes.push_back(static_cast<unsigned char>(value >> static_cast<unsigned>(shift)));
}

// ZigZag, then seven bits a byte; the ninth byte holds eight.
void put_zigzag(Bytes& bytes, std::int64_t value) {
  auto rest = (static_cast<std::uint64_t>(value) << 1U) ^ static_cast<std::uint64_t>(value >> 63);
  for (int i = 0; i < 8 && rest >= 0x80; ++i) {
    bytes.push_back(static_cast<unsigned char>(rest | 0x80));
    rest >>= 7U;
  }
  bytes.push_back(static_cast<unsigned char>(rest));
}

// Index into HdrHistogram's flat array of counts.
std::uint64_t hdr_index(std::uint64_t value) {
  const auto bucket =
      static_cast<unsigned>(std::bit_width(value | ((1U << kSubBucketBits) - 1))) - kSubBucketBits;
  const std::uint64_t sub_bucket = value >> bucket;
  const std::uint64_t half = std::uint64_t{1} << (kSubBucketBits - 1);
  return (bucket + 1) * half + sub_bucket - half;
}

Bytes compress(const Bytes& plain) {
  uLongf length = ::compressBound(plain.size());
  Bytes compressed(length);
  if (::compress2(compressed.data(), &length, plain.data(), plain.size(), Z_DEFAULT_COMPRESSION) !=
      Z_OK)
    throw std::runtime_error("zlib has no memory");
  compressed.resize(length);
  return compressed;
}

std::string base64(Bytes bytes) {
  using boost::archive::iterators::base64_from_binary;
  using boost::archive::iterators::transform_width;
  using Encoded = base64_from_binary<transform_width<Bytes::const_iterator, 6, 8>>;
  const std::size_t padding = (3 - bytes.size() % 3) % 3;
  bytes.resize(bytes.size() + padding);
  std::string text(Encoded(bytes.cbegin()), Encoded(bytes.cend()));
  text.replace(text.size() - padding, padding, padding, '=');
  return text;
}

}  // namespace

std::string encode_hdr(const LatencyHistogram& latencies) {
  std::map<std::uint64_t, std::int64_t> counts;
  latencies.for_each([&counts](double latency_ns, std::uint64_t count) {
    const auto value = std::min(static_cast<std::uint64_t>(latency_ns), kHighestNs);
    counts[hdr_index(value)] += static_cast<std::int64_t>(count);
  });
  Bytes payload;
  std::uint64_t next = 0;
  for (const auto& [index, count] : counts) {
    // A run of zeroes is its negated length.
    if (index > next) put_zigzag(payload, -static_cast<std::int64_t>(index - next));
    put_zigzag(payload, count);
    next = index + 1;
  }
  Bytes plain;
  put_big_endian(plain, kCookie);
  put_big_endian(plain, static_cast<std::uint32_t>(payload.size()));
  put_big_endian(plain, std::uint32_t{0});  // normalizing index offset
  put_big_endian(plain, kSignificantDigits);
  put_big_endian(plain, std::uint64_t{1});  // lowest discernible value
  put_big_endian(plain, kHighestNs);
  put_big_endian(plain, std::bit_cast<std::uint64_t>(1.0));  // integer to double conversion
  plain.insert(plain.end(), payload.begin(), payload.end());
  const Bytes compressed = compress(plain);
  Bytes whole;
  put_big_endian(whole, kCompressedCookie);
  put_big_endian(whole, static_cast<std::uint32_t>(compressed.size()));
  whole.insert(whole.end(), compressed.begin(), compressed.end());
  return base64(whole);
}

std::string hdr_log(std::span<const NamedRun> runs) {
  std::string text;
  const auto out = std::back_inserter(text);
  fmt::format_to(out, "#[vblk {}]\n#[Histogram log format version 1.3]\n#[StartTime: {}.000]\n",
                 VBLK_VERSION, std::time(nullptr));
  fmt::format_to(out,
                 "\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\"Interval_Compressed_"
                 "Histogram\"\n");
  double start = 0;
  for (const NamedRun& run : runs) {
    double longest = 0;
    for (const JobResult& job : run.result.jobs) {
      const double seconds = std::chrono::duration<double>(job.elapsed).count();
      longest = std::max(longest, seconds);
      if (job.is_saturated()) continue;
      for (std::size_t timed = 0; timed < kTimedCount; ++timed) {
        const LatencyHistogram& latencies = job.latencies[timed];
        if (latencies.total() == 0) continue;
        std::string tag = fmt::format("{}.{}", job.workload.name, timed_name(timed));
        for (char& letter : tag) {
          if (letter == ' ' || letter == ',') letter = '_';
        }
        fmt::format_to(out, "Tag={},{:.3f},{:.3f},{:.3f},{}\n", tag, start, seconds,
                       static_cast<double>(latencies.max_ns()) / 1e6, encode_hdr(latencies));
      }
    }
    start += longest;
  }
  return text;
}

}  // namespace vblk::bench
