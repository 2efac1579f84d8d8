// `vblk img bitmap`: persistent bitmaps of a qcow2 image.
//
// Actions are carried out in the order in which they are given. As with qemu-img, one that fails
// ends the work, and what those before it have done is kept.
#include <array>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/edited_file.h"
#include "blockdev/img/source.h"
#include "blockdev/img/stored_bitmaps.h"
#include "blockdev/qcow2/bitmap_editor.h"

namespace vblk::img {

namespace {

struct Action {
  std::string kind;    // "add" and so on
  std::string source;  // of "merge": a bitmap
};

struct BitmapOptions {
  std::string path;
  std::string bitmap;
  std::vector<Action> actions;
  std::optional<std::uint64_t> granularity_bytes;
  std::string source_path;  // of "merge"; empty: the image itself
  std::string source_format;
};

std::unexpected<Error> wrong(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

bool is_action(const std::string& option) {
  return option.size() > 1 && option != "object" && option != "image-opts";
}

Expected<BitmapOptions> parse_options(const Arguments& arguments) {
  BitmapOptions options;
  bool adds = false;
  bool merges = false;
  for (const auto& [name, value] : arguments.given()) {
    if (!is_action(name)) continue;
    options.actions.push_back({name, value});
    adds = adds || name == "add";
    merges = merges || name == "merge";
  }
  if (const auto text = arguments.value("g")) {
    const auto bytes = parse_size(*text, "the granularity");
    if (!bytes) return std::unexpected(bytes.error());
    // 0 is none, as in qemu-img.
    if (*bytes != 0) options.granularity_bytes = *bytes;
  }
  options.source_path = arguments.value_or("b", "");
  options.source_format = arguments.value_or("F", "");
  if (arguments.names().size() != 2) return wrong("give an image and the name of a bitmap");
  if (options.actions.empty())
    return wrong("say --add, --remove, --clear, --enable, --disable or --merge");
  if (options.granularity_bytes && !adds) return wrong("-g goes with --add");
  if (arguments.has("F") && !arguments.has("b")) return wrong("-F goes with -b");
  if (arguments.has("b") && !merges) return wrong("-b goes with --merge");
  options.path = arguments.names()[0];
  options.bitmap = arguments.names()[1];
  return options;
}

Task<int> carry_out(qcow2::BitmapEditor& editor, const Action& action, const BitmapOptions& options,
                    const StoredBitmaps* source) {
  const std::string& name = options.bitmap;
  if (action.kind == "add") co_return editor.add(name, options.granularity_bytes);
  if (action.kind == "remove") co_return editor.remove(name);
  if (action.kind == "clear") co_return editor.clear(name);
  if (action.kind == "enable") co_return editor.enable(name, true);
  if (action.kind == "disable") co_return editor.enable(name, false);
  int error = 0;
  if (source == nullptr) {
    error = co_await editor.merge(name, action.source);
  } else {
    const qcow2::BitmapEditor::Other other = source->view();
    error = co_await editor.merge(name, action.source, other);
  }
  co_return error;
}

Expected<void> edit(const BitmapOptions& options) {
  std::optional<StoredBitmaps> source;
  if (!options.source_path.empty()) {
    if (is_same_file(options.source_path, options.path))
      return wrong(fmt::format("'{}' is the image itself: leave -b away", options.source_path));
    auto opened = open_stored_bitmaps(options.source_path, options.source_format, true);
    if (!opened) return std::unexpected(std::move(opened.error()));
    source = std::move(*opened);
  }
  const auto edited = EditedFile::open(options.path, blockdev::CacheMode::kWriteback);
  if (!edited) return std::unexpected(edited.error());
  EditedFile& file = **edited;
  if (source) source->file->attach(file.context());
  qcow2::BitmapEditor editor(file.file(), file.context(), file.header());
  const auto failed = [&](const std::string& what, int error) {
    return make_error(
        kind_of_errno(error),
        fmt::format("cannot {} of '{}': {}", what, options.path, editor.reason(error)), error);
  };
  Expected<void> result;
  if (const int error = file.run(editor.load()); error != 0) {
    result = failed("change bitmaps", error);
  }
  for (const Action& action : options.actions) {
    if (!result) break;
    const int error = file.run(carry_out(editor, action, options, source ? &*source : nullptr));
    if (error == 0) continue;
    result =
        failed(fmt::format("{} bitmap '{}'", action.kind == "merge" ? "merge into" : action.kind,
                           options.bitmap),
               error);
    // What came before it stays.
    if (const int unsaved = file.run(editor.save()); unsaved != 0)
      result = failed("write bitmaps", unsaved);
  }
  if (result) {
    if (const int error = file.run(editor.save()); error != 0)
      result = failed("write bitmaps", error);
  }
  if (source) source->file->detach(file.context());
  return result;
}

}  // namespace

int bitmap_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 12> kOptions{
      "add", "remove", "clear", "enable", "disable",  "merge:",
      "b:",  "F:",     "f:",    "g:",     "object:!", "image-opts1"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  const auto options = parse_options(*arguments);
  if (!options) return fail(options.error().message);
  const auto format = decide_format(options->path, arguments->value_or("f", ""));
  if (!format) return fail(format.error().message);
  if (*format == "raw") return fail(fmt::format("'{}' is raw and has no bitmaps", options->path));
  const auto done = edit(*options);
  return done ? 0 : fail(done.error().message);
}

}  // namespace vblk::img
