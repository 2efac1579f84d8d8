#include "blockdev/wash/scratch_folder.h"

#include <cerrno>
#include <filesystem>
#include <sys/stat.h>

#include <fmt/core.h>

#include "blockdev/wash/digest.h"

namespace vblk::wash {

namespace {

constexpr std::size_t kDigits = 12;

}  // namespace

Expected<std::unique_ptr<ScratchFolder>> ScratchFolder::make(const std::string& parent,
                                                             const std::string& result_folder) {
  std::error_code error;
  const std::string result = std::filesystem::weakly_canonical(result_folder, error).string();
  const std::string path =
      fmt::format("{}/vblk-wash-{}", parent, sha256(result).substr(0, kDigits));
  std::filesystem::remove_all(path, error);
  if (::mkdir(path.c_str(), 0700) != 0) {
    return make_error(kind_of_errno(errno),
                      fmt::format("cannot make '{}': {}", path, describe_errno(errno)), errno);
  }
  return std::unique_ptr<ScratchFolder>(new ScratchFolder(path));
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace vblk::wash
