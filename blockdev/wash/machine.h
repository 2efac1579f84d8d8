// What a result must say of the machine that it was made on.
#pragma once

#include <map>
#include <string>

#include "blockdev/wash/store.h"

namespace vblk::wash {

// Kernel, processors, file system and block device of `path`, scheduler, mitigations, and so on.
[[nodiscard]] std::map<std::string, std::string> machine_facts(const std::string& image_path);

// "/data/disk.img, 1073741824 bytes, file 12 of file system ...", or of a device its serial number:
// another disk at the same path, or another size, has another one. One that is not there says so.
[[nodiscard]] std::string identity_of_image(const std::string& path);

// By what an experiment is told from another: program, analysis, machine, kernel, and what the
// caller adds. Error: that of reading the program.
Expected<Identity> identity_of_this_process();

}  // namespace vblk::wash
