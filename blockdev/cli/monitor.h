// The monitor: how a running server is asked what it does (`vblk ctl`).
//
// A Unix stream socket. The client sends one line of JSON, {"execute": COMMAND} or {"execute":
// COMMAND, "arguments": {...}}, and gets one line back: {"return": VALUE} or {"error": {"desc":
// TEXT}}; the form is QMP's, the greeting is not needed. Any number of lines per connection. The
// socket is the server's alone: its permissions are who may ask.
//
// Thread: one of its own, which runs the handlers; they fetch what belongs to other threads
// themselves.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include <boost/json/object.hpp>
#include <boost/json/value.hpp>

#include "aio/error.h"

namespace vblk::cli {

// Answers one command. `arguments` is empty where the client sends none. The error's message is
// what the client is told.
using MonitorHandler =
    std::function<Expected<boost::json::value>(const boost::json::object& arguments)>;
using MonitorHandlers = std::map<std::string, MonitorHandler, std::less<>>;

class Monitor {
 public:
  // Listens on `path` and answers with `handlers` until destroyed, which removes the socket.
  // Errors: as for the vhost-user socket (kInvalidArgument, kBusy, kPermission, kNotFound).
  static Expected<std::unique_ptr<Monitor>> start(const std::string& path,
                                                  MonitorHandlers handlers);
  ~Monitor();
  Monitor(const Monitor&) = delete;
  Monitor& operator=(const Monitor&) = delete;

 private:
  struct State;
  explicit Monitor(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// The client's side: sends `command` to the monitor at `path` and returns what it answers: one
// line of JSON text and a newline. Errors: kNotFound, kPermission, kBusy (no answer within
// 10 s), kInvalidArgument (the monitor does not know the command, or cannot carry it out), kCorrupt
// (it does not speak this).
Expected<std::string> ask_monitor(const std::string& path, const std::string& command,
                                  const boost::json::object& arguments);

}  // namespace vblk::cli
