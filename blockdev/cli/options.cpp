#include "blockdev/cli/options.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <sstream>
#include <string_view>
#include <utility>

#include <boost/json.hpp>
#include <boost/program_options.hpp>
#include <fmt/core.h>

#include "blockdev/byte_size.h"

namespace vblk::cli {

namespace program_options = boost::program_options;
using program_options::value;

namespace {

constexpr std::string_view kServeUsage = R"(Usage: vblk serve IMAGE --socket-path PATH [options]
       vblk serve --format null --size SIZE --socket-path PATH [options]
       vblk serve --config FILE [--log-level LEVEL]

Serves a disk image to a virtual machine as a virtio-blk disk over vhost-user.
Runs in the foreground; SIGTERM and SIGINT drain, flush, remove the socket and exit 0.
)";

constexpr std::string_view kCtlUsage = R"(Usage: vblk ctl MONITOR-PATH COMMAND

Asks a running 'vblk serve --monitor MONITOR-PATH'. Prints the answer as JSON.

Commands:
  query-aio      the engine chosen for each kind of operation, the reason for
                 each fallback, what auto has measured, and the engines' counters
  query-status   the disk, the frontend's connection and the queues' counters
  set-aio ENGINE|KIND=ENGINE,...
                 change the engines as serve --aio would have them, while the
                 guest runs; kinds that are not named stay as they are
  resize SIZE    make the disk SIZE long, such as 10G, while the guest runs, and
                 tell it; a raw disk can only become larger
  set-limits NAME=VALUE,...|none
                 change the limits as serve --limits would have them; those that
                 are not named stay, 0 takes one away, none takes all
  pause          finish what is in flight, flush, and take no new requests
  resume         take requests again, and first of all those that had failed

)";

// Commands of `vblk ctl` that take a word, and the member of their "arguments" that it becomes.
struct CtlArgument {
  std::string_view command;
  std::string_view name;
  std::string_view what;
};
constexpr std::array kCtlArguments{
    CtlArgument{"set-aio", "aio", "an engine, or KIND=ENGINE"},
    CtlArgument{"resize", "size", "the new size, such as 10G"},
    CtlArgument{"set-limits", "limits", "NAME=VALUE such as iops-total=1000, or none"}};

