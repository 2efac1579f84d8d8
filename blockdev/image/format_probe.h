// What an image looks like by how it begins.
//
// A guest can write anything to the beginning of a raw disk, so nothing is opened as a format for
// that: it is a reason to ask, or to refuse.
#pragma once

#include <string>
#include <string_view>

#include "aio/error.h"

namespace vblk::blockdev {

// The name of the format whose images begin as the file does, as qemu-img spells it: "qcow2", or
// one that is not supported ("vmdk", "vhdx", "vpc", "qed", "luks", "parallels", "vdi"); empty: none
// of these. Error: as the system says.
Expected<std::string_view> probe_format(const std::string& path);

// Whether it is a regular file of no bytes, which no node is for: as a raw image a disk of none.
[[nodiscard]] bool is_empty_file(const std::string& path);

}  // namespace vblk::blockdev
