// `vblk img map`: what of the disk lies where, in the image and in those it is based on.
#include <array>
#include <cerrno>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/names.h"
#include "blockdev/img/output.h"
#include "blockdev/img/source.h"

namespace vblk::img {

namespace {

struct Range {
  std::uint64_t start{0};
  ChainStatus status;
};

bool continues(const Range& range, const Range& next) {
  const ChainStatus& a = range.status;
  const ChainStatus& b = next.status;
  if (a.is_data != b.is_data || a.is_zero != b.is_zero || a.is_present != b.is_present ||
      a.depth != b.depth || a.file_offset.has_value() != b.file_offset.has_value() ||
      a.file != b.file)
    return false;
  return !a.file_offset || *a.file_offset + a.length_bytes == *b.file_offset;
}

// Prints the ranges one after another.
class Printer {
 public:
  explicit Printer(OutputFormat format) : format_(format) {
    if (format_ == OutputFormat::kJson) {
      say("[");
    } else {
      say("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
    }
  }
  // False: the range cannot be told of in this format.
  bool print(const Range& range) {
    const ChainStatus& status = range.status;
    if (format_ == OutputFormat::kHuman) {
      if (!status.is_data || status.is_zero) return true;
      if (!status.file_offset) return false;
      say("{:<16}{:<16}{:<16}{}\n", hex(range.start), hex(status.length_bytes),
          hex(*status.file_offset), printable(*status.file));
      return true;
    }
    if (!is_first_) say(",\n");
    is_first_ = false;
    say("{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, "
        "\"data\": {}",
        range.start, status.length_bytes, status.depth, status.is_present, status.is_zero,
        status.is_data);
    if (status.file_offset) say(", \"offset\": {}", *status.file_offset);
    say("}}");
    return true;
  }
  void end() const {
    if (format_ == OutputFormat::kJson) say("]\n");
  }

 private:
  static std::string hex(std::uint64_t value) {
    return value == 0 ? "0" : fmt::format("{:#x}", value);
  }
  const OutputFormat format_;
  bool is_first_{true};
};

// Tells of [start, end). ENOTSUP: a range cannot be told of.
Task<int> walk(BlockNode& node, IoContext& context, std::uint64_t start, std::uint64_t end,
               Printer& printer) {
  Range current{.start = start};
  for (std::uint64_t at = start; at < end;) {
    Range next{.start = at};
    const int error = co_await chain_status(node, context, at, end - at, kWholeChain, next.status);
    if (error != 0) co_return error;
    at += next.status.length_bytes;
    if (current.status.length_bytes == 0) {
      current = next;
    } else if (continues(current, next)) {
      current.status.length_bytes += next.status.length_bytes;
    } else {
      if (!printer.print(current)) co_return ENOTSUP;
      current = next;
    }
  }
  co_return printer.print(current) ? 0 : ENOTSUP;
}

}  // namespace

int map_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 8> kOptions{"f:",          "output:",    "start-offset:",
                                                     "max-length:", "U",          "force-share",
                                                     "object:!",    "image-opts1"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  const auto output = parse_output_format(arguments->value_or("output", ""));
  if (!output) return fail(output.error().message);
  if (arguments->names().size() != 1) return fail("give one image; see vblk img --help");
  const auto start = parse_size(arguments->value_or("start-offset", "0"), "--start-offset");
  if (!start) return fail(start.error().message);
  const auto length =
      parse_size(arguments->value_or("max-length", "0x7fffffffffffffff"), "--max-length");
  if (!length) return fail(length.error().message);
  auto source = open_source({.path = arguments->names()[0],
                             .format = arguments->value_or("f", ""),
                             .lock = !arguments->has("U") && !arguments->has("force-share")});
  if (!source) return fail(source.error().message);
  Printer printer(*output);
  const std::uint64_t size = source->size_bytes();
  if (*start >= size) {
    // qemu-img says so of nothing, too.
    if (*output == OutputFormat::kJson) static_cast<void>(printer.print({.start = *start}));
    printer.end();
    return 0;
  }
  const std::uint64_t end = *length < size - *start ? *start + *length : size;
  const auto context = make_context();
  if (!context) return fail(context.error().message);
  source->node->attach((*context)->context());
  const int error =
      (*context)->run(walk(*source->node, (*context)->context(), *start, end, printer));
  source->node->detach((*context)->context());
  if (error == ENOTSUP)
    return fail("the image has compressed clusters, which --output=json can tell of");
  if (error != 0) {
    return fail(
        fmt::format("cannot read how '{}' is mapped: {}", source->path, describe_errno(error)));
  }
  printer.end();
  return 0;
}

}  // namespace vblk::img
