// `vblk img create`.
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/create_options.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/names.h"
#include "blockdev/img/new_image.h"
#include "blockdev/img/output.h"
#include "blockdev/img/source.h"

namespace vblk::img {

namespace {

// Clusters that are placed in one go.
constexpr std::uint64_t kClustersPerStep = 65536;

// Nothing is written; with preallocation every cluster is mapped.
Task<int> place_nothing(qcow2::ImageWriter& writer, IoContext& context) {
  const qcow2::Header& header = writer.header();
  const std::uint64_t clusters = header.geometry.clusters_of(header.size_bytes);
  const std::vector<qcow2::NewCluster> nothing(std::min(clusters, kClustersPerStep));
  for (std::uint64_t at = 0; at < clusters; at += nothing.size()) {
    qcow2::ImageWriter::Writes writes;
    const auto step = std::min<std::uint64_t>(nothing.size(), clusters - at);
    int error = writer.place(at, std::span(nothing).first(step), writes);
    if (error == 0) error = co_await qcow2::ImageWriter::carry_out(context, writes);
    if (error != 0) co_return error;
  }
  co_return 0;
}

// The size of what the new image is based on; says that it can be opened.
Expected<std::uint64_t> size_of_backing(const std::string& path, const CreateOptions& create) {
  const auto backing =
      open_source({.path = resolve_name(path, create.backing_file),
                   .format = create.backing_format,
                   // Only its size is asked for: somebody else may be writing to it.
                   .lock = false});
  if (!backing) {
    return make_error(backing.error().kind,
                      "the backing file cannot be used: " + backing.error().message);
  }
  auto apart = check_target_is_apart(*backing, path);
  if (apart && !create.data_file.empty())
    apart = check_target_is_apart(*backing, resolve_name(path, create.data_file));
  if (!apart) return std::unexpected(std::move(apart.error()));
  return backing->size_bytes();
}

Expected<void> make_image(const std::string& path, const CreateOptions& create,
                          std::uint64_t size_bytes) {
  const auto context = make_context();
  if (!context) return std::unexpected(context.error());
  auto image = NewImage::begin(path, {.create = create, .size_bytes = size_bytes}, **context);
  if (!image) return std::unexpected(std::move(image.error()));
  qcow2::ImageWriter* const writer = (*image)->writer();
  if (writer != nullptr && create.maps_everything()) {
    const int error = (*context)->run(place_nothing(*writer, (*context)->context()));
    if (error != 0) {
      return make_error(kind_of_errno(error),
                        fmt::format("cannot write '{}': {}", path, describe_errno(error)), error);
    }
  }
  return (*image)->finish(**context);
}

}  // namespace

int create_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 7> kOptions{"q", "f:", "b:", "F:", "u", "o:", "object:!"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  const std::string format = arguments->value_or("f", "raw");
  if (asks_for_help(*arguments)) {
    if (format != "raw" && format != "qcow2")
      return fail(
          fmt::format("format '{}' is not known here; raw and qcow2 are supported", format));
    print_create_help(format);
    return 0;
  }
  const auto& names = arguments->names();
  if (names.empty()) return fail("give the name of the new image; see vblk img --help");
  if (names.size() > 2) return fail(fmt::format("what is '{}' to be?", names[2]));
  const std::string& path = names[0];
  auto create = parse_create_options(format, key_values(*arguments));
  if (!create) return fail(fmt::format("{}: {}", path, create.error().message));
  if (names.size() == 2) {
    const auto size = parse_size(names[1], "the size of the image");
    if (!size) return fail(size.error().message);
    create->size_bytes = *size;
  }
  if (arguments->has("b")) create->backing_file = *arguments->value("b");
  if (arguments->has("F")) create->backing_format = *arguments->value("F");
  if (auto checked = check_create_options(*create); !checked)
    return fail(fmt::format("{}: {}", path, checked.error().message));
  if (!create->backing_file.empty() && is_same_file(resolve_name(path, create->backing_file), path))
    return fail(fmt::format("{}: it cannot be its own backing file", path));
  const bool looks_at_backing = !create->backing_file.empty() && !arguments->has("u");
  if (looks_at_backing) {
    const auto backing_bytes = size_of_backing(path, *create);
    if (!backing_bytes) return fail(fmt::format("{}: {}", path, backing_bytes.error().message));
    if (!create->size_bytes) create->size_bytes = *backing_bytes;
  }
  if (!create->size_bytes) return fail(fmt::format("{}: a new image needs a size", path));
  const std::uint64_t size = (*create->size_bytes + blockdev::kSectorBytes - 1) /
                             blockdev::kSectorBytes * blockdev::kSectorBytes;
  if (auto checked = check_image_size(*create, size); !checked)
    return fail(fmt::format("{}: {}", path, checked.error().message));
  if (!arguments->has("q"))
    say("{}\n", printable(describe_creation(path, *create, *create->size_bytes)));
  if (auto made = make_image(path, *create, size); !made) return fail(made.error().message);
  return 0;
}

}  // namespace vblk::img
