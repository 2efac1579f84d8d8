#include "blockdev/img/new_image.h"

#include <algorithm>
#include <cerrno>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/img/names.h"

namespace vblk::img {

using blockdev::BlockIo;
using blockdev::BlockOperation;

namespace {

constexpr std::uint64_t kZeroBytesPerWrite = std::uint64_t{1} << 20;

// Writes zeroes into the holes of a file, up to `end`.
blockdev::Task<int> fill_holes(Target& target, blockdev::IoContext& context, std::uint64_t end) {
  blockdev::AlignedBuffer zeroes(kZeroBytesPerWrite);
  std::ranges::fill(zeroes.bytes(), std::byte{0});
  std::uint64_t at = 0;
  while (at < end) {
    const off_t hole = ::lseek(target.fd(), static_cast<off_t>(at), SEEK_HOLE);
    if (hole < 0) co_return errno;
    at = static_cast<std::uint64_t>(hole);
    if (at >= end) break;
    const off_t data = ::lseek(target.fd(), hole, SEEK_DATA);
    const std::uint64_t hole_end = data < 0 ? end : std::min(end, static_cast<std::uint64_t>(data));
    while (at < hole_end) {
      const std::uint64_t length = std::min(kZeroBytesPerWrite, hole_end - at);
      const int error = co_await BlockIo(target.file(), context, BlockOperation::kWrite, at,
                                         zeroes.bytes().first(length));
      if (error != 0) co_return error;
      at += length;
    }
  }
  co_return 0;
}

}  // namespace

std::unexpected<Error> NewImage::failed(const char* what, int error) const {
  return make_error(kind_of_errno(error),
                    fmt::format("cannot {} '{}': {}", what, target_->path(),
                                error == EFBIG ? "it would be too large; use larger clusters"
                                               : describe_errno(error)),
                    error);
}

Expected<std::unique_ptr<NewImage>> NewImage::begin(const std::string& path,
                                                    const NewImageOptions& options,
                                                    blockdev::PrivateContext& context) {
  const std::string& data_file = options.create.data_file;
  if (!data_file.empty() && is_same_target(path, resolve_name(path, data_file))) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' cannot be its own data file", path));
  }
  auto target = Target::create(path, file_cache(options.cache), options.create.hints);
  if (!target) return std::unexpected(std::move(target.error()));
  std::unique_ptr<NewImage> image(new NewImage(options, std::move(*target)));
  if (image->target_->is_block_device() && options.create.preallocation != Preallocation::kOff) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("'{}' is a block device, whose space is not preallocated", path));
  }
  auto begun =
      options.create.format == "qcow2" ? image->begin_qcow2(path, context) : image->begin_raw();
  if (!begun) return std::unexpected(std::move(begun.error()));
  return image;
}

Expected<void> NewImage::begin_raw() {
  blockdev::RawNode& file = target_->file();
  if (file.is_block_device() && file.data_bytes() < options_.size_bytes) {
    return make_error(ErrorKind::kExhausted,
                      fmt::format("'{}' has {} bytes, too few for a disk of {}", target_->path(),
                                  file.data_bytes(), options_.size_bytes));
  }
  if (file.is_block_device()) return {};
  const int error = options_.size_bytes < file.data_bytes() ? file.shrink(options_.size_bytes)
                                                            : file.grow(options_.size_bytes);
  if (error != 0) return failed("give a size to", error);
  return {};
}