std::unexpected<Error> usage_error(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

// Options as they are typed: text, checked afterwards so that every error is ours to word.
program_options::options_description serve_description() {
  program_options::options_description description("Options");
  description.add_options()                                      //
      ("socket-path", value<std::string>()->value_name("PATH"),  //
       "listen on this Unix socket for the frontend")            //
      ("fd", value<std::string>()->value_name("N"),              //
       "use the inherited vhost-user socket with this number instead, listening or connected; "
       "one that systemd passes (LISTEN_FDS) is used without being named")                 //
      ("blk-file", value<std::string>()->value_name("PATH"), "another way to name IMAGE")  //
      ("format", value<std::string>()->value_name("raw|qcow2|null"),
       "format of the image (default: qcow2 if its name ends in .qcow2, otherwise raw); 'null' is "
       "a "
       "disk that moves no data, for measuring")                                             //
      ("size", value<std::string>()->value_name("SIZE"), "size of a null disk, such as 1G")  //
      ("l2-cache-size", value<std::string>()->value_name("SIZE"),
       "qcow2: memory for L2 tables (default: what the whole disk needs, 4M to 32M)")  //
      ("refcount-cache-size", value<std::string>()->value_name("SIZE"),
       "qcow2: memory for refcounts (default: a quarter of the L2 tables' memory, 256K at "
       "least)")  //
      ("aio",
       value<std::string>()->default_value("threads")->value_name("ENGINE|KIND=ENGINE,..."),  //
       "threads, native, io_uring or auto (whichever costs least for the load), for all or by "
       "kind: read, write, flush, discard, write-zeroes, write-behind")            //
      ("cache", value<std::string>()->default_value("none")->value_name("MODE"),   //
       "none, writeback, writethrough, directsync or unsafe, as QEMU means them")  //
      ("share-flushes", value<std::string>()->default_value("on")->value_name("on|off"),
       "whether flushes share one call to the kernel, and none is made where nothing was written")(
          "write-behind", value<std::string>()->value_name("SIZE"),
          "with --cache writeback: have each SIZE of new data written to the disk soon, 64K to 1G, "
          "so "
          "that a flush has less to wait for (default: when the kernel sees fit)")(
          "queues", value<std::string>()->default_value("1")->value_name("N"),     //
          "virtqueues offered, 1 to 64")                                           //
      ("queue-size", value<std::string>()->default_value("128")->value_name("N"),  //
       "largest virtqueue accepted, a power of two from 2 to 32768")               //
      ("iothreads", value<std::string>()->default_value("1")->value_name("N"),     //
       "I/O threads that share the virtqueues, 1 to --queues")                     //
      ("iothread-cpus", value<std::string>()->value_name("CPUS,..."),
       "processors of each I/O thread in turn: a number, a range such as 0-3, or several of them "
       "joined by ':' (default: any)")                                                         //
      ("read-only", program_options::bool_switch(), "offer a disk that cannot be written")     //
      ("serial", value<std::string>()->default_value("vblk")->value_name("TEXT"),              //
       "serial number that the guest sees, at most 20 bytes")                                  //
      ("discard", value<std::string>()->default_value("unmap")->value_name("unmap|ignore"),    //
       "whether discards free space in the image")                                             //
      ("logical-block-size", value<std::string>()->default_value("512")->value_name("BYTES"),  //
       "sector size that the guest sees: 512, 1024, 2048 or 4096")                             //
      ("limits", value<std::string>()->value_name("NAME=VALUE,..."),
       "I/O limits: iops-total, iops-read, iops-write, bps-total, bps-read, bps-write, each also "
       "with -max (burst) and -max-length (its seconds), and iops-size, as QEMU's throttling has "
       "them (default: none)")  //
      ("rerror", value<std::string>()->default_value("report")->value_name("ACTION"),
       "when a read fails: report it, ignore it, or stop: keep it and pause until 'vblk ctl ... "
       "resume'")  //
      ("werror", value<std::string>()->default_value("enospc")->value_name("ACTION"),
       "when a change or flush fails: report, ignore, stop, or enospc: stop while the disk is "
       "full, "
       "report anything else")                                                         //
      ("thread-pool-max", value<std::string>()->default_value("64")->value_name("N"),  //
       "most worker threads per I/O thread, 1 to 1024")                                //
      ("aio-max-batch", value<std::string>()->default_value("32")->value_name("N"),    //
       "most requests in one submission to the kernel, 1 to 1024")                     //
      ("io-uring", value<std::string>()->value_name("FEATURE=on|off,..."),             //
       "what the io_uring engine uses: defer-taskrun (on), registered-files (on), "
       "registered-buffers (off: pins all guest memory, never with a balloon)")     //
      ("poll-max-us", value<std::string>()->default_value("32")->value_name("US"),  //
       "longest that an I/O thread goes on looking for work before it sleeps, where that "
       "pays; 0 to 10000, 0: it sleeps at once")  //
      ("interrupt-max-us", value<std::string>()->default_value("0")->value_name("US"),
       "hold an interrupt back for at most so long, to be one for several answers; 0 to 10000, 0: "
       "none is")  //
      ("interrupt-max-batch", value<std::string>()->value_name("N"),
       "with --interrupt-max-us: and until N requests have been answered since the last one, 1 to "
       "32768 (default: 16)")  //
      ("recovery", value<std::string>()->default_value("on")->value_name("on|off"),
       "whether requests in flight survive this server, for the next one to finish; 'off' saves "
       "qcow2 a write for each new cluster")  //
      ("migration", value<std::string>()->default_value("off")->value_name("on|off"),
       "let the guest be migrated: the image is open only while a guest runs on it here")(
          "monitor", value<std::string>()->value_name("PATH"),  //
          "answer 'vblk ctl' on this Unix socket")              //
      ("config", value<std::string>()->value_name("FILE"),
       "serve the devices that this TOML file describes, each by the options above")      //
      ("log-level", value<std::string>()->default_value("info")->value_name("LEVEL"),     //
       "trace, debug, info, warning, error or off")                                       //
      ("print-capabilities", "print the capabilities of this back-end as JSON and exit")  //
      ("help", "print this text and exit");
  return description;
}

// Boost's messages name the option; only the ends are ours.
Expected<program_options::variables_map> parse(
    std::span<const std::string> arguments, const program_options::options_description& visible,
    const program_options::positional_options_description& positional,
    std::initializer_list<const char*> hidden_names) {
  program_options::options_description all;
  all.add(visible);
  for (const char* name : hidden_names) all.add_options()(name, value<std::string>());
  program_options::variables_map map;
  try {
    // No guessing: an abbreviation that works today is ambiguous tomorrow.
    const auto style = program_options::command_line_style::unix_style &
                       ~program_options::command_line_style::allow_guessing;
    program_options::store(program_options::command_line_parser(
                               std::vector<std::string>(arguments.begin(), arguments.end()))
                               .options(all)
                               .positional(positional)
                               .style(style)
                               .run(),
                           map);
    program_options::notify(map);
  } catch (const program_options::too_many_positional_options_error&) {
    return usage_error("more words than the command takes; see --help");
  } catch (const program_options::error& error) {
    return usage_error(fmt::format("{}; see --help", error.what()));
  }
  return map;
}

Expected<unsigned> parse_number(const program_options::variables_map& map, const char* option,
                                unsigned min, unsigned max) {
  const auto& text = map[option].as<std::string>();
  unsigned number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc{} || rest != end || number < min || number > max) {
    return usage_error(
        fmt::format("--{} {}: must be a whole number from {} to {}", option, text, min, max));
  }
  return number;
}

