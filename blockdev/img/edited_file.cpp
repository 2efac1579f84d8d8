#include "blockdev/img/edited_file.h"

#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "blockdev/img/engines.h"
#include "blockdev/img/source.h"
#include "blockdev/qcow2/check.h"

namespace vblk::img {

namespace {

Task<int> repair_and_mark(blockdev::RawNode& file, IoContext& context, qcow2::Header& header) {
  const qcow2::TellFinding silent = [](const std::string&) {};
  qcow2::RepairResult repaired;
  qcow2::CheckResult judged;
  int error =
      co_await qcow2::repair_image(file, context, header, qcow2::Repair::kAll, silent, repaired);
  if (error == 0) error = co_await qcow2::check_image(file, context, header, silent, judged);
  if (error == 0 && (judged.corruptions > 0 || judged.check_errors > 0)) error = EUCLEAN;
  if (error == 0) error = co_await qcow2::mark_sound(file, context, header);
  co_return error;
}

}  // namespace

EditedFile::EditedFile(std::unique_ptr<blockdev::RawNode> file, qcow2::Header header,
                       std::unique_ptr<blockdev::PrivateContext> context)
    : file_(std::move(file)), header_(std::move(header)), context_(std::move(context)) {
  file_->attach(context_->context());
}

EditedFile::~EditedFile() { file_->detach(context_->context()); }

Expected<std::unique_ptr<EditedFile>> EditedFile::open(const std::string& path,
                                                       blockdev::CacheMode cache, bool lock) {
  auto file = open_file(
      {.path = path, .format = "qcow2", .cache = cache, .read_only = false, .lock = lock});
  if (!file) return std::unexpected(std::move(file.error()));
  if (!*file) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' is not a qcow2 image: it is empty", path));
  }
  auto header = read_header(**file);
  if (!header) return std::unexpected(std::move(header.error()));
  if (header->has(qcow2::kIncompatCorrupt)) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("'{}' is marked corrupt; see 'vblk img check -r all'", path));
  }
  auto context = make_context();
  if (!context) return std::unexpected(std::move(context.error()));
  std::unique_ptr<EditedFile> edited(
      new EditedFile(std::move(*file), std::move(*header), std::move(*context)));
  if (auto cleaned = edited->clean(); !cleaned) return std::unexpected(std::move(cleaned.error()));
  return edited;
}

Expected<void> EditedFile::clean() {
  if (!header_.has(qcow2::kIncompatDirty)) return {};
  const int error = run(repair_and_mark(*file_, context(), header_));
  if (error == 0) return {};
  return make_error(
      ErrorKind::kCorrupt,
      fmt::format("'{}' was not closed, and cannot be repaired: {}; see 'vblk img check'",
                  file_->name(), error == EUCLEAN ? "it has other errors" : describe_errno(error)),
      error);
}

}  // namespace vblk::img
