// A file that is made: it gets its name when it is complete.
//
//   target               while it is written                     when it is complete
//   no file of the name  has no name (O_TMPFILE)                 gets the name, if that is still
//   free a regular file       the old one stays; the new one has no   takes the old one's place,
//   with its
//                        name, the old one is locked             owner and mode
//   the same, with       it is overwritten, and locked: another
//   several names, a     name, a mount, or a folder that takes
//   mounted file, or a   no new files, leaves no other way
//   folder that is
//   closed
//   a block device       it is overwritten, and locked
//
// So where it can be done, whatever interrupts the work leaves what was there before, and nothing
// else. Where it cannot, a qcow2 image is still none until the end (image_writer.h), and of a
// raw one its user has to know that it was interrupted. A file system without O_TMPFILE gives the
// new file a name of its own, ".NAME.vblk-PID", which SIGKILL leaves behind.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/image.h"
#include "blockdev/raw_node.h"

namespace vblk::img {

// Wishes that some file systems heed; others do not, and nobody is told.
struct FileHints {
  bool nocow{false};                   // no copy on write (btrfs)
  std::uint32_t extent_size_bytes{0};  // of extents (XFS); 0: as the file system likes
};

class Target {
 public:
  // Errors: kNotSupported (a directory, a pipe), kBusy (locked by another process, or mounted),
  // those of open(2) and of a full disk.
  static Expected<std::unique_ptr<Target>> create(const std::string& path,
                                                  blockdev::CacheMode cache, FileHints hints);
  ~Target();
  Target(const Target&) = delete;
  Target& operator=(const Target&) = delete;

  [[nodiscard]] blockdev::RawNode& file() { return *file_; }
  [[nodiscard]] const std::string& path() const { return path_; }
  // A descriptor of the file, buffered.
  [[nodiscard]] int fd() const { return fd_; }
  [[nodiscard]] bool is_block_device() const { return file_->is_block_device(); }
  // Whether what is not written reads as zeroes.
  [[nodiscard]] bool reads_zero() const { return !file_->is_block_device(); }

  // Whether it is written where it is, and so is there all the time.
  [[nodiscard]] bool is_in_place() const { return in_place_; }
  // Whether publish() has given it its name, though something else may have failed.
  [[nodiscard]] bool has_name() const { return has_name_; }
  // Whether publish() takes the name from another file.
  [[nodiscard]] bool replaces() const { return replaces_ && !in_place_; }

  // Gives the file space for `bytes`. 0, or an errno value.
  [[nodiscard]] int allocate(std::uint64_t bytes);
  // It is complete, and closed as far as writing goes. `stable`: also after a power cut; the file's
  // content has been flushed already. Errors: as rename(2) and link(2).
  Expected<void> publish(bool stable);
  // Before publish(), which does it otherwise: what takes the place of another file gets a name
  // beside that one. Errors: as link(2).
  Expected<void> stand_by();
  // Before publish(): the file that would be replaced goes already. Nothing if there is none.
  Expected<void> remove_old(bool stable);
  // A name that publish() has given, and no file had before, is nobody's again.
  void take_name_back();

 private:
  explicit Target(FileHints hints) : hints_(hints) {}
  Expected<void> make_unnamed(blockdev::CacheMode cache);
  Expected<void> open_in_place(blockdev::CacheMode cache);
  [[nodiscard]] std::string temporary_name() const;
  Expected<void> flush_folder() const;
  [[nodiscard]] std::unexpected<Error> error(const char* what, int errno_value) const;

  const FileHints hints_;
  std::string path_;       // as the user says
  std::string real_path_;  // without symbolic links
  std::string temporary_;  // the file's name for now; empty: none
  int fd_{-1};
  int old_fd_{-1};  // of the file that will be replaced, locked
  bool replaces_{false};
  bool in_place_{false};
  bool has_name_{false};
  std::unique_ptr<blockdev::RawNode> file_;
};

// Whether two names, of files that need not be there, are of one target.
[[nodiscard]] bool is_same_target(const std::string& one, const std::string& other);

}  // namespace vblk::img
