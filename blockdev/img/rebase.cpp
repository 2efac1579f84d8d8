// `vblk img rebase`: another backing file for an image, which stays the same disk; or, with -u,
// only another name for it.
//
// What the image does not have itself is compared, block by block, in the old backing file and in
// the new one; where they differ, the old content is written into the image. When all that is
// stable the header gets the new name, in steps that a torn write does not harm
// (qcow2/header_rewrite.h). An interruption before that leaves the image as it was, with some of
// what its backing file has.
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <optional>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/kept_bitmaps.h"
#include "blockdev/img/names.h"
#include "blockdev/img/progress.h"
#include "blockdev/img/source.h"
#include "blockdev/img/workers.h"
#include "blockdev/img/zeroes.h"
#include "blockdev/qcow2/header_rewrite.h"

namespace vblk::img {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::IoGroup;

namespace {

constexpr std::uint64_t kChunkBytes = std::uint64_t{1} << 20;
constexpr std::uint64_t kBlockBytes = 65536;  // that are compared, and written if they differ
constexpr unsigned kWorkers = 8;

class Rebaser {
 public:
  // `new_backing`: nullptr is none.
  Rebaser(BlockNode& image, BlockNode* new_backing, KeptBitmaps& bitmaps, Progress& progress)
      : image_(image), new_backing_(new_backing), bitmaps_(bitmaps), progress_(progress) {}

  Expected<void> run();

 private:
  struct Buffers {
    AlignedBuffer old_content{kChunkBytes};
    AlignedBuffer new_content{kChunkBytes};
  };
  Task<int> work(IoContext& context);
  Task<int> keep(IoContext& context, std::uint64_t at, std::uint64_t end, Buffers& buffers);
  Task<int> keep_range(IoContext& context, std::uint64_t at, std::uint64_t length,
                       Buffers& buffers);

