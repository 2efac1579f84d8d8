// Metadata on its way to the disk, in the order that write_order.h asks for.
//
// A write-back takes a copy of everything that is dirty, at one moment (of kSlicesPerRound slices
// of the mapping at most, and again while there is more), and then writes
//
//   1. refcount blocks; where the refcount table names new ones: a barrier, and the table
//   2. a barrier, if an L2 slice or an L1 block of the copy waits for one
//   3. L2 slices and L1 blocks
//
// Since the copy is of one moment, all refcounts that its mappings need are in it or on the disk
// already. Mappings that are changed meanwhile are the next write-back's. One at a time; others
// wait, and then mostly find nothing left to do.
//
// Usually there is no barrier in it: the allocator takes refcounts in advance
// (cluster_allocator.h), and the flush of the guest makes them stable before they are needed.
#pragma once

#include <cstdint>

#include "blockdev/qcow2/image_state.h"

namespace vblk::qcow2 {

class WriteBack {
 public:
  explicit WriteBack(ImageState& state) : state_(state) {}
  WriteBack(const WriteBack&) = delete;
  WriteBack& operator=(const WriteBack&) = delete;

  // Writes all that is dirty by now. It is not stable before the next barrier. `token` as for
  // WaitList. Returns an errno value; what could not be written stays dirty.
  Task<int> run(IoContext& context, BlockRequest& token);
  // Flushes the data and the file: what was written before is stable afterwards.
  Task<int> barrier(IoContext& context);
  // Both. The changes made by now are stable afterwards, and what they freed is handed to
  // quarantine.
  Task<int> flush(IoContext& context, BlockRequest& token);

  // Keeps others from writing back until end_turn(): for who rewrites a table as a whole.
  Task<int> take_turn(IoContext& context, BlockRequest& token);
  void end_turn(IoContext& context);
  // Refcount blocks and the refcount table alone; in turn.
  Task<int> write_refcounts(IoContext& context);

 private:
  struct Write;
  struct Round;
  void collect_refcounts(Round& round);
  void collect_mapping(Round& round);
  Task<int> write_refcounts(IoContext& context, Round& round);
  Task<int> write_round(IoContext& context, Round& round);
  Task<int> write_all(IoContext& context, std::vector<Write>& writes);
  void settle(Round& round, int error, IoContext& context);

  ImageState& state_;
  bool busy_{false};
  blockdev::WaitList idle_;
};

}  // namespace vblk::qcow2
