// The image that the engines are compared on: written in full before anything is measured, so that
// no engine pays for allocating blocks, and no disk gets away with zeroes.
//
// Every 4 KiB block starts with a stamp that tells where it belongs; the rest cannot be compressed.
// Whoever writes a block stamps it, so that every block read can be checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "aio/error.h"
#include "blockdev/bench/block_content.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::demo {

inline constexpr std::size_t kBlockBytes = 4096;

// The stamps. A read must bring its stamp with it; a write takes it along.
class StampedContent final : public bench::BlockContent {
 public:
  void before_write(std::uint64_t offset_bytes, std::span<std::byte> data) override;
  [[nodiscard]] bool before_read(std::uint64_t offset_bytes, std::span<std::byte> data) override;
  [[nodiscard]] bool is_right(std::uint64_t offset_bytes, std::span<const std::byte> data) override;
};

class ScratchImage {
 public:
  // Called now and then with the bytes written so far.
  using Progress = std::function<void(std::uint64_t written_bytes)>;

  // A file without a name in `directory`: gone with the process, however that ends.
  // Errors: kNotFound, kPermission; kExhausted if there is not enough space, found out before
  // anything is written.
  static Expected<ScratchImage> create_temporary(const std::string& directory,
                                                 std::uint64_t size_bytes);
  // The file or block device at `path`. What does not exist is made and kept; what exists is taken
  // only with `overwrite`. A block device keeps its own size if it is smaller. Locked until
  // precondition() is done. Errors: kBusy (it exists, is mounted, or another process has it),
  // kPermission, kIo.
  static Expected<ScratchImage> create_at(const std::string& path, std::uint64_t size_bytes,
                                          bool overwrite);

  // Writes every block, makes it stable, drops it from the page cache, and unlocks it. Errors:
  // kExhausted, kIo.
  Expected<void> precondition(std::uint64_t seed, const Progress& progress);

  // Where a child process that inherits fd() as number `fd_there` finds the image.
  [[nodiscard]] std::string path_for_child(int fd_there) const;
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] std::uint64_t block_count() const { return size_bytes_ / kBlockBytes; }
  [[nodiscard]] std::uint64_t size_bytes() const { return size_bytes_; }
  // For messages.
  [[nodiscard]] const std::string& name() const { return name_; }

 private:
  ScratchImage(vhost_user::UniqueFd fd, std::string name, bool has_path, std::uint64_t size_bytes)
      : fd_(std::move(fd)), name_(std::move(name)), has_path_(has_path), size_bytes_(size_bytes) {}

  vhost_user::UniqueFd fd_;
  std::string name_;
  bool has_path_;
  std::uint64_t size_bytes_;
};

}  // namespace vblk::demo
