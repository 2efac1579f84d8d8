#include "blockdev/wash/wash.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <unistd.h>
#include <utility>
#include <variant>
#include <vector>

#include <fmt/core.h>

#include "blockdev/bench/output.h"
#include "blockdev/wash/compare.h"
#include "blockdev/wash/digest.h"
#include "blockdev/wash/experiment.h"
#include "blockdev/wash/machine.h"
#include "blockdev/wash/options.h"
#include "blockdev/wash/precondition.h"
#include "blockdev/wash/ram_device.h"
#include "blockdev/wash/report.h"
#include "blockdev/wash/scratch_folder.h"

namespace vblk::wash {

namespace {

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;
// What stands before the reason where a device is not there.
constexpr const char* kSkipped = "skipped: ";

int fail(const Error& error, int status) {
  fmt::print(stderr, "vblk: wash: {}\n", error.message);
  return status;
}

// Where the user is: one line that is rewritten on a terminal, a line each ten seconds elsewhere.
class Progress {
 public:
  explicit Progress(bench::ShowProgress when)
      : is_terminal_(::isatty(STDERR_FILENO) == 1),
        is_on_(when != bench::ShowProgress::kNever),
        interval_(is_terminal_ || when == bench::ShowProgress::kAlways ? 1 : 10) {}
  ~Progress() {
    if (is_dirty_) fmt::print(stderr, "\r\033[K");
  }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void show(const std::string& text) {
    const auto now = std::chrono::steady_clock::now();
    if (!is_on_ || now - last_ < interval_) return;
    last_ = now;
    if (is_terminal_) {
      is_dirty_ = true;
      fmt::print(stderr, "\r\033[K{}", text);
      std::fflush(stderr);
    } else {
      fmt::print(stderr, "{}\n", text);
    }
  }

 private:
  const bool is_terminal_;
  const bool is_on_;
  const std::chrono::seconds interval_;
  bool is_dirty_{false};
  std::chrono::steady_clock::time_point last_;
};

std::string time_left(double seconds) {
  const auto whole = std::llround(seconds);
  if (whole >= 3600) return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
  return whole >= 60 ? fmt::format("{} min {} s", whole / 60, whole % 60)
                     : fmt::format("{} s", whole);
}

std::string now_text() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  std::array<char, 32> text{};
  const std::size_t length =
      std::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M:%S UTC", &parts);
  return {text.data(), length};
}

// All that an experiment needs on this machine.
struct Setting {
  std::vector<Device> devices;
  std::unique_ptr<RamDevice> ram;
  std::unique_ptr<ScratchFolder> scratch;
  std::map<std::string, std::string> device_facts;
};

// "image", and for further ones "image:NAME".
std::string device_name(const WashOptions& options, std::size_t index) {
  if (index == 0) return "image";
  return fmt::format("image:{}",
                     std::filesystem::path(options.image_paths[index]).filename().string());
}

Expected<void> take_images(const WashOptions& options, const Preset& preset,
                           const std::atomic<bool>& interrupted, Progress& progress,
                           Setting& setting) {
  for (std::size_t i = 0; i < options.image_paths.size(); ++i) {
    const std::string& path = options.image_paths[i];
    bool is_new = false;
    if (options.size_bytes != 0) {
      const auto made = make_image(path, options.size_bytes);
      if (!made) return std::unexpected(made.error());
      is_new = *made;
    }
    const auto ready = precondition(path, preset.region_bytes, interrupted, [&](double fraction) {
      progress.show(fmt::format("writing {} once: {:.0f} %", path, fraction * 100));
    });
    if (!ready) {
      if (is_new) ::unlink(path.c_str());
      return std::unexpected(ready.error());
    }
    const std::string name = device_name(options, i);
    setting.devices.push_back({.name = name, .path = path, .region_bytes = ready->region_bytes});
    setting.device_facts[name] =
        fmt::format("{}, {} bytes used, {}", path, ready->region_bytes,
                    ready->was_written ? "written before" : "was written already");
  }
  return {};
}

void take_ram(const WashOptions& options, const Preset& preset, Setting& setting) {
  if (!options.ram) {
    setting.device_facts["ram"] = std::string(kSkipped) + "--ram off";
    return;
  }
  auto ram = RamDevice::create(preset.ram_bytes);
  if (!ram) {
    setting.device_facts["ram"] = kSkipped + ram.error().message;
    return;
  }
  setting.device_facts["ram"] =
      fmt::format("{} over {} bytes of memory", (*ram)->path(), preset.ram_bytes);
  setting.devices.push_back(
      {.name = "ram", .path = (*ram)->path(), .region_bytes = preset.ram_bytes});
  setting.ram = std::move(*ram);
}

// Files lie beside the image, or where the result does if that is a device.
std::string folder_of_files(const WashOptions& options) {
  std::error_code error;
  const std::filesystem::path image = options.image_paths.front();
  if (std::filesystem::is_block_file(image, error)) return options.output_path;
  return std::filesystem::absolute(image, error).parent_path().string();
}

// Requires the result to be ours.
void take_files(const WashOptions& options, Setting& setting) {
  const std::string folder = folder_of_files(options);
  auto scratch = ScratchFolder::make(folder, options.output_path);
  if (scratch) setting.scratch = std::move(*scratch);
  // Where none can be made each run says so; the other cells are measured all the same.
  setting.devices.push_back(
      {.name = "files", .path = setting.scratch ? setting.scratch->path() : folder});
  setting.devices.push_back({.name = "none"});
}

// An experiment has the loop device from its first run to its last, or never.
Expected<void> agree_on_ram(const ResultStore& store, bool force, Setting& setting) {
  const auto& devices = store.experiment().devices;
  const auto before = devices.find("ram");
  const bool had = before != devices.end() && !before->second.starts_with(kSkipped);
  if (had && !setting.ram && !force) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("'{}' was begun with a loop device over memory ({}), which cannot be had now "
                    "({}); go on without it by --force",
                    store.folder(), before->second, setting.device_facts["ram"]));
  }
  if (!had && setting.ram) {
    std::erase_if(setting.devices, [](const Device& device) { return device.name == "ram"; });
    setting.ram.reset();
  }
  return {};
}

