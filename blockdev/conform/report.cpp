#include "blockdev/conform/report.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <fcntl.h>
#include <string_view>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

namespace vblk::conform {

namespace {

std::string statement_text(const Statement& statement) {
  return fmt::format("{}, \"{}\", {}: {}", statement.document, statement.section,
                     to_string(statement.force), statement.text);
}

// Lines after the first, as TAP's comments.
std::string as_comments(const std::string& text) {
  std::string out = "# ";
  for (const char c : text) {
    out += c;
    if (c == '\n') out += "# ";
  }
  return out;
}

std::string one_line(std::string text) {
  for (char& c : text) {
    if (c == '\n') c = ' ';
  }
  return text;
}

// What a backend says may be any bytes; those that move a terminal's cursor, or a parser's, go.
std::string without_controls(std::string text) {
  std::ranges::replace_if(
      text,
      [](char c) {
        const auto byte = static_cast<unsigned char>(c);
        return (byte < 0x20 && c != '\n') || byte == 0x7f;
      },
      '?');
  return text;
}

// How many bytes a character of UTF-8 has that begins with `text`; 0: it is none that XML takes.
std::size_t character_bytes(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return first >= 0x20 || first == '\n' ? 1 : 0;
  const std::size_t count = first >= 0xf0 && first < 0xf5 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first >= 0xf5 || text.size() < count) return 0;
  char32_t code = first & (0xffU >> (count + 1));
  for (std::size_t i = 1; i < count; ++i) {
    if ((byte(i) & 0xc0U) != 0x80U) return 0;
    code = code << 6 | (byte(i) & 0x3fU);
  }
  constexpr std::array<char32_t, 5> kSmallest{0, 0, 0x80, 0x800, 0x10000};
  const bool is_surrogate = code >= 0xd800 && code < 0xe000;
  const bool is_none = code == 0xfffe || code == 0xffff;
  return code < kSmallest[count] || code > 0x10ffff || is_surrogate || is_none ? 0 : count;
}

// What XML cannot say becomes a question mark.
std::string xml(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const std::size_t count = character_bytes(text);
    const char c = text[0];
    if (count == 0) {
      out += '?';
    } else if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else if (c == '"') {
      out += "&quot;";
    } else {
      out += text.substr(0, count);
    }
    text.remove_prefix(std::max<std::size_t>(count, 1));
  }
  return out;
}

}  // namespace

void Report::add(Result result) {
  result.text = without_controls(std::move(result.text));
  seconds_ += result.seconds;
  if (result.outcome == Outcome::kPassed) ++totals_.passed;
  if (result.outcome == Outcome::kSkipped) ++totals_.skipped;
  if (result.outcome == Outcome::kFailed) {
    ++totals_.failed;
    ++totals_.failed_by_force[static_cast<std::size_t>(result.test->statement.force)];
  }
  switch (format_) {
    case ReportFormat::kHuman:
      add_human(result);
      break;
    case ReportFormat::kTap:
      add_tap(result);
      break;
    case ReportFormat::kJunit:
      junit_ += junit_case(result);
      if (file_begin_) write_junit(junit_document(what_is_missing("the run has not ended")));
      break;
  }
  std::fflush(stdout);
}

void Report::add_human(const Result& result) const {
  switch (result.outcome) {
    case Outcome::kPassed:
      fmt::print("ok    {}\n", result.test->name);
      break;
    case Outcome::kSkipped:
      fmt::print("skip  {}: {}\n", result.test->name, one_line(result.text));
      break;
    case Outcome::kFailed:
      fmt::print("FAIL  {}\n      {}\n      seen: {}\n      again: {} --test {}\n",
                 result.test->name, statement_text(result.test->statement), result.text, repeat_,
                 result.test->name);
      break;
  }
}

void Report::add_tap(const Result& result) const {
  const std::size_t number = totals_.passed + totals_.failed + totals_.skipped;
  const bool failed = result.outcome == Outcome::kFailed;
  fmt::print("{} {} - {}", failed ? "not ok" : "ok", number, result.test->name);
  if (result.outcome == Outcome::kSkipped) fmt::print(" # SKIP {}", one_line(result.text));
  fmt::print("\n");
  if (!failed) return;
  fmt::print("{}\n", as_comments(fmt::format("{}\nseen: {}\nagain: {} --test {}",
                                             statement_text(result.test->statement), result.text,
                                             repeat_, result.test->name)));
}

