// Images that a command opens.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/block_node.h"
#include "blockdev/image.h"
#include "blockdev/io_context.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::img {

using blockdev::BlockNode;
using blockdev::IoContext;
using blockdev::Task;

struct SourceOptions {
  std::string path;
  std::string format;  // empty: by the file's first bytes
  std::string snapshot;
  blockdev::CacheMode cache{blockdev::CacheMode::kWriteback};
  bool read_only{true};
  bool lock{true};
  bool may_be_empty{false};  // a qcow2 disk of no bytes has a node too
  bool is_locked{false};     // by the caller: the image itself, not what it is based on
};

struct Source {
  std::string path;
  std::string format;               // "raw" or "qcow2"
  std::unique_ptr<BlockNode> node;  // nullptr: a disk of no bytes, which there is no node for
  [[nodiscard]] std::uint64_t size_bytes() const { return node ? node->size_bytes() : 0; }
};

// "raw" or "qcow2": `format` if it is given, otherwise by the first bytes of the file. A guest of a
// raw disk can write these, which is why serving never goes by them; here it is the user who says
// what to do with the image. What begins as another known format is refused rather than taken for
// raw. Errors: kNotFound and others of open(2), kNotSupported.
Expected<std::string> decide_format(const std::string& path, const std::string& format);

// Opens an image with what it is based on. Errors: as blockdev::open_image(), and above.
Expected<Source> open_source(const SourceOptions& options);

// The file alone, for commands that look at it without its format; nullptr if it is empty.
Expected<std::unique_ptr<blockdev::RawNode>> open_file(const SourceOptions& options);

// Its header. Errors: as qcow2::read_header().
Expected<qcow2::Header> read_header(blockdev::RawNode& file);
Expected<qcow2::Header> header_of(const std::string& path, bool lock);

// Whether two names are of one file.
[[nodiscard]] bool is_same_file(const std::string& one, const std::string& other);
// Whether `target` may be written while `source` is read: it is none of its files. Error:
// kInvalidArgument.
Expected<void> check_target_is_apart(const Source& source, const std::string& target);

// "writeback" and so on, for -t and -T. Error: kInvalidArgument.
Expected<blockdev::CacheMode> parse_cache(const std::string& text, blockdev::CacheMode otherwise);

// How a range is stored in a chain of images.
struct ChainStatus {
  bool is_data{false};
  bool is_zero{false};
  bool is_compressed{false};
  bool is_present{false};  // some image of the chain says what it is
  unsigned depth{0};       // which one; 0 is the top
  std::uint64_t length_bytes{0};
  std::optional<std::uint64_t> file_offset;
  const std::string* file{nullptr};
  int fd{-1};
};

// [offset, +length), which is not empty, as far as it is alike. `depth_max`: images below that are
// not looked at, and what only they would say is neither data nor zero. 0, or an errno value.
Task<int> chain_status(BlockNode& top, IoContext& context, std::uint64_t offset,
                       std::uint64_t length, unsigned depth_max, ChainStatus& status);
inline constexpr unsigned kWholeChain = ~0U;

// Asks for the status of a disk's ranges, many of them, in no particular order, and remembers the
// last long stretch of data. Some file systems look through every extent of a file up to the next
// hole; where there is none, asking again for each MiB would take time that grows with the square
// of the size.
//
// What is remembered stays true while nobody writes to the disk. Where somebody does (-U), a
// stretch of data may have become a hole: that is data all the same, whose bytes are zeroes.
//
// Any thread.
class StatusReader {
 public:
  // `top` may be nullptr: nothing is there, and all reads as zeroes.
  StatusReader(BlockNode* top, unsigned depth_max) : top_(top), depth_max_(depth_max) {}
  StatusReader(const StatusReader&) = delete;
  StatusReader& operator=(const StatusReader&) = delete;

  // As chain_status(), without where in a file it is.
  Task<int> read(IoContext& context, std::uint64_t offset, std::uint64_t length,
                 ChainStatus& status);

 private:
  BlockNode* const top_;
  const unsigned depth_max_;
  std::mutex mutex_;  // over what follows
  std::uint64_t begin_{0};
  ChainStatus data_;  // from begin_ on
};

}  // namespace vblk::img
