// An open qcow2 node on a simulated disk (or two: the image, and its external data file), with the
// contexts of several I/O threads that all run on the calling one, in an order that a seed decides.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "blockdev/private_context.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/task.h"
#include "tests/blockdev/disk_fixture.h"
#include "tests/qcow2/image_check.h"
#include "tests/qcow2/image_format.h"

namespace vblk::qcow2::testing {

using aio::SimulatedDisk;
using blockdev::BlockOperation;
using blockdev::testing::Context;
using blockdev::testing::TestRequest;

// A backing file that is only memory.
class MemoryNode final : public blockdev::BlockNode {
 public:
  explicit MemoryNode(Bytes bytes) : bytes_(std::move(bytes)) {
    name_ = "memory";
    size_bytes_.store(bytes_.size());
    limits_.read_only = true;
  }

 protected:
  void do_submit(BlockRequest& request, IoContext& context) override {
    const std::byte* from = bytes_.data() + request.offset_bytes;
    if (request.operation == BlockOperation::kRead) {
      for (const iovec& element : std::span(request.iov, request.iov_count)) {
        if (element.iov_len > 0) std::memcpy(element.iov_base, from, element.iov_len);
        from += element.iov_len;
      }
    }
    context.complete_later(request, 0);
  }

 private:
  const Bytes bytes_;
};

// Begins a task; `outcome` is there when it has ended.
inline blockdev::Detached begin(Task<int> task, std::optional<int>& outcome) {
  outcome = co_await task;
}

struct RigOptions {
  bool direct{false};
  std::uint64_t l2_cache_bytes{0};
  std::uint64_t refcount_cache_bytes{0};
  std::size_t context_count{1};
  std::uint64_t seed{1};
  double short_transfer_probability{0};
  bool loses_flushes{false};
  bool data_file_loses_flushes{false};  // it alone
  bool read_only{false};
  // The file cannot be made longer than this: EFBIG.
  std::uint64_t file_bytes_max{std::uint64_t{1} << 30};
};

class Rig {
 public:
  // A data file counts only if the image says that it has one.
  Rig(const ImageFiles& files, std::span<const std::uint64_t> backing, const RigOptions& options)
      : Rig(files.image, backing, options, files.data_file) {}
  Rig(const Bytes& image, std::span<const std::uint64_t> backing, const RigOptions& options,
      const Bytes& data_file = {})
      : disk({.seed = options.seed,
              .short_transfer_probability = options.short_transfer_probability,
              .loses_flushes = options.loses_flushes},
             image),
        file_bytes_max_(options.file_bytes_max) {
    Qcow2Parts parts{.file = open_file(disk, image.size(), options),
                     .data_file = nullptr,
                     .backing = nullptr,
                     .header = {}};
    if (!backing.empty()) parts.backing = std::make_unique<MemoryNode>(bytes_of(backing));
    const blockdev::MakePrivateContext make = [this, seed = options.seed] {
      return std::make_unique<blockdev::PrivateContext>(make_engines(seed + 1000));
    };
    auto header = read_header(*parts.file, make);
    if (!header) {
      error = header.error().message;
      return;
    }
    parts.header = std::move(*header);
    if (parts.header.has_data_file()) {
      data_disk = std::make_unique<SimulatedDisk>(
          aio::SimulatedDiskOptions{
              .number = 1,
              .seed = options.seed + 1,
              .short_transfer_probability = options.short_transfer_probability,
              .loses_flushes = options.loses_flushes || options.data_file_loses_flushes},
          data_file);
      parts.data_file = open_file(*data_disk, data_file.size(), options);
      // As open_image() does.
      if (!options.read_only && parts.data_file->grow(parts.header.size_bytes) != 0) {
        error = "the data file cannot be as long as the disk";
        return;
      }
    }
    auto opened = Qcow2Node::open(std::move(parts),
                                  {.read_only = options.read_only,
                                   .l2_cache_bytes = options.l2_cache_bytes,
                                   .refcount_cache_bytes = options.refcount_cache_bytes},
                                  make);
    if (!opened) {
      error = opened.error().message;
      return;
    }
    node = std::move(*opened);
    for (std::size_t i = 0; i < options.context_count; ++i)
      contexts.push_back(std::make_unique<Context>(make_engines(options.seed + i)));
    // What the analyzer takes for a leak is in `contexts`.
  }  // NOLINT(clang-analyzer-cplusplus.NewDeleteLeaks)
  ~Rig() { close(); }
  Rig(const Rig&) = delete;
  Rig& operator=(const Rig&) = delete;

