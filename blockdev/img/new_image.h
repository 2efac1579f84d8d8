// A raw or qcow2 image that is made, from its options to its name.
//
// With a data file there are two names, which no file system gives at once. Neither file is to be
// taken for half of an image that it is not: the old image, if there is one and the old data file
// is replaced too, loses its name first; then the data file gets its name, then the image. An
// interruption between these leaves the new data file alone. If the image cannot get its name, a
// data file that was not there before goes too.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "aio/error.h"
#include "blockdev/image.h"
#include "blockdev/img/create_options.h"
#include "blockdev/img/target.h"
#include "blockdev/private_context.h"
#include "blockdev/qcow2/image_writer.h"

namespace vblk::img {

struct NewImageOptions {
  CreateOptions create;
  std::uint64_t size_bytes{0};
  // kUnsafe: nothing is flushed.
  blockdev::CacheMode cache{blockdev::CacheMode::kUnsafe};
  // Every byte gets its space, and is written (`convert -S 0`).
  bool fully_allocated{false};
};

class NewImage {
 public:
  // Makes the files ready. Errors: as Target::create(), kExhausted (a device that is too small),
  // kNotSupported (preallocation on a block device).
  static Expected<std::unique_ptr<NewImage>> begin(const std::string& path,
                                                   const NewImageOptions& options,
                                                   blockdev::PrivateContext& context);
  ~NewImage();
  NewImage(const NewImage&) = delete;
  NewImage& operator=(const NewImage&) = delete;

  // Of a raw image, and of the file of a qcow2 image.
  [[nodiscard]] Target& target() { return *target_; }
  [[nodiscard]] Target* data_target() { return data_target_.get(); }
  // nullptr: a raw image.
  [[nodiscard]] qcow2::ImageWriter* writer() { return writer_.get(); }
  // Whether what is not written reads as zeroes.
  [[nodiscard]] bool reads_zero() const { return target_->reads_zero(); }
  // Whether the kernel writes what takes the data through the page cache, one write after the
  // other.
  [[nodiscard]] bool takes_one_write_at_a_time() const {
    const Target& target = data_target_ ? *data_target_ : *target_;
    return !target.is_block_device() && !blockdev::uses_direct_io(options_.cache);
  }

  // All content has been written: tables, space, flush, header, name. `last`, if there is one,
  // changes the file as an image of writer()->header() before it can be told to be one. Errors:
  // those of the files, and its own.
  Expected<void> finish(blockdev::PrivateContext& context,
                        const std::function<Expected<void>()>& last = {});

 private:
  NewImage(const NewImageOptions& options, std::unique_ptr<Target> target)
      : options_(options), target_(std::move(target)) {}
  Expected<void> begin_raw();
  Expected<void> begin_qcow2(const std::string& path, blockdev::PrivateContext& context);
  Expected<void> take_space(blockdev::PrivateContext& context, Target& target, std::uint64_t bytes);
  blockdev::Task<int> flush(Target& target, blockdev::IoContext& context);
  // Gives both files their names.
  Expected<void> publish();
  [[nodiscard]] std::unexpected<Error> failed(const char* what, int error) const;
  [[nodiscard]] bool must_flush() const { return options_.cache != blockdev::CacheMode::kUnsafe; }

  const NewImageOptions options_;
  std::unique_ptr<Target> target_;
  std::unique_ptr<Target> data_target_;
  std::unique_ptr<qcow2::ImageWriter> writer_;
  bool is_complete_{false};
};

// The cache mode that files are opened in: "unsafe" only says that nobody flushes.
[[nodiscard]] inline blockdev::CacheMode file_cache(blockdev::CacheMode cache) {
  return cache == blockdev::CacheMode::kUnsafe ? blockdev::CacheMode::kWriteback : cache;
}

}  // namespace vblk::img