// Stores a value or passes the error on, so that the checks below read as a list.
template <typename T, typename Target>
bool take(Expected<T> result, Target& target, std::optional<Error>& error) {
  if (error) return false;
  if (!result) {
    error = std::move(result.error());
    return false;
  }
  target = static_cast<Target>(*result);
  return true;
}

Expected<bool> parse_discard(const std::string& text) {
  if (text == "unmap") return true;
  if (text == "ignore") return false;
  return usage_error(fmt::format("--discard {}: use unmap or ignore", text));
}

Expected<bool> parse_switch(const program_options::variables_map& map, const char* option) {
  const auto& text = map[option].as<std::string>();
  if (text == "on") return true;
  if (text == "off") return false;
  return usage_error(fmt::format("--{} {}: use on or off", option, text));
}

// 0 where it is not given. From a few slices on, so that concurrent requests find room.
Expected<std::uint64_t> parse_cache_size(const program_options::variables_map& map,
                                         const char* option) {
  constexpr std::uint64_t kMin = std::uint64_t{64} << 10;
  constexpr std::uint64_t kMax = std::uint64_t{16} << 30;
  if (!map.contains(option)) return 0;
  const auto& text = map[option].as<std::string>();
  const auto size = blockdev::parse_byte_size(text);
  if (!size) return size;
  if (*size < kMin || *size > kMax)
    return usage_error(fmt::format("--{} {}: use 64K to 16G", option, text));
  return size;
}

Expected<void> take_image(const program_options::variables_map& map, ServeOptions& options) {
  std::optional<Error> error;
  auto& image = options.image;
  image.format = blockdev::ImageFormat::kByName;
  if (map.contains("format"))
    take(blockdev::parse_image_format(map["format"].as<std::string>()), image.format, error);
  take(parse_cache_size(map, "l2-cache-size"), image.l2_cache_bytes, error);
  take(parse_cache_size(map, "refcount-cache-size"), image.refcount_cache_bytes, error);
  take(blockdev::parse_cache_mode(map["cache"].as<std::string>()), image.cache, error);
  take(parse_discard(map["discard"].as<std::string>()), image.discard, error);
  take(parse_switch(map, "share-flushes"), image.share_flushes, error);
  if (error) return std::unexpected(std::move(*error));
  image.read_only = map["read-only"].as<bool>();

  const bool has_path = map.contains("image") || map.contains("blk-file");
  if (map.contains("write-behind")) {
    take(blockdev::parse_write_behind(map["write-behind"].as<std::string>(), image.cache),
         image.write_behind_bytes, error);
    if (error) return std::unexpected(std::move(*error));
  }
  if (image.format == blockdev::ImageFormat::kNull) {
    if (image.write_behind_bytes != 0)
      return usage_error("a null disk keeps nothing; leave --write-behind away");
    if (has_path)
      return usage_error(
          "a null disk takes no image; leave the file name away or name another --format");
    if (!map.contains("size"))
      return usage_error("a null disk needs a size; add for example --size 1G");
    take(blockdev::parse_byte_size(map["size"].as<std::string>()), image.null_size_bytes, error);
    if (error) return std::unexpected(std::move(*error));
    return {};
  }
  if (map.contains("size"))
    return usage_error("--size is for --format null; an image has its own size");
  if (map.contains("image") && map.contains("blk-file")) {
    return usage_error("the image is named twice, as IMAGE and by --blk-file; name it once");
  }
  if (!has_path) return usage_error("no image is named; see vblk serve --help");
  image.path = map[map.contains("image") ? "image" : "blk-file"].as<std::string>();
  return {};
}

