#include "blockdev/cli/config_file.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <sys/stat.h>
#include <toml++/toml.h>
#include <utility>

#include <fmt/core.h>

namespace vblk::cli {

namespace {

// Far more than kDevicesMax devices need.
constexpr std::uintmax_t kFileBytesMax = std::uintmax_t{1} << 20;
// A device has some five threads of its own, and dozens of descriptors.
constexpr std::size_t kDevicesMax = 64;
// The kernel takes 15 characters for a thread's name, and some go to what the thread does.
constexpr std::size_t kNameBytesMax = 64;

// What a key's value may be. What is not here is text.
enum class ValueType : std::uint8_t {
  kText,
  kNumber,
  kSize,    // a number, or text such as "4M"
  kSwitch,  // true or false
  kPairs,   // a table, or text "NAME=VALUE,..."
  kList,    // an array, or text "A,B"
};
struct KeyType {
  std::string_view key;
  ValueType type;
};
constexpr std::array kKeyTypes{
    KeyType{"queues", ValueType::kNumber},
    KeyType{"queue-size", ValueType::kNumber},
    KeyType{"iothreads", ValueType::kNumber},
    KeyType{"logical-block-size", ValueType::kNumber},
    KeyType{"thread-pool-max", ValueType::kNumber},
    KeyType{"aio-max-batch", ValueType::kNumber},
    KeyType{"poll-max-us", ValueType::kNumber},
    KeyType{"interrupt-max-us", ValueType::kNumber},
    KeyType{"interrupt-max-batch", ValueType::kNumber},
    KeyType{"size", ValueType::kSize},
    KeyType{"l2-cache-size", ValueType::kSize},
    KeyType{"refcount-cache-size", ValueType::kSize},
    KeyType{"write-behind", ValueType::kSize},
    KeyType{"read-only", ValueType::kSwitch},
    KeyType{"share-flushes", ValueType::kSwitch},
    KeyType{"recovery", ValueType::kSwitch},
    KeyType{"migration", ValueType::kSwitch},
    KeyType{"aio", ValueType::kPairs},
    KeyType{"io-uring", ValueType::kPairs},
    KeyType{"limits", ValueType::kPairs},
    KeyType{"iothread-cpus", ValueType::kList},
};

std::string_view describe(ValueType type) {
  switch (type) {
    case ValueType::kText:
      return "text in quotes";
    case ValueType::kNumber:
      return "a whole number";
    case ValueType::kSize:
      return "a whole number, or text such as \"4M\"";
    case ValueType::kSwitch:
      return "true or false";
    case ValueType::kPairs:
      return "text in quotes, or a table { NAME = VALUE, ... }";
    case ValueType::kList:
      return "text in quotes, or an array";
  }
  return "";
}

ValueType type_of(std::string_view key) {
  const auto* const known = std::ranges::find(kKeyTypes, key, &KeyType::key);
  return known == kKeyTypes.end() ? ValueType::kText : known->type;
}

// A device as it is being read, with the places of its keys for messages.
struct Device {
  const toml::table* table{nullptr};
  ServeOptions options;
  bool is_writer{false};
};

class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path) {}
  Expected<std::vector<ServeOptions>> read(const toml::table& root);
  [[nodiscard]] std::unexpected<Error> wrong(const toml::source_region& place,
                                             std::string_view what) const {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("{}:{}:{}: {}", path_, place.begin.line, place.begin.column, what));
  }

 private:
  Expected<void> read_device(const toml::table& table, std::size_t index);
  Expected<std::string> text_of(std::string_view key, const toml::node& value,
                                ValueType type) const;
  Expected<void> check_together(const Device& device) const;
  Expected<void> check_socket(const Device& device, std::string_view key,
                              const std::string& socket) const;
  [[nodiscard]] static toml::source_region place_of(const toml::table& table,
                                                    std::string_view key) {
    const toml::node* const value = table.get(key);
    return value != nullptr ? value->source() : table.source();
  }

  const std::string& path_;
  std::vector<Device> devices_;
};

