#include "tests/fuzz/hostile_image.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/log.h"
#include "tests/fuzz/image_patches.h"
#include "tests/fuzz/input.h"
#include "tests/qcow2/qcow2_rig.h"

namespace vblk::fuzz {

namespace {

using blockdev::BlockOperation;
using qcow2::testing::Bytes;
using qcow2::testing::get_be;
using qcow2::testing::ImageSpec;
using qcow2::testing::kNoTag;
using qcow2::testing::kSectorBytes;
using qcow2::testing::Rig;
using qcow2::testing::RigOptions;
using qcow2::testing::Tags;
using qcow2::testing::TestRequest;

constexpr std::uint64_t kOffsetMask = 0x00ff'ffff'ffff'fe00;
constexpr std::uint64_t kGuestMark = 0x6e57'ae57;  // upper half of the tags that the guest writes
constexpr std::size_t kRequestsMax = 24;
// A discard or zeroes of more clusters than this takes its time, and rightly so.
constexpr std::uint64_t kUnmapBytesMax = std::uint64_t{64} << 20;

// Made once for each geometry: they are few.
const qcow2::testing::FormattedImage& formatted(const ImageSpec& spec) {
  static std::map<std::string, qcow2::testing::FormattedImage> known;
  const std::string key = fmt::format("{} {}", spec.to_string(), spec.lazy_refcounts);
  auto found = known.find(key);
  if (found == known.end()) {
    if (known.size() >= 256) known.clear();
    std::mt19937_64 random(1);
    found = known.emplace(key, qcow2::testing::format_image(spec, random)).first;
  }
  return found->second;
}

// As a guest writes them without looking for them afterwards.
std::span<const std::byte> guest_bytes(std::uint64_t length) {
  static const Bytes bytes = qcow2::testing::bytes_of(Tags(256, kGuestMark << 32));
  return std::span(bytes).first(length);
}

// What of an image's tables can be told by its header alone.
class Tables {
 public:
  explicit Tables(const Bytes& image) : image_(image) {}

  // The header, the L1 table and what it names, the refcount table and what it names.
  [[nodiscard]] std::vector<std::uint64_t> clusters() const {
    std::vector<std::uint64_t> found{0};
    const std::uint64_t cluster = cluster_bytes();
    for (const auto& [offset, bytes] :
         {std::pair{get_be(image_, 40, 8), l1_entries() * 8},
          std::pair{get_be(image_, 48, 8), get_be(image_, 56, 4) * cluster}}) {
      for (std::uint64_t at = offset / cluster; at * cluster < offset + bytes; ++at)
        found.push_back(at);
      for (std::uint64_t at = offset; at < offset + bytes && at + 8 <= image_.size(); at += 8) {
        const std::uint64_t table = get_be(image_, at, 8) & kOffsetMask;
        if (table != 0) found.push_back(table / cluster);
      }
    }
    return found;
  }
  [[nodiscard]] std::uint64_t l1_entries() const { return get_be(image_, 36, 4); }
  [[nodiscard]] std::uint64_t cluster_bytes() const {
    return std::uint64_t{1} << get_be(image_, 20, 4);
  }

 private:
  const Bytes& image_;
};

class Run {
 public:
  explicit Run(Input input) : input_(input) {}
  Outcome run();

 private:
  void make_image();
  void open_read_only();
  void use(bool read_only);
  void request(Rig& rig, bool read_only);
  void start(Rig& rig, std::unique_ptr<TestRequest> request);
  void wait(Rig& rig);
  void resize(Rig& rig);
  void fill(Rig& rig, std::uint64_t offset);
  void write_and_read_back(Rig& rig, std::uint64_t offset, bool write_through);
  std::uint64_t take_offset(std::uint64_t disk_bytes);
  void check_tables(const Bytes& left);
  void fail(std::string what) {
    if (outcome_.failure.empty()) outcome_.failure = std::move(what);
  }

