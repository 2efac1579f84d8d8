// The file or block device under an image: opened, checked, locked and measured once.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "aio/error.h"
#include "blockdev/image.h"

namespace vblk::blockdev {

// Owns its descriptors. What is read from it never changes; the file itself may be given another
// size.
class ImageFile {
 public:
  // Errors: as open_image().
  static Expected<std::unique_ptr<ImageFile>> open(const ImageOptions& options);
  // Wraps descriptor numbers that an engine understands (the simulated disk's); nothing is closed.
  // `set_size` is what resize() does; without one it fails with EOPNOTSUPP.
  using SetSize = std::function<int(std::uint64_t size_bytes)>;
  static std::unique_ptr<ImageFile> wrap(int fd, int buffered_fd, std::uint64_t size_bytes,
                                         std::uint32_t alignment_bytes, bool read_only,
                                         SetSize set_size = {});
  ~ImageFile();
  ImageFile(const ImageFile&) = delete;
  ImageFile& operator=(const ImageFile&) = delete;

  [[nodiscard]] int fd() const { return fd_; }
  // The same file without O_DIRECT, for what O_DIRECT cannot address; fd() itself in the buffered
  // modes.
  [[nodiscard]] int buffered_fd() const { return buffered_fd_; }
  // When it was opened.
  [[nodiscard]] std::uint64_t size_bytes() const { return size_bytes_; }
  [[nodiscard]] bool direct() const { return fd_ != buffered_fd_; }
  [[nodiscard]] bool is_block_device() const { return is_block_device_; }
  [[nodiscard]] bool read_only() const { return read_only_; }
  // What a block device takes discards and zeroes in, whatever the cache mode; 1 for a file, of
  // which any range can be punched or zeroed.
  [[nodiscard]] std::uint32_t logical_block_bytes() const { return logical_block_bytes_; }
  // What O_DIRECT demands of offsets and lengths, and of buffers; 1 in the buffered modes.
  [[nodiscard]] std::uint32_t offset_alignment_bytes() const { return offset_alignment_bytes_; }
  [[nodiscard]] std::uint32_t memory_alignment_bytes() const { return memory_alignment_bytes_; }
  // Makes the file end at `size_bytes`; what is new reads as zeroes. 0, or an errno value: ENOSPC
  // for a block device that ends before it. Any thread; a system call.
  [[nodiscard]] int resize(std::uint64_t size_bytes);

 private:
  ImageFile() = default;
  Expected<void> measure(const std::string& path, bool may_be_empty);
  Expected<void> measure_device(const std::string& path);
  void probe_alignment();
  [[nodiscard]] int fill_last_page(std::uint64_t old_bytes, std::uint64_t end_bytes);

  int fd_{-1};
  int buffered_fd_{-1};
  std::uint64_t size_bytes_{0};
  std::uint32_t logical_block_bytes_{1};
  std::uint32_t offset_alignment_bytes_{1};
  std::uint32_t memory_alignment_bytes_{1};
  bool is_block_device_{false};
  bool read_only_{false};
  bool owned_{false};
  bool locked_{false};
  SetSize set_size_;
};

}  // namespace vblk::blockdev