// A single value of a table or an array, as it stands on a command line.
std::optional<std::string> plain_text(const toml::node& value) {
  if (const auto* text = value.as_string()) return text->get();
  if (const auto* number = value.as_integer()) return fmt::format("{}", number->get());
  if (const auto* boolean = value.as_boolean()) return std::string(boolean->get() ? "on" : "off");
  return std::nullopt;
}

Expected<std::string> Reader::text_of(std::string_view key, const toml::node& value,
                                      ValueType type) const {
  const bool fits =
      (type == ValueType::kNumber && value.is_integer()) ||
      (type == ValueType::kSwitch && value.is_boolean()) ||
      (type == ValueType::kSize && (value.is_integer() || value.is_string())) ||
      ((type == ValueType::kText || type == ValueType::kPairs || type == ValueType::kList) &&
       value.is_string());
  if (fits) return *plain_text(value);
  std::string text;
  const auto add = [&text](const std::string& part) { text += (text.empty() ? "" : ",") + part; };
  if (const auto* const table = value.as_table(); table != nullptr && type == ValueType::kPairs) {
    for (const auto& [name, element] : *table) {
      const auto part = plain_text(element);
      if (!part) {
        return wrong(element.source(),
                     fmt::format("{}.{} must be text, a number, true or false", key, name.str()));
      }
      add(fmt::format("{}={}", name.str(), *part));
    }
    return text;
  }
  if (const auto* const array = value.as_array(); array != nullptr && type == ValueType::kList) {
    for (const auto& element : *array) {
      const auto part = plain_text(element);
      if (!part || element.is_boolean())
        return wrong(element.source(), fmt::format("{} must hold text or numbers", key));
      add(*part);
    }
    return text;
  }
  return wrong(value.source(), fmt::format("{} must be {}", key, describe(type)));
}

Expected<void> Reader::read_device(const toml::table& table, std::size_t index) {
  Device device{.table = &table};
  device.options.name = fmt::format("device-{}", index + 1);
  std::vector<std::string> arguments;
  for (const auto& [toml_key, value] : table) {
    const auto key = std::string(toml_key.str());
    if (key == "name") {
      const auto name = text_of(key, value, ValueType::kText);
      if (!name) return std::unexpected(name.error());
      if (name->empty() || name->size() > kNameBytesMax)
        return wrong(value.source(), fmt::format("name must have 1 to {} bytes", kNameBytesMax));
      device.options.name = *name;
      continue;
    }
    const bool is_image = key == "image";
    const DeviceOption option = is_image ? DeviceOption{.exists = true} : find_device_option(key);
    if (!option.exists) {
      return wrong(
          toml_key.source(),
          fmt::format("a device has no key '{}'; there are name, image, and the options of "
                      "vblk serve --help for one device",
                      key));
    }
    const auto text = text_of(key, value, type_of(key));
    if (!text) return std::unexpected(text.error());
    if (text->empty()) return wrong(value.source(), fmt::format("{} is empty", key));
    if (!option.is_switch) {
      arguments.push_back(fmt::format("--{}={}", is_image ? "blk-file" : key, *text));
    } else if (*text == "on") {
      arguments.push_back("--" + key);
    }
  }
  auto parsed = parse_serve_options(arguments, std::nullopt);
  if (!parsed) {
    // Messages begin with the option that is wrong, if it is one.
    toml::source_region place = table.source();
    for (const auto& [key, value] : table) {
      const std::string option = fmt::format("--{} ", key.str());
      if (parsed.error().message.starts_with(option)) place = value.source();
    }
    return wrong(place,
                 fmt::format("device '{}': {}", device.options.name, parsed.error().message));
  }
  const std::string name = std::move(device.options.name);
  device.options = std::get<ServeOptions>(std::move(*parsed));
  device.options.name = name;
  device.is_writer = !device.options.image.read_only;
  if (auto checked = check_together(device); !checked) return checked;
  devices_.push_back(std::move(device));
  return {};
}

std::string normal_path(const std::string& path) {
  std::error_code error;
  const auto absolute = std::filesystem::absolute(path, error);
  return error ? path : absolute.lexically_normal().string();
}

