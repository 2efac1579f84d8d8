#include "blockdev/wash/store.h"

#include <cerrno>
#include <cstdio>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string_view>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include <boost/json.hpp>
#include <fmt/core.h>

#include "blockdev/bench/output.h"
#include "blockdev/wash/digest.h"

namespace vblk::wash {

namespace {

namespace json = boost::json;

constexpr const char* kExperiment = "experiment.json";
constexpr const char* kRuns = "runs.jsonl";
constexpr const char* kAnalysis = "analysis.json";
constexpr const char* kSeed = "seed";
constexpr int kSchema = 1;
constexpr std::string_view kLineBegin = R"({"digest":")";
constexpr std::string_view kLineMiddle = R"(","run":)";
constexpr std::size_t kDigestLength = 64;

std::unexpected<Error> failed(const std::string& what, const std::string& path, int error) {
  return make_error(kind_of_errno(error),
                    fmt::format("cannot {} '{}': {}", what, path, describe_errno(error)), error);
}

json::object object_of(const std::map<std::string, std::string>& values) {
  json::object object;
  for (const auto& [name, value] : values) object[name] = value;
  return object;
}

std::map<std::string, std::string> texts_of(const json::value& value) {
  std::map<std::string, std::string> texts;
  for (const auto& [name, text] : value.as_object())
    texts[name] = json::value_to<std::string>(text);
  return texts;
}

std::string text_of(const Experiment& experiment) {
  // One member a line, for people.
  const json::object object{{"schema", kSchema},
                            {"preset", experiment.preset},
                            {"seed", experiment.seed},
                            {"started", experiment.started},
                            {"identity", object_of(experiment.identity)},
                            {"machine", object_of(experiment.machine)},
                            {"devices", object_of(experiment.devices)}};
  std::string text = "{\n";
  const char* separator = "";
  for (const auto& [name, value] : object) {
    text +=
        fmt::format("{}  \"{}\": {}", separator, std::string_view(name), json::serialize(value));
    separator = ",\n";
  }
  return text + "\n}\n";
}

Experiment parse_experiment(const std::string& text) {
  const json::value parsed = json::parse(text);
  const json::object& object = parsed.as_object();
  if (object.at("schema").to_number<int>() != kSchema)
    throw std::runtime_error("made by a version of vblk that writes other results");
  return {.seed = object.at("seed").to_number<std::uint64_t>(),
          .preset = json::value_to<std::string>(object.at("preset")),
          .started = json::value_to<std::string>(object.at("started")),
          .identity = texts_of(object.at("identity")),
          .machine = texts_of(object.at("machine")),
          .devices = texts_of(object.at("devices"))};
}

std::string line_of(const StoredRun& run) {
  json::object object{{"cell", run.cell},           {"arm", run.arm},
                      {"round", run.round},         {"attempt", run.attempt},
                      {"block_end", run.block_end}, {"noisy", run.noisy},
                      {"kept", run.is_kept},        {"foreign_share", run.foreign_share},
                      {"error", run.error}};
  object["record"] = json::parse(to_json(run.record));
  const std::string payload = json::serialize(object);
  return fmt::format("{}{}{}{}}}\n", kLineBegin, sha256(payload), kLineMiddle, payload);
}

