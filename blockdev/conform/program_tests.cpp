// The backend as a program: vhost-user.rst, "Backend program conventions".
#include <algorithm>
#include <array>
#include <chrono>
#include <filesystem>
#include <string>
#include <string_view>
#include <sys/socket.h>
#include <vector>

#include <boost/json.hpp>
#include <fmt/format.h>

#include "blockdev/conform/channel.h"
#include "blockdev/conform/test.h"

namespace vblk::conform {

namespace {

constexpr std::chrono::milliseconds kProgramPatience{8000};

// The program's name and the words behind it that are no options: "vblk serve".
std::vector<std::string> program_of(const Target& target) {
  const auto is_option = [](const std::string& word) {
    return word.starts_with('-') || word.find('{') != std::string::npos;
  };
  const auto begin = target.command.begin();
  return {begin, std::find_if(begin + 1, target.command.end(), is_option)};
}

const Target& target_of(Probe& probe) {
  if (!probe.has_own_backend())
    Probe::skip("the program is started: takes --backend-command or --profile");
  return probe.options().target;
}

// Programs that start others: their own conventions say nothing of the backend.
constexpr std::array<std::string_view, 16> kStarters{
    "sh",      "bash",    "dash",    "env",    "sudo",   "nice",   "ionice",      "chrt",
    "taskset", "numactl", "setarch", "strace", "podman", "docker", "systemd-run", "unshare"};

void need_program_itself(const Target& target) {
  const std::string name = std::filesystem::path(target.command.front()).filename().string();
  if (std::ranges::find(kStarters, name) != kStarters.end())
    Probe::skip(fmt::format("the command begins with '{}', not with the backend", name));
}

std::string excerpt(std::string text) {
  constexpr std::size_t kMax = 200;
  std::ranges::replace(text, '\n', ' ');
  if (text.size() > kMax) text.resize(kMax);
  return text;
}

void capabilities_are_printed(Probe& probe) {
  const Target& target = target_of(probe);
  need_program_itself(target);
  std::vector<std::string> words = program_of(target);
  words.emplace_back("--print-capabilities");
  const auto end = Probe::value(run_program(words, kProgramPatience), "starting the program");
  Probe::expect(end.in_time && end.exit_status == 0,
                fmt::format("'{}' does not end with status 0: {}", fmt::join(words, " "),
                            excerpt(end.output)));
  boost::system::error_code error;
  const boost::json::value said = boost::json::parse(end.output, error);
  const boost::json::object* const object = error ? nullptr : said.if_object();
  const boost::json::value* const type = object == nullptr ? nullptr : object->if_contains("type");
  Probe::expect(type != nullptr && type->is_string() && type->as_string() == "block",
                fmt::format("'{}' prints no JSON with the type \"block\": {}",
                            fmt::join(words, " "), excerpt(end.output)));
}

void failure_ends_it(Probe& probe) {
  const Target& target = target_of(probe);
  const bool has_image = std::ranges::any_of(target.command, [](const std::string& word) {
    return word.find("{image}") != std::string::npos;
  });
  if (!has_image) Probe::skip("the command does not say {image}");
  const auto words =
      Backend::fill_in_paths(target.command, probe.folder() + "/s",
                             probe.folder() + "/there-is-no/disk", probe.folder() + "/m");
  const auto end = Probe::value(run_program(words, kProgramPatience), "starting the program");
  Probe::expect(end.in_time,
                fmt::format("the program still runs {} ms after it was started on an image that "
                            "is not there",
                            kProgramPatience.count()));
  Probe::expect(end.exit_status != 0, "the program ends with status 0, and its image is not there");
}

void it_does_not_daemonize(Probe& probe) {
  const Backend& backend = probe.own_backend("the program is looked at");
  need_program_itself(probe.options().target);
  const Channel channel(probe);
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(channel.socket(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0)
    Probe::skip("the kernel does not say whose socket it is");
  Probe::expect(credentials.pid == backend.pid(),
                fmt::format("the socket is that of process {}, and the program is {}",
                            credentials.pid, backend.pid()));
}

constexpr const char* kConventions = "Backend program conventions";

constexpr std::array kTests{
    Test{"program/print-capabilities",
         {kVhostUser, kConventions, Force::kShould,
          "with --print-capabilities a JSON object comes that says type \"block\", and status 0"},
         capabilities_are_printed},
    Test{"program/fails-early",
         {kVhostUser, kConventions, Force::kShould,
          "a program whose initialization fails ends early, with a status other than 0"},
         failure_ends_it},
    Test{"program/foreground",
         {kVhostUser, kConventions, Force::kMust, "the program does not daemonize itself"},
         it_does_not_daemonize},
};

}  // namespace

std::span<const Test> program_tests() { return kTests; }

}  // namespace vblk::conform