// The same file under any name, links included.
bool is_same_file(const std::string& one, const std::string& other) {
  struct stat first{};
  struct stat second{};
  if (::stat(one.c_str(), &first) != 0 || ::stat(other.c_str(), &second) != 0) return false;
  if (S_ISBLK(first.st_mode) && S_ISBLK(second.st_mode)) return first.st_rdev == second.st_rdev;
  return first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

Expected<void> Reader::check_socket(const Device& device, std::string_view key,
                                    const std::string& socket) const {
  if (socket.empty()) return {};
  const auto mine = normal_path(socket);
  for (const Device& other : devices_) {
    for (const auto* const taken : {&other.options.socket_path, &other.options.monitor_path}) {
      if (taken->empty() || normal_path(*taken) != mine) continue;
      return wrong(place_of(*device.table, key),
                   fmt::format("{} '{}' is a socket of device '{}' already", key, socket,
                               other.options.name));
    }
  }
  return {};
}

// What two devices of one process cannot both have.
Expected<void> Reader::check_together(const Device& device) const {
  const ServeOptions& options = device.options;
  for (const Device& other : devices_) {
    if (other.options.name == options.name) {
      return wrong(place_of(*device.table, "name"),
                   fmt::format("there is a device '{}' already", options.name));
    }
    const auto& image = options.image.path;
    if (image.empty() || (!device.is_writer && !other.is_writer)) continue;
    if (is_same_file(image, other.options.image.path)) {
      return wrong(place_of(*device.table, "image"),
                   fmt::format("image '{}' is the image of device '{}' already; only devices with "
                               "read-only = true can share one",
                               image, other.options.name));
    }
  }
  if (!options.monitor_path.empty() &&
      normal_path(options.monitor_path) == normal_path(options.socket_path)) {
    return wrong(place_of(*device.table, "monitor"),
                 "monitor and socket-path are the same; give each its own");
  }
  if (auto checked = check_socket(device, "socket-path", options.socket_path); !checked)
    return checked;
  return check_socket(device, "monitor", options.monitor_path);
}

Expected<std::vector<ServeOptions>> Reader::read(const toml::table& root) {
  for (const auto& [key, value] : root) {
    const auto* const tables = value.as_array();
    if (key.str() != "device" || tables == nullptr || !tables->is_homogeneous<toml::table>()) {
      return wrong(key.source(),
                   fmt::format("'{}' is not known here; each device is a [[device]] with its keys "
                               "below",
                               key.str()));
    }
    if (tables->size() > kDevicesMax) {
      return wrong(key.source(), fmt::format("{} devices; up to {} fit in one process",
                                             tables->size(), kDevicesMax));
    }
    for (std::size_t i = 0; i < tables->size(); ++i) {
      if (auto done = read_device(*tables->get_as<toml::table>(i), i); !done)
        return std::unexpected(std::move(done.error()));
    }
  }
  if (devices_.empty()) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("{}: there is no [[device]] in it", path_));
  }
  std::vector<ServeOptions> options;
  options.reserve(devices_.size());
  for (Device& device : devices_) options.push_back(std::move(device.options));
  return options;
}

}  // namespace

Expected<std::vector<ServeOptions>> parse_config(std::string_view text, const std::string& path) {
  Reader reader(path);
  toml::table root;
  try {
    root = toml::parse(text);
  } catch (const toml::parse_error& error) {
    return reader.wrong(error.source(), error.description());
  }
  return reader.read(root);
}

Expected<std::vector<ServeOptions>> read_config(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::error_code error;
  const auto bytes = std::filesystem::file_size(path, error);
  if (!file || error) {
    const int errno_value = error ? error.value() : errno;
    return make_error(kind_of_errno(errno_value),
                      fmt::format("cannot read '{}': {}", path, describe_errno(errno_value)),
                      errno_value);
  }
  if (bytes > kFileBytesMax) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("'{}' has {} bytes; a configuration has up to {}", path, bytes, kFileBytesMax));
  }
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  return parse_config(text, path);
}

}  // namespace vblk::cli
