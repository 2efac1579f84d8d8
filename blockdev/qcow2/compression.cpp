#include "blockdev/qcow2/compression.h"

#include <memory>
#include <new>
#include <zlib.h>
#include <zstd.h>

namespace vblk::qcow2 {

namespace {

constexpr int kRawDeflateWindowBits = -12;  // negative: no zlib header
constexpr int kZstdWindowBitsMax = 23;  // a cluster is 2 MiB at most; as QEMU's encoder makes it

// What follows is set up once for a thread, and then only set back: setting up takes memory from
// the kernel, for some of them as much time as a cluster of 64 KiB.

class Inflater {
 public:
  Inflater() = default;
  ~Inflater() {
    if (is_ready_) inflateEnd(&stream_);
  }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  bool run(std::span<const std::byte> compressed, std::span<std::byte> cluster) {
    if (!is_ready_) is_ready_ = inflateInit2(&stream_, kRawDeflateWindowBits) == Z_OK;
    if (!is_ready_ || inflateReset(&stream_) != Z_OK) return false;
    // zlib's interface is from before const.
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(compressed.data()));
    stream_.avail_in = static_cast<uInt>(compressed.size());
    stream_.next_out = reinterpret_cast<Bytef*>(cluster.data());
    stream_.avail_out = static_cast<uInt>(cluster.size());
    const int result = inflate(&stream_, Z_FINISH);
    // Z_BUF_ERROR with a full cluster: the end mark lies beyond what is needed.
    return (result == Z_STREAM_END || result == Z_BUF_ERROR) && stream_.avail_out == 0;
  }

 private:
  z_stream stream_{};
  bool is_ready_{false};
};

class Unzstd {
 public:
  bool run(std::span<const std::byte> compressed, std::span<std::byte> cluster) {
    if (!context_) {
      context_.reset(ZSTD_createDCtx());
      if (!context_) return false;
      ZSTD_DCtx_setParameter(context_.get(), ZSTD_d_windowLogMax, kZstdWindowBitsMax);
    }
    ZSTD_DCtx_reset(context_.get(), ZSTD_reset_session_only);
    ZSTD_inBuffer input{compressed.data(), compressed.size(), 0};
    ZSTD_outBuffer output{cluster.data(), cluster.size(), 0};
    // By streaming: the data is followed by what else is in its last sector.
    while (output.pos < output.size) {
      const std::size_t before = output.pos + input.pos;
      const std::size_t result = ZSTD_decompressStream(context_.get(), &output, &input);
      if (ZSTD_isError(result) != 0 || output.pos + input.pos == before) return false;
      if (result == 0) break;
    }
    return output.pos == output.size;
  }

 private:
  struct Free {
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
  };
  std::unique_ptr<ZSTD_DCtx, Free> context_;
};

}  // namespace

bool decompress(Compression compression, std::span<const std::byte> compressed,
                std::span<std::byte> cluster) {
  if (compression == Compression::kZlib) {
    thread_local Inflater inflater;
    return inflater.run(compressed, cluster);
  }
  thread_local Unzstd unzstd;
  return unzstd.run(compressed, cluster);
}

namespace {

// As QEMU makes them: the window of the format, the memory that goes with it.
constexpr int kDeflateMemoryLevel = 9;

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
