// The commands of `vblk img`. Each takes the words after its name and returns qemu-img's exit
// status; what went wrong is one line on standard error.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "aio/error.h"

namespace vblk::img {

int amend_command(std::span<const std::string> words);
int bitmap_command(std::span<const std::string> words);
int dd_command(std::span<const std::string> words);
int info_command(std::span<const std::string> words);
int create_command(std::span<const std::string> words);
int map_command(std::span<const std::string> words);
int check_command(std::span<const std::string> words);
int commit_command(std::span<const std::string> words);
int convert_command(std::span<const std::string> words);
int compare_command(std::span<const std::string> words);
int measure_command(std::span<const std::string> words);
int rebase_command(std::span<const std::string> words);
int resize_command(std::span<const std::string> words);
int snapshot_command(std::span<const std::string> words);

// Prints "vblk img: MESSAGE" on standard error; returns `status`.
int fail(std::string_view message, int status = 1);

enum class OutputFormat : std::uint8_t { kHuman, kJson };
// "human" or "json". Error: kInvalidArgument.
Expected<OutputFormat> parse_output_format(std::string_view text);

// A size as qemu-img reads it: a number, with a fraction if it has a suffix. Error:
// kInvalidArgument, naming `what`.
Expected<std::uint64_t> parse_size(std::string_view text, std::string_view what);
// "196 KiB": three digits.
[[nodiscard]] std::string human_size(std::uint64_t bytes);

}  // namespace vblk::img
