// `vblk img snapshot`.
#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <utility>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/snapshot_list.h"
#include "blockdev/img/source.h"
#include "blockdev/qcow2/snapshot_editor.h"

namespace vblk::img {

namespace {

enum class Action : std::uint8_t { kList, kApply, kCreate, kRemove };

constexpr std::array<std::string_view, 4> kVerbs{"list", "apply", "create", "delete"};

Expected<void> carry_out(const std::string& path, Action action, const std::string& name,
                         bool lock) {
  const auto format = decide_format(path, "");
  if (!format) return std::unexpected(format.error());
  const bool is_list = action == Action::kList;
  if (*format == "raw") {
    if (is_list) return {};
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("'{}' is raw and has no snapshots", path));
  }
  const auto file =
      open_file({.path = path, .format = *format, .read_only = is_list, .lock = lock});
  if (!file) return std::unexpected(file.error());
  const auto header = read_header(**file);
  if (!header) return std::unexpected(header.error());
  if (is_list) {
    const auto snapshots = qcow2::read_snapshots(**file, *header, make_context);
    if (!snapshots) return std::unexpected(snapshots.error());
    print_snapshots(*snapshots);
    return {};
  }
  if (header->has_data_file()) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("'{}' has its data in a data file, of which there are no "
                                  "snapshots",
                                  path));
  }
  if (header->has(qcow2::kIncompatCorrupt)) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("'{}' is marked corrupt; see 'vblk img check -r all'", path));
  }
  if (action == Action::kApply && header->bitmap_directory) {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("'{}' has persistent bitmaps, which would not be true any more", path));
  }
  const auto context = make_context();
  if (!context) return std::unexpected(context.error());
  (*file)->attach((*context)->context());
  qcow2::SnapshotEditor editor(**file, (*context)->context(), *header);
  auto task = action == Action::kCreate  ? editor.create(name)
              : action == Action::kApply ? editor.apply(name)
                                         : editor.remove(name);
  const int error = (*context)->run(std::move(task));
  (*file)->detach((*context)->context());
  if (error == 0) return {};
  return make_error(
      kind_of_errno(error),
      fmt::format("cannot {} snapshot '{}' of '{}': {}", kVerbs[static_cast<std::size_t>(action)],
                  name, path, editor.why().empty() ? describe_errno(error) : editor.why()),
      error);
}

}  // namespace

int snapshot_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 9> kOptions{
      "q", "l", "a:", "c:", "d:", "U", "force-share", "object:!", "image-opts!"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  constexpr std::array<std::string_view, 4> kLetters{"l", "a", "c", "d"};
  std::size_t asked = 0;
  std::size_t action = 0;
  for (std::size_t i = 0; i < kLetters.size(); ++i) {
    if (!arguments->has(kLetters[i])) continue;
    ++asked;
    action = i;
  }
  if (asked > 1) return fail("give one of -l, -a, -c and -d");
  if (arguments->names().size() != 1) return fail("give one image; see vblk img --help");
  const std::string name = arguments->value_or(kLetters[action], "");
  if (name.size() > std::numeric_limits<std::uint16_t>::max())
    return fail("the name of a snapshot has 65535 bytes at most");
  const bool lock = !arguments->has("U") && !arguments->has("force-share");
  auto done = carry_out(arguments->names()[0], static_cast<Action>(action), name, lock);
  return done ? 0 : fail(done.error().message);
}

}  // namespace vblk::img
