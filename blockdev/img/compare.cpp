// `vblk img compare`: whether two images are the same disk, and where they first differ.
//
// Workers take chunks in order and stop when a difference is known before them, so that what is
// told is the first one.
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/output.h"
#include "blockdev/img/progress.h"
#include "blockdev/img/source.h"
#include "blockdev/img/workers.h"
#include "blockdev/img/zeroes.h"

namespace vblk::img {

using blockdev::AlignedBuffer;
using blockdev::BlockOperation;
using blockdev::IoGroup;

namespace {

constexpr int kStatusDifferent = 1;
constexpr int kStatusCannotOpen = 2;
constexpr int kStatusCannotMap = 3;
constexpr int kStatusCannotRead = 4;

constexpr std::uint64_t kChunkBytes = std::uint64_t{1} << 20;
constexpr unsigned kWorkers = 8;  // two chunks each: 16 MiB

// What ends a comparison, by where it was found.
struct Finding {
  enum class What : std::uint8_t { kStatus, kContent, kCannotMap, kCannotRead };
  std::uint64_t offset{std::numeric_limits<std::uint64_t>::max()};
  What what{What::kContent};
  int error{0};
};

class Comparison {
 public:
  // Compares [begin, end); `b` may be nullptr, for zeroes.
  Comparison(BlockNode* a, BlockNode* b, std::uint64_t begin, std::uint64_t end, bool strict,
             Progress& progress)
      : a_(a),
        b_(b),
        status_a_(a, kWholeChain),
        status_b_(b, kWholeChain),
        next_(begin),
        end_(end),
        strict_(strict),
        progress_(progress) {}

  Expected<std::optional<Finding>> run();

 private:
  struct Buffers {
    AlignedBuffer a{kChunkBytes};
    AlignedBuffer b{kChunkBytes};
  };
  Task<int> work(IoContext& context);
  Task<int> compare(IoContext& context, std::uint64_t at, std::uint64_t end, Buffers& buffers);
  void found(const Finding& finding) {
    const std::lock_guard lock(mutex_);
    if (finding.offset < first_.offset) first_ = finding;
    known_.store(first_.offset, std::memory_order_relaxed);
  }

