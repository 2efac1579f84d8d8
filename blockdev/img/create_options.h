// The options of a new image, as -o of `create`, `convert` and `measure` takes them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "aio/error.h"
#include "blockdev/img/target.h"
#include "blockdev/qcow2/header.h"

namespace vblk::img {

enum class Preallocation : std::uint8_t { kOff, kMetadata, kFalloc, kFull };
// "off" and so on. Error: kInvalidArgument.
Expected<Preallocation> parse_preallocation(const std::string& text);

struct CreateOptions {
  std::string format{"raw"};
  std::optional<std::uint64_t> size_bytes;
  Preallocation preallocation{Preallocation::kOff};
  bool preallocation_given{false};
  FileHints hints;
  bool nocow_given{false};
  bool extent_size_given{false};
  // qcow2 alone.
  std::string compat;  // as given; empty: not given
  unsigned version{3};
  std::uint64_t cluster_bytes{65536};
  unsigned refcount_bits{16};
  bool extended_l2{false};
  bool lazy_refcounts{false};
  qcow2::Compression compression{qcow2::Compression::kZlib};
  std::string backing_file;
  std::string backing_format;
  std::string data_file;
  bool data_file_raw{false};

  // The header of such an image, without the places of its tables.
  [[nodiscard]] qcow2::Header header(std::uint64_t size_bytes) const;
  // Whether every cluster gets its space.
  [[nodiscard]] bool maps_everything() const {
    return preallocation != Preallocation::kOff || data_file_raw;
  }
};

// Errors: kInvalidArgument (unknown option, value that makes no sense, options that exclude each
// other), kNotSupported (an option of qemu-img's that is not supported here, by its name).
Expected<CreateOptions> parse_create_options(
    const std::string& format, const std::vector<std::pair<std::string, std::string>>& given);

// What those given together must be, after all of them are known. Errors as above.
Expected<void> check_create_options(const CreateOptions& options);

// Whether an image of this size can be: of the format's tables. Error: kInvalidArgument.
Expected<void> check_image_size(const CreateOptions& options, std::uint64_t size_bytes);

// "-o help".
void print_create_help(const std::string& format);

// "Formatting 'a.qcow2', fmt=qcow2 ...".
[[nodiscard]] std::string describe_creation(const std::string& path, const CreateOptions& options,
                                            std::uint64_t size_bytes);

}  // namespace vblk::img
