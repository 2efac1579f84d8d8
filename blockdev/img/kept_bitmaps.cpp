#include "blockdev/img/kept_bitmaps.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <fcntl.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/image_lock.h"
#include "blockdev/img/source.h"
#include "blockdev/qcow2/bitmaps.h"

namespace vblk::img {

namespace {

using Loose = qcow2::BitmapEditor::Loose;

std::unexpected<Error> failed(const char* what, const std::string& path,
                              const qcow2::BitmapEditor& editor, int error) {
  return make_error(
      kind_of_errno(error),
      fmt::format("cannot {} the bitmaps of '{}': {}", what, path, editor.reason(error)), error);
}

// Out of the image in memory. With room for the disk that there will be.
int take(EditedFile& file, qcow2::BitmapEditor& editor, std::uint64_t disk_bytes,
         bool may_be_inconsistent, std::vector<Loose>& bitmaps) {
  const int error = file.run(editor.take_out(may_be_inconsistent, bitmaps));
  if (error != 0) return error;
  for (Loose& bitmap : bitmaps) {
    const std::uint64_t bytes = qcow2::bitmap_bytes(disk_bytes, bitmap.granularity_bits);
    if (bytes > qcow2::kBitmapBytesMax) return EFBIG;
    if (!bitmap.inconsistent) bitmap.bits.resize(std::max<std::size_t>(bitmap.bits.size(), bytes));
  }
  return 0;
}

}  // namespace

Expected<void> KeptBitmaps::edit(
    const char* what, const std::function<int(EditedFile&, qcow2::BitmapEditor&)>& change) {
  const auto file = EditedFile::open(path_, blockdev::CacheMode::kWriteback, false);
  if (!file) return std::unexpected(file.error());
  qcow2::BitmapEditor editor((*file)->file(), (*file)->context(), (*file)->header());
  int error = (*file)->run(editor.load());
  if (error == 0) error = change(**file, editor);
  if (error == 0) error = (*file)->run(editor.save());
  if (error != 0) return failed(what, path_, editor, error);
  return {};
}

Expected<void> KeptBitmaps::lock() {
  fd_ = ::open(path_.c_str(), O_RDWR | O_CLOEXEC);
  if (fd_ < 0) {
    const int error = errno;
    return make_error(kind_of_errno(error),
                      fmt::format("cannot open '{}' for writing: {}", path_, describe_errno(error)),
                      error);
  }
  auto locked = blockdev::lock_image(fd_, path_, false);
  if (!locked) ::close(std::exchange(fd_, -1));
  return locked;
}

void KeptBitmaps::unlock() {
  if (fd_ < 0) return;
  blockdev::unlock_image(fd_);
  ::close(std::exchange(fd_, -1));
}

Expected<bool> KeptBitmaps::has_bitmaps() const {
  const auto header = header_of(path_, false);
  if (!header) return std::unexpected(header.error());
  return header->bitmap_directory.has_value();
}

Expected<void> KeptBitmaps::take_out(const std::string& format, std::uint64_t disk_bytes,
                                     bool may_be_inconsistent) {
  if (format != "qcow2") return {};
  // Most images have none, and need no lock of ours.
  auto has_some = has_bitmaps();
  if (has_some && *has_some) {
    if (auto locked = lock(); !locked) return locked;
    has_some = has_bitmaps();
  }
  if (!has_some) return std::unexpected(std::move(has_some.error()));
  if (!*has_some) {
    unlock();
    return {};
  }
  std::vector<Loose> taken;
  auto done = edit("keep", [&](EditedFile& file, qcow2::BitmapEditor& editor) {
    return take(file, editor, disk_bytes, may_be_inconsistent, taken);
  });
  if (!done) has_some = has_bitmaps();
  // They may be out, though it failed in the end.
  if (done || (has_some && !*has_some)) bitmaps_ = std::move(taken);
  return done ? done : put_in(std::move(done));
}

void KeptBitmaps::mark(std::uint64_t offset_bytes, std::uint64_t length_bytes) {
  if (length_bytes == 0) return;
  const std::lock_guard lock(mutex_);
  for (Loose& bitmap : bitmaps_) {
    if (!bitmap.enabled || bitmap.inconsistent) continue;
    const std::uint64_t last = (offset_bytes + length_bytes - 1) >> bitmap.granularity_bits;
    for (std::uint64_t bit = offset_bytes >> bitmap.granularity_bits; bit <= last; ++bit)
      bitmap.bits[bit / 8] |= std::byte(1U << (bit % 8));
  }
}

Expected<void> KeptBitmaps::put_in(Expected<void> work) {
  Expected<void> back;
  if (!bitmaps_.empty()) {
    back = edit("put back", [this](EditedFile&, qcow2::BitmapEditor& editor) {
      int error = 0;
      for (Loose& bitmap : bitmaps_) {
        if (error == 0) error = editor.put_in(std::move(bitmap));
      }
      return error;
    });
    bitmaps_.clear();
  }
  unlock();
  if (back) return work;
  Error error = std::move(back.error());
  error.message += "; they are lost";
  if (!work) error.message = fmt::format("{}; besides: {}", work.error().message, error.message);
  return std::unexpected(std::move(error));
}

Expected<void> can_take_out_bitmaps(EditedFile& file, const std::string& path,
                                    std::uint64_t disk_bytes) {
  qcow2::BitmapEditor editor(file.file(), file.context(), file.header());
  std::vector<Loose> ignored;
  int error = file.run(editor.load());
  if (error == 0) error = take(file, editor, disk_bytes, false, ignored);
  if (error != 0) return failed("keep", path, editor, error);
  return {};
}

}  // namespace vblk::img
