#include "blockdev/img/arguments.h"

#include <algorithm>

#include <fmt/core.h>

namespace vblk::img {

namespace {

std::unexpected<Error> usage_error(const std::string& message) {
  return make_error(ErrorKind::kInvalidArgument, message + "; see vblk img --help");
}

struct Option {
  std::string_view name;
  bool takes_value{false};
  bool is_refused{false};
  char described{0};
};

Option decode(std::string_view word) {
  Option option{.name = word};
  if (word.ends_with('!')) {
    option.is_refused = true;
    option.name.remove_suffix(1);
  }
  if (option.name.ends_with(':')) {
    option.takes_value = true;
    option.name.remove_suffix(1);
  }
  const std::size_t end = option.name.find_last_not_of("12<$");
  if (option.name.substr(0, end + 1).ends_with("image-opts") && end + 1 < option.name.size()) {
    option.described = option.name.back();
    option.name.remove_suffix(1);
  }
  return option;
}

Expected<Option> find(std::span<const std::string_view> options, std::string_view name) {
  std::optional<Option> abbreviated;
  for (const std::string_view word : options) {
    const Option option = decode(word);
    if (option.name == name) return option;
    if (name.size() < 2 || option.name.size() < 2 || !option.name.starts_with(name)) continue;
    if (abbreviated) return usage_error(fmt::format("option '--{}' is ambiguous", name));
    abbreviated = option;
  }
  if (abbreviated) return *abbreviated;
  return usage_error(fmt::format("unknown option '{}{}'", name.size() == 1 ? "-" : "--", name));
}

std::unexpected<Error> refusal(const Option& option) {
  return make_error(ErrorKind::kNotSupported,
                    fmt::format("{}{} is not supported here; docs/img.md says what is",
                                option.name.size() == 1 ? "-" : "--", option.name));
}

}  // namespace

Expected<Arguments> Arguments::parse(std::span<const std::string> words,
                                     std::span<const std::string_view> options) {
  Arguments arguments;
  const auto missing = [](std::string_view name) {
    return usage_error(fmt::format("option '{}' needs a value", name));
  };
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "--") {
      arguments.names_.insert(arguments.names_.end(),
                              words.begin() + static_cast<std::ptrdiff_t>(i) + 1, words.end());
      break;
    }
    if (word.size() < 2 || word[0] != '-') {
      arguments.names_.push_back(word);
      continue;
    }
    if (word.starts_with("--")) {
      const std::size_t equals = word.find('=');
      const auto option = find(options, std::string_view(word).substr(2, equals - 2));
      if (!option) return std::unexpected(option.error());
      if (option->is_refused) return refusal(*option);
      std::string value;
      if (option->takes_value && equals != std::string::npos) {
        value = word.substr(equals + 1);
      } else if (option->takes_value) {
        if (++i == words.size()) return missing(word);
        value = words[i];
      } else if (equals != std::string::npos) {
        return usage_error(fmt::format("option '{}' takes no value", word.substr(0, equals)));
      }
      arguments.given_.emplace_back(option->name, value);
      continue;
    }
    for (std::size_t letter = 1; letter < word.size(); ++letter) {
      const auto option = find(options, std::string_view(word).substr(letter, 1));
      if (!option) return std::unexpected(option.error());
      if (option->is_refused) return refusal(*option);
      if (!option->takes_value) {
        arguments.given_.emplace_back(option->name, "");
        continue;
      }
      std::string value = word.substr(letter + 1);
      if (value.empty()) {
        if (++i == words.size()) return missing(word);
        value = words[i];
      }
      arguments.given_.emplace_back(option->name, value);
      break;
    }
  }
  arguments.names_as_given_ = arguments.names_;
  if (auto taken = arguments.take_descriptions(options); !taken)
    return std::unexpected(std::move(taken.error()));
  return arguments;
}

