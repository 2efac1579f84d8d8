// `vblk img convert`.
#include <algorithm>
#include <array>
#include <cerrno>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <optional>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/image_lock.h"
#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/converter.h"
#include "blockdev/img/create_options.h"
#include "blockdev/img/edited_file.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/kept_bitmaps.h"
#include "blockdev/img/names.h"
#include "blockdev/img/new_image.h"
#include "blockdev/img/output.h"
#include "blockdev/img/progress.h"
#include "blockdev/img/source.h"
#include "blockdev/img/stored_bitmaps.h"
#include "blockdev/qcow2/bitmap_editor.h"

namespace vblk::img {

namespace {

constexpr std::uint64_t kSparseBytesMax = std::uint64_t{16} << 20;
constexpr unsigned kWorkersMax = 16;

struct ConvertOptions {
  std::vector<std::string> sources;
  std::string target;
  std::string source_format;
  std::string snapshot;
  blockdev::CacheMode source_cache{blockdev::CacheMode::kWriteback};
  blockdev::CacheMode target_cache{blockdev::CacheMode::kUnsafe};
  bool lock{true};
  bool into_existing{false};
  bool target_is_zero{false};
  bool compress{false};
  bool show_progress{false};
  bool copies_bitmaps{false};
  bool skips_broken_bitmaps{false};
  bool kernel_copies{false};
  std::string target_format;
  CreateOptions create;
  ConvertPlan plan;
};

std::unexpected<Error> wrong(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

Expected<void> take_numbers(const Arguments& arguments, ConvertPlan& plan) {
  if (const auto text = arguments.value("S")) {
    const auto bytes = parse_size(*text, "-S");
    if (!bytes) return std::unexpected(bytes.error());
    if (*bytes % blockdev::kSectorBytes != 0 || *bytes > kSparseBytesMax)
      return wrong("-S takes a multiple of 512 up to 16M; 0: nothing is left out");
    plan.sparse_bytes = *bytes;
  }
  if (const auto text = arguments.value("m")) {
    const auto workers = parse_size(*text, "-m");
    if (!workers || *workers < 1 || *workers > kWorkersMax)
      return wrong(fmt::format("-m takes a number from 1 to {}", kWorkersMax));
    plan.workers_max = static_cast<unsigned>(*workers);
  }
  if (const auto text = arguments.value("r")) {
    const auto rate = parse_size(*text, "-r");
    if (!rate) return std::unexpected(rate.error());
    plan.rate_bytes = *rate;
  }
  plan.in_order = !arguments.has("W");
  plan.salvage = arguments.has("salvage");
  plan.quiet = arguments.has("q");
  return {};
}

Expected<void> check_combination(const ConvertOptions& options) {
  const CreateOptions& create = options.create;
  const bool is_qcow2 = options.target_format == "qcow2";
  if (options.compress && !is_qcow2) return wrong("-c: a raw image is not compressed");
  if (options.compress && !create.data_file.empty())
    return wrong("-c: what is in a data file is not compressed");
  if (options.compress && create.preallocation != Preallocation::kOff)
    return wrong("-c and preallocation exclude each other");
  if (options.kernel_copies && options.compress)
    return wrong("-C and -c exclude each other: what the kernel copies is not compressed");
  if (options.target_is_zero && !options.into_existing)
    return wrong("--target-is-zero goes with -n");
  if (options.skips_broken_bitmaps && !options.copies_bitmaps)
    return wrong("--skip-broken-bitmaps goes with --bitmaps");
  if (options.copies_bitmaps && options.sources.size() > 1)
    return wrong("--bitmaps: the bitmaps of several images do not become one");
  if (options.copies_bitmaps && (!is_qcow2 || create.version < 3))
    return wrong("--bitmaps: only qcow2 images of version 3 have bitmaps");
  if (options.into_existing && !create.backing_file.empty())
    return wrong("-n with -B: the target has the backing file that it has");
  return {};
}

Expected<ConvertOptions> parse_options(const Arguments& arguments) {
  ConvertOptions options;
  const auto& names = arguments.names();
  if (names.size() < 2) return wrong("give the image and the name of the new one");
  options.sources.assign(names.begin(), names.end() - 1);
  options.target = names.back();
  options.source_format = arguments.value_or("f", "");
  options.target_format = arguments.value_or("O", "raw");
  options.snapshot = arguments.value_or("l", "");
  if (arguments.has("l") && options.snapshot.empty()) return wrong("-l names no snapshot");
  options.lock = !arguments.has("U") && !arguments.has("force-share");
  options.into_existing = arguments.has("n");
  if (arguments.has("target-image-opts") && !options.into_existing)
    return wrong("--target-image-opts goes with -n: a description is of an image that is there");
  options.target_is_zero = arguments.has("target-is-zero");
  options.compress = arguments.has("c");
  options.show_progress = arguments.has("p") && !arguments.has("q");
  options.kernel_copies = arguments.has("C");
  if (options.kernel_copies && arguments.has("S"))
    return wrong("-C and -S exclude each other: the kernel does not look for zeroes");
  options.copies_bitmaps = arguments.has("bitmaps");
  options.skips_broken_bitmaps = arguments.has("skip-broken-bitmaps");
  auto source_cache = parse_cache(arguments.value_or("T", ""), options.source_cache);
  if (!source_cache) return std::unexpected(source_cache.error());
  options.source_cache = *source_cache;
  auto target_cache = parse_cache(arguments.value_or("t", ""), options.target_cache);
  if (!target_cache) return std::unexpected(target_cache.error());
  options.target_cache = *target_cache;
  if (auto taken = take_numbers(arguments, options.plan); !taken)
    return std::unexpected(std::move(taken.error()));
  auto create = parse_create_options(options.target_format, key_values(arguments));
  if (!create) return std::unexpected(std::move(create.error()));
  options.create = std::move(*create);
  if (arguments.has("B")) options.create.backing_file = *arguments.value("B");
  if (arguments.has("F")) options.create.backing_format = *arguments.value("F");
  if (auto checked = check_create_options(options.create); !checked)
    return std::unexpected(std::move(checked.error()));
  if (options.sources.size() > 1 &&
      (!options.create.backing_file.empty() || !options.snapshot.empty()))
    return wrong("several images go together neither with -B nor with -l");
  if (auto checked = check_combination(options); !checked)
    return std::unexpected(std::move(checked.error()));
  if (options.compress) options.plan.compression = options.create.compression;
  return options;
}

Expected<void> check_targets_are_apart(const Source& source, const ConvertOptions& options) {
  auto checked = check_target_is_apart(source, options.target);
  if (checked && !options.create.data_file.empty())
    checked = check_target_is_apart(source, resolve_name(options.target, options.create.data_file));
  return checked;
}

Expected<std::vector<Source>> open_sources(const ConvertOptions& options) {
  std::vector<Source> sources;
  for (const std::string& path : options.sources) {
    auto source = open_source({.path = path,
                               .format = options.source_format,
                               .snapshot = options.snapshot,
                               .cache = options.source_cache,
                               .lock = options.lock});
    if (!source) return std::unexpected(std::move(source.error()));
    if (auto checked = check_targets_are_apart(*source, options); !checked)
      return std::unexpected(std::move(checked.error()));
    sources.push_back(std::move(*source));
  }
  return sources;
}

// Not beside writes that go around the page cache.
bool copies_in_kernel(const ConvertOptions& options) {
  return options.kernel_copies && options.target_format == "raw" &&
         !blockdev::uses_direct_io(options.target_cache);
}

// The file of a raw target that there is, for the kernel to copy into; none if it is not to.
class CopyTarget {
 public:
  CopyTarget(const ConvertOptions& options, const std::string& path)
      : fd_(copies_in_kernel(options) ? ::open(path.c_str(), O_WRONLY | O_CLOEXEC) : -1) {}
  ~CopyTarget() {
    if (fd_ >= 0) ::close(fd_);
  }
  CopyTarget(const CopyTarget&) = delete;
  CopyTarget& operator=(const CopyTarget&) = delete;
  [[nodiscard]] int fd() const { return fd_; }

 private:
  const int fd_;
};

Task<int> flush(BlockNode& node, IoContext& context) {
  const int error =
      co_await blockdev::BlockIo(node, context, blockdev::BlockOperation::kFlush, 0, 0);
  co_return error;
}

// Those that are to be copied, of the one source.
Expected<StoredBitmaps> bitmaps_to_copy(const ConvertOptions& options) {
  auto bitmaps = open_stored_bitmaps(options.sources[0], options.source_format, false);
  if (!bitmaps) return bitmaps;
  const auto is_broken = [](const qcow2::Bitmap& bitmap) {
    return (bitmap.entry.flags & qcow2::kBitmapInUse) != 0;
  };
  for (const qcow2::Bitmap& bitmap : bitmaps->list) {
    if (!is_broken(bitmap)) continue;
    if (!options.skips_broken_bitmaps) {
      return make_error(
          ErrorKind::kInvalidArgument,
          fmt::format("bitmap '{}' of '{}' is inconsistent; --skip-broken-bitmaps leaves it out",
                      bitmap.name, options.sources[0]));
    }
    warn("vblk img: warning: bitmap '{}' is inconsistent and left out\n", printable(bitmap.name));
  }
  std::erase_if(bitmaps->list, is_broken);
  return bitmaps;
}

Task<int> add_bitmaps(qcow2::BitmapEditor& editor, const StoredBitmaps& bitmaps) {
  const qcow2::BitmapEditor::Other source = bitmaps.view();
  int error = co_await editor.load();
  for (const qcow2::Bitmap& bitmap : bitmaps.list) {
    if (error == 0)
      error = editor.add(bitmap.name, std::uint64_t{1} << bitmap.entry.granularity_bits);
    if (error == 0) error = co_await editor.merge(bitmap.name, bitmap.name, source);
    if (error == 0)
      error = editor.enable(bitmap.name, (bitmap.entry.flags & qcow2::kBitmapAuto) != 0);
  }
  if (error == 0) error = co_await editor.save();
  co_return error;
}

// Into an image of `header` that is in `file`, which `context` has attached.
Expected<void> copy_bitmaps(const StoredBitmaps& bitmaps, blockdev::RawNode& file,
                            const qcow2::Header& header, blockdev::PrivateContext& context) {
  bitmaps.file->attach(context.context());
  qcow2::BitmapEditor editor(file, context.context(), header);
  const int error = context.run(add_bitmaps(editor, bitmaps));
  bitmaps.file->detach(context.context());
  if (error == 0) return {};
  return make_error(kind_of_errno(error),
                    fmt::format("cannot copy bitmaps: {}", editor.reason(error)), error);
}

// What would forbid it, known before anything is written.
Expected<void> can_add_bitmaps(const StoredBitmaps& bitmaps, const std::string& target) {
  const auto there = open_stored_bitmaps(target, "qcow2", false);
  if (!there) return std::unexpected(there.error());
  if (there->header.version < 3) return wrong("--bitmaps: images of version 2 have no bitmaps");
  if (there->header.size_bytes != bitmaps.header.size_bytes)
    return wrong("--bitmaps: source and target are disks of different sizes");
  for (const qcow2::Bitmap& bitmap : bitmaps.list) {
    if (std::ranges::find(there->list, bitmap.name, &qcow2::Bitmap::name) != there->list.end())
      return wrong(fmt::format("the target has a bitmap '{}' already", printable(bitmap.name)));
  }
  return {};
}

Expected<void> copy_into(const ConvertOptions& options, ConvertPlan& plan, BlockNode* target) {
  Progress progress(options.show_progress, plan.size_bytes);
  plan.target = target;
  plan.target_reads_zero = options.target_is_zero;
  if (target != nullptr) {
    if (options.compress && target->compressed_unit_bytes() == 0)
      return wrong("-c: what is in a data file is not compressed");
    auto converted = Converter(plan, progress).run();
    if (!converted) return converted;
  }
  // Of a qcow2 image that is what writes its tables, and says if it cannot.
  const bool must_flush =
      options.target_format == "qcow2" || options.target_cache != blockdev::CacheMode::kUnsafe;
  if (target != nullptr && must_flush) {
    const auto context = make_context();
    if (!context) return std::unexpected(context.error());
    target->attach((*context)->context());
    const int error = (*context)->run(flush(*target, (*context)->context()));
    target->detach((*context)->context());
    if (error != 0) {
      return make_error(kind_of_errno(error),
                        fmt::format("cannot flush '{}': {}", options.target, describe_errno(error)),
                        error);
    }
  }
  progress.finish();
  return {};
}

Expected<Source> open_target(const ConvertOptions& options, bool read_only, bool is_locked) {
  return open_source({.path = options.target,
                      .format = options.target_format,
                      .cache = file_cache(options.target_cache),
                      .read_only = read_only,
                      .is_locked = is_locked});
}

Expected<void> write_into_existing(const ConvertOptions& options, ConvertPlan& plan) {
  if (auto checked = blockdev::check_is_not_mounted(options.target); !checked) return checked;
  std::uint64_t target_bytes = 0;
  {
    const auto target = open_target(options, true, false);
    if (!target) return std::unexpected(target.error());
    target_bytes = target->size_bytes();
  }
  if (target_bytes < plan.size_bytes) {
    return make_error(ErrorKind::kExhausted,
                      fmt::format("the target '{}' has {} bytes, too few for {}", options.target,
                                  target_bytes, plan.size_bytes));
  }
  std::optional<StoredBitmaps> new_bitmaps;
  if (options.copies_bitmaps) {
    auto found = bitmaps_to_copy(options);
    if (!found) return std::unexpected(std::move(found.error()));
    new_bitmaps = std::move(*found);
    if (auto possible = can_add_bitmaps(*new_bitmaps, options.target); !possible) return possible;
  }
  KeptBitmaps bitmaps(options.target);
  auto taken = bitmaps.take_out(options.target_format, target_bytes, true);
  if (!taken) return taken;
  plan.written = bitmaps.marker();
  Expected<void> copied;
  if (auto target = open_target(options, false, bitmaps.has_locked()); !target) {
    copied = std::unexpected(std::move(target.error()));
  } else {
    const CopyTarget copy_target(options, options.target);
    plan.copy_fd = copy_target.fd();
    copied = copy_into(options, plan, target->node.get());
  }
  copied = bitmaps.put_in(std::move(copied));
  if (!copied || !new_bitmaps) return copied;
  const auto edited = EditedFile::open(options.target, blockdev::CacheMode::kWriteback);
  if (!edited) return std::unexpected(edited.error());
  return copy_bitmaps(*new_bitmaps, (*edited)->file(), (*edited)->header(),
                      (*edited)->own_context());
}

Expected<void> write_new_image(const ConvertOptions& options, ConvertPlan& plan) {
  if (auto checked = check_image_size(options.create, plan.size_bytes); !checked) return checked;
  if (!options.create.backing_file.empty()) {
    const auto backing =
        open_source({.path = resolve_name(options.target, options.create.backing_file),
                     .format = options.create.backing_format,
                     .lock = options.lock});
    if (!backing) {
      return make_error(backing.error().kind,
                        "the backing file cannot be used: " + backing.error().message);
    }
    if (auto apart = check_targets_are_apart(*backing, options); !apart) return apart;
  }
  std::optional<StoredBitmaps> bitmaps;
  if (options.copies_bitmaps) {
    auto found = bitmaps_to_copy(options);
    if (!found) return std::unexpected(std::move(found.error()));
    bitmaps = std::move(*found);
  }
  const auto context = make_context();
  if (!context) return std::unexpected(context.error());
  // What is left to a backing file has no space of its own.
  const bool fully_allocated = plan.sparse_bytes == 0 && options.create.backing_file.empty();
  auto image = NewImage::begin(options.target,
                               {.create = options.create,
                                .size_bytes = plan.size_bytes,
                                .cache = options.target_cache,
                                .fully_allocated = fully_allocated},
                               **context);
  if (!image) return std::unexpected(std::move(image.error()));
  Progress progress(options.show_progress, plan.size_bytes);
  plan.writer = (*image)->writer();
  plan.one_write_at_a_time = (*image)->takes_one_write_at_a_time();
  if (!options.create.backing_file.empty()) plan.depth_max = 0;
  if (plan.writer == nullptr) {
    plan.target = &(*image)->target().file();
    plan.target_reads_zero = (*image)->reads_zero();
    if (copies_in_kernel(options)) plan.copy_fd = (*image)->target().fd();
  }
  auto converted = Converter(plan, progress).run();
  if (!converted) return converted;
  std::function<Expected<void>()> last;
  if (bitmaps) {
    last = [&] {
      return copy_bitmaps(*bitmaps, (*image)->target().file(), (*image)->writer()->header(),
                          **context);
    };
  }
  if (auto finished = (*image)->finish(**context, last); !finished) return finished;
  progress.finish();
  return {};
}

}  // namespace

int convert_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 28> kOptions{"c",
                                                      "p",
                                                      "q",
                                                      "n",
                                                      "f:",
                                                      "t:",
                                                      "T:",
                                                      "O:",
                                                      "B:",
                                                      "F:",
                                                      "o:",
                                                      "l:",
                                                      "S:",
                                                      "r:",
                                                      "m:",
                                                      "W",
                                                      "U",
                                                      "C",
                                                      "force-share",
                                                      "target-is-zero",
                                                      "salvage",
                                                      "bitmaps",
                                                      "object:!",
                                                      "image-opts<",
                                                      "target-image-opts$",
                                                      "skip-broken-bitmaps",
                                                      "b:!",
                                                      "s:!"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  if (asks_for_help(*arguments)) {
    const std::string format = arguments->value_or("O", "raw");
    if (format != "raw" && format != "qcow2")
      return fail(
          fmt::format("format '{}' is not known here; raw and qcow2 are supported", format));
    print_create_help(format);
    return 0;
  }
  const auto options = parse_options(*arguments);
  if (!options) return fail(options.error().message);
  auto sources = open_sources(*options);
  if (!sources) return fail(sources.error().message);
  ConvertPlan plan = options->plan;
  for (Source& source : *sources) {
    if (!source.node) continue;
    plan.sources.push_back(&source);
    plan.size_bytes += source.size_bytes();
  }
  if (options->create.size_bytes) {
    // A disk of another size is not the source any more.
    return fail("option 'size' has no place here: the new image has the size of the source");
  }
  auto written = options->into_existing ? write_into_existing(*options, plan)
                                        : write_new_image(*options, plan);
  if (!written) return fail(fmt::format("{}: {}", options->target, written.error().message));
  return 0;
}

}  // namespace vblk::img
