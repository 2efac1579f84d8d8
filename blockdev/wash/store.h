// The folder of a result, on the disk: what the experiment is, and each run as it was done.
//
//   experiment.json  what was asked for, the seed, the machine, the digests of program and analysis
//   runs.jsonl       a line per run: {"digest":"SHA-256 of what follows","run":{...}}
//   analysis.json    the rules, as they were compiled in
//
// A line is appended by one write(2) and made durable before the next run begins. Whatever kills
// the process leaves whole lines and at most one torn one at the end, which is cut off when the
// experiment goes on. A damaged line anywhere else is an error, and nothing is changed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/vhost_user/socket.h"
#include "blockdev/wash/run.h"

namespace vblk::wash {

// One run and what became of it.
struct StoredRun {
  std::string cell;
  std::string arm;
  int round{0};           // kCalibration, or from 0
  unsigned attempt{0};    // of its block
  bool block_end{false};  // the last of its block, which the next two describe
  bool noisy{false};
  bool is_kept{true};  // false: the block was run again
  double foreign_share{0};
  std::string error;  // why there is no record
  RunRecord record;

  static constexpr int kCalibration = -1;
  static constexpr int kCounting = -2;  // of system calls, which costs time and decides nothing
};

// What must be alike for an experiment to go on: name and value of each thing, on both sides. Only
// the seed need not be said again.
using Identity = std::map<std::string, std::string>;

struct Experiment {
  std::uint64_t seed{0};
  std::string preset;
  std::string started;  // as date(1) says it
  Identity identity;
  std::map<std::string, std::string> machine;  // facts for the report
  std::map<std::string, std::string> devices;  // "image": its path; "ram": why it is not there
};

class ResultStore {
 public:
  // Makes the folder, or opens the one that is there. `wanted` is what this process would do; where
  // an experiment is there already its own seed, time and facts are taken instead. Errors: as the
  // system says; kBusy (another process works on it, or the folder holds something else); kCorrupt
  // (naming file and line); kInvalidArgument (it was made by another program, machine, image or
  // preset; names the differences; not if `force`).
  static Expected<std::unique_ptr<ResultStore>> open(const std::string& folder,
                                                     const Experiment& wanted, bool force);
  // Whether an experiment is in the folder, which need not be there. Error: kBusy: something else
  // is.
  static Expected<bool> look(const std::string& folder);
  // Only to read. `force`: past damaged lines. Errors: as above.
  static Expected<std::unique_ptr<ResultStore>> read(const std::string& folder, bool force);

  [[nodiscard]] const Experiment& experiment() const { return experiment_; }
  [[nodiscard]] const std::vector<StoredRun>& runs() const { return runs_; }
  [[nodiscard]] const std::string& folder() const { return folder_; }
  // What the user should know: a torn line, forced differences.
  [[nodiscard]] const std::vector<std::string>& notes() const { return notes_; }

  // Durable when it returns. Errors: kExhausted (a full disk) and so on; what was there is kept.
  Expected<void> append(StoredRun run);
  // Writes a file of the folder whole or not at all, whatever happens to the machine meanwhile.
  // Durable when it returns.
  Expected<void> write(const std::string& name, const std::string& text) const;

 private:
  explicit ResultStore(std::string folder) : folder_(std::move(folder)) {}
  Expected<void> load(bool may_repair, bool force);
  Expected<void> load_runs(bool may_repair, bool force);
  Expected<void> lock();
  [[nodiscard]] std::string path(const std::string& name) const { return folder_ + "/" + name; }

  const std::string folder_;
  Experiment experiment_;
  std::vector<StoredRun> runs_;
  std::vector<std::string> notes_;
  vhost_user::UniqueFd runs_file_;
};

}  // namespace vblk::wash
