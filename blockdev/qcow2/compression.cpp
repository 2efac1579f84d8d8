#include "blockdev/qcow2/compression.h"

#include <memory>
#include <new>
#include <zlib.h>
#include <zstd.h>

namespace vblk::qcow2 {

namespace {

constexpr int kRawDeflateWindowBits = -12;  // negative: no zlib header
constexpr int kZstdWindowBitsMax = 23;  // a cluster is 2 MiB at most; as QEMU's encoder makes it

bool inflate_cluster(std::span<const std::byte> compressed, std::span<std::byte> cluster) {
  z_stream stream{};
  if (inflateInit2(&stream, kRawDeflateWindowBits) != Z_OK) return false;
  // zlib's interface is from before const.
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(compressed.data()));
  stream.avail_in = static_cast<uInt>(compressed.size());
  stream.next_out = reinterpret_cast<Bytef*>(cluster.data());
  stream.avail_out = static_cast<uInt>(cluster.size());
  const int result = inflate(&stream, Z_FINISH);
  // Z_BUF_ERROR with a full cluster: the end mark lies beyond what is needed.
  const bool is_whole = (result == Z_STREAM_END || result == Z_BUF_ERROR) && stream.avail_out == 0;
  inflateEnd(&stream);
  return is_whole;
}

bool unzstd_cluster(std::span<const std::byte> compressed, std::span<std::byte> cluster) {
  const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(ZSTD_createDCtx(),
                                                                     &ZSTD_freeDCtx);
  if (!context) return false;
  ZSTD_DCtx_setParameter(context.get(), ZSTD_d_windowLogMax, kZstdWindowBitsMax);
  ZSTD_inBuffer input{compressed.data(), compressed.size(), 0};
  ZSTD_outBuffer output{cluster.data(), cluster.size(), 0};
  // By streaming: the data is followed by what else is in its last sector.
  while (output.pos < output.size) {
    const std::size_t before = output.pos + input.pos;
    const std::size_t result = ZSTD_decompressStream(context.get(), &output, &input);
    if (ZSTD_isError(result) != 0 || output.pos + input.pos == before) return false;
    if (result == 0) break;
  }
  return output.pos == output.size;
}

}  // namespace

bool decompress(Compression compression, std::span<const std::byte> compressed,
                std::span<std::byte> cluster) {
  return compression == Compression::kZlib ? inflate_cluster(compressed, cluster)
                                           : unzstd_cluster(compressed, cluster);
}

namespace {

// As QEMU makes them: the window of the format, the memory that goes with it.
constexpr int kDeflateMemoryLevel = 9;

// Set up once for a thread: that costs as much as a cluster of 64 KiB.
class Deflater {
 public:
  Deflater() {
    if (deflateInit2(&stream_, Z_DEFAULT_COMPRESSION, Z_DEFLATED, kRawDeflateWindowBits,
                     kDeflateMemoryLevel, Z_DEFAULT_STRATEGY) != Z_OK)
      throw std::bad_alloc();
  }
  ~Deflater() { deflateEnd(&stream_); }
  Deflater(const Deflater&) = delete;
  Deflater& operator=(const Deflater&) = delete;

  std::size_t run(std::span<const std::byte> cluster, std::span<std::byte> compressed) {
    deflateReset(&stream_);
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(cluster.data()));
    stream_.avail_in = static_cast<uInt>(cluster.size());
    stream_.next_out = reinterpret_cast<Bytef*>(compressed.data());
    stream_.avail_out = static_cast<uInt>(compressed.size());
    if (deflate(&stream_, Z_FINISH) != Z_STREAM_END) return 0;
    return compressed.size() - stream_.avail_out;
  }

 private:
  z_stream stream_{};
};

struct FreeZstd {
  void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
};

}  // namespace

std::size_t compress(Compression compression, std::span<const std::byte> cluster,
                     std::span<std::byte> compressed) {
  if (compression == Compression::kZlib) {
    thread_local Deflater deflater;
    return deflater.run(cluster, compressed);
  }
  thread_local const std::unique_ptr<ZSTD_CCtx, FreeZstd> context(ZSTD_createCCtx());
  if (!context) throw std::bad_alloc();
  const std::size_t length = ZSTD_compress2(context.get(), compressed.data(), compressed.size(),
                                            cluster.data(), cluster.size());
  return ZSTD_isError(length) != 0 ? 0 : length;
}

}  // namespace vblk::qcow2