// Throws for a line that is not what line_of() made.
StoredRun parse_line(std::string_view line) {
  const std::size_t begin = kLineBegin.size() + kDigestLength + kLineMiddle.size();
  if (line.size() <= begin || !line.starts_with(kLineBegin) || !line.ends_with('}') ||
      line.substr(kLineBegin.size() + kDigestLength, kLineMiddle.size()) != kLineMiddle)
    throw std::runtime_error("it is no run");
  const std::string_view payload = line.substr(begin, line.size() - begin - 1);
  if (line.substr(kLineBegin.size(), kDigestLength) != sha256(payload))
    throw std::runtime_error("its digest is wrong");
  const json::value parsed = json::parse(payload);
  const json::object& object = parsed.as_object();
  auto record = parse_run_record(json::serialize(object.at("record")));
  if (!record) throw std::runtime_error(record.error().message);
  return {.cell = json::value_to<std::string>(object.at("cell")),
          .arm = json::value_to<std::string>(object.at("arm")),
          .round = object.at("round").to_number<int>(),
          .attempt = object.at("attempt").to_number<unsigned>(),
          .block_end = object.at("block_end").as_bool(),
          .noisy = object.at("noisy").as_bool(),
          .is_kept = object.at("kept").as_bool(),
          .foreign_share = object.at("foreign_share").to_number<double>(),
          .error = json::value_to<std::string>(object.at("error")),
          .record = std::move(*record)};
}

Expected<std::string> read_text(const std::string& path) {
  std::ifstream file(path);
  if (!file) return failed("read", path, errno);
  return std::string{std::istreambuf_iterator<char>(file), {}};
}

// Whatever is not what a beginning that was killed leaves.
bool holds_something(const std::string& folder, std::error_code& error) {
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename();
    const bool is_ours = name == kAnalysis || name.ends_with(".new") ||
                         (name == kRuns && entry.file_size(error) == 0);
    if (!is_ours) return true;
  }
  return false;
}

std::string differences(const Identity& there, const Identity& here) {
  std::string text;
  const auto add = [&text](const std::string& name, const std::string& old,
                           const std::string& now) {
    text += fmt::format("{}{} ({}, now {})", text.empty() ? "" : ", ", name, old, now);
  };
  for (const auto& [name, value] : here) {
    const auto found = there.find(name);
    if (found == there.end()) {
      // A seed that was not asked for by number is in the experiment all the same.
      add(name, "none", value);
    } else if (found->second != value) {
      add(name, found->second, value);
    }
  }
  for (const auto& [name, value] : there) {
    if (!here.contains(name) && name != kSeed) add(name, value, "none");
  }
  return text;
}

// What is in a folder, such as a new name, is durable when the folder is.
Expected<void> sync_folder(const std::string& folder) {
  const vhost_user::UniqueFd fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd || ::fsync(fd.get()) != 0) return failed("sync the folder", folder, errno);
  return {};
}

}  // namespace

Expected<bool> ResultStore::look(const std::string& folder) {
  std::error_code error;
  if (!std::filesystem::exists(folder, error)) return false;
  if (std::filesystem::exists(folder + "/" + kExperiment, error)) return true;
  const bool is_busy = holds_something(folder, error);
  if (error) return failed("look into", folder, error.value());
  if (!is_busy) return false;
  return make_error(ErrorKind::kBusy,
                    fmt::format("'{}' holds something else than a result of vblk wash; name "
                                "another folder with --output",
                                folder));
}

Expected<std::unique_ptr<ResultStore>> ResultStore::open(const std::string& folder,
                                                         const Experiment& wanted, bool force) {
  const auto is_there = look(folder);
  if (!is_there) return std::unexpected(is_there.error());
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return failed("make the folder", folder, error.value());
  std::unique_ptr<ResultStore> store(new ResultStore(folder));
  if (!*is_there) {
    store->experiment_ = wanted;
    if (auto locked = store->lock(); !locked) return std::unexpected(locked.error());
    if (auto written = store->write(kAnalysis, std::string(analysis_text())); !written)
      return std::unexpected(written.error());
    if (auto written = store->write(kExperiment, text_of(wanted)); !written)
      return std::unexpected(written.error());
    // The folder itself is new, too.
    const auto parent = std::filesystem::absolute(folder, error).lexically_normal().parent_path();
    if (auto synced = sync_folder(parent.string()); !synced) return std::unexpected(synced.error());
    return store;
  }
  if (auto locked = store->lock(); !locked) return std::unexpected(locked.error());
  if (auto loaded = store->load(true, force); !loaded) return std::unexpected(loaded.error());
  const std::string different = differences(store->experiment_.identity, wanted.identity);
  if (!different.empty() && !force) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("'{}' was begun with another {}; name another folder with --output, or mix "
                    "them by --force",
                    folder, different));
  }
  if (!different.empty()) {
    store->notes_.push_back(fmt::format("mixed by --force with another {}", different));
    store->experiment_.machine["mixed"] = different;
    if (auto written = store->write(kExperiment, text_of(store->experiment_)); !written)
      return std::unexpected(written.error());
  }
  return store;
}

