#include "blockdev/wash/options.h"

#include <sstream>
#include <string_view>
#include <utility>

#include <fmt/core.h>

#include "blockdev/byte_size.h"
#include "blockdev/wash/analysis.h"
#include "blockdev/wash/child.h"

namespace vblk::wash {

namespace program_options = boost::program_options;
using program_options::value;

namespace {

constexpr std::string_view kUsage =
    R"(Usage: vblk wash --image FILE-OR-DEVICE --output DIR [--preset NAME] [options]
       vblk wash --output DIR --report
       vblk wash compare DIR DIR...

Decides by experiment whether Linux AIO and io_uring do better than a pool of
threads, claim by claim. What is on the image is destroyed. The result is a
folder; an experiment that was stopped goes on where it was when the same
command is given again. See docs/wash.md.

Presets: quick (minutes: a first opinion), standard (about 50 minutes), full
(hours), smoke (a trial of the program that measures nothing).

)";

std::unexpected<Error> usage_error(std::string message) {
  return make_error(ErrorKind::kInvalidArgument, std::move(message));
}

program_options::options_description describe() {
  program_options::options_description description("Options");
  const auto text = [](const char* name) { return value<std::string>()->value_name(name); };
  description.add_options()  //
      ("image", value<std::vector<std::string>>()->value_name("PATH"),
       "an image or block device that is written to; raw, or qcow2 where its name ends in .qcow2; "
       "several compare formats or disks")                                            //
      ("output", text("DIR"), "the folder of the result, new or to be gone on with")  //
      ("preset", text("NAME"), "quick (default), standard, full or smoke")            //
      ("size", text("SIZE"), "make an image that is not there, raw, of this size")    //
      ("peer", text("SOCKET|COMMAND"),
       "another vhost-user-blk server to measure beside vblk serve: a command that starts it, in "
       "which {image}, {aio} and {socket} stand for the image, the engine by QEMU's name, and the "
       "socket; or the sockets of servers that run, a path with {aio}")                      //
      ("ram", text("on|off"), "measure a loop device over memory, too (default: on; root)")  //
      ("randseed", text("N"), "seed of all orders and loads (default: a new one)")           //
      ("force", program_options::bool_switch(),
       "go on (or report) though program, machine or images have changed, or lines are damaged")  //
      ("report", program_options::bool_switch(),
       "measure nothing: write the reports of what is there")      //
      ("eta", text("WHEN"), "show progress, as vblk bench --eta")  //
      ("help", "print this text and exit");
  return description;
}

std::string text_of(const program_options::variables_map& map, const char* name,
                    std::string_view otherwise) {
  return map.contains(name) ? map[name].as<std::string>() : std::string(otherwise);
}

Expected<void> take_numbers(const program_options::variables_map& map, WashOptions& options) {
  if (map.contains("size")) {
    const auto size = blockdev::parse_byte_size(map["size"].as<std::string>());
    if (!size) return usage_error("--size: " + size.error().message);
    options.size_bytes = *size;
  }
  if (map.contains("randseed")) {
    bench::Workload seeded;
    if (auto done = bench::set_key(seeded, "randseed", map["randseed"].as<std::string>()); !done)
      return usage_error("--" + done.error().message);
    options.seed = seeded.seed;
  }
  return {};
}

}  // namespace

Expected<std::variant<WashOptions, bench::HelpText>> parse_options(std::span<char*> arguments) {
  const auto description = describe();
  const auto map = bench::parse_words(arguments, description, {}, "vblk wash");
  if (!map) return std::unexpected(map.error());
  if (map->contains("help")) {
    std::ostringstream text;
    text << kUsage << description;
    return bench::HelpText{text.str()};
  }
  WashOptions options;
  options.output_path = text_of(*map, "output", "");
  if (options.output_path.empty())
    return usage_error("name the folder of the result by --output DIR");
  options.report_only = (*map)["report"].as<bool>();
  if (map->contains("image")) options.image_paths = (*map)["image"].as<std::vector<std::string>>();
  if (options.report_only != options.image_paths.empty()) {
    return usage_error(options.report_only
                           ? "--report measures nothing; leave --image away"
                           : "name what is measured by --image FILE-OR-DEVICE; it is written to");
  }
  options.preset = text_of(*map, "preset", "quick");
  if (registered_analysis().preset(options.preset) == nullptr) {
    return usage_error(
        fmt::format("--preset {}: use quick, standard, full or smoke", options.preset));
  }
  const std::string ram = text_of(*map, "ram", "on");
  if (ram != "on" && ram != "off") return usage_error(fmt::format("--ram {}: use on or off", ram));
  options.ram = ram == "on";
  options.peer = text_of(*map, "peer", "");
  const bool peer_is_command = is_peer_command(options.peer);
  const auto peer_says = [&options](const char* word) {
    return options.peer.find(word) != std::string::npos;
  };
  if (map->contains("peer") && !peer_says(peer_is_command ? "{image}" : "{aio}")) {
    return usage_error(
        "--peer: a command must say where {image} and {socket} go, and the path of running "
        "servers' sockets where {aio} goes");
  }
  if (peer_is_command && !options.image_paths.empty() &&
      options.image_paths.front().ends_with(".qcow2"))
    return usage_error("--peer: the other server writes to the first image as raw; name a raw one");
  options.force = (*map)["force"].as<bool>();
  if (auto taken = take_numbers(*map, options); !taken) return std::unexpected(taken.error());
  const auto output = bench::take_output_words(*map);
  if (!output) return std::unexpected(output.error());
  options.show_progress = output->show_progress;
  return options;
}

}  // namespace vblk::wash
