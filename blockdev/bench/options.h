// The words of `vblk bench`, checked. Names are fio's where fio has one.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <sys/types.h>
#include <variant>
#include <vector>

#include <boost/program_options.hpp>

#include "aio/error.h"
#include "blockdev/bench/image_target.h"
#include "blockdev/bench/job_file.h"

namespace vblk::bench {

enum class ShowProgress : std::uint8_t { kAuto, kAlways, kNever };

// What is measured: one of the two.
struct TargetOptions {
  std::optional<ImageTargetOptions> image;
  std::string socket_path;
  pid_t process{0};  // of the backend behind the socket; 0: unknown
  bool packed_rings{false};
};

struct BenchOptions {
  TargetOptions target;
  std::vector<JobGroup> groups;  // one after the other
  bool count_system_calls{false};
  std::string flush_device;  // empty: none
  bool flush_device_is_named{false};
  bool json{false};
  std::string output_path;   // empty: standard output
  std::string hdr_log_path;  // empty: none
  ShowProgress show_progress{ShowProgress::kAuto};
};

// An answer to --help instead of options.
struct HelpText {
  std::string text;
};

// Error: kInvalidArgument; those of a job file.
Expected<std::variant<BenchOptions, HelpText>> parse_options(std::span<char*> arguments);

// What --output-format and --eta say. Error: kInvalidArgument.
struct OutputWords {
  bool json{false};
  ShowProgress show_progress{ShowProgress::kAuto};
};
Expected<OutputWords> take_output_words(const boost::program_options::variables_map& map);

// The format of an image to measure: raw or qcow2.
Expected<blockdev::ImageFormat> take_format(const std::string& text);

// Parses the words of `command`: no abbreviations, every error one line.
Expected<boost::program_options::variables_map> parse_words(
    std::span<char*> arguments, const boost::program_options::options_description& options,
    const boost::program_options::positional_options_description& positional,
    const std::string& command);

}  // namespace vblk::bench
