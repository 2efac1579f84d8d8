// Another header in place of the one that an image has, where more changes than the fields of
// encode_header_fields(): version, extensions.
//
// A disk writes a sector whole or not at all, and no more than that. So what a header is read by
// goes through states that each lie in the first sector:
//
//   1. first sector   fields, extensions, name of the backing file, as they are to be, but without
//                     the names of features, which nobody needs; nothing behind it is looked at
//   2. the rest       of the whole header
//   3. first sector   of the whole header
//
// with a flush after each; only the first where nothing behind the sector changes. Where the name
// of the backing file is too long for the first sector:
//
//   1. elsewhere      the name, in sectors of the cluster that the old header does not use
//   2. first sector   fields, extensions without the names of features, where the name is
//
// Only where there is no such place, or the name of a data file is too long for the first sector,
// some 300 bytes, all of it is written at once.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "blockdev/qcow2/header.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

// Has the header in an image's first cluster say what `header` says. What nobody here knows stays:
// extensions, and fields that come after the known ones, unless version 2 has none. The name of the
// backing file comes behind the extensions, or at byte `name_at` if that is not 0. Returns how many
// bytes are in use. Error: kInvalidArgument: as encode_header().
Expected<std::size_t> rewrite_header(std::span<std::byte> first_cluster, const Header& header,
                                     bool with_feature_names, std::size_t name_at = 0);

// The same in the file, in the steps above, and flushed. 0, or an errno value; EINVAL: `why` says
// why there is no room for it, and nothing has changed.
blockdev::Task<int> replace_header(blockdev::RawNode& file, blockdev::IoContext& context,
                                   const Header& header, std::string& why);

}  // namespace vblk::qcow2
