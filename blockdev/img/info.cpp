// `vblk img info`: what is recorded of an image, and of those that it is based on.
#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>
#include <sys/stat.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/json.h"
#include "blockdev/img/names.h"
#include "blockdev/img/output.h"
#include "blockdev/img/snapshot_list.h"
#include "blockdev/img/source.h"
#include "blockdev/qcow2/bitmaps.h"
#include "blockdev/qcow2/snapshots.h"

namespace vblk::img {

namespace {

// Longest chain of backing files that is told of; opening them has the same limit.
constexpr std::size_t kChainMax = 64;
constexpr std::uint64_t kNanoseconds = 1'000'000'000;

struct ImageInfo {
  std::string path;
  std::string format;
  std::uint64_t virtual_size{0};
  std::uint64_t actual_size{0};
  std::optional<qcow2::Header> header;
  std::vector<qcow2::Snapshot> snapshots;
  std::vector<qcow2::Bitmap> bitmaps;

  [[nodiscard]] std::string full_backing_name() const {
    return resolve_name(path, header->backing_file);
  }
};

Expected<ImageInfo> read_info(const SourceOptions& asked) {
  SourceOptions options = asked;
  const auto format = decide_format(options.path, options.format);
  if (!format) return std::unexpected(format.error());
  options.format = *format;
  ImageInfo info{.path = options.path, .format = *format};
  const auto file = open_file(options);
  if (!file) return std::unexpected(file.error());
  struct stat status{};
  if (::stat(options.path.c_str(), &status) == 0)
    info.actual_size = static_cast<std::uint64_t>(status.st_blocks) * 512;
  const std::uint64_t file_bytes = *file ? (*file)->data_bytes() : 0;
  if (*format == "raw") {
    info.virtual_size =
        (file_bytes + blockdev::kSectorBytes - 1) / blockdev::kSectorBytes * blockdev::kSectorBytes;
    return info;
  }
  if (!*file) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' is not a qcow2 image: it is empty", options.path));
  }
  auto header = read_header(**file);
  if (!header) return std::unexpected(std::move(header.error()));
  info.virtual_size = header->size_bytes;
  auto snapshots = qcow2::read_snapshots(**file, *header, make_context);
  if (!snapshots) return std::unexpected(std::move(snapshots.error()));
  info.snapshots = std::move(*snapshots);
  auto bitmaps = qcow2::read_bitmaps(**file, *header, make_context);
  if (!bitmaps) return std::unexpected(std::move(bitmaps.error()));
  info.bitmaps = std::move(*bitmaps);
  info.header = std::move(*header);
  return info;
}

// The image, and with `whole_chain` those below it.
Expected<std::vector<ImageInfo>> read_chain(SourceOptions options, bool whole_chain) {
  std::vector<ImageInfo> chain;
  std::vector<std::pair<dev_t, ino_t>> seen;
  for (;;) {
    struct stat status{};
    if (::stat(options.path.c_str(), &status) == 0) {
      const std::pair identity{status.st_dev, status.st_ino};
      if (std::ranges::find(seen, identity) != seen.end() || chain.size() >= kChainMax) {
        return make_error(
            ErrorKind::kInvalidArgument,
            fmt::format("backing file '{}' creates an endless loop, or the chain is too long",
                        options.path));
      }
      seen.push_back(identity);
    }
    auto info = read_info(options);
    if (!info) return std::unexpected(std::move(info.error()));
    chain.push_back(std::move(*info));
    const ImageInfo& last = chain.back();
    if (!whole_chain || !last.header || last.header->backing_file.empty()) return chain;
    options.path = last.full_backing_name();
    options.format = last.header->backing_format;
  }
}

boost::json::array flag_names(std::uint32_t flags) {
  boost::json::array names;
  if ((flags & qcow2::kBitmapInUse) != 0) names.emplace_back("in-use");
  if ((flags & qcow2::kBitmapAuto) != 0) names.emplace_back("auto");
  return names;
}

boost::json::value format_specific(const ImageInfo& info) {
  const qcow2::Header& header = *info.header;
  boost::json::object data;
  data["compat"] = header.version == 2 ? "0.10" : "1.1";
  data["compression-type"] = header.compression == qcow2::Compression::kZstd ? "zstd" : "zlib";
  data["refcount-bits"] = 1U << header.geometry.refcount_order;
  if (header.version >= 3) {
    data["lazy-refcounts"] = (header.compatible_features & qcow2::kCompatLazyRefcounts) != 0;
    data["corrupt"] = header.has(qcow2::kIncompatCorrupt);
    data["extended-l2"] = header.geometry.extended_l2;
    if (header.has_data_file()) {
      data["data-file"] = header.data_file;
      data["data-file-raw"] = header.data_file_is_raw();
    }
    if (!info.bitmaps.empty()) {
      boost::json::array bitmaps;
      for (const qcow2::Bitmap& bitmap : info.bitmaps) {
        bitmaps.push_back(boost::json::object{
            {"flags", flag_names(bitmap.entry.flags)},
            {"name", bitmap.name},
            {"granularity", std::uint64_t{1} << bitmap.entry.granularity_bits}});
      }
      data["bitmaps"] = std::move(bitmaps);
    }
  }
  return boost::json::object{{"type", "qcow2"}, {"data", std::move(data)}};
}

boost::json::object to_json(const qcow2::Snapshot& snapshot) {
  const qcow2::SnapshotEntry& entry = snapshot.entry;
  boost::json::object object{{"id", snapshot.id},
                             {"name", snapshot.name},
                             {"vm-state-size", entry.vm_state_bytes},
                             {"date-sec", entry.date_seconds},
                             {"date-nsec", entry.date_nanoseconds},
                             {"vm-clock-sec", entry.vm_clock_nanoseconds / kNanoseconds},
                             {"vm-clock-nsec", entry.vm_clock_nanoseconds % kNanoseconds}};
  if (entry.instructions != ~std::uint64_t{0}) object["icount"] = entry.instructions;
  return object;
}

boost::json::object to_json(const ImageInfo& info) {
  boost::json::object object{{"virtual-size", info.virtual_size},
                             {"filename", info.path},
                             {"format", info.format},
                             {"actual-size", info.actual_size},
                             {"dirty-flag", false}};
  if (!info.header) return object;
  const qcow2::Header& header = *info.header;
  object["dirty-flag"] = header.has(qcow2::kIncompatDirty);
  object["cluster-size"] = header.geometry.cluster_bytes();
  object["format-specific"] = format_specific(info);
  if (!header.backing_file.empty()) {
    object["backing-filename"] = header.backing_file;
    object["full-backing-filename"] = info.full_backing_name();
    if (!header.backing_format.empty()) object["backing-filename-format"] = header.backing_format;
  }
  if (!info.snapshots.empty()) {
    boost::json::array snapshots;
    for (const qcow2::Snapshot& snapshot : info.snapshots) snapshots.push_back(to_json(snapshot));
    object["snapshots"] = std::move(snapshots);
  }
  return object;
}

void print_format_specific(const ImageInfo& info) {
  const qcow2::Header& header = *info.header;
  const auto line = [](std::string_view name, std::string_view value) {
    say("    {}: {}\n", name, value);
  };
  const auto yes_or_no = [](bool value) { return value ? "true" : "false"; };
  say("Format specific information:\n");
  line("compat", header.version == 2 ? "0.10" : "1.1");
  line("compression type", header.compression == qcow2::Compression::kZstd ? "zstd" : "zlib");
  if (header.version >= 3)
    line("lazy refcounts",
         yes_or_no((header.compatible_features & qcow2::kCompatLazyRefcounts) != 0));
  if (header.version >= 3 && !info.bitmaps.empty()) {
    say("    bitmaps:\n");
    for (std::size_t i = 0; i < info.bitmaps.size(); ++i) {
      say("        [{}]:\n            flags:\n", i);
      const boost::json::array names = flag_names(info.bitmaps[i].entry.flags);
      for (std::size_t flag = 0; flag < names.size(); ++flag)
        say("                [{}]: {}\n", flag, names[flag].as_string().c_str());
      say("            name: {}\n            granularity: {}\n", printable(info.bitmaps[i].name),
          std::uint64_t{1} << info.bitmaps[i].entry.granularity_bits);
    }
  }
  line("refcount bits", std::to_string(1U << header.geometry.refcount_order));
  if (header.version < 3) return;
  if (header.has_data_file()) {
    line("data file", printable(header.data_file));
    line("data file raw", yes_or_no(header.data_file_is_raw()));
  }
  line("corrupt", yes_or_no(header.has(qcow2::kIncompatCorrupt)));
  line("extended l2", yes_or_no(header.geometry.extended_l2));
}

void print_human(const ImageInfo& info) {
  say("image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
      printable(info.path), info.format, human_size(info.virtual_size), info.virtual_size,
      human_size(info.actual_size));
  if (!info.header) return;
  const qcow2::Header& header = *info.header;
  say("cluster_size: {}\n", header.geometry.cluster_bytes());
  if (header.has(qcow2::kIncompatDirty)) say("cleanly shut down: no\n");
  if (!header.backing_file.empty()) {
    const std::string full = info.full_backing_name();
    say("backing file: {}", printable(header.backing_file));
    if (full != header.backing_file) say(" (actual path: {})", printable(full));
    say("\n");
    if (!header.backing_format.empty())
      say("backing file format: {}\n", printable(header.backing_format));
  }
  if (!info.snapshots.empty()) print_snapshots(info.snapshots);
  print_format_specific(info);
}

}  // namespace

int info_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 7> kOptions{
      "f:", "output:", "backing-chain", "U", "force-share", "object:!", "image-opts1"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  const auto output = parse_output_format(arguments->value_or("output", ""));
  if (!output) return fail(output.error().message);
  if (arguments->names().size() != 1) return fail("give one image; see vblk img --help");
  const SourceOptions source{.path = arguments->names()[0],
                             .format = arguments->value_or("f", ""),
                             .lock = !arguments->has("U") && !arguments->has("force-share")};
  const bool whole_chain = arguments->has("backing-chain");
  const auto chain = read_chain(source, whole_chain);
  if (!chain) return fail(chain.error().message);
  if (*output == OutputFormat::kJson) {
    boost::json::array array;
    for (const ImageInfo& info : *chain) array.push_back(to_json(info));
    say("{}", pretty_json(whole_chain ? boost::json::value(array) : array[0]));
    return 0;
  }
  for (std::size_t i = 0; i < chain->size(); ++i) {
    if (i > 0) say("\n");
    print_human((*chain)[i]);
  }
  return 0;
}

}  // namespace vblk::img
