#include "blockdev/conform/report.h"

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

std::string xml(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else if (c == '"') {
      out += "&quot;";
    } else if (static_cast<unsigned char>(c) < 0x20 && c != '\n') {
      out += ' ';
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

void Report::add(const Result& result) {
  seconds_ += result.seconds;
  if (result.outcome == Outcome::kPassed) ++totals_.passed;
  if (result.outcome == Outcome::kSkipped) ++totals_.skipped;
  if (result.outcome == Outcome::kFailed) {
    ++totals_.failed;
    if (result.test->statement.force == Force::kMust) ++totals_.failed_must;
  }
  switch (format_) {
    case ReportFormat::kHuman:
      add_human(result);
      break;
    case ReportFormat::kTap:
      add_tap(result);
      break;
    case ReportFormat::kJunit:
      add_junit(result);
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

void Report::add_junit(const Result& result) {
  const std::string group(result.test->group());
  junit_ += fmt::format("  <testcase classname=\"vblk.conform.{}\" name=\"{}\" time=\"{:.3f}\"",
                        group, result.test->name, result.seconds);
  switch (result.outcome) {
    case Outcome::kPassed:
      junit_ += "/>\n";
      break;
    case Outcome::kSkipped:
      junit_ += fmt::format("><skipped message=\"{}\"/></testcase>\n", xml(result.text));
      break;
    case Outcome::kFailed:
      junit_ += fmt::format(
          "><failure type=\"{}\" message=\"{}\">{}\nagain: {} --test {}</failure>"
          "</testcase>\n",
          to_string(result.test->statement.force), xml(result.text),
          xml(statement_text(result.test->statement)), xml(repeat_), result.test->name);
      break;
  }
}

void Report::finish(std::size_t test_count, const std::string& why_incomplete) {
  const std::size_t run = totals_.passed + totals_.failed + totals_.skipped;
  switch (format_) {
    case ReportFormat::kHuman:
      fmt::print("{} passed, {} failed{}, {} skipped, in {:.1f} s\n", totals_.passed,
                 totals_.failed,
                 totals_.failed == 0 ? "" : fmt::format(" ({} MUST)", totals_.failed_must),
                 totals_.skipped, seconds_);
      if (!why_incomplete.empty())
        fmt::print("{} of {} tests were not run: {}\n", test_count - run, test_count,
                   why_incomplete);
      break;
    case ReportFormat::kTap:
      fmt::print("1..{}\n", test_count);
      if (!why_incomplete.empty()) fmt::print("Bail out! {}\n", why_incomplete);
      break;
    case ReportFormat::kJunit:
      fmt::print(
          "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"vblk conform\" "
          "tests=\"{}\" failures=\"{}\" skipped=\"{}\" time=\"{:.3f}\">\n{}",
          run, totals_.failed, totals_.skipped, seconds_, junit_);
      if (!why_incomplete.empty())
        fmt::print("  <system-err>{}</system-err>\n", xml(why_incomplete));
      fmt::print("</testsuite>\n");
      break;
  }
  std::fflush(stdout);
}

}  // namespace vblk::conform