  BlockNode& image_;
  BlockNode* const new_backing_;
  KeptBitmaps& bitmaps_;
  Progress& progress_;
  std::atomic<std::uint64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::optional<Error> error_;
};

// A range that the image does not have itself.
Task<int> Rebaser::keep_range(IoContext& context, std::uint64_t at, std::uint64_t length,
                              Buffers& buffers) {
  const auto old_content = buffers.old_content.bytes().first(length);
  const auto new_content = buffers.new_content.bytes().first(length);
  const std::uint64_t backed = new_backing_ == nullptr || at >= new_backing_->size_bytes()
                                   ? 0
                                   : std::min(length, new_backing_->size_bytes() - at);
  std::ranges::fill(new_content.subspan(backed), std::byte{0});
  IoGroup reads(context);
  reads.start(image_, BlockOperation::kRead, at, {{old_content.data(), length}});
  if (backed > 0)
    reads.start(*new_backing_, BlockOperation::kRead, at, {{new_content.data(), backed}});
  int error = co_await reads;
  for (std::uint64_t done = 0; done < length && error == 0;) {
    const std::uint64_t block =
        std::min(length, (at + done) / kBlockBytes * kBlockBytes + kBlockBytes - at) - done;
    const auto content = old_content.subspan(done, block);
    if (std::memcmp(content.data(), new_content.data() + done, block) != 0) {
      bitmaps_.mark(at + done, block);
      // Where the old backing file does not reach, zeroes are what there is, and asking for them
      // would do nothing: they have to be written to be there under the new one.
      const BlockNode* const old_backing = image_.backing_node();
      const bool is_backed =
          old_backing != nullptr && at + done + block <= old_backing->size_bytes();
      if (is_backed && is_zero(content)) {
        BlockIo zeroes(image_, context, BlockOperation::kWriteZeroes, at + done, block);
        zeroes.may_unmap = true;
        error = co_await zeroes;
      } else {
        error = co_await BlockIo(image_, context, BlockOperation::kWrite, at + done, content);
      }
    }
    done += block;
  }
  co_return error;
}

Task<int> Rebaser::keep(IoContext& context, std::uint64_t at, std::uint64_t end, Buffers& buffers) {
  while (at < end) {
    ChainStatus status;
    int error = co_await chain_status(image_, context, at, end - at, 0, status);
    if (error == 0 && !status.is_present)
      error = co_await keep_range(context, at, status.length_bytes, buffers);
    if (error != 0) co_return error;
    at += status.length_bytes;
  }
  co_return 0;
}

Task<int> Rebaser::work(IoContext& context) {
  Buffers buffers;
  while (!failed_.load(std::memory_order_relaxed)) {
    const std::uint64_t at = next_.fetch_add(kChunkBytes, std::memory_order_relaxed);
    if (at >= image_.size_bytes()) break;
    const std::uint64_t end = std::min(image_.size_bytes(), at + kChunkBytes);
    const int error = co_await keep(context, at, end, buffers);
    if (error != 0) {
      failed_.store(true, std::memory_order_relaxed);
      const std::lock_guard lock(mutex_);
      error_ =
          Error{kind_of_errno(error), error,
                fmt::format("cannot keep what there is at byte {}: {}", at, describe_errno(error))};
    }
    progress_.advance(end - at);
  }
  co_return 0;
}

Task<int> flush(BlockNode& node, IoContext& context) {
  const int error = co_await BlockIo(node, context, BlockOperation::kFlush, 0, 0);
  co_return error;
}

Expected<void> Rebaser::run() {
  std::vector<BlockNode*> nodes{&image_};
  if (new_backing_ != nullptr) nodes.push_back(new_backing_);
  auto ran = run_workers(kWorkers, kThreadPerProcessor, nodes,
                         [this](IoContext& context) { return work(context); });
  if (!ran) return ran;
  if (error_) return std::unexpected(*error_);
  return {};
}

struct RebaseOptions {
  std::string path;
  std::string backing_file;  // empty: none
  std::string backing_format;
  blockdev::CacheMode cache{blockdev::CacheMode::kWriteback};
  blockdev::CacheMode source_cache{blockdev::CacheMode::kWriteback};
  bool only_the_name{false};
  bool show_progress{false};
};

Expected<void> keep_content(const RebaseOptions& options, KeptBitmaps& bitmaps) {
  auto image = open_source({.path = options.path,
                            .format = "qcow2",
                            .cache = options.cache,
                            .read_only = false,
                            .is_locked = bitmaps.has_locked()});
  if (!image) return std::unexpected(std::move(image.error()));
  Source backing;
  if (!options.backing_file.empty()) {
    auto opened = open_source({.path = resolve_name(options.path, options.backing_file),
                               .format = options.backing_format,
                               .cache = options.source_cache});
    if (!opened) {
      return make_error(opened.error().kind,
                        "the new backing file cannot be used: " + opened.error().message);
    }
    backing = std::move(*opened);
  }
  Progress progress(options.show_progress, image->size_bytes());
  if (image->node) {
    auto kept = Rebaser(*image->node, backing.node.get(), bitmaps, progress).run();
    if (!kept) return kept;
    const auto context = make_context();
    if (!context) return std::unexpected(context.error());
    image->node->attach((*context)->context());
    const int error = (*context)->run(flush(*image->node, (*context)->context()));
    image->node->detach((*context)->context());
    if (error != 0) {
      return make_error(kind_of_errno(error),
                        fmt::format("cannot flush it: {}", describe_errno(error)), error);
    }
  }
  progress.finish();
  return {};
}

Expected<void> rename_backing_file(const RebaseOptions& options) {
  const auto file = open_file({.path = options.path, .format = "qcow2", .read_only = false});
  if (!file) return std::unexpected(file.error());
  auto header = read_header(**file);
  if (!header) return std::unexpected(std::move(header.error()));
  header->backing_file = options.backing_file;
  header->backing_format = options.backing_format;
  // "Header", autoclear_features: whoever writes clears those that it does not know.
  header->autoclear_features &= qcow2::kAutoclearBitmaps | qcow2::kAutoclearRawDataFile;
  const auto context = make_context();
  if (!context) return std::unexpected(context.error());
  (*file)->attach((*context)->context());
  std::string why;
  const int error =
      (*context)->run(qcow2::replace_header(**file, (*context)->context(), *header, why));
  (*file)->detach((*context)->context());
  if (error == 0) return {};
  return make_error(
      kind_of_errno(error),
      fmt::format("cannot change its header: {}", why.empty() ? describe_errno(error) : why),
      error);
}

// What forbids it, by the header alone.
Expected<void> check_image(const RebaseOptions& options) {
  const auto file = open_file({.path = options.path, .format = "qcow2"});
  if (!file) return std::unexpected(file.error());
  if (!*file) return make_error(ErrorKind::kInvalidArgument, "it is empty, and no qcow2 image");
  const auto header = read_header(**file);
  if (!header) return std::unexpected(header.error());
  if (header->data_file_is_raw() && !options.backing_file.empty()) {
    return make_error(ErrorKind::kNotSupported,
                      "an image with a raw data file cannot have a backing file");
  }
  return {};
}

Expected<void> rebase(const RebaseOptions& options) {
  if (auto checked = check_image(options); !checked) return checked;
  if (options.only_the_name) {
    Progress progress(options.show_progress, 0);
    auto renamed = rename_backing_file(options);
    if (renamed) progress.finish();
    return renamed;
  }
  const auto header = header_of(options.path, true);
  if (!header) return std::unexpected(header.error());
  KeptBitmaps bitmaps(options.path);
  if (auto taken = bitmaps.take_out("qcow2", header->size_bytes, true); !taken) return taken;
  if (auto kept = bitmaps.put_in(keep_content(options, bitmaps)); !kept) return kept;
  return rename_backing_file(options);
}

}  // namespace

int rebase_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 12> kOptions{
      "q", "p", "u", "f:", "t:", "T:", "b:", "F:", "U!", "force-share!", "object:!", "image-opts1"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  if (arguments->names().size() != 1) return fail("give one image; see vblk img --help");
  RebaseOptions options{.path = arguments->names()[0],
                        .backing_file = arguments->value_or("b", ""),
                        .backing_format = arguments->value_or("F", ""),
                        .only_the_name = arguments->has("u"),
                        .show_progress = arguments->has("p") && !arguments->has("q")};
  if (!arguments->has("b") && !options.only_the_name)
    return fail("name the new backing file (-b), or say -u");
  const std::string& backing_format = options.backing_format;
  if (!backing_format.empty() && backing_format != "raw" && backing_format != "qcow2")
    return fail(
        fmt::format("format '{}' is not known here; raw and qcow2 are supported", backing_format));
  if (options.backing_file.empty()) {
    options.backing_format.clear();
  } else if (backing_format.empty()) {
    return fail("a backing file needs its format (-F)");
  }
  const auto cache = parse_cache(arguments->value_or("t", ""), options.cache);
  if (!cache) return fail(cache.error().message);
  // What is promised of interruptions needs flushes.
  options.cache = *cache == blockdev::CacheMode::kUnsafe ? blockdev::CacheMode::kWriteback : *cache;
  const auto source_cache = parse_cache(arguments->value_or("T", ""), options.source_cache);
  if (!source_cache) return fail(source_cache.error().message);
  options.source_cache = *source_cache;
  const auto format = decide_format(options.path, arguments->value_or("f", ""));
  if (!format) return fail(format.error().message);
  if (*format == "raw")
    return fail(fmt::format("'{}' is raw and has no backing file", options.path));
  auto done = rebase(options);
  return done ? 0 : fail(fmt::format("{}: {}", options.path, done.error().message));
}

}  // namespace vblk::img
