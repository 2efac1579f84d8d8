// JSON as qemu-img prints it: four spaces for each level, a member to a line.
#pragma once

#include <string>

#include <boost/json.hpp>

namespace vblk::img {

// With a newline at the end.
[[nodiscard]] std::string pretty_json(const boost::json::value& value);

}  // namespace vblk::img
