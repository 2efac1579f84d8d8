// `vblk img check`: whether an image's metadata is what it ought to be, and how to make it so.
#include "blockdev/qcow2/check.h"

#include <array>
#include <cerrno>
#include <optional>
#include <utility>

#include <fmt/core.h>

#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/json.h"
#include "blockdev/img/output.h"
#include "blockdev/img/source.h"

namespace vblk::img {

namespace {

constexpr int kStatusFailed = 1;
constexpr int kStatusCorrupt = 2;
constexpr int kStatusLeaks = 3;
constexpr int kStatusNotSupported = 63;

void print_human(const qcow2::CheckResult& result) {
  if (result.corruptions == 0 && result.leaks == 0 && result.check_errors == 0)
    say("No errors were found on the image.\n");
  if (result.corruptions > 0) {
    say("\n{} errors were found on the image.\nData may be corrupted, or further writes to the "
        "image may corrupt it.\n",
        result.corruptions);
  }
  if (result.leaks > 0) {
    say("\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no "
        "harm to data.\n",
        result.leaks);
  }
  if (result.check_errors > 0) {
    say("\n{} internal errors have occurred during the check.\n", result.check_errors);
  }
  if (result.total_clusters != 0 && result.allocated_clusters != 0) {
    const auto percent = [](std::uint64_t part, std::uint64_t whole) {
      return 100.0 * static_cast<double>(part) / static_cast<double>(whole);
    };
    say("{}/{} = {:0.2f}% allocated, {:0.2f}% fragmented, {:0.2f}% compressed clusters\n",
        result.allocated_clusters, result.total_clusters,
        percent(result.allocated_clusters, result.total_clusters),
        percent(result.fragmented_clusters, result.allocated_clusters),
        percent(result.compressed_clusters, result.allocated_clusters));
  }
  if (result.image_end_offset > 0) say("Image end offset: {}\n", result.image_end_offset);
}

void print_json(const std::string& path, const qcow2::CheckResult& result,
                const qcow2::RepairResult& repaired) {
  boost::json::object object{
      {"filename", path}, {"format", "qcow2"}, {"check-errors", result.check_errors}};
  const auto add = [&object](const char* name, std::uint64_t value) {
    if (value != 0) object[name] = value;
  };
  add("image-end-offset", result.image_end_offset);
  add("corruptions", result.corruptions);
  add("leaks", result.leaks);
  add("corruptions-fixed", repaired.corruptions_fixed);
  add("leaks-fixed", repaired.leaks_fixed);
  add("total-clusters", result.total_clusters);
  add("allocated-clusters", result.allocated_clusters);
  add("fragmented-clusters", result.fragmented_clusters);
  add("compressed-clusters", result.compressed_clusters);
  say("{}", pretty_json(object));
}

std::optional<qcow2::Repair> parse_repair(const std::string& text) {
  if (text == "leaks") return qcow2::Repair::kLeaks;
  if (text == "all") return qcow2::Repair::kAll;
  return std::nullopt;
}

void tell_line(const std::string& line) { warn("{}\n", line); }

// What there is to be done with a file whose header has been read.
struct Job {
  blockdev::RawNode& file;
  qcow2::Header header;
  std::optional<qcow2::Repair> repair;
  bool tells_of_repairs{false};  // on standard output
  qcow2::CheckResult result;
  qcow2::RepairResult repaired;
};

Task<int> carry_out(Job& job, IoContext& context) {
  const qcow2::TellFinding tell_finding = tell_line;
  if (job.repair) {
    const int error = co_await qcow2::repair_image(job.file, context, job.header, *job.repair,
                                                   tell_finding, job.repaired);
    if (error != 0) co_return error;
    if (job.repaired.leaks_fixed + job.repaired.corruptions_fixed > 0 && job.tells_of_repairs) {
      say("The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    "
          "{} "
          "corruptions\n\nDouble checking the fixed image now...\n",
          job.repaired.leaks_fixed, job.repaired.corruptions_fixed);
    }
  }
  int error = co_await qcow2::check_image(job.file, context, job.header, tell_finding, job.result);
  if (error == 0 && job.repair && job.result.check_errors == 0 && job.result.corruptions == 0)
    error = co_await qcow2::mark_sound(job.file, context, job.header);
  co_return error;
}

}  // namespace

int check_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 9> kOptions{
      "q", "f:", "output:", "T:", "U", "force-share", "r:", "object:!", "image-opts1"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  const auto output = parse_output_format(arguments->value_or("output", ""));
  if (!output) return fail(output.error().message);
  const auto cache = parse_cache(arguments->value_or("T", ""), blockdev::CacheMode::kWriteback);
  if (!cache) return fail(cache.error().message);
  std::optional<qcow2::Repair> repair;
  if (const auto text = arguments->value("r")) {
    repair = parse_repair(*text);
    if (!repair) return fail("-r takes leaks or all");
  }
  const bool lock = !arguments->has("U") && !arguments->has("force-share");
  if (repair && !lock) return fail("-U is for looking: with -r nobody else may use the image");
  if (arguments->names().size() != 1) return fail("give one image; see vblk img --help");
  const std::string& path = arguments->names()[0];
  const auto format = decide_format(path, arguments->value_or("f", ""));
  if (!format) return fail(format.error().message);
  const auto file = open_file({.path = path,
                               .format = *format,
                               .cache = *cache,
                               .read_only = !repair || *format == "raw",
                               .lock = lock});
  if (!file) return fail(file.error().message);
  if (*format == "raw") return fail("raw images have nothing to be checked", kStatusNotSupported);
  if (!*file) return fail(fmt::format("'{}' is not a qcow2 image: it is empty", path));
  auto header = read_header(**file);
  if (!header) return fail(header.error().message);
  const auto context = make_context();
  if (!context) return fail(context.error().message);
  (*file)->attach((*context)->context());
  Job job{.file = **file,
          .header = std::move(*header),
          .repair = repair,
          .tells_of_repairs = *output == OutputFormat::kHuman && !arguments->has("q"),
          .result = {},
          .repaired = {}};
  const int error = (*context)->run(carry_out(job, (*context)->context()));
  (*file)->detach((*context)->context());
  const qcow2::CheckResult& result = job.result;
  if (error == EFBIG) {
    return fail(fmt::format("'{}' has more than {} clusters, for which memory would not be enough",
                            path, qcow2::kCheckClustersMax));
  }
  if (error != 0) {
    return fail(fmt::format("'{}' cannot be checked to its end: {}", path, describe_errno(error)));
  }
  if (!result.failure.empty())
    return fail(fmt::format("'{}' cannot be checked to its end: {}", path, result.failure));
  const bool quiet = arguments->has("q");
  if (*output == OutputFormat::kJson && !quiet)
    print_json(arguments->names_as_given()[0], result, job.repaired);
  if (*output == OutputFormat::kHuman && !quiet) print_human(result);
  if (result.check_errors > 0)
    return fail(fmt::format("'{}' cannot be checked to its end", path), kStatusFailed);
  if (result.corruptions > 0) return kStatusCorrupt;
  return result.leaks > 0 ? kStatusLeaks : 0;
}

}  // namespace vblk::img
