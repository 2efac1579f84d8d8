// What a program says on its standard output and error, of which the end is kept.
//
// A thread reads it all, so that a program that says much neither waits for a reader nor costs more
// than what is kept, however long it runs. It ends with the object, even where processes that the
// program has left behind still hold their end.
#pragma once

#include <cstddef>
#include <mutex>
#include <string>
#include <thread>

#include "blockdev/vhost_user/socket.h"

namespace vblk::conform {

class ProgramOutput {
 public:
  ProgramOutput();
  ~ProgramOutput();
  ProgramOutput(const ProgramOutput&) = delete;
  ProgramOutput& operator=(const ProgramOutput&) = delete;

  // The program's end. Once it has it, it is to be closed here.
  [[nodiscard]] int write_end() const { return write_end_.get(); }
  void close_write_end() { write_end_.reset(); }

  // The last of what it has said so far, kKeptBytes at most. Any thread.
  [[nodiscard]] std::string text();

  static constexpr std::size_t kKeptBytes = std::size_t{64} << 10;

 private:
  void read_on();
  // Takes what is there; false: there is nothing to come.
  bool take();

  vhost_user::UniqueFd read_end_;
  vhost_user::UniqueFd write_end_;
  vhost_user::UniqueFd ends_;  // tells the thread to end
  std::mutex mutex_;
  std::string text_;  // under the mutex, as what is read is
  std::thread thread_;
};

}  // namespace vblk::conform
