#include "blockdev/bench/job_file.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_request.h"
#include "blockdev/byte_size.h"

namespace vblk::bench {

namespace {

constexpr unsigned kDepthMax = 1024;
constexpr unsigned kQueuesMax = 64;
constexpr std::size_t kBlockBytesMax = std::size_t{64} << 20;
constexpr std::size_t kBuffersBytesMax = std::size_t{1} << 30;
constexpr double kSecondsMax = 1e6;
constexpr double kRateMax = 1e8;

std::unexpected<Error> wrong(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

std::unexpected<Error> wrong_value(std::string_view key, std::string_view value,
                                   std::string_view expected) {
  return wrong(fmt::format("{} '{}': use {}", key, value, expected));
}

template <typename Number>
Expected<Number> number(std::string_view key, std::string_view value, Number least, Number most) {
  Number parsed{};
  const auto [rest, error] = std::from_chars(value.data(), value.data() + value.size(), parsed);
  if (error != std::errc{} || rest != value.data() + value.size() || !(parsed >= least) ||
      !(parsed <= most))
    return wrong_value(key, value, fmt::format("a number from {} to {}", least, most));
  return parsed;
}

Expected<std::uint64_t> bytes(std::string_view key, std::string_view value) {
  const auto size = blockdev::parse_byte_size(std::string(value));
  if (!size) return wrong_value(key, value, "a size, such as 4k or 1G");
  return *size;
}

// Stores what was parsed, or passes the error on.
template <typename T, typename Target>
Expected<void> store(Expected<T> parsed, Target& target) {
  if (!parsed) return std::unexpected(std::move(parsed.error()));
  target = static_cast<Target>(*parsed);
  return {};
}

Expected<void> set_rw(Workload& workload, std::string_view /*key*/, std::string_view value) {
  std::string_view name = value;
  const bool random = name.starts_with("rand");
  if (random) name.remove_prefix(4);
  struct Kind {
    std::string_view name;
    unsigned read_percent;
    Operation other;
  };
  constexpr std::array kKinds{
      Kind{"read", 100, Operation::kWrite}, Kind{"write", 0, Operation::kWrite},
      Kind{"rw", 50, Operation::kWrite},    Kind{"readwrite", 50, Operation::kWrite},
      Kind{"trim", 0, Operation::kDiscard}, Kind{"writezeroes", 0, Operation::kWriteZeroes},
      Kind{"flush", 0, Operation::kFlush}};
  const auto* const kind = std::ranges::find(kKinds, name, &Kind::name);
  if (kind == kKinds.end() || (random && kind->name == "flush") || value == "randreadwrite") {
    return wrong_value("rw", value,
                       "read, write, rw, trim, writezeroes, the same with rand in front, or flush");
  }
  workload.read_percent = kind->read_percent;
  workload.other = kind->other;
  if (!random) {
    workload.distribution = Distribution::kSequential;
  } else if (workload.distribution == Distribution::kSequential) {
    workload.distribution = Distribution::kUniform;
  }
  return {};
}

Expected<void> set_mix(Workload& workload, std::string_view key, std::string_view value) {
  const auto percent = number<unsigned>(key, value, 0, 100);
  if (!percent) return std::unexpected(percent.error());
  if (workload.other != Operation::kWrite || workload.read_percent % 100 == 0)
    return wrong(fmt::format("{} is for rw and randrw, and comes after them", key));
  workload.read_percent = *percent;
  return {};
}

Expected<void> set_block_bytes(Workload& workload, std::string_view key, std::string_view value) {
  const auto size = bytes(key, value);
  if (!size || *size == 0 || *size % blockdev::kSectorBytes != 0 || *size > kBlockBytesMax)
    return wrong_value(key, value,
                       value.contains(',') ? "one size, a multiple of 512 up to 64M"
                                           : "a multiple of 512 up to 64M");
  workload.block_bytes = *size;
  return {};
}

Expected<void> set_sync(Workload& workload, std::string_view key, std::string_view value) {
  if (value != "none" && value != "0" && value != "dsync")
    return wrong_value(key, value, "none or dsync");
  workload.write_through = value == "dsync";
  return {};
}

Expected<void> set_flush_every(Workload& workload, std::string_view key, std::string_view value) {
  return store(number<unsigned>(key, value, 0, 1'000'000'000), workload.flush_every);
}

Expected<void> set_rate_process(Workload& workload, std::string_view key, std::string_view value) {
  if (value != "linear" && value != "poisson") return wrong_value(key, value, "linear or poisson");
  workload.arrival = value == "linear" ? Arrival::kFixed : Arrival::kPoisson;
  return {};
}

Expected<void> set_rate(Workload& workload, std::string_view key, std::string_view value) {
  if (workload.arrival == Arrival::kClosed) workload.arrival = Arrival::kFixed;
  return store(number<double>(key, value, 0.001, kRateMax), workload.rate_per_second);
}

Expected<void> set_distribution(Workload& workload, std::string_view key, std::string_view value) {
  if (workload.distribution == Distribution::kSequential)
    return wrong(fmt::format("{} is for rw that begins with rand, and comes after it", key));
  if (value == "random" || value == "uniform") {
    workload.distribution = Distribution::kUniform;
    return {};
  }
  if (!value.starts_with("zipf")) return wrong_value(key, value, "uniform or zipf:THETA");
  workload.distribution = Distribution::kZipf;
  value.remove_prefix(4);
  if (value.empty()) return {};
  if (!value.starts_with(':')) return wrong_value(key, value, "uniform or zipf:THETA");
  return store(number<double>(key, value.substr(1), 0.01, 10), workload.zipf_theta);
}

Expected<void> set_verify(Workload& workload, std::string_view key, std::string_view value) {
  if (value != "pattern" && value != "0")
    return wrong_value(key, value, "pattern, which is written from the seed, or 0");
  workload.verify = value == "pattern";
  return {};
}

struct Key {
  std::string_view name;
  Expected<void> (*set)(Workload& workload, std::string_view key, std::string_view value);
};

constexpr std::array kKeys{
    Key{"rw", set_rw},
    Key{"readwrite", set_rw},
    Key{"rwmixread", set_mix},
    Key{"bs", set_block_bytes},
    Key{"blocksize", set_block_bytes},
    Key{"iodepth",
        [](Workload& workload, std::string_view key, std::string_view value) {
          return store(number<unsigned>(key, value, 1, kDepthMax), workload.depth);
        }},
    Key{"numjobs",
        [](Workload& workload, std::string_view key, std::string_view value) {
          return store(number<unsigned>(key, value, 1, kQueuesMax), workload.queue_count);
        }},
    Key{"offset",
        [](Workload& workload, std::string_view key, std::string_view value) {
          return store(bytes(key, value), workload.offset_bytes);
        }},
    Key{"size",
        [](Workload& workload, std::string_view key, std::string_view value) {
          return store(bytes(key, value), workload.size_bytes);
        }},
    Key{"io_size",
        [](Workload& workload, std::string_view key, std::string_view value) {
          return store(bytes(key, value), workload.amount_bytes);
        }},
    Key{"runtime",
        [](Workload& workload, std::string_view key, std::string_view value) {
          return store(parse_duration(key, value), workload.run_time);
        }},
    Key{"ramp_time",
        [](Workload& workload, std::string_view key, std::string_view value) {
          return store(parse_duration(key, value), workload.ramp_time);
        }},
    Key{"fsync", set_flush_every},
    Key{"fdatasync", set_flush_every},
    Key{"sync", set_sync},
    Key{"rate_iops", set_rate},
    Key{"rate_process", set_rate_process},
    Key{"random_distribution", set_distribution},
    Key{"verify", set_verify},
    Key{"randseed",
        [](Workload& workload, std::string_view key, std::string_view value) {
          return store(number<std::uint64_t>(key, value, 0, ~std::uint64_t{0}), workload.seed);
        }},
};

// Keys of fio that people write and that the command line decides here.
constexpr std::array<std::pair<std::string_view, std::string_view>, 4> kElsewhere{{
    {"ioengine", "the engine is chosen by --aio, or is the backend's own"},
    {"direct", "the page cache is chosen by --cache, or is the backend's own"},
    {"filename", "the disk is named by --image or --socket-path"},
    {"directory", "the disk is named by --image or --socket-path"},
}};

std::string_view trim(std::string_view text) {
  const auto begin = text.find_first_not_of(" \t\r");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1);
}

// A section while it is read. Its keys are applied in the order that dependencies want: what is
// said of a rw comes after the rw, wherever it stands.
struct Section {
  std::string name;
  std::vector<std::pair<std::string, std::string>> keys;
  bool stonewall{false};
  bool time_based{false};
};

Expected<Workload> job_of(const Section& section, Workload workload, bool time_based) {
  workload.name = section.name;
  const auto apply = [&](bool rw_keys) -> Expected<void> {
    for (const auto& [key, value] : section.keys) {
      if ((key == "rw" || key == "readwrite") != rw_keys) continue;
      if (auto done = set_key(workload, key, value); !done) return done;
    }
    return {};
  };
  if (auto done = apply(true); !done) return std::unexpected(std::move(done.error()));
  if (auto done = apply(false); !done) return std::unexpected(std::move(done.error()));
  if (time_based && workload.run_time.count() == 0) return wrong("time_based needs a runtime");
  if (!time_based && workload.amount_bytes == 0) {
    workload.amount_bytes = workload.size_bytes;
    if (workload.amount_bytes == 0 && workload.run_time.count() == 0)
      return wrong("it would never end; give size, io_size or runtime");
  }
  return workload;
}

}  // namespace

Expected<std::chrono::nanoseconds> parse_duration(std::string_view key, std::string_view value) {
  struct Unit {
    std::string_view suffix;
    double seconds;
  };
  constexpr std::array kUnits{Unit{"us", 1e-6}, Unit{"ms", 1e-3}, Unit{"s", 1},
                              Unit{"m", 60},    Unit{"h", 3600},  Unit{"d", 86400}};
  double factor = 1;
  std::string_view digits = value;
  for (const Unit& unit : kUnits) {
    if (!value.ends_with(unit.suffix)) continue;
    factor = unit.seconds;
    digits.remove_suffix(unit.suffix.size());
    break;
  }
  const auto count = number<double>(key, digits, 0, kSecondsMax);
  if (!count || *count * factor > kSecondsMax)
    return wrong_value(key, value, "seconds, such as 10, 500ms or 2m");
  return std::chrono::nanoseconds(std::llround(*count * factor * 1e9));
}

Expected<void> set_key(Workload& workload, std::string_view key, std::string_view value) {
  const auto* const known = std::ranges::find(kKeys, key, &Key::name);
  if (known != kKeys.end()) return known->set(workload, key, value);
  for (const auto& [name, why] : kElsewhere) {
    if (name == key) return wrong(fmt::format("{}: {}", key, why));
  }
  return wrong(fmt::format("'{}' means nothing here; see vblk bench --help for what does", key));
}

Expected<void> check(const Workload& workload) {
  if (workload.arrival != Arrival::kClosed && workload.rate_per_second == 0)
    return wrong("rate_process needs rate_iops");
  if (workload.flush_every != 0 && !workload.writes())
    return wrong("fsync is for writes; use rw=write, randwrite, rw or randrw");
  if (workload.write_through && !workload.writes())
    return wrong("sync is for writes; use rw=write, randwrite, rw or randrw");
  if (workload.verify && workload.read_percent < 100 && workload.other != Operation::kWrite)
    return wrong("verify is for reads and writes; what a trim leaves behind is not known");
  if (workload.verify && workload.offset_bytes % blockdev::kSectorBytes != 0)
    return wrong("verify needs an offset of whole sectors");
  if (workload.offset_bytes % blockdev::kSectorBytes != 0)
    return wrong("offset: use a multiple of 512");
  if (workload.size_bytes != 0 && workload.size_bytes < workload.block_bytes)
    return wrong("size is smaller than one request (bs)");
  if (workload.size_bytes % workload.block_bytes != 0)
    return wrong("size is not a whole number of requests (bs)");
  if (workload.amount_bytes != 0 && workload.amount_bytes % workload.block_bytes != 0)
    return wrong("io_size is not a whole number of requests (bs)");
  if (std::size_t{workload.queue_count} * workload.depth * workload.block_bytes > kBuffersBytesMax)
    return wrong("iodepth times numjobs times bs is more than 1G of buffers; use less of one");
  return {};
}

Expected<std::vector<JobGroup>> parse_job_file(std::string_view text, const std::string& name,
                                               const Workload& defaults) {
  std::vector<JobGroup> groups;
  Section global{.name = "global"};
  std::optional<Section> section;
  std::size_t section_line = 0;
  const auto at = [&name](std::size_t line, const Error& error) {
    return wrong(fmt::format("{}:{}: {}", name, line, error.message));
  };
  const auto end_section = [&]() -> Expected<void> {
    if (!section || section->name == "global") return {};
    Section whole = *std::exchange(section, std::nullopt);
    whole.keys.insert(whole.keys.begin(), global.keys.begin(), global.keys.end());
    auto job = job_of(whole, defaults, whole.time_based || global.time_based);
    if (job) {
      if (auto checked = check(*job); !checked) job = std::unexpected(std::move(checked.error()));
    }
    if (!job) return at(section_line, job.error());
    if (groups.empty() || whole.stonewall || global.stonewall) groups.emplace_back();
    groups.back().push_back(*job);
    return {};
  };
  std::size_t line_number = 0;
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    const std::string_view line = trim(text.substr(0, end));
    text = end == std::string_view::npos ? std::string_view{} : text.substr(end + 1);
    ++line_number;
    if (line.empty() || line.front() == '#' || line.front() == ';') continue;
    if (line.front() == '[') {
      if (line.back() != ']' || line.size() < 3)
        return at(line_number, wrong("a section is [name]").error());
      if (auto done = end_section(); !done) return std::unexpected(std::move(done.error()));
      section_line = line_number;
      section = Section{.name = std::string(line.substr(1, line.size() - 2))};
      continue;
    }
    if (!section) return at(line_number, wrong("a key before the first [section]").error());
    Section& target = section->name == "global" ? global : *section;
    const std::size_t equals = line.find('=');
    const std::string key(trim(line.substr(0, equals)));
    if (equals == std::string_view::npos) {
      if (key == "stonewall" || key == "wait_for_previous") {
        target.stonewall = true;
      } else if (key == "time_based") {
        target.time_based = true;
      } else {
        return at(line_number, wrong(fmt::format("'{}' needs a value", key)).error());
      }
      continue;
    }
    const std::string value(trim(line.substr(equals + 1)));
    if (key == "time_based") {
      target.time_based = value != "0";
      continue;
    }
    // Each value by itself is checked here, where its line is known.
    Workload trial = defaults;
    trial.distribution = Distribution::kUniform;
    trial.read_percent = 50;
    if (auto done = set_key(trial, key, value); !done) return at(line_number, done.error());
    target.keys.emplace_back(key, value);
  }
  if (auto done = end_section(); !done) return std::unexpected(std::move(done.error()));
  if (groups.empty()) return wrong(fmt::format("{}: there is no job in it", name));
  return groups;
}

Expected<std::vector<JobGroup>> read_job_file(const std::string& path, const Workload& defaults) {
  std::ifstream file(path);
  if (!file) {
    const int error = errno;
    return make_error(kind_of_errno(error),
                      fmt::format("cannot open the job file '{}': {}", path, describe_errno(error)),
                      error);
  }
  const std::string text(std::istreambuf_iterator<char>(file), {});
  return parse_job_file(text, path, defaults);
}

}  // namespace vblk::bench
