// A command line as qemu-img takes it (getopt_long(3)): options anywhere, letters joined, values
// joined or apart, long names abbreviated, "--" before names that begin with a dash.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "aio/error.h"

namespace vblk::img {

class Arguments {
 public:
  // `options`: names, a letter or a word each; a ':' at the end: it takes a value. A '!' at the
  // end: qemu-img has it, and it is refused by its name. Error: kInvalidArgument.
  static Expected<Arguments> parse(std::span<const std::string> words,
                                   std::span<const std::string_view> options);

  [[nodiscard]] bool has(std::string_view name) const { return value(name).has_value(); }
  // The last one given; empty for one that takes none.
  [[nodiscard]] std::optional<std::string> value(std::string_view name) const;
  [[nodiscard]] std::string value_or(std::string_view name, std::string_view otherwise) const {
    return value(name).value_or(std::string(otherwise));
  }
  [[nodiscard]] std::vector<std::string> values(std::string_view name) const;
  // All of them in order, with their values.
  [[nodiscard]] const std::vector<std::pair<std::string, std::string>>& given() const {
    return given_;
  }
  [[nodiscard]] const std::vector<std::string>& names() const { return names_; }

 private:
  std::vector<std::pair<std::string, std::string>> given_;
  std::vector<std::string> names_;
};

// "a=b,c=d", as of -o: in order; ",," is a comma within a value. A word without '=' is "on".
[[nodiscard]] std::vector<std::pair<std::string, std::string>> parse_key_values(
    std::string_view text);
// All values of -o as one list.
[[nodiscard]] std::vector<std::pair<std::string, std::string>> key_values(
    const Arguments& arguments);
// Whether -o asks for help: "help" or "?" among the words.
[[nodiscard]] bool asks_for_help(const Arguments& arguments);

}  // namespace vblk::img