void identify_images(const WashOptions& options, Identity& identity) {
  for (std::size_t i = 0; i < options.image_paths.size(); ++i)
    identity[device_name(options, i)] = identity_of_image(options.image_paths[i]);
}

Expected<Experiment> wanted_experiment(const WashOptions& options) {
  auto identity = identity_of_this_process();
  if (!identity) return std::unexpected(identity.error());
  Experiment experiment{.preset = options.preset, .started = now_text()};
  experiment.seed = options.seed ? *options.seed : std::random_device{}();
  experiment.identity = std::move(*identity);
  experiment.identity["preset"] = options.preset;
  experiment.identity["peer"] = options.peer;
  experiment.identity["ram"] = options.ram ? "on" : "off";
  identify_images(options, experiment.identity);
  if (options.seed) experiment.identity["seed"] = fmt::format("{}", *options.seed);
  experiment.machine = machine_facts(options.image_paths.front());
  return experiment;
}

// Which devices an experiment has, by its cells.
std::vector<std::string> devices_of(const ResultStore& store) {
  std::vector<std::string> devices{"none"};
  for (const auto& [name, what] : store.experiment().devices) {
    if (!what.starts_with(kSkipped)) devices.push_back(name);
  }
  return devices;
}

Report report_of(const ResultStore& store, bool complete) {
  const Analysis& analysis = registered_analysis();
  Report report{.analysis = &analysis,
                .preset = analysis.preset(store.experiment().preset),
                .experiment = &store.experiment(),
                .runs = &store.runs(),
                .complete = complete,
                .notes = store.notes()};
  report.cells = cells_of(analysis, *report.preset, devices_of(store));
  for (const auto& [name, what] : store.experiment().devices) {
    if (!what.starts_with(kSkipped)) continue;
    report.skipped.push_back({.device = name,
                              .cells = cells_of(analysis, *report.preset, {name}).size(),
                              .why = what.substr(std::string_view(kSkipped).size())});
  }
  report.judgement = judge(analysis, *report.preset, report.cells, store.runs());
  return report;
}

Expected<void> write_reports(const ResultStore& store, const Report& report) {
  for (const auto& [name, text] : {std::pair("summary.txt", text_report(report)),
                                   std::pair("summary.json", json_report(report)),
                                   std::pair("runs.csv", csv_of_runs(store.runs())),
                                   std::pair("report.html", html_report(report))}) {
    if (auto written = store.write(name, text); !written) return written;
  }
  return {};
}

// Every round of every cell is there, or cannot be: nothing in it has ever worked.
bool is_complete(const ResultStore& store) {
  const Analysis& analysis = registered_analysis();
  const Preset& preset = *analysis.preset(store.experiment().preset);
  const Measured measured = kept_runs(store.runs());
  for (const Cell& cell : cells_of(analysis, preset, devices_of(store))) {
    if (cell.family->kind == Kind::kServe && store.experiment().identity.at("peer").empty())
      continue;
    const auto arms = measured.find(cell.id);
    std::size_t rounds = 0;
    if (arms != measured.end()) {
      for (const auto& [arm, runs] : arms->second) rounds = std::max(rounds, runs.size());
    }
    const bool cannot_be = std::ranges::all_of(cell.family->arms, [&](const std::string& arm) {
      const auto failures = std::ranges::count_if(store.runs(), [&](const StoredRun& run) {
        return run.cell == cell.id && run.arm == arm && !run.error.empty();
      });
      return failures >= kFailuresMax;
    });
    if (rounds < preset.rounds && !cannot_be) return false;
  }
  return true;
}

