#include "blockdev/img/json.h"

namespace vblk::img {

namespace {

void print(const boost::json::value& value, std::size_t level, std::string& text) {
  const auto new_line = [&text](std::size_t indent) {
    text += '\n';
    text.append(4 * indent, ' ');
  };
  bool is_first = true;
  const auto begin_member = [&] {
    if (!is_first) text += ',';
    is_first = false;
    new_line(level + 1);
  };
  if (const auto* const object = value.if_object()) {
    text += '{';
    for (const auto& member : *object) {
      begin_member();
      text += boost::json::serialize(boost::json::value(member.key())) + ": ";
      print(member.value(), level + 1, text);
    }
    new_line(level);
    text += '}';
  } else if (const auto* const array = value.if_array()) {
    text += '[';
    for (const auto& element : *array) {
      begin_member();
      print(element, level + 1, text);
    }
    new_line(level);
    text += ']';
  } else {
    text += boost::json::serialize(value);
  }
}

}  // namespace

std::string pretty_json(const boost::json::value& value) {
  std::string text;
  print(value, 0, text);
  return text + '\n';
}

}  // namespace vblk::img
