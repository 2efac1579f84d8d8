// `vblk img measure`: how large the file of a new image will be.
#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/create_options.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/json.h"
#include "blockdev/img/output.h"
#include "blockdev/img/source.h"
#include "blockdev/qcow2/bitmaps.h"
#include "blockdev/qcow2/refcount_layout.h"

namespace vblk::img {

namespace {

struct Measure {
  std::uint64_t required{0};
  std::uint64_t fully_allocated{0};
  std::optional<std::uint64_t> bitmaps;
};

std::uint64_t round_up(std::uint64_t value, std::uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// With every table that the whole disk needs.
std::uint64_t fully_allocated_bytes(const qcow2::Geometry& geometry, std::uint64_t disk_bytes) {
  const std::uint64_t cluster_bytes = geometry.cluster_bytes();
  const std::uint64_t data = round_up(disk_bytes, cluster_bytes);
  const std::uint64_t entry_bytes = std::uint64_t{geometry.l2_entry_words()} * 8;
  const std::uint64_t l2_entries =
      round_up(data / cluster_bytes, std::uint64_t{1} << geometry.l2_bits());
  const std::uint64_t l2_tables = l2_entries * entry_bytes / cluster_bytes;
  const std::uint64_t tables =
      cluster_bytes + l2_entries * entry_bytes + round_up(l2_tables, cluster_bytes / 8) * 8;
  const qcow2::RefcountLayout refcounts =
      qcow2::plan_refcounts(geometry, (tables + data) / cluster_bytes);
  return refcounts.end() * cluster_bytes;
}

// Clusters of the new image that have to be written, in bytes.
Task<int> count_data(BlockNode& node, IoContext& context, std::uint64_t cluster_bytes,
                     std::uint64_t& data_bytes) {
  const std::uint64_t size = node.size_bytes();
  for (std::uint64_t at = 0; at < size;) {
    ChainStatus status;
    const int error = co_await chain_status(node, context, at, size - at, kWholeChain, status);
    if (error != 0) co_return error;
    std::uint64_t end = at + status.length_bytes;
    if (status.is_data) {
      end = round_up(end, cluster_bytes);
      data_bytes += end - at / cluster_bytes * cluster_bytes;
    }
    at = end;
  }
  co_return 0;
}

// The clusters that copies of the image's bitmaps take; nothing where the image cannot have any.
Expected<std::optional<std::uint64_t>> bitmap_bytes(const SourceOptions& options,
                                                    std::uint64_t disk_bytes,
                                                    std::uint64_t cluster_bytes) {
  SourceOptions looking = options;
  looking.lock = false;  // it is open and locked already
  const auto file = open_file(looking);
  if (!file) return std::unexpected(file.error());
  const auto header = read_header(**file);
  if (!header) return std::unexpected(header.error());
  if (header->version < 3) return std::nullopt;
  const auto bitmaps = qcow2::read_bitmaps(**file, *header, make_context);
  if (!bitmaps) return std::unexpected(bitmaps.error());
  std::uint64_t bytes = 0;
  std::uint64_t directory_bytes = 0;
  for (const qcow2::Bitmap& bitmap : *bitmaps) {
    if ((bitmap.entry.flags & qcow2::kBitmapInUse) != 0) continue;
    const std::uint64_t granules =
        (disk_bytes + (std::uint64_t{1} << bitmap.entry.granularity_bits) - 1) >>
        bitmap.entry.granularity_bits;
    const std::uint64_t clusters = round_up((granules + 7) / 8, cluster_bytes) / cluster_bytes;
    bytes += clusters * cluster_bytes + round_up(clusters * 8, cluster_bytes);
    directory_bytes += round_up(24 + bitmap.name.size(), 8);
  }
  return bytes + round_up(directory_bytes, cluster_bytes);
}

Expected<Measure> measure_source(const Arguments& arguments, const CreateOptions& create) {
  if (arguments.has("l") && arguments.value_or("l", "").empty())
    return make_error(ErrorKind::kInvalidArgument, "-l names no snapshot");
  const SourceOptions options{.path = arguments.names()[0],
                              .format = arguments.value_or("f", ""),
                              .snapshot = arguments.value_or("l", ""),
                              .lock = !arguments.has("U") && !arguments.has("force-share")};
  auto source = open_source(options);
  if (!source) return std::unexpected(std::move(source.error()));
  const std::uint64_t size = source->size_bytes();
  if (create.format == "raw")
    return Measure{.required = size, .fully_allocated = size, .bitmaps = std::nullopt};
  if (auto checked = check_image_size(create, size); !checked)
    return std::unexpected(std::move(checked.error()));
  const qcow2::Geometry geometry = create.header(size).geometry;
  const std::uint64_t disk = round_up(size, geometry.cluster_bytes());
  std::uint64_t data_bytes = 0;
  if (!create.backing_file.empty()) {
    data_bytes = disk;  // how much the backing file has of it is not known
  } else if (source->node) {
    const auto context = make_context();
    if (!context) return std::unexpected(context.error());
    source->node->attach((*context)->context());
    const int error = (*context)->run(
        count_data(*source->node, (*context)->context(), geometry.cluster_bytes(), data_bytes));
    source->node->detach((*context)->context());
    if (error != 0) {
      return make_error(
          kind_of_errno(error),
          fmt::format("cannot read how '{}' is mapped: {}", source->path, describe_errno(error)),
          error);
    }
  }
  if (create.preallocation == Preallocation::kFalloc ||
      create.preallocation == Preallocation::kFull)
    data_bytes = disk;
  Measure measure;
  measure.fully_allocated = fully_allocated_bytes(geometry, size);
  measure.required = measure.fully_allocated - disk + data_bytes;
  if (create.version >= 3 && source->format == "qcow2") {
    const auto bitmaps = bitmap_bytes(options, size, geometry.cluster_bytes());
    if (!bitmaps) return std::unexpected(bitmaps.error());
    measure.bitmaps = *bitmaps;
  }
  return measure;
}

Expected<Measure> measure_size(std::uint64_t asked, const CreateOptions& create) {
  const std::uint64_t size = round_up(asked, blockdev::kSectorBytes);
  if (create.format == "raw")
    return Measure{.required = size, .fully_allocated = size, .bitmaps = std::nullopt};
  if (auto checked = check_image_size(create, size); !checked)
    return std::unexpected(std::move(checked.error()));
  const qcow2::Geometry geometry = create.header(size).geometry;
  Measure measure{.fully_allocated = fully_allocated_bytes(geometry, size)};
  measure.required = measure.fully_allocated;
  if (create.preallocation != Preallocation::kFalloc &&
      create.preallocation != Preallocation::kFull)
    measure.required -= round_up(size, geometry.cluster_bytes());
  return measure;
}

void print(const Measure& measure, OutputFormat output) {
  if (output == OutputFormat::kJson) {
    boost::json::object object{{"required", measure.required},
                               {"fully-allocated", measure.fully_allocated}};
    if (measure.bitmaps) object["bitmaps"] = *measure.bitmaps;
    say("{}", pretty_json(object));
    return;
  }
  say("required size: {}\nfully allocated size: {}\n", measure.required, measure.fully_allocated);
  if (measure.bitmaps) say("bitmaps size: {}\n", *measure.bitmaps);
}

}  // namespace

int measure_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 10> kOptions{
      "f:", "O:", "o:", "l:", "U", "force-share", "output:", "size:", "object:!", "image-opts1"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  const auto output = parse_output_format(arguments->value_or("output", ""));
  if (!output) return fail(output.error().message);
  const std::string format = arguments->value_or("O", "raw");
  const auto create = parse_create_options(format, key_values(*arguments));
  if (!create) return fail(create.error().message);
  if (auto checked = check_create_options(*create); !checked) return fail(checked.error().message);
  const auto& names = arguments->names();
  const auto size_text = arguments->value("size");
  if (names.size() > 1 || names.empty() != size_text.has_value())
    return fail("give either one image or --size; see vblk img --help");
  Expected<Measure> measure = Measure{};
  if (size_text) {
    if (arguments->has("f") || arguments->has("l")) return fail("-f and -l go with an image");
    const auto size = parse_size(*size_text, "--size");
    if (!size) return fail(size.error().message);
    measure = measure_size(*size, *create);
  } else {
    measure = measure_source(*arguments, *create);
  }
  if (!measure) return fail(measure.error().message);
  print(*measure, *output);
  return 0;
}

}  // namespace vblk::img
