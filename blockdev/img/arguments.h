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
  // end: qemu-img has it, and it is refused by its name. At the end of --image-opts and
  // --target-image-opts, which names are descriptions of images (below): '1' the first, '2' two,
  // '<' all but the last, '$' the last. Errors: kInvalidArgument, kNotSupported.
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
  // The same, where they are descriptions as they are.
  [[nodiscard]] const std::vector<std::string>& names_as_given() const { return names_as_given_; }

  // A description, "driver=qcow2,file.filename=x", becomes the name of its file; force-share is -U.
  // Returns its driver, which is what an option for the format would say; empty: it has none.
  Expected<std::string> take_description(std::string& name,
                                         std::span<const std::string_view> options);

 private:
  Expected<void> take_descriptions(std::span<const std::string_view> options);

  std::vector<std::pair<std::string, std::string>> given_;
  std::vector<std::string> names_;
  std::vector<std::string> names_as_given_;
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
