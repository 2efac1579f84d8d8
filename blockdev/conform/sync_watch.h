// Counts how often a file system has made one file stable, whoever asked for it and however: the
// tracepoint in its fsync, which fdatasync, RWF_DSYNC, O_DSYNC, IOCB_CMD_FDSYNC and IORING_OP_FSYNC
// all end in. Needs root and a file system that has such a tracepoint.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::conform {

class SyncWatch {
 public:
  // Watches `path` on all processors. Mounts tracefs where it is missing, for this process alone.
  // Error: kNotSupported with what is missing.
  static Expected<std::unique_ptr<SyncWatch>> open(const std::string& path);

  // Syncs that have ended since open(); on file systems that tell only their begin, begun.
  [[nodiscard]] std::uint64_t count() const;

 private:
  std::vector<vhost_user::UniqueFd> events_;  // one per processor
};

}  // namespace vblk::conform
