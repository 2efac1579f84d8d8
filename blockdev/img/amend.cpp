// `vblk img amend`: properties of a qcow2 image, changed in place.
//
// What is asked for is checked before anything is written, and comes into the image by one write of
// its header (qcow2/image_amender.h). Only with another size of the disk there are up to three
// steps, each of them whole: what the size may need, the size, and what it must not prevent, which
// is version 2. All three are checked before the first.
#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/create_options.h"
#include "blockdev/img/edited_file.h"
#include "blockdev/img/kept_bitmaps.h"
#include "blockdev/img/names.h"
#include "blockdev/img/output.h"
#include "blockdev/img/progress.h"
#include "blockdev/img/resize.h"
#include "blockdev/img/source.h"
#include "blockdev/qcow2/image_amender.h"

namespace vblk::img {

namespace {

using Pairs = std::vector<std::pair<std::string, std::string>>;

struct OptionHelp {
  std::string_view name;
  std::string_view meaning;
};
constexpr std::array kHelp{
    OptionHelp{"backing_file=<str>", "Image that it is based on; as it is: see rebase"},
    OptionHelp{"backing_fmt=<str>", "Its format; as it is: see rebase"},
    OptionHelp{"compat=<str>", "Version: v2 (0.10) or v3 (1.1)"},
    OptionHelp{"data_file=<str>", "Name of the file beside the image that holds the data"},
    OptionHelp{"data_file_raw=<bool (on/off)>", "The data file must stay valid as a raw image"},
    OptionHelp{"lazy_refcounts=<bool (on/off)>", "Refcounts may be written late"},
    OptionHelp{"refcount_bits=<num>", "Width of a refcount, a power of two up to 64"},
    OptionHelp{"size=<size>", "Size of the virtual disk"}};
// Of a new image; what has been made has them for good.
constexpr std::array<std::string_view, 4> kOnlyNew{"cluster_size", "preallocation", "extended_l2",
                                                   "compression_type"};

std::unexpected<Error> wrong(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

struct AmendOptions {
  std::string path;
  Pairs given;
  CreateOptions values;
  blockdev::CacheMode cache{blockdev::CacheMode::kWriteback};

  [[nodiscard]] bool has(std::string_view name) const {
    return std::ranges::find(given, name, &Pairs::value_type::first) != given.end();
  }
};

Expected<void> take_values(AmendOptions& options) {
  if (options.given.empty()) return wrong("-o names no option");
  for (const auto& [name, value] : options.given) {
    if (name.starts_with("encrypt."))
      return make_error(ErrorKind::kNotSupported,
                        fmt::format("option '{}' is not supported here", name));
    if (std::ranges::find(kOnlyNew, name) != kOnlyNew.end())
      return wrong(
          fmt::format("option '{}' is for new images; 'vblk img convert' makes one", name));
    const bool is_known = std::ranges::any_of(kHelp, [&name](const OptionHelp& option) {
      return option.name.substr(0, option.name.find('=')) == name;
    });
    if (!is_known)
      return wrong(fmt::format(
          "option '{}' is unknown; 'vblk img amend -f qcow2 -o help' lists them", name));
  }
  auto values = parse_create_options("qcow2", options.given);
  if (!values) return std::unexpected(std::move(values.error()));
  options.values = std::move(*values);
  if (!std::has_single_bit(options.values.refcount_bits) || options.values.refcount_bits > 64)
    return wrong("refcount_bits is a power of two up to 64");
  return {};
}

// What is to change of an image that has this header.
Expected<qcow2::Amendment> decide(const AmendOptions& options, const qcow2::Header& header) {
  const CreateOptions& values = options.values;
  const bool names_backing = options.has("backing_file") || options.has("backing_fmt");
  if (names_backing && (header.backing_file.empty() || values.backing_file != header.backing_file ||
                        values.backing_format != header.backing_format))
    return wrong("another backing file is the work of 'vblk img rebase'");
  if (options.has("data_file_raw") && values.data_file_raw && !header.data_file_is_raw())
    return wrong("data_file_raw cannot be set on an image that there is");
  const std::string data_path = resolve_name(options.path, values.data_file);
  if (!values.data_file.empty() && is_same_file(data_path, options.path))
    return wrong("an image cannot be its own data file");
  qcow2::Amendment amendment;
  if (options.has("compat") && values.version != header.version) amendment.version = values.version;
  const auto order = static_cast<unsigned>(std::countr_zero(values.refcount_bits));
  if (options.has("refcount_bits") && order != header.geometry.refcount_order)
    amendment.refcount_order = order;
  const bool is_lazy = (header.compatible_features & qcow2::kCompatLazyRefcounts) != 0;
  if (options.has("lazy_refcounts") && values.lazy_refcounts != is_lazy)
    amendment.lazy_refcounts = values.lazy_refcounts;
  if (options.has("data_file")) amendment.data_file = values.data_file;
  amendment.data_file_is_raw_no_more =
      options.has("data_file_raw") && !values.data_file_raw && header.data_file_is_raw();
  if (amendment.version == 2U && amendment.lazy_refcounts == true)
    return wrong("lazy_refcounts needs compat=1.1");
  return amendment;
}

std::unexpected<Error> failed(const std::string& path, const std::string& why, int error) {
  return make_error(
      kind_of_errno(error),
      fmt::format("cannot amend '{}': {}", path, why.empty() ? describe_errno(error) : why), error);
}

Expected<void> carry_out(const std::string& path, EditedFile& edited,
                         const qcow2::Amendment& amendment) {
  if (amendment.is_empty()) return {};
  qcow2::ImageAmender amender(edited.file(), edited.context(), edited.header());
  const int error = edited.run(amender.amend(amendment));
  return error == 0 ? Expected<void>() : failed(path, amender.why(), error);
}

// What one of the steps would refuse that come with another size.
Expected<void> check_steps(const AmendOptions& options, EditedFile& edited,
                           const qcow2::Amendment& all, std::uint64_t size_bytes) {
  qcow2::Header resized = edited.header();
  if (all.version == 3U) resized.version = 3;
  if (auto possible = can_resize_qcow2(options.path, resized, size_bytes); !possible)
    return possible;
  if (resized.bitmap_directory) {
    if (auto possible = can_take_out_bitmaps(edited, options.path, size_bytes); !possible)
      return possible;
  }
  // It will be opened with all that it is based on; with the name that its data file is to have.
  if (!all.data_file) {
    const auto source = open_source({.path = options.path, .format = "qcow2", .lock = false});
    if (!source) return std::unexpected(source.error());
  }
  qcow2::ImageAmender amender(edited.file(), edited.context(), edited.header());
  const int error = edited.run(amender.check(all, size_bytes));
  return error == 0 ? Expected<void>() : failed(options.path, amender.why(), error);
}

Expected<void> amend(const AmendOptions& options) {
  qcow2::Amendment last;
  const std::uint64_t size_bytes = options.values.size_bytes.value_or(0);
  {
    const auto edited = EditedFile::open(options.path, options.cache);
    if (!edited) return std::unexpected(edited.error());
    auto first = decide(options, (*edited)->header());
    if (!first) return std::unexpected(std::move(first.error()));
    // As in qemu-img, a size of 0 is none.
    if (size_bytes != 0) {
      if (auto possible = check_steps(options, **edited, *first, size_bytes); !possible)
        return possible;
      if (first->version == 2U) std::swap(last.version, first->version);
    }
    if (auto done = carry_out(options.path, **edited, *first); !done) return done;
  }
  if (size_bytes == 0) return {};
  if (auto resized = resize_qcow2(options.path, size_bytes); !resized) return resized;
  if (last.is_empty()) return {};
  const auto edited = EditedFile::open(options.path, options.cache);
  if (!edited) return std::unexpected(edited.error());
  return carry_out(options.path, **edited, last);
}

int print_help(const std::string& format) {
  if (format == "raw") return fail("raw images have no options that could be amended");
  say("Amend options for 'qcow2':\n");
  for (const OptionHelp& option : kHelp) say("  {:<22} - {}\n", option.name, option.meaning);
  return 0;
}

}  // namespace

int amend_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 8> kOptions{
      "p", "q", "f:", "t:", "o:", "force!", "object:!", "image-opts1"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  if (!arguments->has("o")) return fail("say what to amend (-o); see vblk img --help");
  const bool wants_help = asks_for_help(*arguments);
  const std::string given_format = arguments->value_or("f", "");
  const auto& names = arguments->names();
  if (wants_help && !given_format.empty()) {
    const auto format = decide_format("", given_format);
    return format ? print_help(*format) : fail(format.error().message);
  }
  if (names.size() != 1) return fail("give one image; see vblk img --help");
  AmendOptions options{.path = names[0], .given = key_values(*arguments), .values = {}};
  const auto cache = parse_cache(arguments->value_or("t", ""), options.cache);
  if (!cache) return fail(cache.error().message);
  // What is promised of interruptions needs flushes.
  options.cache = *cache == blockdev::CacheMode::kUnsafe ? blockdev::CacheMode::kWriteback : *cache;
  const auto format = decide_format(options.path, given_format);
  if (!format) return fail(format.error().message);
  if (wants_help || *format == "raw") return print_help(*format);
  if (auto taken = take_values(options); !taken) return fail(taken.error().message);
  Progress progress(arguments->has("p") && !arguments->has("q"), 1);
  if (auto done = amend(options); !done) return fail(done.error().message);
  progress.finish();
  return 0;
}

}  // namespace vblk::img