  Input input_;
  Bytes image_;
  Tags backing_;
  RigOptions options_;
  unsigned faults_permille_{0};
  std::mt19937_64 random_{1};
  std::vector<std::unique_ptr<TestRequest>> in_flight_;
  std::uint64_t writes_{0};
  bool was_resized_{false};
  Outcome outcome_;
};

void Run::make_image() {
  const std::uint8_t kind = input_.byte();
  if (kind % 2 == 0) {
    const auto& valid = formatted(take_spec(input_));
    image_ = valid.bytes;
    backing_ = valid.backing;
    if (image_.size() > kImageBytesMax) image_.resize(kImageBytesMax);
    apply_patches(input_, image_);
  } else {
    const auto bytes = input_.bytes(input_.take<std::uint16_t>());
    std::ranges::transform(bytes, std::back_inserter(image_),
                           [](std::uint8_t byte) { return std::byte{byte}; });
    if (kind / 2 % 4 != 0) image_.resize(std::max(image_.size(), std::size_t{kind / 2U} << 13));
    if (kind / 2 % 3 == 0) backing_.assign(64, kGuestMark);
  }
  if (image_.empty()) image_.resize(kSectorBytes);
}

std::uint64_t Run::take_offset(std::uint64_t disk_bytes) {
  const std::uint64_t sectors = disk_bytes / kSectorBytes;
  const std::uint8_t kind = input_.byte();
  const std::uint64_t value = input_.take<std::uint16_t>();
  if (sectors == 0) return 0;
  switch (kind % 4) {
    case 0:
    case 1:
      return value % sectors * kSectorBytes;
    case 2:
      return (sectors - 1 - value % sectors) * kSectorBytes;
    default:
      return sectors / 65536 * value * kSectorBytes;
  }
}

void Run::start(Rig& rig, std::unique_ptr<TestRequest> request) {
  auto& context = *rig.contexts[random_() % rig.contexts.size()];
  context.start(*rig.node, *request);
  in_flight_.push_back(std::move(request));
}

void Run::wait(Rig& rig) {
  rig.settle();
  for (const auto& request : in_flight_) {
    if (request->completions != 1)
      fail(fmt::format("a request has completed {} times", request->completions));
  }
  in_flight_.clear();
}

// Nothing else is in flight. One sector lies in one cluster, so that no other guest cluster of a
// damaged image can be mapped to the same place between the two.
void Run::write_and_read_back(Rig& rig, std::uint64_t offset, bool write_through) {
  auto& context = *rig.contexts.front();
  Bytes sector(kSectorBytes);
  qcow2::testing::fill_sector(sector, kGuestMark << 32 | ++writes_);
  TestRequest write(BlockOperation::kWrite, offset, kSectorBytes);
  write.use_plain_memory();
  write.fill(sector);
  write.write_through = write_through;
  if (context.run(*rig.node, write) != 0) return;
  TestRequest read(BlockOperation::kRead, offset, kSectorBytes);
  read.use_plain_memory();
  if (context.run(*rig.node, read) != 0 || read.bytes() == sector) return;
  fail(fmt::format("sector {} reads back as {:#x} after the write of {:#x}", offset / kSectorBytes,
                   qcow2::testing::tag_of(read.bytes()), qcow2::testing::tag_of(sector)));
}

void Run::resize(Rig& rig) {
  wait(rig);
  const std::uint64_t old_bytes = rig.node->size_bytes();
  const std::uint64_t sectors = input_.take<std::uint16_t>();
  if (old_bytes > kUnmapBytesMax) return;
  was_resized_ = true;
  bool is_done = false;
  rig.node->resize((sectors + 1) * kSectorBytes, **rig.contexts.front(),
                   [&is_done](const Expected<void>&) { is_done = true; });
  rig.settle();
  if (!is_done) fail("a change of size does not end");
}

// As who fills an image does, and no guest: a unit that is stored compressed, or space for
// clusters.
void Run::fill(Rig& rig, std::uint64_t offset) {
  wait(rig);
  const std::uint64_t unit = rig.node->compressed_unit_bytes();
  Bytes content;
  std::optional<int> error;
  blockdev::IoContext& context = **rig.contexts.front();
  if (input_.byte() % 2 == 0 && unit > 0) {
    content = qcow2::testing::bytes_of(Tags(unit / kSectorBytes, kGuestMark << 32));
    qcow2::testing::begin(rig.node->write_compressed(context, offset / unit * unit, content),
                          error);
  } else {
    const std::uint64_t length = std::min(rig.node->size_bytes() - offset, kUnmapBytesMax);
    qcow2::testing::begin(
        rig.node->allocate(context, offset, length / kSectorBytes * kSectorBytes, false), error);
  }
  rig.settle();
  if (!error) fail("what fills the image does not end");
}

void Run::request(Rig& rig, bool read_only) {
  const std::uint8_t kind = input_.byte();
  if (kind % 16 == 15 && !read_only) return resize(rig);
  const std::uint64_t disk_bytes = rig.node->size_bytes();
  const std::uint64_t offset = take_offset(disk_bytes);
  const std::uint64_t rest = (disk_bytes - offset) / kSectorBytes * kSectorBytes;
  const bool is_long = (kind & 0x10) != 0;
  // 16 sectors or 256: more of the same clusters only takes longer.
  const std::uint64_t wanted = (1 + input_.byte() % (is_long ? 256U : 16U)) * kSectorBytes;
  if (rest == 0) return;
  if (kind >= 0xe0 && kind % 16 == 14 && !read_only) return fill(rig, offset);
  if (kind % 16 < 4 && !read_only) {
    wait(rig);
    return write_and_read_back(rig, offset, (kind & 0x20) != 0);
  }
  constexpr std::array kOperations{BlockOperation::kRead,        BlockOperation::kWrite,
                                   BlockOperation::kWrite,       BlockOperation::kDiscard,
                                   BlockOperation::kWriteZeroes, BlockOperation::kFlush};
  const BlockOperation operation = kOperations[kind % 16 % kOperations.size()];
  const bool moves = operation == BlockOperation::kRead || operation == BlockOperation::kWrite;
  const bool is_flush = operation == BlockOperation::kFlush;
  std::uint64_t length = std::min(wanted, rest);
  if (!moves && is_long && (kind & 0x40) != 0) length = std::min(rest, kUnmapBytesMax);
  auto request =
      std::make_unique<TestRequest>(operation, is_flush ? 0 : offset, is_flush ? 0 : length);
  if (moves && (kind & 0x20) != 0) request->use_scattered_memory(random_);
  if (moves && (kind & 0x20) == 0) request->use_plain_memory();
  if (operation == BlockOperation::kWrite) request->fill(guest_bytes(length));
  request->may_unmap = (kind & 0x20) != 0;
  request->write_through = (kind & 0x40) != 0 && operation == BlockOperation::kWrite;
  start(rig, std::move(request));
  if ((kind & 0x80) == 0) wait(rig);
}

void Run::use(bool read_only) {
  RigOptions options = options_;
  options.read_only = read_only;
  Rig rig(image_, backing_, options);
  if (rig.node != nullptr) {
    (read_only ? outcome_.opened : outcome_.written) = true;
    rig.disk.set_fault_plan([this](const aio::IoRequest&, std::uint64_t) {
      return random_() % 1000 < faults_permille_ ? std::optional(EIO) : std::nullopt;
    });
    Input before = input_;
    for (std::size_t i = 0; i < kRequestsMax && !input_.is_empty(); ++i) request(rig, read_only);
    wait(rig);
    // Whatever the input asks for: its beginning and its end.
    for (const std::uint64_t offset : {std::uint64_t{0}, rig.node->size_bytes()}) {
      const std::uint64_t length = std::min<std::uint64_t>(rig.node->size_bytes(), 65536);
      auto read = std::make_unique<TestRequest>(BlockOperation::kRead,
                                                offset == 0 ? 0 : offset - length, length);
      read->use_plain_memory();
      start(rig, std::move(read));
    }
    wait(rig);
    if (read_only) input_ = before;
    rig.disk.set_fault_plan({});
  }
  rig.close();
  Bytes left = rig.disk.current();
  if (!read_only && std::getenv("VBLK_FUZZ_CANARY") != nullptr)
    qcow2::testing::put_be(left, get_be(left, 40, 8), 8, 0);
  if (read_only && left != image_) fail("an image that was opened read-only has changed");
  if (read_only || image_.size() < kSectorBytes) return;
  check_tables(left);
  image_ = std::move(left);
}

void Run::check_tables(const Bytes& left) {
  if (!std::equal(image_.begin(), image_.begin() + 24, left.begin()))
    return fail("the beginning of the header has changed");
  if (!outcome_.written) return;
  const Tables before(image_);
  const Tables after(left);
  for (const auto& [offset_at, entries] :
       {std::pair{40U, before.l1_entries()},
        std::pair{48U, get_be(image_, 56, 4) * before.cluster_bytes() / 8}}) {
    const std::uint64_t offset = get_be(image_, offset_at, 8);
    // It may have moved.
    if (get_be(left, offset_at, 8) != offset || was_resized_) continue;
    for (std::uint64_t i = 0; i < entries && offset + i * 8 + 8 <= image_.size(); ++i) {
      if (get_be(image_, offset + i * 8, 8) == 0) continue;
      if (offset + i * 8 + 8 > left.size() || get_be(left, offset + i * 8, 8) == 0)
        return fail(fmt::format("entry {} of the table at {:#x} is lost", i, offset));
    }
  }
  const std::uint64_t cluster = after.cluster_bytes();
  for (const std::uint64_t number : after.clusters()) {
    for (std::uint64_t at = number * cluster;
         at < (number + 1) * cluster && at + kSectorBytes <= left.size(); at += kSectorBytes) {
      const std::uint64_t tag = qcow2::testing::tag_of(std::span(left).subspan(at, kSectorBytes));
      if (tag != kNoTag && tag >> 32 == kGuestMark)
        return fail(fmt::format("guest data has got into the table at {:#x}", number * cluster));
    }
  }
}

Outcome Run::run() {
  log::set_level(log::Level::kOff);
  make_image();
  const std::uint8_t flags = input_.byte();
  options_.direct = (flags & 1) != 0;
  if ((flags & 2) != 0) options_.l2_cache_bytes = options_.refcount_cache_bytes = 1;
  options_.context_count = (flags & 4) != 0 ? 2 : 1;
  if ((flags & 8) != 0) options_.short_transfer_probability = 0.2;
  if ((flags & 0x10) != 0) faults_permille_ = input_.byte();
  if ((flags & 0x20) == 0) backing_.clear();
  options_.file_bytes_max = kFileBytesMax;
  options_.seed = random_();
  use(true);
  use(false);
  if (!outcome_.written) return outcome_;
  options_.read_only = true;
  const Rig rig(image_, backing_, options_);
  if (rig.node == nullptr) fail("it does not open any more: " + rig.error);
  return outcome_;
}

}  // namespace

Outcome run_hostile_image(std::span<const std::uint8_t> input) { return Run(Input(input)).run(); }

}  // namespace vblk::fuzz
