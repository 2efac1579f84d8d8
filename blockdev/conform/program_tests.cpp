// The backend as a program: vhost-user.rst, "Backend program conventions".
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <boost/json.hpp>
#include <fmt/format.h>

#include "blockdev/conform/channel.h"
#include "blockdev/conform/test.h"
#include "blockdev/driver/blk_driver.h"
#include "blockdev/vhost_user/socket.h"
#include "blockdev/virtio/blk_wire.h"

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

// The command with its socket by --fd; skips the test where it does not name the socket by
// --socket-path, in whose place --fd stands.
std::vector<std::string> command_with_fd(const Target& target, int fd) {
  std::vector<std::string> words = target.command;
  const std::string by_fd = fmt::format("--fd={}", fd);
  for (auto word = words.begin(); word != words.end(); ++word) {
    if (*word == "--socket-path={socket}") {
      *word = by_fd;
      return words;
    }
    if (*word == "--socket-path" && word + 1 != words.end() && *(word + 1) == "{socket}") {
      *word = by_fd;
      words.erase(word + 1);
      return words;
    }
  }
  Probe::skip(
      "the command does not name its socket by --socket-path, which --fd takes the place of");
}

// A socket, inherited by what is started. The specification does not say whether it is one that
// listens or one that is connected, and there are backends of both kinds: either will do.
class InheritedSocket {
 public:
  explicit InheritedSocket(const std::string& path)
      : listener_(::socket(AF_UNIX, SOCK_STREAM, 0)),
        ours_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    const auto* const generic = reinterpret_cast<const sockaddr*>(&address);
    ::unlink(path.c_str());
    if (!listener_ || !ours_ || ::bind(listener_.get(), generic, sizeof address) != 0 ||
        ::listen(listener_.get(), 1) != 0 || ::connect(ours_.get(), generic, sizeof address) != 0)
      Probe::fail("the suite itself: " + describe_errno(errno));
  }

  [[nodiscard]] int listening() const { return listener_.get(); }
  int connected() {
    connected_.reset(::accept(listener_.get(), nullptr, nullptr));
    return connected_.get();
  }
  vhost_user::UniqueFd take_ours() { return std::move(ours_); }

 private:
  vhost_user::UniqueFd listener_;
  vhost_user::UniqueFd connected_;
  vhost_user::UniqueFd ours_;
};

// Why a program that inherits such a socket does not serve a disk on it; empty: it does.
std::string serves_on(Probe& probe, bool by_listening) {
  InheritedSocket socket(probe.folder() + "/s");
  const int fd = by_listening ? socket.listening() : socket.connected();
  Target target = probe.options().target;
  target.command = command_with_fd(target, fd);
  const auto backend = Backend::start(target, probe.folder(), false);
  if (!backend) return backend.error().message;
  const auto driver = driver::BlkDriver::adopt(
      socket.take_ours(),
      {.memory_bytes = std::size_t{2} << 20, .frontend = {.timeout = kPatience}});
  if (!driver) return driver.error().message;
  constexpr std::size_t kBlock = 4096;
  const auto status = (*driver)->read(0, (*driver)->memory().allocate(kBlock, kBlock));
  if (!status) return status.error().message;
  return *status == virtio::kBlkSOk ? "" : fmt::format("a read has status {}", *status);
}

void socket_is_inherited(Probe& probe) {
  need_program_itself(target_of(probe));
  const std::string listening = serves_on(probe, true);
  if (listening.empty()) return;
  const std::string connected = serves_on(probe, false);
  Probe::expect(connected.empty(),
                fmt::format("the program does not serve on the socket that --fd names; one that "
                            "listens: {}; one that is connected: {}",
                            excerpt(listening), excerpt(connected)));
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
         {kVhostUser, kConventions, Force::kStates,
          "with --print-capabilities a JSON object comes that says type \"block\", and status 0"},
         capabilities_are_printed},
    Test{"program/fails-early",
         {kVhostUser, kConventions, Force::kShould,
          "a program whose initialization fails ends early, with a status other than 0"},
         failure_ends_it},
    Test{"program/fd",
         {kVhostUser, kConventions, Force::kStates,
          "with --fd=FDNUM in place of --socket-path the program serves on the socket that it "
          "inherits"},
         socket_is_inherited},
    Test{"program/foreground",
         {kVhostUser, kConventions, Force::kMust, "the program does not daemonize itself"},
         it_does_not_daemonize},
};

}  // namespace

std::span<const Test> program_tests() { return kTests; }

}  // namespace vblk::conform
