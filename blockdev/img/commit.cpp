// `vblk img commit`: what an image has, written into the one that it is based on.
//
// Until all of it is stable there, the image keeps what it has, and so stays the same disk whatever
// interrupts the work; then it is emptied by one write of its header.
#include <algorithm>
#include <array>
#include <cerrno>
#include <memory>
#include <optional>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/converter.h"
#include "blockdev/img/edited_file.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/kept_bitmaps.h"
#include "blockdev/img/names.h"
#include "blockdev/img/output.h"
#include "blockdev/img/progress.h"
#include "blockdev/img/resize.h"
#include "blockdev/img/source.h"
#include "blockdev/qcow2/snapshot_editor.h"

namespace vblk::img {

namespace {

struct CommitOptions {
  std::string path;
  std::optional<std::string> base;  // as -b names it
  blockdev::CacheMode cache{blockdev::CacheMode::kWriteback};
  std::uint64_t rate_bytes{0};
  bool keeps_content{false};  // -d
  bool show_progress{false};
};

// The image that the others are written into, and how many of them there are.
struct Base {
  std::string path;
  std::string format;
  unsigned depth{0};
};

Expected<Base> find_base(const CommitOptions& options) {
  Base base{.path = options.path, .format = "qcow2"};
  // As long as opening such a chain allows.
  for (unsigned depth = 1; depth < 64 && base.format == "qcow2"; ++depth) {
    const auto header = header_of(base.path, false);
    if (!header) return std::unexpected(header.error());
    if (header->backing_file.empty()) break;
    const std::string name = header->backing_file;
    base = {
        .path = resolve_name(base.path, name), .format = header->backing_format, .depth = depth};
    if (!options.base || *options.base == name || *options.base == base.path) return base;
  }
  return make_error(ErrorKind::kNotFound,
                    options.base
                        ? fmt::format("'{}' is not based on '{}'", options.path, *options.base)
                        : fmt::format("'{}' has no backing file", options.path));
}

Task<int> flush(BlockNode& node, IoContext& context) {
  const int error =
      co_await blockdev::BlockIo(node, context, blockdev::BlockOperation::kFlush, 0, 0);
  co_return error;
}

Expected<void> grow(BlockNode& node, std::uint64_t size_bytes) {
  if (node.size_bytes() >= size_bytes) return {};
  const auto own = make_context();
  if (!own) return std::unexpected(own.error());
  IoContext& context = (*own)->context();
  node.attach(context);
  Expected<void> resized;
  node.resize(size_bytes, context,
              [&resized](Expected<void> result) { resized = std::move(result); });
  context.drain();
  node.detach(context);
  return resized;
}

Expected<void> copy(Source& source, const CommitOptions& options, const Base& base,
                    KeptBitmaps& bitmaps) {
  auto target = open_source({.path = base.path,
                             .format = base.format,
                             .cache = options.cache,
                             .read_only = false,
                             .is_locked = bitmaps.has_locked()});
  if (!target) return std::unexpected(std::move(target.error()));
  if (auto grown = grow(*target->node, source.size_bytes()); !grown) return grown;
  const ConvertPlan plan{.sources = {&source},
                         .size_bytes = source.size_bytes(),
                         .target = target->node.get(),
                         .depth_max = base.depth - 1,
                         .rate_bytes = options.rate_bytes,
                         .written = bitmaps.marker()};
  Progress progress(options.show_progress, plan.size_bytes);
  if (auto copied = Converter(plan, progress).run(); !copied) return copied;
  const auto context = make_context();
  if (!context) return std::unexpected(context.error());
  target->node->attach((*context)->context());
  const int error = (*context)->run(flush(*target->node, (*context)->context()));
  target->node->detach((*context)->context());
  if (error != 0) {
    return make_error(kind_of_errno(error),
                      fmt::format("cannot flush '{}': {}", base.path, describe_errno(error)),
                      error);
  }
  progress.finish();
  return {};
}

Expected<void> write_into_base(const CommitOptions& options, const Base& base) {
  // The image is locked by the caller. It comes first: where its chain does not end it says so, and
  // not that the base is in use, by this process.
  auto source = open_source({.path = options.path, .format = "qcow2", .lock = false});
  if (!source) return std::unexpected(std::move(source.error()));
  std::uint64_t base_bytes = 0;
  {
    const auto target = open_source({.path = base.path, .format = base.format});
    if (!target) return std::unexpected(target.error());
    base_bytes = target->size_bytes();
  }
  if (!source->node) return {};
  if (base_bytes == 0) {
    auto grown = grow_empty_disk(base.path, base.format, source->size_bytes());
    if (!grown) return grown;
  }
  KeptBitmaps bitmaps(base.path);
  auto taken = bitmaps.take_out(base.format, std::max(base_bytes, source->size_bytes()), true);
  if (!taken) return taken;
  return bitmaps.put_in(copy(*source, options, base, bitmaps));
}

Expected<void> commit(const CommitOptions& options) {
  const auto base = find_base(options);
  if (!base) return std::unexpected(base.error());
  // It is closed cleanly before anything is read from it, as opening it for writing would do.
  const auto edited = EditedFile::open(options.path, options.cache);
  if (!edited) return std::unexpected(edited.error());
  const qcow2::Header& header = (*edited)->header();
  if (header.has_data_file() && !options.keeps_content) {
    return make_error(ErrorKind::kNotSupported,
                      "an image with a data file is not emptied here; say -d to keep what it has");
  }
  if (options.keeps_content) return write_into_base(options, *base);
  qcow2::SnapshotEditor editor((*edited)->file(), (*edited)->context(), header);
  // What forbids that it is emptied in the end is known before anything is written.
  int error = (*edited)->run(editor.load());
  if (error != 0) {
    return make_error(kind_of_errno(error), editor.reason(error), error);
  }
  if (auto written = write_into_base(options, *base); !written) return written;
  error = (*edited)->run(editor.empty());
  if (error == 0) return {};
  return make_error(kind_of_errno(error),
                    fmt::format("everything is in '{}', but the image cannot be emptied: {}",
                                base->path, editor.reason(error)),
                    error);
}

}  // namespace

int commit_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 9> kOptions{
      "q", "p", "d", "f:", "t:", "b:", "r:", "object:!", "image-opts1"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  if (arguments->names().size() != 1) return fail("give one image; see vblk img --help");
  const bool quiet = arguments->has("q");
  CommitOptions options{.path = arguments->names()[0],
                        .base = arguments->value("b"),
                        // Images between this one and the base would not be true without it.
                        .keeps_content = arguments->has("d") || arguments->has("b"),
                        .show_progress = arguments->has("p") && !quiet};
  const auto cache = parse_cache(arguments->value_or("t", ""), options.cache);
  if (!cache) return fail(cache.error().message);
  // What is promised of interruptions needs flushes.
  options.cache = *cache == blockdev::CacheMode::kUnsafe ? blockdev::CacheMode::kWriteback : *cache;
  if (const auto text = arguments->value("r")) {
    const auto rate = parse_size(*text, "-r");
    if (!rate) return fail(rate.error().message);
    options.rate_bytes = *rate;
  }
  const auto format = decide_format(options.path, arguments->value_or("f", ""));
  if (!format) return fail(format.error().message);
  if (*format == "raw")
    return fail(fmt::format("'{}' is raw and has no backing file", options.path));
  auto done = commit(options);
  if (!done) return fail(fmt::format("{}: {}", options.path, done.error().message));
  if (!quiet) say("Image committed.\n");
  return 0;
}

}  // namespace vblk::img