std::string Report::junit_case(const Result& result) const {
  const std::string group(result.test->group());
  const std::string begin =
      fmt::format("  <testcase classname=\"vblk.conform.{}\" name=\"{}\" time=\"{:.3f}\"", group,
                  result.test->name, result.seconds);
  switch (result.outcome) {
    case Outcome::kPassed:
      break;
    case Outcome::kSkipped:
      return begin + fmt::format("><skipped message=\"{}\"/></testcase>\n", xml(result.text));
    case Outcome::kFailed:
      return begin + fmt::format(
                         "><failure type=\"{}\" message=\"{}\">{}\nagain: {} --test {}</failure>"
                         "</testcase>\n",
                         to_string(result.test->statement.force), xml(result.text),
                         xml(statement_text(result.test->statement)), xml(repeat_),
                         result.test->name);
  }
  return begin + "/>\n";
}

namespace {

// " (3 MUST, 1 robust)", or nothing.
std::string by_force(const Totals& totals) {
  std::string text;
  for (std::size_t i = 0; i < kForces; ++i) {
    if (totals.failed_by_force[i] == 0) continue;
    text += fmt::format("{}{} {}", text.empty() ? " (" : ", ", totals.failed_by_force[i],
                        to_string(static_cast<Force>(i)));
  }
  return text.empty() ? text : text + ")";
}

}  // namespace

Report::Report(ReportFormat format, std::string repeat, std::span<const Test* const> tests)
    : format_(format), repeat_(std::move(repeat)), tests_(tests) {
  struct stat output{};
  const int flags = ::fcntl(STDOUT_FILENO, F_GETFL);
  if (format != ReportFormat::kJunit || ::fstat(STDOUT_FILENO, &output) != 0 ||
      !S_ISREG(output.st_mode) || (flags & O_APPEND) != 0)
    return;
  const off_t here = ::lseek(STDOUT_FILENO, 0, SEEK_CUR);
  if (here < 0) return;
  file_begin_ = here;
  write_junit(junit_document(what_is_missing("the run has not ended")));
}

std::string Report::what_is_missing(const std::string& why) const {
  return fmt::format("{} of {} tests were not run: {}", tests_.size() - count(), tests_.size(),
                     one_line(without_controls(why)));
}

void Report::finish(const std::string& why_incomplete) {
  const bool is_complete = why_incomplete.empty();
  switch (format_) {
    case ReportFormat::kHuman:
      fmt::print("{} passed, {} failed{}, {} skipped, in {:.1f} s\n", totals_.passed,
                 totals_.failed, by_force(totals_), totals_.skipped, seconds_);
      if (!is_complete) fmt::print("{}\n", what_is_missing(why_incomplete));
      break;
    case ReportFormat::kTap:
      fmt::print("1..{}\n", tests_.size());
      if (!is_complete) fmt::print("Bail out! {}\n", what_is_missing(why_incomplete));
      break;
    case ReportFormat::kJunit:
      write_junit(junit_document(is_complete ? "" : what_is_missing(why_incomplete)));
      break;
  }
  std::fflush(stdout);
}

std::string Report::junit_document(const std::string& missing) const {
  std::string cases = junit_;
  std::size_t not_run = 0;
  std::size_t errors = 0;
  if (!missing.empty()) {
    for (const Test* test : tests_.subspan(count())) {
      cases +=
          junit_case({.test = test, .outcome = Outcome::kSkipped, .text = "not run", .seconds = 0});
      ++not_run;
    }
    cases += fmt::format(
        "  <testcase classname=\"vblk.conform\" name=\"run\" time=\"{:.3f}\"><error "
        "type=\"incomplete\" message=\"{}\"/></testcase>\n",
        seconds_, xml(missing));
    errors = 1;
  }
  return fmt::format(
      "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"vblk conform\" tests=\"{}\" "
      "failures=\"{}\" errors=\"{}\" skipped=\"{}\" time=\"{:.3f}\">\n{}</testsuite>\n",
      count() + not_run + errors, totals_.failed, errors, totals_.skipped + not_run, seconds_,
      cases);
}

void Report::write_junit(const std::string& document) const {
  if (!file_begin_) {
    fmt::print("{}", document);
    return;
  }
  std::size_t written = 0;
  while (written < document.size()) {
    const ssize_t length =
        ::pwrite(STDOUT_FILENO, document.data() + written, document.size() - written,
                 *file_begin_ + static_cast<off_t>(written));
    if (length < 0 && errno == EINTR) continue;
    if (length <= 0) return;  // a disk that is full: there is nobody to tell
    written += static_cast<std::size_t>(length);
  }
  const off_t end = *file_begin_ + static_cast<off_t>(document.size());
  [[maybe_unused]] const auto cut = ::ftruncate(STDOUT_FILENO, end);
  ::lseek(STDOUT_FILENO, end, SEEK_SET);
}

}  // namespace vblk::conform
