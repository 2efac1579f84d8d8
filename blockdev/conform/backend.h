// The backend under test: a socket that somebody serves, or a program that the suite starts.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <sys/types.h>
#include <vector>

#include "aio/error.h"
#include "blockdev/conform/program_output.h"

namespace vblk::conform {

enum class ImageFormat : std::uint8_t { kRaw, kQcow2 };

// How to change the size of a served disk.
enum class ResizeBy : std::uint8_t { kNothing, kCommand, kQmp };

struct Target {
  // A running backend; empty if the suite starts one.
  std::string socket_path;
  std::string image_path;  // of a running backend, where that is known
  // The program's words, with {socket}, {image} and {monitor} to be filled in.
  std::vector<std::string> command;
  std::vector<std::string> read_only_command;  // none: not known
  std::vector<std::string> resize_command;     // with {monitor} and {bytes}
  ResizeBy resize_by{ResizeBy::kNothing};
  ImageFormat format{ImageFormat::kRaw};
  std::uint64_t image_bytes{std::uint64_t{64} << 20};
  bool may_write{false};
  // The program serves one frontend and ends with it, with status 0: it is started again for the
  // next one.
  bool ends_with_frontend{false};

  [[nodiscard]] bool starts_itself() const { return !command.empty(); }
};

// Splits a command at blanks; '...' and "..." keep them. Error: a quote that does not end.
Expected<std::vector<std::string>> split_command(const std::string& text);

// How a program has ended that was run to its end, or for a while.
struct ProgramEnd {
  bool in_time{false};
  int exit_status{-1};  // -1: killed by a signal, or not in time
  std::string output;   // what it has said, its errors included; the last 64 KiB
};
// Runs a program for so long at most; then it is killed. Error: there is no process.
Expected<ProgramEnd> run_program(const std::vector<std::string>& words,
                                 std::chrono::milliseconds patience);

// What Backend::end() says of exit status 0.
inline constexpr const char* kEndedInOrder = "ended with status 0";

// One backend process with an image of its own. It ends, if not before, with whoever started it.
class Backend {
 public:
  // Makes a new image in `folder` unless there is one, starts the program, and waits until its
  // socket accepts. Errors: kIo with what the program said last.
  static Expected<std::unique_ptr<Backend>> start(const Target& target, const std::string& folder,
                                                  bool read_only);
  ~Backend();
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  [[nodiscard]] const std::string& socket_path() const { return socket_path_; }
  [[nodiscard]] const std::string& image_path() const { return image_path_; }
  [[nodiscard]] pid_t pid() const { return pid_; }
  // The command's words with these paths filled in.
  [[nodiscard]] static std::vector<std::string> fill_in_paths(std::vector<std::string> words,
                                                              const std::string& socket_path,
                                                              const std::string& image_path,
                                                              const std::string& monitor_path);
  // "killed by signal 11 (Segmentation fault)", or empty while it runs.
  [[nodiscard]] std::string end();
  // The last line of what it said; may be empty.
  [[nodiscard]] std::string last_words() const;

  // SIGKILL, waited for.
  void kill();
  // SIGTERM; whether it ended in time, and with status 0.
  [[nodiscard]] std::string terminate(std::chrono::milliseconds patience);
  // The same command on the same image and socket, after it has ended.
  Expected<void> restart();
  // How often it has been started.
  [[nodiscard]] unsigned launches() const { return launches_; }
  // Has the served disk become `bytes` long. Error: kNotSupported where no way is known.
  Expected<void> resize(std::uint64_t bytes);

 private:
  Backend() = default;
  Expected<void> launch();
  Expected<void> wait_until_it_accepts();

  Target target_;
  bool read_only_{false};
  std::string folder_;
  std::string socket_path_;
  std::string image_path_;
  std::string monitor_path_;
  pid_t pid_{-1};
  std::string end_;  // once it has been waited for
  unsigned launches_{0};
  std::unique_ptr<ProgramOutput> output_;
};

}  // namespace vblk::conform