Expected<void> Arguments::take_descriptions(std::span<const std::string_view> options) {
  for (const std::string_view word : options) {
    const Option option = decode(word);
    if (option.described == 0 || !has(option.name)) continue;
    const std::size_t count = names_.size();
    const bool is_target = option.described == '$';
    const std::size_t end = option.described == '1'   ? std::min<std::size_t>(count, 1)
                            : option.described == '<' ? std::max<std::size_t>(count, 1) - 1
                                                      : count;
    const auto format_of = [&option, is_target](std::size_t name) -> std::string_view {
      if (is_target) return "O";
      return option.described == '2' && name == 1 ? "F" : "f";
    };
    for (const std::string_view format : {format_of(0), format_of(1)}) {
      if (has(format))
        return usage_error(fmt::format("--{} tells the format by itself, and -{} has no place",
                                       option.name, format));
    }
    for (std::size_t i = is_target ? std::max<std::size_t>(count, 1) - 1 : 0; i < end; ++i) {
      const auto driver = take_description(names_[i], options);
      if (!driver) return std::unexpected(driver.error());
      if (is_target && driver->empty())
        return usage_error("the description of the target has no driver");
      if (option.described == '<' && i > 0 && *driver != value_or("f", ""))
        return usage_error("several images together have one driver");
      if (!driver->empty()) given_.emplace_back(format_of(i), *driver);
    }
  }
  return {};
}

Expected<std::string> Arguments::take_description(std::string& name,
                                                  std::span<const std::string_view> options) {
  std::string file;
  std::string driver;
  for (const auto& [key, value] : parse_key_values(name)) {
    const bool is_file = key == "file.driver" && value == "file";
    if (key == "file.filename") {
      file = value;
    } else if (key == "driver" && (value == "raw" || value == "qcow2")) {
      driver = value;
    } else if (key == "force-share" && (value == "on" || value == "off") &&
               std::ranges::find(options, std::string_view("U")) != options.end()) {
      if (value == "on") given_.emplace_back("U", "");
    } else if (!is_file) {
      return make_error(
          ErrorKind::kNotSupported,
          fmt::format("'{}={}' of '{}' is not supported here: a description has driver=raw or "
                      "qcow2, file.filename, file.driver=file and, for commands with -U, "
                      "force-share",
                      key, value, name));
    }
  }
  if (file.empty())
    return usage_error(fmt::format("'{}' names no file: file.filename is missing", name));
  name = file;
  return driver;
}

std::optional<std::string> Arguments::value(std::string_view name) const {
  const auto found = std::find_if(given_.rbegin(), given_.rend(),
                                  [name](const auto& option) { return option.first == name; });
  if (found == given_.rend()) return std::nullopt;
  return found->second;
}

std::vector<std::string> Arguments::values(std::string_view name) const {
  std::vector<std::string> values;
  for (const auto& [given, value] : given_) {
    if (given == name) values.push_back(value);
  }
  return values;
}

std::vector<std::pair<std::string, std::string>> parse_key_values(std::string_view text) {
  std::vector<std::pair<std::string, std::string>> pairs;
  std::string word;
  const auto add = [&] {
    if (word.empty()) return;
    const std::size_t equals = word.find('=');
    if (equals == std::string::npos) {
      pairs.emplace_back(word, "on");
    } else {
      pairs.emplace_back(word.substr(0, equals), word.substr(equals + 1));
    }
    word.clear();
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != ',') {
      word += text[i];
    } else if (i + 1 < text.size() && text[i + 1] == ',') {
      word += text[i++];
    } else {
      add();
    }
  }
  add();
  return pairs;
}

std::vector<std::pair<std::string, std::string>> key_values(const Arguments& arguments) {
  std::vector<std::pair<std::string, std::string>> all;
  for (const std::string& text : arguments.values("o")) {
    for (auto& pair : parse_key_values(text)) all.push_back(std::move(pair));
  }
  return all;
}

bool asks_for_help(const Arguments& arguments) {
  return std::ranges::any_of(key_values(arguments), [](const auto& pair) {
    return (pair.first == "help" || pair.first == "?") && pair.second == "on";
  });
}

}  // namespace vblk::img
