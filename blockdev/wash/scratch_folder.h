// A folder for the files that runs make beside the image.
#pragma once

#include <memory>
#include <string>

#include "aio/error.h"

namespace vblk::wash {

// Of one experiment: its name follows from the result's, so that whatever a killed process left in
// it is removed by the next one that goes on. Gone with the object.
class ScratchFolder {
 public:
  // Requires that nobody else works on the result. Errors: as the system says.
  static Expected<std::unique_ptr<ScratchFolder>> make(const std::string& parent,
                                                       const std::string& result_folder);
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  explicit ScratchFolder(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};

}  // namespace vblk::wash