int tell(const ResultStore& store) {
  const Report report = report_of(store, is_complete(store));
  if (auto written = write_reports(store, report); !written)
    return fail(written.error(), kExitFailure);
  fmt::print("{}\n\n{}\n{}\n{}", label_of(report), headline(report),
             controls_text(report.judgement.controls, *report.preset), skipped_text(report));
  fmt::print("report: {}/report.html (summary.txt, summary.json, runs.csv)\n", store.folder());
  return 0;
}

int report_only(const WashOptions& options) {
  const auto store = ResultStore::read(options.output_path, options.force);
  if (!store) return fail(store.error(), kExitFailure);
  if ((*store)->experiment().identity.at("analysis") != sha256(analysis_text()).substr(0, 16)) {
    return fail({.kind = ErrorKind::kInvalidArgument,
                 .message = fmt::format("'{}' was made by other rules than this program's; its own "
                                        "are in its analysis.json",
                                        options.output_path)},
                kExitFailure);
  }
  for (const std::string& note : (*store)->notes()) fmt::print(stderr, "vblk: wash: {}\n", note);
  return tell(**store);
}

int measure(const WashOptions& options) {
  const Analysis& analysis = registered_analysis();
  const Preset& preset = *analysis.preset(options.preset);
  const auto& interrupted = bench::interrupt_flag();
  auto wanted = wanted_experiment(options);
  if (!wanted) return fail(wanted.error(), kExitFailure);
  Setting setting;
  Expected<bool> done = false;
  std::unique_ptr<ResultStore> store;
  {
    Progress progress(options.show_progress);
    // What cannot be measured leaves no folder behind; what is there already is looked at before
    // anything is written to an image.
    const auto is_there = ResultStore::look(options.output_path);
    if (!is_there) return fail(is_there.error(), kExitFailure);
    if (*is_there) {
      auto opened = ResultStore::open(options.output_path, *wanted, options.force);
      if (!opened) return fail(opened.error(), kExitFailure);
      store = std::move(*opened);
    }
    std::error_code error;
    std::filesystem::create_directories(options.output_path, error);
    if (error) {
      return fail({.kind = kind_of_errno(error.value()),
                   .message = fmt::format("cannot make the folder '{}': {}", options.output_path,
                                          describe_errno(error.value()))},
                  kExitFailure);
    }
    if (auto taken = take_images(options, preset, interrupted, progress, setting); !taken) {
      // Only if it is empty.
      if (!*is_there) std::filesystem::remove(options.output_path, error);
      return fail(taken.error(), kExitFailure);
    }
    if (interrupted) return 128 + SIGINT;
    take_ram(options, preset, setting);
    setting.device_facts["files"] = folder_of_files(options);
    wanted->devices = setting.device_facts;
    if (store) {
      if (auto agreed = agree_on_ram(*store, options.force, setting); !agreed)
        return fail(agreed.error(), kExitFailure);
    } else {
      // Now the images are there, and of their size.
      identify_images(options, wanted->identity);
      wanted->machine = machine_facts(options.image_paths.front());
      auto opened = ResultStore::open(options.output_path, *wanted, options.force);
      if (!opened) return fail(opened.error(), kExitFailure);
      store = std::move(*opened);
    }
    take_files(options, setting);
    for (const std::string& note : store->notes()) fmt::print(stderr, "vblk: wash: {}\n", note);
    const Conduct conduct{
        .analysis = &analysis,
        .preset = &preset,
        .devices = setting.devices,
        .peer = options.peer,
        .interrupted = &interrupted,
        .show =
            [&](const std::string& what, std::size_t runs, std::size_t planned, double seconds) {
              progress.show(fmt::format("{} of {} runs, about {} left: {}", runs, planned,
                                        time_left(seconds), what));
            },
        .carry_out = carry_out_elsewhere};
    done = conduct_experiment(conduct, *store);
  }
  if (!done) {
    // One line says why. The reports of what there is are worth a try, on a full disk, too.
    [[maybe_unused]] const auto written = write_reports(*store, report_of(*store, false));
    return fail(done.error(), kExitFailure);
  }
  const int status = tell(*store);
  if (!*done) {
    fmt::print(stderr, "vblk: wash: interrupted; the same command goes on where it was\n");
    return 128 + SIGINT;
  }
  return status;
}

}  // namespace

int run(int argc, char** argv) {
  const std::span<char*> arguments(argv, static_cast<std::size_t>(argc));
  if (argc > 1 && std::string_view(argv[1]) == "run-one") return run_one();
  if (argc > 1 && std::string_view(argv[1]) == "compare") return run_compare(arguments.subspan(1));
  const auto parsed = parse_options(arguments);
  if (!parsed) return fail(parsed.error(), kExitUsage);
  if (const auto* help = std::get_if<bench::HelpText>(&*parsed)) {
    fmt::print("{}", help->text);
    return 0;
  }
  const auto& options = std::get<WashOptions>(*parsed);
  return options.report_only ? report_only(options) : measure(options);
}

}  // namespace vblk::wash