  // No request is in flight: lets everything come to rest that goes on behind the guest's back, and
  // closes the node.
  void close() {
    settle();
    contexts.clear();
    node.reset();
  }
  void settle() {
    for (std::size_t quiet = 0; quiet < 4;) {
      std::size_t done = 0;
      for (const auto& context : contexts) {
        done += (*context)->poll();
        done += (*context)->engines().in_flight();
      }
      quiet = done == 0 ? quiet + 1 : 0;
    }
  }
  // From now on the disk does nothing any more.
  void switch_off() {
    is_off_.store(true);
    set_fault_plan([](const aio::IoRequest&, std::uint64_t) { return std::optional(EIO); });
  }
  void set_fault_plan(const SimulatedDisk::FaultPlan& plan) {
    for (SimulatedDisk* const each : disks()) each->set_fault_plan(plan);
  }
  Bytes read_all() { return contexts.front()->read(*node, 0, node->size_bytes()); }
  std::unique_ptr<aio::EngineSet> make_engines(std::uint64_t seed) {
    auto engine = *aio::SimulatedEngine::create(disk, {.seed = seed});
    if (data_disk) engine->add_disk(*data_disk);
    return std::make_unique<aio::EngineSet>(std::move(engine));
  }
  [[nodiscard]] std::vector<SimulatedDisk*> disks() {
    std::vector<SimulatedDisk*> all{&disk};
    if (data_disk) all.push_back(data_disk.get());
    return all;
  }
  [[nodiscard]] ImageFiles files() const {
    return {.image = disk.current(), .data_file = data_disk ? data_disk->current() : Bytes{}};
  }
  // What a power cut at this moment would leave. What of the data file was not flushed has a fate
  // of its own.
  [[nodiscard]] ImageFiles files_after_power_cut(std::uint64_t seed,
                                                 SimulatedDisk::Unflushed unflushed) const {
    using enum SimulatedDisk::Unflushed;
    constexpr std::array kFates{kLost, kKept, kByWrite, kBySector};
    std::mt19937_64 random(seed);
    ImageFiles left{.image = disk.after_power_cut(random(), unflushed), .data_file = {}};
    if (data_disk)
      left.data_file = data_disk->after_power_cut(random(), kFates[random() % kFates.size()]);
    return left;
  }

  SimulatedDisk disk;
  std::unique_ptr<SimulatedDisk> data_disk;  // nullptr: no external data file
  std::vector<std::unique_ptr<Context>> contexts;
  std::unique_ptr<Qcow2Node> node;
  std::string error;  // why there is no node

 private:
  std::unique_ptr<blockdev::RawNode> open_file(SimulatedDisk& file, std::uint64_t size_bytes,
                                               const RigOptions& options) {
    return std::make_unique<blockdev::RawNode>(
        blockdev::ImageFile::wrap(options.direct ? file.direct_fd() : file.buffered_fd(),
                                  file.buffered_fd(), size_bytes, kSectorBytes, options.read_only,
                                  [this, &file](std::uint64_t size) { return resize(file, size); }),
        blockdev::RawNodeOptions{.name = "simulated", .holds_format = true});
  }
  int resize(SimulatedDisk& file, std::uint64_t size_bytes) {
    if (is_off_.load()) return EIO;
    if (size_bytes > file_bytes_max_) return EFBIG;
    file.resize(size_bytes);
    return 0;
  }

  const std::uint64_t file_bytes_max_;
  std::atomic<bool> is_off_{false};
};

}  // namespace vblk::qcow2::testing