Expected<void> take_interrupts(const program_options::variables_map& map,
                               virtio::InterruptOptions& interrupts) {
  std::optional<Error> error;
  unsigned hold_max_us = 0;
  take(parse_number(map, "interrupt-max-us", 0, 10'000), hold_max_us, error);
  interrupts.hold_max = std::chrono::microseconds(hold_max_us);
  if (map.contains("interrupt-max-batch")) {
    take(parse_number(map, "interrupt-max-batch", 1, virtio::BlkDevice::kQueueSizeMax),
         interrupts.batch_max, error);
    if (!error && hold_max_us == 0) {
      return usage_error(
          "--interrupt-max-batch does nothing where no interrupt is held back; give "
          "--interrupt-max-us too");
    }
  }
  if (error) return std::unexpected(std::move(*error));
  return {};
}

Expected<void> take_device(const program_options::variables_map& map, ServeOptions& options) {
  std::optional<Error> error;
  auto& device = options.device;
  take(parse_number(map, "queues", 1, kMaxQueues), device.queue_count, error);
  take(parse_number(map, "queue-size", 2, virtio::BlkDevice::kQueueSizeMax), device.queue_size_max,
       error);
  take(parse_number(map, "logical-block-size", 512, 4096), device.logical_block_bytes, error);
  take(parse_number(map, "iothreads", 1, kMaxQueues), options.iothread_count, error);
  unsigned poll_max_us = 0;
  take(parse_number(map, "poll-max-us", 0, 10'000), poll_max_us, error);
  options.loop.poll_max = std::chrono::microseconds(poll_max_us);
  take(parse_number(map, "thread-pool-max", 1, 1024), options.engine.max_threads, error);
  take(parse_number(map, "aio-max-batch", 1, 1024), options.engine.max_batch, error);
  take(aio::AioSelection::parse(map["aio"].as<std::string>()), options.aio, error);
  if (map.contains("io-uring")) {
    take(aio::IoUringFeatures::parse(map["io-uring"].as<std::string>()), options.engine.io_uring,
         error);
  }
  if (error) return std::unexpected(std::move(*error));
  if (options.iothread_count > device.queue_count) {
    return usage_error(
        fmt::format("--iothreads {} is more than --queues {}: a thread without a queue would do "
                    "nothing",
                    options.iothread_count, device.queue_count));
  }
  if (map.contains("iothread-cpus")) {
    const auto& text = map["iothread-cpus"].as<std::string>();
    auto lists = blockdev::parse_cpu_lists(text);
    if (!lists)
      return usage_error(fmt::format("--iothread-cpus {}: {}", text, lists.error().message));
    if (lists->size() > options.iothread_count) {
      return usage_error(
          fmt::format("--iothread-cpus {}: is for {} I/O threads, and --iothreads is {}", text,
                      lists->size(), options.iothread_count));
    }
    options.iothread_cpus = std::move(*lists);
  }
  if (map.contains("limits")) {
    take(blockdev::IoLimits::parse(map["limits"].as<std::string>(), "--limits", {}), device.limits,
         error);
  }
  take(virtio::parse_read_error_choice(map["rerror"].as<std::string>(), "--rerror"),
       device.on_error.read, error);
  take(virtio::parse_write_error_choice(map["werror"].as<std::string>(), "--werror"),
       device.on_error.write, error);
  if (error) return std::unexpected(std::move(*error));
  if (auto done = take_interrupts(map, device.interrupts); !done) return done;
  device.serial = map["serial"].as<std::string>();
  device.discard = options.image.discard;
  device.write_cache = blockdev::has_write_cache(options.image.cache);
  return {};
}

Expected<void> take_socket(const program_options::variables_map& map,
                           std::optional<int> activated_fd, ServeOptions& options) {
  if (activated_fd) {
    for (const char* option : {"socket-path", "fd"}) {
      if (map.contains(option)) {
        return usage_error(fmt::format(
            "a socket is passed by LISTEN_FDS, and --{} names another; leave one of them away",
            option));
      }
    }
    options.socket_fd = *activated_fd;
    options.socket_is_activated = true;
    return {};
  }
  if (map.contains("socket-path") == map.contains("fd")) {
    return usage_error(
        "give either --socket-path PATH or --fd N, so that a frontend can reach the disk");
  }
  if (map.contains("fd")) {
    // Descriptors 0 to 2 are standard input, output and error (vhost-user.rst, "Backend program
    // conventions").
    const auto fd = parse_number(map, "fd", 3, 1U << 20);
    if (!fd) return std::unexpected(fd.error());
    options.socket_fd = static_cast<int>(*fd);
    return {};
  }
  options.socket_path = map["socket-path"].as<std::string>();
  if (options.socket_path.empty()) return usage_error("--socket-path is empty; name a path");
  return {};
}

// With --config all that a device is lies in the file.
Expected<void> take_config(const program_options::variables_map& map,
                           std::optional<int> activated_fd, ServeOptions& options) {
  options.config_path = map["config"].as<std::string>();
  if (activated_fd)
    return usage_error(
        "--config: a socket is passed by LISTEN_FDS, which cannot be several devices'");
  for (const auto& [name, given] : map) {
    if (given.defaulted() || name == "config" || name == "log-level") continue;
    return usage_error(fmt::format(
        "--config describes whole devices: put {} into the file",
        name == "image" ? fmt::format("image = \"{}\"", given.as<std::string>()) : "--" + name));
  }
  return {};
}

// vhost-user.json, @VHostUserBackendCapabilities and @VHostUserBackendBlockFeature.
std::string capabilities() {
  const boost::json::value answer{{"type", "block"}, {"features", {"read-only", "blk-file"}}};
  return boost::json::serialize(answer) + "\n";
}

}  // namespace

Expected<Parsed<ServeOptions>> parse_serve_options(std::span<const std::string> arguments,
                                                   std::optional<int> activated_fd) {
  // "Other options and arguments should be ignored" (vhost-user.rst, "Backend program
  // conventions").
  for (const auto& argument : arguments) {
    if (argument == "--print-capabilities") return Answer{capabilities()};
  }
  program_options::positional_options_description positional;
  positional.add("image", 1);
  const auto description = serve_description();
  const auto map = parse(arguments, description, positional, {"image"});
  if (!map) return std::unexpected(map.error());
  if (map->contains("help")) {
    std::ostringstream text;
    text << kServeUsage << '\n' << description;
    return Answer{text.str()};
  }
  ServeOptions options;
  const auto level = log::parse_level((*map)["log-level"].as<std::string>());
  if (!level) return std::unexpected(level.error());
  options.log_level = *level;
  if (map->contains("config")) {
    if (auto done = take_config(*map, activated_fd, options); !done)
      return std::unexpected(std::move(done.error()));
    return options;
  }
  if (auto done = take_image(*map, options); !done) return std::unexpected(std::move(done.error()));
  if (auto done = take_device(*map, options); !done)
    return std::unexpected(std::move(done.error()));
  if (auto done = take_socket(*map, activated_fd, options); !done)
    return std::unexpected(std::move(done.error()));
  const auto recovery = parse_switch(*map, "recovery");
  if (!recovery) return std::unexpected(recovery.error());
  options.recovery = *recovery;
  const auto migration = parse_switch(*map, "migration");
  if (!migration) return std::unexpected(migration.error());
  options.migration = *migration;
  // A setting of the driver's that no frontend takes along would be lost on the way.
  if (options.migration) options.device.config_wce = false;
  if (map->contains("monitor")) options.monitor_path = (*map)["monitor"].as<std::string>();
  return options;
}

DeviceOption find_device_option(std::string_view name) {
  // What is the program's, or another way to say the same.
  for (const std::string_view other :
       {"config", "log-level", "print-capabilities", "help", "fd", "blk-file"}) {
    if (name == other) return {};
  }
  static const auto description = serve_description();
  const auto* const option = description.find_nothrow(std::string(name), false);
  if (option == nullptr) return {};
  return {.exists = true, .is_switch = option->semantic()->max_tokens() == 0};
}

Expected<Parsed<CtlOptions>> parse_ctl_options(std::span<const std::string> arguments) {
  program_options::options_description description("Options");
  description.add_options()("help", "print this text and exit");
  program_options::positional_options_description positional;
  positional.add("monitor", 1).add("command", 1).add("argument", 1);
  const auto map = parse(arguments, description, positional, {"monitor", "command", "argument"});
  if (!map) return std::unexpected(map.error());
  if (map->contains("help")) {
    std::ostringstream text;
    text << kCtlUsage << description;
    return Answer{text.str()};
  }
  if (!map->contains("monitor") || !map->contains("command")) {
    return usage_error(
        "name the monitor's socket and a command, such as query-aio; see vblk ctl --help");
  }
  CtlOptions options{.monitor_path = (*map)["monitor"].as<std::string>(),
                     .command = (*map)["command"].as<std::string>(),
                     .argument = {}};
  const auto takes = std::ranges::find(kCtlArguments, options.command, &CtlArgument::command);
  const bool has_word = map->contains("argument");
  if (takes == kCtlArguments.end() && has_word) {
    return usage_error(fmt::format("{} takes no word such as '{}'; see vblk ctl --help",
                                   options.command, (*map)["argument"].as<std::string>()));
  }
  if (takes != kCtlArguments.end()) {
    if (!has_word)
      return usage_error(
          fmt::format("{}: name {}; see vblk ctl --help", takes->command, takes->what));
    options.argument = {std::string(takes->name), (*map)["argument"].as<std::string>()};
  }
  return options;
}

}  // namespace vblk::cli
