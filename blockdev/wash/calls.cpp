// The kinds "calls" and "range": calls on files through aio/file_call.h, driven by the load
// generator of vblk bench where they are a load, and one by one where the file must be made dirty
// before each.
#include <array>
#include <cerrno>
#include <cstring>
#include <deque>
#include <fcntl.h>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "aio/file_call.h"
#include "blockdev/bench/measure.h"
#include "blockdev/bench/noise.h"
#include "blockdev/bench/process_usage.h"
#include "blockdev/byte_size.h"
#include "blockdev/vhost_user/socket.h"
#include "blockdev/wash/run.h"

namespace vblk::wash {

using vhost_user::UniqueFd;

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kReadaheadBytes = 131072;
// Of the folder that names are looked up in.
constexpr std::uint64_t kNames = 512;
constexpr std::uint64_t kFileBytes = std::uint64_t{32} << 20;

std::unexpected<Error> failed(const std::string& what, const std::string& path, int error) {
  return make_error(kind_of_errno(error),
                    fmt::format("cannot {} '{}': {}", what, path, describe_errno(error)), error);
}

// A folder that is gone afterwards.
class Folder {
 public:
  static Expected<std::unique_ptr<Folder>> make(const std::string& parent) {
    std::string path = parent + "/vblk-wash-XXXXXX";
    if (::mkdtemp(path.data()) == nullptr) return failed("make a folder in", parent, errno);
    return std::unique_ptr<Folder>(new Folder(path));
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  explicit Folder(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};

// A file of noise, written and stable.
Expected<UniqueFd> make_file(const std::string& path, std::uint64_t size_bytes) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!fd) return failed("make", path, errno);
  std::vector<std::byte> chunk(std::size_t{1} << 20);
  bench::fill_with_noise(chunk, 1);
  for (std::uint64_t done = 0; done < size_bytes; done += chunk.size()) {
    if (::pwrite(fd.get(), chunk.data(), chunk.size(), static_cast<off_t>(done)) !=
        static_cast<ssize_t>(chunk.size()))
      return failed("write", path, errno == 0 ? ENOSPC : errno);
  }
  if (::fsync(fd.get()) != 0) return failed("sync", path, errno);
  return fd;
}

class Mapping {
 public:
  static Expected<std::unique_ptr<Mapping>> make(int fd, std::uint64_t size_bytes) {
    void* const address = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) return failed("map", "a file", errno);
    return std::unique_ptr<Mapping>(new Mapping(address, size_bytes));
  }
  ~Mapping() { ::munmap(address_, size_bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  [[nodiscard]] std::byte* at(std::uint64_t offset_bytes) const {
    return static_cast<std::byte*>(address_) + offset_bytes;
  }

 private:
  Mapping(void* address, std::uint64_t size_bytes) : address_(address), size_bytes_(size_bytes) {}
  void* const address_;
  const std::uint64_t size_bytes_;
};

// The files that calls are made on.
struct Files {
  std::unique_ptr<Folder> folder;
  UniqueFd folder_fd;
  UniqueFd file;
  std::unique_ptr<Mapping> mapping;
  std::vector<std::string> names;
};

Expected<Files> make_files(const std::string& parent) {
  Files files;
  auto folder = Folder::make(parent);
  if (!folder) return std::unexpected(folder.error());
  files.folder = std::move(*folder);
  const std::string& path = files.folder->path();
  files.folder_fd.reset(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!files.folder_fd) return failed("open", path, errno);
  auto file = make_file(path + "/file", kFileBytes);
  if (!file) return std::unexpected(file.error());
  files.file = std::move(*file);
  auto mapping = Mapping::make(files.file.get(), kFileBytes);
  if (!mapping) return std::unexpected(mapping.error());
  files.mapping = std::move(*mapping);
  for (std::uint64_t i = 0; i < kNames; ++i) {
    files.names.push_back(fmt::format("name{}", i));
    if (::linkat(files.folder_fd.get(), "file", files.folder_fd.get(), files.names.back().c_str(),
                 0) != 0)
      return failed("link", files.names.back(), errno);
  }
  return files;
}

// What a call needs to have something to do, in the caller's thread and the same for every engine:
// a name to unlink, a page to sync, pages that are not in the cache.
class Preparation {
 public:
  Preparation(aio::FileCallKind kind, const Files& files) : kind_(kind), files_(files) {}

  // An errno value.
  [[nodiscard]] int prepare(aio::FileCall& call, std::uint64_t index) const {
    call.kind = kind_;
    call.fd = files_.file.get();
    call.offset_bytes = index * kPageBytes % kFileBytes;
    call.length_bytes = kPageBytes;
    switch (kind_) {
      case aio::FileCallKind::kUnlinkat:
      case aio::FileCallKind::kOpenat:
        call.fd = files_.folder_fd.get();
        call.name = files_.names[index % kNames].c_str();
        // Who has it in flight already unlinks it as well, or finds it gone.
        if (kind_ == aio::FileCallKind::kUnlinkat &&
            ::linkat(call.fd, "file", call.fd, call.name, 0) != 0 && errno != EEXIST)
          return errno;
        return 0;
      case aio::FileCallKind::kFadvise:
        call.offset_bytes = index * kReadaheadBytes % kFileBytes;
        call.length_bytes = kReadaheadBytes;
        return ::posix_fadvise(call.fd, static_cast<off_t>(call.offset_bytes),
                               static_cast<off_t>(call.length_bytes), POSIX_FADV_DONTNEED);
      case aio::FileCallKind::kMsync:
        call.address = files_.mapping->at(call.offset_bytes);
        *static_cast<volatile std::byte*>(call.address) = std::byte(index & 0xff);
        return 0;
      default: {
        const std::byte value{static_cast<unsigned char>(index & 0xff)};
        return ::pwrite(call.fd, &value, 1, static_cast<off_t>(call.offset_bytes)) == 1 ? 0 : errno;
      }
    }
  }

 private:
  const aio::FileCallKind kind_;
  const Files& files_;
};

class CallPort final : public bench::Port {
 public:
  CallPort(std::unique_ptr<aio::FileCallEngine> engine, const Preparation& preparation)
      : engine_(std::move(engine)), preparation_(preparation) {}
  ~CallPort() override {
    while (engine_->in_flight() > 0) {
      engine_->submit();
      if (engine_->reap() == 0) engine_->sleep(std::chrono::milliseconds(100));
    }
  }

  Expected<bench::Io*> make_io(std::size_t /*buffer_bytes*/) override {
    return &ios_.emplace_back();
  }
  bool submit(bench::Io& asked) override {
    auto& io = static_cast<CallIo&>(asked);
    io.call.context = &io;
    io.call.complete = [](aio::FileCall& call, long result) {
      auto& done = *static_cast<CallIo*>(call.context);
      if (call.kind == aio::FileCallKind::kOpenat && result >= 0) ::close(static_cast<int>(result));
      const bool gone = call.kind == aio::FileCallKind::kUnlinkat && result == -ENOENT;
      done.error = result < 0 && !gone ? static_cast<int>(-result) : 0;
      done.complete(done);
    };
    io.error = preparation_.prepare(io.call, io.offset_bytes / kPageBytes);
    if (io.error == 0) {
      engine_->queue(io.call);
    } else {
      unprepared_.push_back(&io);
    }
    return true;
  }
  void kick() override { engine_->submit(); }
  Expected<std::size_t> poll() override {
    engine_->submit();
    const std::vector<CallIo*> unprepared = std::exchange(unprepared_, {});
    for (CallIo* const io : unprepared) io->complete(*io);
    return engine_->reap() + unprepared.size();
  }
  Expected<void> sleep(std::chrono::nanoseconds timeout) override {
    if (engine_->in_flight() > 0) engine_->sleep(timeout);
    return {};
  }

 private:
  struct CallIo : bench::Io {
    aio::FileCall call;
  };
  std::unique_ptr<aio::FileCallEngine> engine_;
  const Preparation& preparation_;
  std::deque<CallIo> ios_;
  std::vector<CallIo*> unprepared_;  // to be completed with their error
};

// Files as a target of the load generator: each "read" is the call, its offset says of what.
class CallTarget final : public bench::Target {
 public:
  CallTarget(aio::EngineName engine, aio::EngineOptions options, aio::FileCallKind kind,
             Files files)
      : engine_(engine), options_(options), files_(std::move(files)), preparation_(kind, files_) {}

  [[nodiscard]] std::string name() const override { return files_.folder->path(); }
  [[nodiscard]] std::uint64_t size_bytes() const override { return kFileBytes; }
  [[nodiscard]] std::size_t transfer_bytes_max() const override { return kPageBytes; }
  [[nodiscard]] bool can(bench::Operation operation) const override {
    return operation == bench::Operation::kRead;
  }
  [[nodiscard]] bool is_read_only() const override { return true; }
  [[nodiscard]] pid_t process() const override { return ::getpid(); }
  [[nodiscard]] bool is_in_process() const override { return true; }
  Expected<void> set_write_through(bool /*write_through*/) override { return {}; }
  Expected<std::unique_ptr<bench::Port>> open_port(unsigned /*index*/) override {
    auto engine = aio::make_file_call_engine(engine_, options_);
    if (!engine) return std::unexpected(std::move(engine.error()));
    return std::make_unique<CallPort>(std::move(*engine), preparation_);
  }

 private:
  const aio::EngineName engine_;
  const aio::EngineOptions options_;
  const Files files_;
  const Preparation preparation_;
};

Expected<aio::FileCallKind> call_named(const std::string& name) {
  constexpr std::array kCalls{std::pair("openat", aio::FileCallKind::kOpenat),
                              std::pair("unlinkat", aio::FileCallKind::kUnlinkat),
                              std::pair("fadvise", aio::FileCallKind::kFadvise),
                              std::pair("msync", aio::FileCallKind::kMsync),
                              std::pair("fsync", aio::FileCallKind::kFsync)};
  for (const auto& [known, kind] : kCalls) {
    if (name == known) return kind;
  }
  return make_error(ErrorKind::kInvalidArgument, fmt::format("there is no call '{}'", name));
}

aio::FileCallKind sync_call(SyncCall sync) {
  if (sync == SyncCall::kMsync) return aio::FileCallKind::kMsync;
  return sync == SyncCall::kRange ? aio::FileCallKind::kRangeFdatasync
                                  : aio::FileCallKind::kFdatasync;
}

// One call, to its end. Returns its result.
long call_and_wait(aio::FileCallEngine& engine, aio::FileCall& call) {
  struct Outcome {
    bool done{false};
    long result{0};
  } outcome;
  call.context = &outcome;
  call.complete = [](aio::FileCall& done, long result) {
    *static_cast<Outcome*>(done.context) = {.done = true, .result = result};
  };
  engine.queue(call);
  engine.submit();
  while (!outcome.done) {
    if (engine.reap() == 0) engine.sleep(std::chrono::milliseconds(100));
  }
  return outcome.result;
}

}  // namespace

Expected<RunRecord> measure_calls(const RunSpec& spec, const Arm& arm) {
  const auto kind = call_named(level_of(spec, "call"));
  if (!kind) return std::unexpected(kind.error());
  auto files = make_files(spec.directory);
  if (!files) return std::unexpected(files.error());
  bench::Workload workload;
  workload.name = level_of(spec, "call");
  workload.run_time = spec.run_time;
  workload.ramp_time = spec.ramp_time;
  workload.seed = spec.seed;
  if (auto set = bench::set_key(workload, "iodepth", level_of(spec, "iodepth")); !set)
    return std::unexpected(set.error());
  CallTarget target(arm.engine, arm.options, *kind, std::move(*files));
  auto run = bench::measure_on(target, {workload}, {});
  if (!run) return std::unexpected(run.error());
  if (run->result.error) return std::unexpected(*run->result.error);
  const bench::JobResult& job = run->result.jobs.front();
  RunRecord record;
  record.seconds = std::chrono::duration<double>(job.elapsed).count();
  record.metrics["rate"] = job.per_second(job.operations());
  const bench::RunUsage& usage = run->result.usage;
  if (job.operations() > 0) {
    const auto operations = static_cast<double>(job.operations());
    record.metrics["cpu"] =
        std::chrono::duration<double, std::micro>(usage.cpu_time).count() / operations;
    record.counters["sleeps_per_io"] =
        static_cast<double>(usage.context_switches.voluntary) / operations;
  }
  if (usage.machine_time.count() > 0) {
    record.steal_share = static_cast<double>(usage.machine_steal.count()) /
                         static_cast<double>(usage.machine_time.count());
  }
  add_latencies(record, job.latencies[static_cast<std::size_t>(bench::Operation::kRead)]);
  return record;
}

Expected<RunRecord> measure_ranges(const RunSpec& spec, const Arm& arm) {
  // However long each takes, a median needs some.
  constexpr std::uint64_t kIterationsMin = 24;
  const auto dirty = blockdev::parse_byte_size(level_of(spec, "dirty"));
  if (!dirty) return std::unexpected(dirty.error());
  const auto folder = Folder::make(spec.directory);
  if (!folder) return std::unexpected(folder.error());
  constexpr std::uint64_t kOwnBytes = std::uint64_t{1} << 20;
  const std::uint64_t size_bytes = kOwnBytes + *dirty;
  const auto file = make_file((*folder)->path() + "/file", size_bytes);
  if (!file) return std::unexpected(file.error());
  const auto mapping = Mapping::make(file->get(), size_bytes);
  if (!mapping) return std::unexpected(mapping.error());
  auto engine = aio::make_file_call_engine(arm.engine, arm.options);
  if (!engine) return std::unexpected(engine.error());
  bench::LatencyHistogram latencies;
  const StealMeter steal;
  const auto begin = Clock::now();
  for (std::uint64_t i = 0; i < kIterationsMin || Clock::now() < begin + spec.run_time; ++i) {
    // All of what is not to be synced, and one page that is.
    for (std::uint64_t offset = 0; offset < *dirty; offset += kPageBytes)
      *(*mapping)->at(kOwnBytes + offset) = std::byte(i & 0xff);
    aio::FileCall call;
    call.kind = sync_call(arm.sync);
    call.fd = file->get();
    call.offset_bytes = i * kPageBytes % kOwnBytes;
    call.length_bytes = kPageBytes;
    call.address = (*mapping)->at(call.offset_bytes);
    *(*mapping)->at(call.offset_bytes) = std::byte(i & 0xff);
    const auto called = Clock::now();
    const long result = call_and_wait(**engine, call);
    const auto returned = Clock::now();
    if (result < 0) return failed("sync", (*folder)->path() + "/file", static_cast<int>(-result));
    latencies.add(static_cast<std::uint64_t>(std::chrono::nanoseconds(returned - called).count()));
  }
  RunRecord record;
  record.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  record.steal_share = steal.share();
  add_latencies(record, latencies);
  return record;
}

}  // namespace vblk::wash
