// The file of a qcow2 image whose metadata a command changes: open for writing, locked, with
// engines under it.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "aio/error.h"
#include "blockdev/image.h"
#include "blockdev/private_context.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::img {

class EditedFile {
 public:
  // What was not closed (marked dirty) has its refcounts set right first, as opening it would.
  // Errors: as open_file() and read_header(), kInvalidArgument (empty), kCorrupt (marked so, or not
  // to be repaired).
  // Without `lock` the caller has it locked.
  static Expected<std::unique_ptr<EditedFile>> open(const std::string& path,
                                                    blockdev::CacheMode cache, bool lock = true);
  ~EditedFile();
  EditedFile(const EditedFile&) = delete;
  EditedFile& operator=(const EditedFile&) = delete;

  [[nodiscard]] blockdev::RawNode& file() { return *file_; }
  [[nodiscard]] const qcow2::Header& header() const { return header_; }
  [[nodiscard]] blockdev::IoContext& context() { return context_->context(); }
  [[nodiscard]] blockdev::PrivateContext& own_context() { return *context_; }
  // Carries `task` to its end.
  int run(blockdev::Task<int> task) { return context_->run(std::move(task)); }

 private:
  EditedFile(std::unique_ptr<blockdev::RawNode> file, qcow2::Header header,
             std::unique_ptr<blockdev::PrivateContext> context);
  Expected<void> clean();

  std::unique_ptr<blockdev::RawNode> file_;
  qcow2::Header header_;
  std::unique_ptr<blockdev::PrivateContext> context_;
};

}  // namespace vblk::img