Expected<void> NewImage::begin_qcow2(const std::string& path, blockdev::PrivateContext& context) {
  const CreateOptions& create = options_.create;
  blockdev::RawNode* data_file = nullptr;
  if (!create.data_file.empty()) {
    const std::string data_path = resolve_name(path, create.data_file);
    auto target = Target::create(data_path, file_cache(options_.cache), create.hints);
    if (!target) return std::unexpected(std::move(target.error()));
    data_target_ = std::move(*target);
    data_file = &data_target_->file();
    const int error =
        data_file->data_bytes() > options_.size_bytes && !data_target_->is_block_device()
            ? data_file->shrink(options_.size_bytes)
            : data_file->grow(options_.size_bytes);
    if (error != 0) return failed("make the data file of", error);
  }
  writer_ = std::make_unique<qcow2::ImageWriter>(
      target_->file(), data_file, create.header(options_.size_bytes),
      qcow2::ImageWriterOptions{.map_everything =
                                    create.maps_everything() || options_.fully_allocated});
  // The names are looked at now, not when everything has been written.
  blockdev::AlignedBuffer cluster(create.cluster_bytes);
  if (auto fits = qcow2::encode_header(writer_->header(), cluster.bytes()); !fits) return fits;
  if (!target_->is_block_device()) return {};
  const int error = context.run(writer_->erase_header(context.context()));
  if (error != 0) return failed("write", error);
  return {};
}

Expected<void> NewImage::take_space(blockdev::PrivateContext& context, Target& target,
                                    std::uint64_t bytes) {
  const Preallocation mode = options_.create.preallocation;
  int error = 0;
  if (mode == Preallocation::kFalloc || mode == Preallocation::kFull)
    error = target.allocate(bytes);
  // What reserves no space by itself gets it by being written.
  if (error == EOPNOTSUPP && mode == Preallocation::kFull) error = 0;
  const bool is_written = mode == Preallocation::kFull || options_.fully_allocated;
  if (error == 0 && is_written && !target.is_block_device())
    error = context.run(fill_holes(target, context.context(), bytes));
  if (error != 0) return failed("take the space for", error);
  return {};
}

blockdev::Task<int> NewImage::flush(Target& target, blockdev::IoContext& context) {
  int error = 0;
  if (must_flush()) error = co_await BlockIo(target.file(), context, BlockOperation::kFlush, 0, 0);
  co_return error;
}

Expected<void> NewImage::finish(blockdev::PrivateContext& context,
                                const std::function<Expected<void>()>& last) {
  std::uint64_t file_bytes = options_.size_bytes;
  if (writer_) {
    const int error = context.run(writer_->write_tables(context.context()));
    if (error != 0) return failed("write", error);
    file_bytes = writer_->end_bytes();
  }
  if (auto taken = take_space(context, *target_, file_bytes); !taken) return taken;
  if (data_target_) {
    if (auto taken = take_space(context, *data_target_, options_.size_bytes); !taken) return taken;
    const int error = context.run(flush(*data_target_, context.context()));
    if (error != 0) return failed("flush the data file of", error);
    // What is overwritten in place is an image with its header.
    if (target_->is_in_place()) {
      if (auto named = data_target_->publish(must_flush()); !named) return named;
    }
  }
  int error = 0;
  if (writer_) {
    error = context.run(writer_->write_hidden_header(context.context()));
    if (error != 0) return failed("write", error);
    if (last) {
      if (auto done = last(); !done) return done;
    }
    error = context.run(flush(*target_, context.context()));
    if (error == 0) error = context.run(writer_->reveal_header(context.context()));
  }
  if (error == 0) error = context.run(flush(*target_, context.context()));
  if (error != 0) return failed("write", error);
  return publish();
}

Expected<void> NewImage::publish() {
  if (data_target_ && !target_->is_in_place()) {
    // What may fail comes before what cannot be taken back.
    if (auto ready = data_target_->stand_by(); !ready) return ready;
    if (auto ready = target_->stand_by(); !ready) return ready;
    if (data_target_->replaces()) {
      if (auto removed = target_->remove_old(must_flush()); !removed) return removed;
    }
    if (auto named = data_target_->publish(must_flush()); !named) return named;
  }
  auto named = target_->publish(must_flush());
  is_complete_ = named.has_value() || target_->has_name();
  return named;
}

NewImage::~NewImage() {
  if (data_target_ && !is_complete_) data_target_->take_name_back();
}

}  // namespace vblk::img
