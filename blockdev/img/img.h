// `vblk img`: what people do with images around serving them (docs/img.md).
#pragma once

#include <span>
#include <string>

namespace vblk::img {

// Runs a command with the words after `img`; returns the exit status.
int run(std::span<const std::string> words);

}  // namespace vblk::img
