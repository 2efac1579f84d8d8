// What a guest may find in each sector of its disk: now, and after a power cut.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <fmt/core.h>

#include "tests/qcow2/image_format.h"

namespace vblk::qcow2::testing {

// Changes of a sector follow one another: the guest never has two in flight.
class GuestModel {
 public:
  explicit GuestModel(std::span<const std::uint64_t> tags) {
    for (const std::uint64_t tag : tags) sectors_.push_back({{.tag = tag, .completed = 1}});
  }

  [[nodiscard]] std::size_t sector_count() const { return sectors_.size(); }

  // A change that is doubtful may come to nothing: a discard.
  void begin(std::uint64_t sector, std::uint64_t tag, bool is_doubtful) {
    sectors_[sector].push_back({.tag = tag, .is_doubtful = is_doubtful});
  }
  void completed(std::uint64_t sector, bool is_stable) {
    std::vector<Value>& values = sectors_[sector];
    values.back().completed = time_;
    if (is_stable && !values.back().is_doubtful) values.erase(values.begin(), values.end() - 1);
  }
  // It has come to nothing, or not.
  void failed(std::uint64_t sector) {
    completed(sector, false);
    sectors_[sector].back().is_doubtful = true;
  }
  // What has completed by now; for flushed().
  [[nodiscard]] std::uint64_t now() { return time_++; }
  // A flush that began at `begun` has succeeded.
  void flushed(std::uint64_t begun) {
    for (std::vector<Value>& values : sectors_) {
      for (std::size_t i = values.size() - 1; i > 0; --i) {
        const Value& value = values[i];
        if (value.completed == 0 || value.completed > begun || value.is_doubtful) continue;
        values.erase(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(i));
        break;
      }
    }
  }

  // The guest has read `tag`, while nothing was in flight to the sector: whether it may. What has
  // become of a doubtful change is known then.
  bool has_read(std::uint64_t sector, std::uint64_t tag) {
    std::vector<Value>& values = sectors_[sector];
    while (values.back().is_doubtful) {
      if (tag == values.back().tag) {
        values.back().is_doubtful = false;
        return true;
      }
      values.pop_back();
    }
    return values.back().tag == tag;
  }
  // Whether a power cut now may leave `tag`.
  [[nodiscard]] bool may_hold(std::uint64_t sector, std::uint64_t tag) const {
    for (const Value& value : sectors_[sector]) {
      if (value.tag == tag) return true;
    }
    return false;
  }
  [[nodiscard]] std::string describe(std::uint64_t sector) const {
    std::string text;
    for (const Value& value : sectors_[sector])
      text += fmt::format(" {:#x}{}{}", value.tag, value.is_doubtful ? " (or not)" : "",
                          value.completed == 0 ? " (in flight)" : "");
    return text;
  }

 private:
  struct Value {
    std::uint64_t tag{0};
    std::uint64_t completed{0};  // 0: in flight
    bool is_doubtful{false};     // or what was there before
  };
  std::vector<std::vector<Value>> sectors_;
  std::uint64_t time_{1};
};

}  // namespace vblk::qcow2::testing
