#include "blockdev/img/create_options.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <string_view>

#include <fmt/core.h>

#include "blockdev/img/command.h"
#include "blockdev/img/output.h"

namespace vblk::img {

namespace {

std::unexpected<Error> wrong(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

Expected<bool> parse_switch(const std::string& name, const std::string& text) {
  for (const std::string_view yes : {"on", "yes", "true", "y"}) {
    if (text == yes) return true;
  }
  for (const std::string_view no : {"off", "no", "false", "n"}) {
    if (text == no) return false;
  }
  return wrong(fmt::format("option {} is on or off, not '{}'", name, text));
}

// What qemu-img takes, and we do not.
constexpr std::array<std::string_view, 2> kRefused{"encryption", "encrypt.format"};

struct OptionHelp {
  std::string_view name;
  std::string_view meaning;
};
constexpr std::array kRawHelp{
    OptionHelp{"extent_size_hint=<size>",
               "Size of the file's extents, for file systems that heed it"},
    OptionHelp{"nocow=<bool (on/off)>", "No copy on write below, for file systems that heed it"},
    OptionHelp{"preallocation=<str>", "Space in advance: off, falloc (reserved), full (written)"},
    OptionHelp{"size=<size>", "Size of the virtual disk"}};
constexpr std::array kQcow2Help{
    OptionHelp{"backing_file=<str>", "Image that the new one is based on"},
    OptionHelp{"backing_fmt=<str>", "Its format: raw or qcow2"},
    OptionHelp{"cluster_size=<size>", "Size of a cluster, a power of two from 512 to 2M"},
    OptionHelp{"compat=<str>", "Version: v2 (0.10) or v3 (1.1)"},
    OptionHelp{"compression_type=<str>", "How clusters are compressed: zlib or zstd"},
    OptionHelp{"data_file=<str>", "File beside the image that holds the data"},
    OptionHelp{"data_file_raw=<bool (on/off)>", "The data file must stay valid as a raw image"},
    OptionHelp{"extended_l2=<bool (on/off)>", "L2 tables with subclusters"},
    OptionHelp{"extent_size_hint=<size>",
               "Size of the file's extents, for file systems that heed it"},
    OptionHelp{"lazy_refcounts=<bool (on/off)>", "Refcounts may be written late"},
    OptionHelp{"nocow=<bool (on/off)>", "No copy on write below, for file systems that heed it"},
    OptionHelp{"preallocation=<str>",
               "Space in advance: off, metadata, falloc (reserved), full (written)"},
    OptionHelp{"refcount_bits=<num>", "Width of a refcount, a power of two up to 64"},
    OptionHelp{"size=<size>", "Size of the virtual disk"}};

Expected<void> take_compat(const std::string& text, CreateOptions& options) {
  options.compat = text;
  if (text == "0.10" || text == "v2") {
    options.version = 2;
  } else if (text == "1.1" || text == "v3") {
    options.version = 3;
  } else {
    return wrong(fmt::format("compat is v2 (0.10) or v3 (1.1), not '{}'", text));
  }
  return {};
}

Expected<void> take_qcow2_option(const std::string& name, const std::string& value,
                                 CreateOptions& options) {
  const auto set_switch = [&](bool& member) -> Expected<void> {
    const auto parsed = parse_switch(name, value);
    if (!parsed) return std::unexpected(parsed.error());
    member = *parsed;
    return {};
  };
  if (name == "compat") return take_compat(value, options);
  if (name == "extended_l2") return set_switch(options.extended_l2);
  if (name == "lazy_refcounts") return set_switch(options.lazy_refcounts);
  if (name == "data_file_raw") return set_switch(options.data_file_raw);
  if (name == "cluster_size") {
    const auto size = parse_size(value, "cluster_size");
    if (!size) return std::unexpected(size.error());
    options.cluster_bytes = *size;
  } else if (name == "refcount_bits") {
    const auto bits = parse_size(value, "refcount_bits");
    if (!bits) return std::unexpected(bits.error());
    options.refcount_bits = static_cast<unsigned>(std::min<std::uint64_t>(*bits, 128));
  } else if (name == "compression_type") {
    if (value != "zlib" && value != "zstd")
      return wrong(fmt::format("compression_type is zlib or zstd, not '{}'", value));
    options.compression = value == "zstd" ? qcow2::Compression::kZstd : qcow2::Compression::kZlib;
  } else if (name == "backing_file") {
    options.backing_file = value;
  } else if (name == "backing_fmt") {
    options.backing_format = value;
  } else if (name == "data_file") {
    options.data_file = value;
  } else {
    return wrong(
        fmt::format("option '{}' is unknown; 'vblk img create -f qcow2 -o help' lists them", name));
  }
  return {};
}

Expected<void> check_qcow2_options(const CreateOptions& options) {
  const bool is_v3 = options.version >= 3;
  if (!std::has_single_bit(options.cluster_bytes) || options.cluster_bytes < 512 ||
      options.cluster_bytes > (2U << 20))
    return wrong("cluster_size is a power of two from 512 to 2M");
  if (!std::has_single_bit(options.refcount_bits) || options.refcount_bits > 64)
    return wrong("refcount_bits is a power of two up to 64");
  if (!is_v3 && options.refcount_bits != 16)
    return wrong("refcounts of other than 16 bits need compat=v3");
  if (!is_v3 && options.lazy_refcounts) return wrong("lazy_refcounts needs compat=v3");
  if (!is_v3 && options.extended_l2) return wrong("extended_l2 needs compat=v3");
  if (!is_v3 && options.compression != qcow2::Compression::kZlib)
    return wrong("compression_type=zstd needs compat=v3");
  if (!is_v3 && !options.data_file.empty()) return wrong("data_file needs compat=v3");
  if (options.extended_l2 && options.cluster_bytes < 16384)
    return wrong("extended_l2 needs a cluster_size of 16k at least");
  if (options.data_file_raw && options.data_file.empty())
    return wrong("data_file_raw needs data_file");
  if (!options.backing_file.empty() && options.data_file_raw)
    return wrong("an image with a raw data file cannot have a backing file");
  if (!options.backing_file.empty() && options.backing_format.empty())
    return wrong("a backing file needs its format (-F)");
  if (options.backing_file.empty() && !options.backing_format.empty())
    return wrong("a format of the backing file is given, and no backing file");
  if (!options.backing_format.empty() && options.backing_format != "raw" &&
      options.backing_format != "qcow2")
    return wrong(
        fmt::format("the backing file's format '{}' is not known here; raw and qcow2 are "
                    "supported",
                    options.backing_format));
  if (!options.backing_file.empty() && options.preallocation != Preallocation::kOff &&
      !options.extended_l2)
    return wrong("a backing file and preallocation go together only with extended_l2");
  return {};
}

}  // namespace

Expected<Preallocation> parse_preallocation(const std::string& text) {
  if (text == "off") return Preallocation::kOff;
  if (text == "metadata") return Preallocation::kMetadata;
  if (text == "falloc") return Preallocation::kFalloc;
  if (text == "full") return Preallocation::kFull;
  return wrong(fmt::format("preallocation is off, metadata, falloc or full, not '{}'", text));
}

qcow2::Header CreateOptions::header(std::uint64_t bytes) const {
  qcow2::Header made;
  made.version = version;
  made.geometry = {.cluster_bits = static_cast<unsigned>(std::countr_zero(cluster_bytes)),
                   .refcount_order = static_cast<unsigned>(std::countr_zero(refcount_bits)),
                   .extended_l2 = extended_l2};
  made.size_bytes = bytes;
  made.compression = compression;
  made.backing_file = backing_file;
  made.backing_format = backing_format;
  made.data_file = data_file;
  if (compression != qcow2::Compression::kZlib)
    made.incompatible_features |= qcow2::kIncompatCompression;
  if (extended_l2) made.incompatible_features |= qcow2::kIncompatExtendedL2;
  if (!data_file.empty()) made.incompatible_features |= qcow2::kIncompatDataFile;
  if (data_file_raw) made.autoclear_features |= qcow2::kAutoclearRawDataFile;
  if (lazy_refcounts) made.compatible_features |= qcow2::kCompatLazyRefcounts;
  return made;
}

Expected<CreateOptions> parse_create_options(
    const std::string& format, const std::vector<std::pair<std::string, std::string>>& given) {
  if (format != "raw" && format != "qcow2") {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("format '{}' is not known here; raw and qcow2 are supported", format));
  }
  CreateOptions options{.format = format};
  for (const auto& [name, value] : given) {
    const bool is_encryption = name.starts_with("encrypt.");
    if (is_encryption || std::ranges::find(kRefused, name) != kRefused.end()) {
      return make_error(ErrorKind::kNotSupported,
                        fmt::format("option '{}' is not supported here", name));
    }
    if (name == "size") {
      const auto size = parse_size(value, "size");
      if (!size) return std::unexpected(size.error());
      options.size_bytes = *size;
    } else if (name == "preallocation") {
      const auto mode = parse_preallocation(value);
      if (!mode) return std::unexpected(mode.error());
      options.preallocation = *mode;
      options.preallocation_given = true;
    } else if (name == "nocow") {
      const auto nocow = parse_switch(name, value);
      if (!nocow) return std::unexpected(nocow.error());
      options.hints.nocow = *nocow;
      options.nocow_given = true;
    } else if (name == "extent_size_hint") {
      const auto bytes = parse_size(value, name);
      if (!bytes) return std::unexpected(bytes.error());
      if (*bytes > std::numeric_limits<std::uint32_t>::max())
        return wrong("extent_size_hint is a size below 4G");
      options.hints.extent_size_bytes = static_cast<std::uint32_t>(*bytes);
      options.extent_size_given = true;
    } else if (format == "qcow2") {
      if (auto taken = take_qcow2_option(name, value, options); !taken)
        return std::unexpected(std::move(taken.error()));
    } else {
      return wrong(
          fmt::format("option '{}' is unknown; 'vblk img create -f raw -o help' lists them", name));
    }
  }
  return options;
}

Expected<void> check_create_options(const CreateOptions& options) {
  if (options.format == "qcow2") return check_qcow2_options(options);
  if (!options.backing_file.empty() || !options.backing_format.empty())
    return wrong("a raw image has no backing file");
  if (options.preallocation == Preallocation::kMetadata)
    return wrong("a raw image has no metadata to be preallocated; use off, falloc or full");
  return {};
}

Expected<void> check_image_size(const CreateOptions& options, std::uint64_t size_bytes) {
  constexpr std::uint64_t kOffsetMax = std::uint64_t{1} << 61;
  if (options.format != "qcow2" || size_bytes == 0) return {};
  const qcow2::Geometry geometry = options.header(size_bytes).geometry;
  if (size_bytes > kOffsetMax || (geometry.l1_index(size_bytes - 1) + 1) * 8 > qcow2::kL1BytesMax) {
    return wrong(fmt::format("a disk of {} bytes is too large for clusters of {} bytes", size_bytes,
                             geometry.cluster_bytes()));
  }
  return {};
}

void print_create_help(const std::string& format) {
  say("Supported {} options:\n", format);
  const auto print = [](const OptionHelp& option) {
    say("  {:<22} - {}\n", option.name, option.meaning);
  };
  if (format == "qcow2") {
    std::ranges::for_each(kQcow2Help, print);
  } else {
    std::ranges::for_each(kRawHelp, print);
  }
}

std::string describe_creation(const std::string& path, const CreateOptions& options,
                              std::uint64_t size_bytes) {
  std::string text = fmt::format("Formatting '{}', fmt={}", path, options.format);
  const auto add = [&text](std::string_view name, std::string_view value) {
    text += fmt::format(" {}={}", name, value);
  };
  const auto on_off = [](bool value) { return value ? "on" : "off"; };
  constexpr std::array kModes{"off", "metadata", "falloc", "full"};
  const char* const mode = kModes[static_cast<std::size_t>(options.preallocation)];
  const bool is_qcow2 = options.format == "qcow2";
  if (is_qcow2) {
    add("cluster_size", std::to_string(options.cluster_bytes));
    add("extended_l2", on_off(options.extended_l2));
    if (options.preallocation_given) add("preallocation", mode);
    add("compression_type", options.compression == qcow2::Compression::kZstd ? "zstd" : "zlib");
  }
  add("size", std::to_string(size_bytes));
  const auto add_hints = [&] {
    if (options.nocow_given) add("nocow", on_off(options.hints.nocow));
    if (!is_qcow2 && options.preallocation_given) add("preallocation", mode);
    if (options.extent_size_given)
      add("extent_size_hint", std::to_string(options.hints.extent_size_bytes));
  };
  if (!is_qcow2) {
    add_hints();
    return text;
  }
  if (!options.compat.empty()) add("compat", options.compat);
  if (!options.backing_file.empty()) {
    add("backing_file", options.backing_file);
    add("backing_fmt", options.backing_format);
  }
  if (!options.data_file.empty()) add("data_file", options.data_file);
  if (options.data_file_raw) add("data_file_raw", "on");
  add("lazy_refcounts", on_off(options.lazy_refcounts));
  add("refcount_bits", std::to_string(options.refcount_bits));
  add_hints();
  return text;
}

}  // namespace vblk::img