  BlockNode* const a_;
  BlockNode* const b_;
  StatusReader status_a_;
  StatusReader status_b_;
  std::atomic<std::uint64_t> next_;
  const std::uint64_t end_;
  const bool strict_;
  Progress& progress_;
  std::atomic<std::uint64_t> known_{std::numeric_limits<std::uint64_t>::max()};
  std::mutex mutex_;
  Finding first_;
};

// The first sector that differs, as an offset; nothing if none does.
std::optional<std::uint64_t> difference(std::span<const std::byte> a,
                                        std::span<const std::byte> b) {
  if (std::memcmp(a.data(), b.data(), a.size()) == 0) return std::nullopt;
  for (std::uint64_t at = 0;; at += blockdev::kSectorBytes) {
    const std::size_t length = std::min<std::size_t>(blockdev::kSectorBytes, a.size() - at);
    if (std::memcmp(a.data() + at, b.data() + at, length) != 0) return at;
  }
}

std::optional<std::uint64_t> not_zero(std::span<const std::byte> bytes) {
  if (is_zero(bytes)) return std::nullopt;
  for (std::uint64_t at = 0;; at += blockdev::kSectorBytes) {
    const std::size_t length = std::min<std::size_t>(blockdev::kSectorBytes, bytes.size() - at);
    if (!is_zero(bytes.subspan(at, length))) return at;
  }
}

Task<int> Comparison::compare(IoContext& context, std::uint64_t at, std::uint64_t end,
                              Buffers& buffers) {
  while (at < end) {
    ChainStatus a;
    ChainStatus b;
    int error = co_await status_a_.read(context, at, end - at, a);
    if (error == 0) error = co_await status_b_.read(context, at, end - at, b);
    if (error != 0) {
      found({.offset = at, .what = Finding::What::kCannotMap, .error = error});
      co_return 0;
    }
    const std::uint64_t length = std::min(a.length_bytes, b.length_bytes);
    if (strict_ &&
        (a.is_data != b.is_data || a.is_zero != b.is_zero || a.is_present != b.is_present)) {
      found({.offset = at, .what = Finding::What::kStatus});
      co_return 0;
    }
    IoGroup group(context);
    const auto bytes_a = buffers.a.bytes().first(length);
    const auto bytes_b = buffers.b.bytes().first(length);
    if (a.is_data) group.start(*a_, BlockOperation::kRead, at, {{bytes_a.data(), bytes_a.size()}});
    if (b.is_data) group.start(*b_, BlockOperation::kRead, at, {{bytes_b.data(), bytes_b.size()}});
    error = co_await group;
    if (error != 0) {
      found({.offset = at, .what = Finding::What::kCannotRead, .error = error});
      co_return 0;
    }
    std::optional<std::uint64_t> where;
    if (a.is_data && b.is_data) {
      where = difference(bytes_a, bytes_b);
    } else if (a.is_data || b.is_data) {
      where = not_zero(a.is_data ? bytes_a : bytes_b);
    }
    if (where) {
      found({.offset = at + *where, .what = Finding::What::kContent});
      co_return 0;
    }
    at += length;
  }
  co_return 0;
}

Task<int> Comparison::work(IoContext& context) {
  Buffers buffers;
  for (;;) {
    const std::uint64_t at = next_.fetch_add(kChunkBytes, std::memory_order_relaxed);
    if (at >= end_ || at >= known_.load(std::memory_order_relaxed)) co_return 0;
    const std::uint64_t end = std::min(end_, at + kChunkBytes);
    [[maybe_unused]] const int ignored = co_await compare(context, at, end, buffers);
    if (end > known_.load(std::memory_order_relaxed)) co_return 0;
    progress_.advance(end - at);
  }
}

Expected<std::optional<Finding>> Comparison::run() {
  std::vector<BlockNode*> nodes{a_};
  if (b_ != nullptr) nodes.push_back(b_);
  auto ran = run_workers(kWorkers, kThreadPerProcessor, nodes,
                         [this](IoContext& context) { return work(context); });
  if (!ran) return std::unexpected(std::move(ran.error()));
  if (first_.offset == std::numeric_limits<std::uint64_t>::max()) return std::nullopt;
  return first_;
}

// The exit status for what was found, which is told of.
int tell(const Finding& finding, bool quiet) {
  switch (finding.what) {
    case Finding::What::kStatus:
      if (!quiet) say("Strict mode: Offset {} block status mismatch!\n", finding.offset);
      return kStatusDifferent;
    case Finding::What::kContent:
      if (!quiet) say("Content mismatch at offset {}!\n", finding.offset);
      return kStatusDifferent;
    case Finding::What::kCannotMap:
      return fail(fmt::format("cannot find out what there is at offset {}: {}", finding.offset,
                              describe_errno(finding.error)),
                  kStatusCannotMap);
    case Finding::What::kCannotRead:
      return fail(fmt::format("cannot read at offset {}: {}", finding.offset,
                              describe_errno(finding.error)),
                  kStatusCannotRead);
  }
  return kStatusCannotRead;
}

int compare_images(const Source& a, const Source& b, bool strict, bool quiet, Progress& progress) {
  const std::uint64_t both = std::min(a.size_bytes(), b.size_bytes());
  const bool same_size = a.size_bytes() == b.size_bytes();
  if (strict && !same_size) {
    if (!quiet) say("Strict mode: Image size mismatch!\n");
    return kStatusDifferent;
  }
  if (both > 0) {
    const auto finding = Comparison(a.node.get(), b.node.get(), 0, both, strict, progress).run();
    if (!finding) return fail(finding.error().message, kStatusCannotOpen);
    if (*finding) return tell(**finding, quiet);
  }
  if (!same_size) {
    if (!quiet) say("Warning: Image size mismatch!\n");
    const Source& longer = a.size_bytes() > b.size_bytes() ? a : b;
    const auto finding =
        Comparison(longer.node.get(), nullptr, both, longer.size_bytes(), false, progress).run();
    if (!finding) return fail(finding.error().message, kStatusCannotOpen);
    if (*finding) return tell(**finding, quiet);
  }
  if (!quiet) say("Images are identical.\n");
  return 0;
}

}  // namespace

int compare_command(std::span<const std::string> words) {
  constexpr std::array<std::string_view, 10> kOptions{
      "f:", "F:", "T:", "p", "q", "s", "U", "force-share", "object:!", "image-opts2"};
  const auto arguments = Arguments::parse(words, kOptions);
  if (!arguments) return fail(arguments.error().message);
  if (arguments->names().size() != 2) return fail("give two images; see vblk img --help");
  const auto cache = parse_cache(arguments->value_or("T", ""), blockdev::CacheMode::kWriteback);
  if (!cache) return fail(cache.error().message, kStatusCannotOpen);
  const auto open = [&](std::size_t index, std::string_view format) {
    return open_source({.path = arguments->names()[index],
                        .format = arguments->value_or(format, ""),
                        .cache = *cache,
                        .lock = !arguments->has("U") && !arguments->has("force-share")});
  };
  const auto a = open(0, "f");
  if (!a) return fail(a.error().message, kStatusCannotOpen);
  const auto b = open(1, "F");
  if (!b) return fail(b.error().message, kStatusCannotOpen);
  const bool quiet = arguments->has("q");
  Progress progress(arguments->has("p") && !quiet, std::max(a->size_bytes(), b->size_bytes()));
  const int status = compare_images(*a, *b, arguments->has("s"), quiet, progress);
  progress.end();
  return status;
}

}  // namespace vblk::img
