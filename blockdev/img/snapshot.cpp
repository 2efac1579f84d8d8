// `vblk img snapshot`.
#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <utility>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/edited_file.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/snapshot_list.h"
#include "blockdev/img/source.h"
#include "blockdev/qcow2/snapshot_editor.h"

namespace vblk::img {

namespace {

enum class Action : std::uint8_t { kList, kApply, kCreate, kRemove, kNone };

constexpr std::array<std::string_view, 4> kVerbs{"list", "apply", "create", "delete"};

// `prints`: otherwise it is only looked whether they can be read.
Expected<void> list(const std::string& path, bool lock, bool prints) {
  const auto file = open_file({.path = path, .format = "qcow2", .lock = lock});
  if (!file) return std::unexpected(file.error());
  if (!*file) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' is not a qcow2 image: it is empty", path));
  }
  const auto header = read_header(**file);
  if (!header) return std::unexpected(header.error());
  const auto snapshots = qcow2::read_snapshots(**file, *header, make_context);
  if (!snapshots) return std::unexpected(snapshots.error());
  if (prints) print_snapshots(*snapshots);
  return {};
}

Expected<void> change(const std::string& path, Action action, const std::string& name) {
  const auto edited = EditedFile::open(path, blockdev::CacheMode::kWriteback);
  if (!edited) return std::unexpected(edited.error());
  const qcow2::Header& header = (*edited)->header();
  if (header.has_data_file()) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("'{}' has its data in a data file, of which there are no "
                                  "snapshots",
                                  path));
  }
  if (action == Action::kApply && header.bitmap_directory) {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("'{}' has persistent bitmaps, which would not be true any more", path));
  }
  qcow2::SnapshotEditor editor((*edited)->file(), (*edited)->context(), header);
  auto task = action == Action::kCreate  ? editor.create(name)
              : action == Action::kApply ? editor.apply(name)
                                         : editor.remove(name);
  const int error = (*edited)->run(std::move(task));
  if (error == 0) return {};
  return make_error(
      kind_of_errno(error),
      fmt::format("cannot {} snapshot '{}' of '{}': {}", kVerbs[static_cast<std::size_t>(action)],
                  name, path, editor.reason(error)),
      error);
}

Expected<void> carry_out(const std::string& path, Action action, const std::string& name,
                         bool lock) {
  const auto format = decide_format(path, "");
  if (!format) return std::unexpected(format.error());
  const bool only_looks = action == Action::kList || action == Action::kNone;
  if (*format != "raw") {
    return only_looks ? list(path, lock, action == Action::kList) : change(path, action, name);
  }
  if (only_looks) return {};
  return make_error(ErrorKind::kNotSupported,
                    fmt::format("'{}' is raw and has no snapshots", path));
}

}  // namespace

int snapshot_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 9> kOptions{
      "q", "l", "a:", "c:", "d:", "U", "force-share", "object:!", "image-opts1"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  constexpr std::array<std::string_view, 4> kLetters{"l", "a", "c", "d"};
  std::size_t asked = 0;
  auto action = Action::kNone;
  std::string name;
  for (std::size_t i = 0; i < kLetters.size(); ++i) {
    if (!arguments->has(kLetters[i])) continue;
    ++asked;
    action = static_cast<Action>(i);
    name = arguments->value_or(kLetters[i], "");
  }
  if (asked > 1) return fail("give one of -l, -a, -c and -d");
  if (arguments->names().size() != 1) return fail("give one image; see vblk img --help");
  // Only a description says it.
  if (arguments->value_or("f", "qcow2") != "qcow2") return fail("a raw image has no snapshots");
  if (name.size() > std::numeric_limits<std::uint16_t>::max())
    return fail("the name of a snapshot has 65535 bytes at most");
  const bool lock = !arguments->has("U") && !arguments->has("force-share");
  if (!lock && action != Action::kList && action != Action::kNone)
    return fail("-U is for looking: with -a, -c and -d nobody else may use the image");
  auto done = carry_out(arguments->names()[0], action, name, lock);
  return done ? 0 : fail(done.error().message);
}

}  // namespace vblk::img
