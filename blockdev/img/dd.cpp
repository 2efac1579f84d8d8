// `vblk img dd`: a part of a disk as a new image.
//
// As with qemu-img 7.2, and other than with dd(1), `count` counts from the beginning of the disk,
// not from where `skip` leads.
#include <array>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/converter.h"
#include "blockdev/img/create_options.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/new_image.h"
#include "blockdev/img/output.h"
#include "blockdev/img/source.h"

namespace vblk::img {

namespace {

constexpr std::uint64_t kBlockBytesMax = std::numeric_limits<std::int32_t>::max();
constexpr std::uint64_t kOffsetMax = std::numeric_limits<std::int64_t>::max();

struct Operands {
  std::optional<std::string> input;
  std::optional<std::string> output;
  std::uint64_t block_bytes{512};
  std::optional<std::uint64_t> count;
  std::uint64_t skip{0};
};

std::unexpected<Error> wrong(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

Expected<Operands> parse_operands(const std::vector<std::string>& words) {
  Operands operands;
  for (const std::string& word : words) {
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    const bool is_number = name == "bs" || name == "count" || name == "skip";
    if (equals == std::string::npos || (!is_number && name != "if" && name != "of"))
      return wrong(
          fmt::format("what is '{}' to be? dd takes bs=, count=, skip=, if= and of=", word));
    if (name == "if") operands.input = value;
    if (name == "of") operands.output = value;
    if (!is_number) continue;
    const auto number = parse_size(value, name);
    if (!number) return std::unexpected(number.error());
    if (name == "bs" && (*number == 0 || *number > kBlockBytesMax))
      return wrong(fmt::format("bs is a size from 1 to {}", kBlockBytesMax));
    if (name == "bs") operands.block_bytes = *number;
    if (name == "count") operands.count = *number;
    if (name == "skip") operands.skip = *number;
  }
  if (!operands.input || !operands.output) return wrong("give both if= and of=");
  return operands;
}

// What of a disk of `disk_bytes` is asked for. Nothing: `skip` leads beyond the end of it.
std::optional<ConvertPlan::Window> window_of(const Operands& operands, std::uint64_t disk_bytes) {
  const std::uint64_t blocks_max = kOffsetMax / operands.block_bytes;
  std::uint64_t end = disk_bytes;
  if (operands.count && *operands.count <= blocks_max)
    end = std::min(end, *operands.count * operands.block_bytes);
  if (operands.skip > blocks_max || operands.skip * operands.block_bytes > end) return std::nullopt;
  const std::uint64_t begin = operands.skip * operands.block_bytes;
  return ConvertPlan::Window{.skip_bytes = begin, .length_bytes = end - begin};
}

Expected<void> copy(Source& source, const Operands& operands, const CreateOptions& create) {
  auto window = window_of(operands, source.size_bytes());
  if (!window) {
    warn("vblk img: {}: cannot skip to where skip leads: it is beyond the end\n", source.path);
    window = {.skip_bytes = 0, .length_bytes = 0};
  }
  ConvertPlan plan{.sources = {},
                   .size_bytes = (window->length_bytes + blockdev::kSectorBytes - 1) /
                                 blockdev::kSectorBytes * blockdev::kSectorBytes,
                   .sparse_bytes = 0,
                   .window = window};
  if (source.node && plan.size_bytes > 0) plan.sources.push_back(&source);
  if (auto checked = check_image_size(create, plan.size_bytes); !checked) return checked;
  const auto context = make_context();
  if (!context) return std::unexpected(context.error());
  auto image = NewImage::begin(*operands.output,
                               {.create = create,
                                .size_bytes = plan.size_bytes,
                                .cache = blockdev::CacheMode::kWriteback,
                                .fully_allocated = true},
                               **context);
  if (!image) return std::unexpected(std::move(image.error()));
  plan.writer = (*image)->writer();
  if (plan.writer == nullptr) plan.target = &(*image)->target().file();
  Progress progress(false, plan.size_bytes);
  if (auto copied = Converter(plan, progress).run(); !copied) return copied;
  return (*image)->finish(**context);
}

}  // namespace

int dd_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 6> kOptions{"f:",          "O:",       "U",
                                                     "force-share", "object:!", "image-opts"};
  auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  auto operands = parse_operands(arguments->names());
  if (!operands) return fail(operands.error().message);
  std::string format = arguments->value_or("f", "");
  if (arguments->has("image-opts")) {
    if (!format.empty())
      return fail("--image-opts tells the format by itself, and -f has no place");
    auto driver = arguments->take_description(*operands->input, kOptions);
    if (!driver) return fail(driver.error().message);
    format = std::move(*driver);
  }
  const auto create = parse_create_options(arguments->value_or("O", "raw"), {});
  if (!create) return fail(create.error().message);
  auto source = open_source({.path = *operands->input,
                             .format = format,
                             .lock = !arguments->has("U") && !arguments->has("force-share")});
  if (!source) return fail(source.error().message);
  if (auto checked = check_target_is_apart(*source, *operands->output); !checked)
    return fail(checked.error().message);
  const auto copied = copy(*source, *operands, *create);
  return copied ? 0 : fail(fmt::format("{}: {}", *operands->output, copied.error().message));
}

}  // namespace vblk::img