Expected<std::unique_ptr<ResultStore>> ResultStore::read(const std::string& folder, bool force) {
  std::unique_ptr<ResultStore> store(new ResultStore(folder));
  if (auto loaded = store->load(false, force); !loaded) return std::unexpected(loaded.error());
  return store;
}

Expected<void> ResultStore::lock() {
  runs_file_.reset(::open(path(kRuns).c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (!runs_file_) return failed("open", path(kRuns), errno);
  if (::flock(runs_file_.get(), LOCK_EX | LOCK_NB) == 0) return {};
  return make_error(ErrorKind::kBusy, fmt::format("another vblk wash is at work in '{}'", folder_),
                    errno);
}

Expected<void> ResultStore::load(bool may_repair, bool force) {
  const auto text = read_text(path(kExperiment));
  if (!text) return std::unexpected(text.error());
  try {
    experiment_ = parse_experiment(*text);
  } catch (const std::exception& exception) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("'{}' is damaged: {}", path(kExperiment), exception.what()));
  }
  return load_runs(may_repair, force);
}

Expected<void> ResultStore::load_runs(bool may_repair, bool force) {
  const auto text = read_text(path(kRuns));
  if (!text) return std::unexpected(text.error());
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text->size(); ++number) {
    const std::size_t end = text->find('\n', begin);
    if (end == std::string::npos) {
      notes_.push_back(
          fmt::format("the last line of '{}' is torn, and was left away", path(kRuns)));
      if (may_repair && ::ftruncate(runs_file_.get(), static_cast<off_t>(begin)) != 0)
        return failed("cut the torn line off", path(kRuns), errno);
      break;
    }
    try {
      runs_.push_back(parse_line(std::string_view(*text).substr(begin, end - begin)));
    } catch (const std::exception& exception) {
      const std::string what =
          fmt::format("'{}' is damaged in line {}: {}", path(kRuns), number + 1, exception.what());
      if (!force)
        return make_error(ErrorKind::kCorrupt, what + "; --force goes on without that line");
      notes_.push_back(what);
    }
    begin = end + 1;
  }
  return {};
}

Expected<void> ResultStore::append(StoredRun run) {
  const std::string line = line_of(run);
  const off_t end = ::lseek(runs_file_.get(), 0, SEEK_END);
  const ssize_t written = ::write(runs_file_.get(), line.data(), line.size());
  const int error = written < 0 ? errno : ENOSPC;
  if (written != static_cast<ssize_t>(line.size())) {
    // A part of a line is worse than none.
    if (written > 0 && ::ftruncate(runs_file_.get(), end) != 0)
      return failed("write and repair", path(kRuns), errno);
    return failed("write", path(kRuns), error);
  }
  if (::fdatasync(runs_file_.get()) != 0) return failed("write", path(kRuns), errno);
  runs_.push_back(std::move(run));
  return {};
}

Expected<void> ResultStore::write(const std::string& name, const std::string& text) const {
  const std::string temporary = path(name + ".new");
  if (auto written = bench::write_file(temporary, text); !written) {
    ::unlink(temporary.c_str());
    return written;
  }
  const vhost_user::UniqueFd fd(::open(temporary.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd || ::fsync(fd.get()) != 0 || ::rename(temporary.c_str(), path(name).c_str()) != 0) {
    const int error = errno;
    ::unlink(temporary.c_str());
    return failed("write", path(name), error);
  }
  return sync_folder(folder_);
}

}  // namespace vblk::wash
