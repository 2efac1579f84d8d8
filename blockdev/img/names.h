// Names in headers: whose they are, where they lead.
#pragma once

#include <string>
#include <string_view>

namespace vblk::img {

// Nothing that a terminal would act on.
[[nodiscard]] std::string printable(std::string_view text);

// Where the name of a backing or data file in the header of `image` leads: relative names are
// relative to the folder of the image, and "file:" says nothing. Names of other protocols stay.
[[nodiscard]] std::string resolve_name(const std::string& image, const std::string& name);

}  // namespace vblk::img
