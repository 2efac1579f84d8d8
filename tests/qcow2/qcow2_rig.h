// An open qcow2 node on a simulated disk, with the contexts of several I/O threads that all run on
// the calling one, in an order that a seed decides.
#pragma once

#include <algorithm>
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

struct RigOptions {
  bool direct{false};
  std::uint64_t l2_cache_bytes{0};
  std::uint64_t refcount_cache_bytes{0};
  std::size_t context_count{1};
  std::uint64_t seed{1};
  double short_transfer_probability{0};
  bool loses_flushes{false};
  bool read_only{false};
  // The file cannot be made longer than this: EFBIG.
  std::uint64_t file_bytes_max{std::uint64_t{1} << 30};
};

class Rig {
 public:
  Rig(const Bytes& image, std::span<const std::uint64_t> backing, const RigOptions& options)
      : disk({.seed = options.seed,
              .short_transfer_probability = options.short_transfer_probability,
              .loses_flushes = options.loses_flushes},
             image),
        file_bytes_max_(options.file_bytes_max) {
    Qcow2Parts parts{
        .file = std::make_unique<blockdev::RawNode>(
            blockdev::ImageFile::wrap(
                options.direct ? SimulatedDisk::kDirectFd : SimulatedDisk::kBufferedFd,
                SimulatedDisk::kBufferedFd, image.size(), kSectorBytes, options.read_only,
                [this](std::uint64_t size) { return resize(size); }),
            blockdev::RawNodeOptions{.name = "simulated", .holds_format = true}),
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
      error = "there is but one simulated disk, and none for an external data file";
      return;
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
    disk.set_fault_plan([](const aio::IoRequest&, std::uint64_t) { return std::optional(EIO); });
  }
  Bytes read_all() { return contexts.front()->read(*node, 0, node->size_bytes()); }
  std::unique_ptr<aio::EngineSet> make_engines(std::uint64_t seed) {
    return std::make_unique<aio::EngineSet>(*aio::SimulatedEngine::create(disk, {.seed = seed}));
  }

  SimulatedDisk disk;
  std::vector<std::unique_ptr<Context>> contexts;
  std::unique_ptr<Qcow2Node> node;
  std::string error;  // why there is no node

 private:
  int resize(std::uint64_t size_bytes) {
    if (is_off_.load()) return EIO;
    if (size_bytes > file_bytes_max_) return EFBIG;
    disk.resize(size_bytes);
    return 0;
  }

  const std::uint64_t file_bytes_max_;
  std::atomic<bool> is_off_{false};
};

}  // namespace vblk::qcow2::testing
