#include "blockdev/img/output.h"

#include <atomic>
#include <cerrno>

#include "aio/error.h"
#include "blockdev/img/command.h"

namespace vblk::img {

namespace {

// The first one on standard output.
std::atomic<int> output_error{0};

void note_output_error(int error) {
  int none = 0;
  output_error.compare_exchange_strong(none, error == 0 ? EIO : error);
}

}  // namespace

void write_text(std::FILE* stream, std::string_view text) {
  errno = 0;
  const bool is_taken = std::fwrite(text.data(), 1, text.size(), stream) == text.size();
  if (!is_taken && stream == stdout) note_output_error(errno);
}

void flush_output() {
  errno = 0;
  if (std::fflush(stdout) != 0) note_output_error(errno);
}

int finish_output(int status) {
  flush_output();
  const int error = output_error.load();
  if (error == 0 || error == EPIPE || status != 0) return status;
  return fail(fmt::format("the work is done, but what there is to say of it cannot be written: {}",
                          describe_errno(error)));
}

}  // namespace vblk::img
