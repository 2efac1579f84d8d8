// Judges an image's metadata: whether refcounts are what the references say, whether what is named
// has a place, whether flags are true (qcow2.txt, all of its structures). Finds what `qemu-img
// check` finds, and counts as it does.
//
// Everything that the image names is counted in one pass, and then held against what the refcount
// blocks say. Tables are read in the order in which they lie in the file, neighbours together and
// several pieces at once. A table that many snapshots share is read once and counted as often as it
// is named, so that the work is bounded by the file, whatever the tables say.
//
// Memory: 8 bytes for each cluster of the file, 128 MiB for each TiB with clusters of 64 KiB; the
// L1 and refcount tables; 16 bytes for each L2 table that is named; 16 MiB of tables being read.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "blockdev/qcow2/header.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

struct CheckResult {
  std::uint64_t check_errors{0};  // what could not be judged
  std::uint64_t corruptions{0};
  std::uint64_t leaks{0};
  std::string failure;  // why judging ended early, which is a check_error; empty: it did not
  // Of the corruptions: what a snapshot table written anew does not have; refcounts.
  std::uint64_t snapshot_corruptions{0};
  std::uint64_t refcounts_too_low{0};
  std::uint64_t image_end_offset{0};
  // Of the disk as it is now, without its snapshots; guest clusters.
  std::uint64_t total_clusters{0};
  std::uint64_t allocated_clusters{0};
  std::uint64_t fragmented_clusters{0};
  std::uint64_t compressed_clusters{0};
};

// A finding, as one line; it may be thousands.
using TellFinding = std::function<void(const std::string& line)>;

// Clusters of a file that can be judged: 2^28, for which 2 GiB are needed; 16 TiB with clusters of
// 64 KiB.
inline constexpr std::uint64_t kCheckClustersMax = std::uint64_t{1} << 28;

// `file` holds the image of this header, and nobody changes it. 0, or an errno value where judging
// ended early: EFBIG (too many clusters), those of the file.
blockdev::Task<int> check_image(blockdev::RawNode& file, blockdev::IoContext& context,
                                const Header& header, const TellFinding& tell, CheckResult& result);

// The same, and how often each cluster of the file is named, by everything but the refcount
// structures: what their content ought to be.
blockdev::Task<int> survey_image(blockdev::RawNode& file, blockdev::IoContext& context,
                                 const Header& header, const TellFinding& tell, CheckResult& result,
                                 std::vector<std::uint32_t>& references);

enum class Repair : std::uint8_t {
  kLeaks,  // refcounts that are too high are lowered; if nothing else was wrong, COPIED flags
           // are set to tell so
  kAll,    // and those too low raised, COPIED flags set right, refcount structures written anew,
           // and so the snapshot table where entries lack what they need or have too much
};

struct RepairResult {
  std::uint64_t leaks_fixed{0};
  std::uint64_t corruptions_fixed{0};
};

// Judges, and repairs what the references say how to. Entries that lead nowhere stay, for nobody
// knows what they were; unless they are of clusters that read as zeroes, and lose their space, or
// of snapshots that have nothing at all. `header` changes where new structures are written.
//
// Whatever interrupts it leaves the image no worse, and it can be repeated:
//   - refcount blocks are changed in place, an entry at a time to what it ought to be;
//   - where the table or a block cannot be used, or one is missing, a new table and new blocks are
//     written behind the end of the file, flushed, and put in place by one write of the header;
//   - flags follow when the refcounts that they tell of are stable. A table that something else
//     claims too is not touched;
//   - a new snapshot table comes last, as image_editor.h has it.
// Memory: 4 bytes for each cluster more than judging, and the sectors of L2 tables that change.
// Errors: as check_image(), and EFBIG: the new table would be too large.
blockdev::Task<int> repair_image(blockdev::RawNode& file, blockdev::IoContext& context,
                                 Header& header, Repair repair, const TellFinding& tell,
                                 RepairResult& result);

// For an image that is sound: it is marked neither dirty nor corrupt any more.
blockdev::Task<int> mark_sound(blockdev::RawNode& file, blockdev::IoContext& context,
                               Header& header);

}  // namespace vblk::qcow2
