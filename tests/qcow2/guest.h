// A guest at its random work, checked against a model; and random images, disks and work.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "blockdev/block_io.h"
#include "blockdev/task.h"
#include "tests/qcow2/guest_model.h"
#include "tests/qcow2/qcow2_rig.h"

namespace vblk::qcow2::testing {

// What the guest does.
struct Work {
  int operations{200};
  std::size_t in_flight_max{8};
  unsigned flush_percent{6};  // of the operations
  unsigned through_percent{4};
  unsigned discard_percent{12};
  unsigned zero_percent{12};
  unsigned read_percent{10};
  unsigned compressed_percent{0};  // writes of whole clusters, to be stored compressed
  std::uint64_t length_sectors_max{32};
  std::uint64_t hot_sectors{0};  // only so many at the beginning of the disk; 0: all
  bool may_fail{false};
  bool outlives_process{false};    // asked of every change
  bool kill_takes_nothing{false};  // what has completed must be there when the process was killed
};

// One guest request, and what it does to the model.
struct GuestRequest : TestRequest {
  using TestRequest::TestRequest;
  std::uint64_t flush_begun{0};
  blockdev::AlignedBuffer unit;  // of a compressed write
};

inline blockdev::Detached write_compressed(blockdev::BlockNode& node, blockdev::IoContext& context,
                                           GuestRequest& request) {
  const int error =
      co_await node.write_compressed(context, request.offset_bytes, request.unit.bytes());
  request.complete(request, error);
}

// A guest at work on the disk of a rig, or on a raw one.
class Guest {
 public:
  Guest(blockdev::BlockNode& node, std::vector<std::unique_ptr<Context>>& contexts,
        GuestModel& model, const Work& work, std::mt19937_64& random, std::uint32_t& next_tag)
      : node_(node),
        contexts_(contexts),
        model_(model),
        work_(work),
        random_(random),
        next_tag_(next_tag),
        busy_(model.sector_count()) {}

  // Only these sectors are this guest's; without it all are.
  void set_owned(std::vector<bool> owned) { owned_ = std::move(owned); }

  // Perhaps starts a request, and lets one of the threads go on.
  void step(bool may_start) {
    if (may_start && in_flight_.size() < work_.in_flight_max && random_() % 3 != 0) start();
    Context& context = *contexts_[random_() % contexts_.size()];
    context->poll();
    std::erase_if(in_flight_, [this](const auto& request) {
      if (request->completions == 0) return false;
      finish(*request);
      return true;
    });
  }
  [[nodiscard]] bool is_idle() const { return in_flight_.empty(); }
  [[nodiscard]] int started() const { return started_; }
  // The disk is gone: nothing that completes from here on means anything.
  void give_up() { has_given_up_ = true; }

 private:
  void start() {
    ++started_;
    const unsigned kind = static_cast<unsigned>(random_() % 100);
    const unsigned flushes = work_.flush_percent;
    const unsigned discards = flushes + work_.discard_percent;
    const unsigned zeroes = discards + work_.zero_percent;
    const unsigned reads = zeroes + work_.read_percent;
    const bool is_compressed = kind >= reads && kind < reads + work_.compressed_percent;
    if (kind < flushes) return submit(std::make_unique<GuestRequest>(BlockOperation::kFlush, 0, 0));
    BlockOperation operation = BlockOperation::kWrite;
    if (kind < discards) {
      operation = BlockOperation::kDiscard;
    } else if (kind < zeroes) {
      operation = BlockOperation::kWriteZeroes;
    } else if (kind < reads) {
      operation = BlockOperation::kRead;
    }
    const std::uint64_t sectors =
        work_.hot_sectors == 0 ? model_.sector_count()
                               : std::min<std::uint64_t>(work_.hot_sectors, model_.sector_count());
    const std::uint64_t unit = is_compressed ? node_.compressed_unit_bytes() / kSectorBytes : 0;
    if (is_compressed && unit == 0) return;
    std::uint64_t first = random_() % sectors;
    if (is_compressed) first = first / unit * unit;
    const std::uint64_t longest =
        std::max<std::uint64_t>(1, work_.length_sectors_max >> (random_() % 6));
    std::uint64_t count = std::min(sectors - first, operation == BlockOperation::kDiscard
                                                        ? 1 + random_() % (4 * longest)
                                                        : 1 + random_() % longest);
    if (is_compressed) count = std::min(unit, model_.sector_count() - first);
    for (std::uint64_t i = first; i < first + count; ++i) {
      if (!owned_.empty() && !owned_[i]) {
        if (is_compressed) return;
        count = i - first;
        break;
      }
      if (busy_[i]) return;
    }
    if (count == 0) return;
    auto request =
        std::make_unique<GuestRequest>(operation, first * kSectorBytes, count * kSectorBytes);
    std::fill_n(busy_.begin() + static_cast<std::ptrdiff_t>(first), count, true);
    const std::uint32_t number = ++next_tag_;
    if (operation == BlockOperation::kRead || operation == BlockOperation::kWrite) {
      if (random_() % 2 == 0) {
        request->use_plain_memory();
      } else {
        request->use_scattered_memory(random_);
      }
    }
    Tags tags;
    for (std::uint64_t i = first; i < first + count; ++i) {
      tags.push_back((i + 1) << 32 | number);
      if (operation == BlockOperation::kWrite) model_.begin(i, tags.back(), false);
      if (operation == BlockOperation::kWriteZeroes) model_.begin(i, 0, false);
      if (operation == BlockOperation::kDiscard) model_.begin(i, 0, true);
    }
    if (operation == BlockOperation::kWrite) request->fill(bytes_of(tags));
    if (is_compressed) {
      tags.resize(unit);
      request->unit = blockdev::AlignedBuffer(unit * kSectorBytes);
      std::ranges::copy(bytes_of(tags), request->unit.data());
      in_flight_.push_back(std::move(request));
      write_compressed(node_, **contexts_[random_() % contexts_.size()], *in_flight_.back());
      return;
    }
    request->may_unmap = random_() % 2 == 0;
    request->write_through =
        (operation == BlockOperation::kWrite || operation == BlockOperation::kWriteZeroes) &&
        random_() % 100 < work_.through_percent;
    request->outlives_process = work_.outlives_process && operation != BlockOperation::kRead;
    submit(std::move(request));
  }
  void submit(std::unique_ptr<GuestRequest> request) {
    request->flush_begun = model_.now();
    contexts_[random_() % contexts_.size()]->start(node_, *request);
    in_flight_.push_back(std::move(request));
  }
  void finish(GuestRequest& request) {
    if (has_given_up_) return;
    EXPECT_EQ(request.completions, 1);
    if (!work_.may_fail) {
      EXPECT_EQ(request.error, 0) << aio::to_string(request.operation) << " at "
                                  << request.offset_bytes << "+" << request.length_bytes;
    }
    if (request.operation == BlockOperation::kFlush) {
      if (request.error == 0) model_.flushed(request.flush_begun);
      return;
    }
    const std::uint64_t first = request.offset_bytes / kSectorBytes;
    const std::uint64_t count = request.length_bytes / kSectorBytes;
    std::fill_n(busy_.begin() + static_cast<std::ptrdiff_t>(first), count, false);
    EXPECT_TRUE(request.left_its_neighbours_alone());
    if (request.operation != BlockOperation::kRead) {
      for (std::uint64_t i = first; i < first + count; ++i) {
        if (request.error != 0) {
          model_.failed(i);
        } else {
          model_.completed(i, request.write_through || work_.kill_takes_nothing);
        }
      }
      return;
    }
    if (request.error != 0) return;
    const Tags tags = tags_of(request.bytes());
    for (std::uint64_t i = 0; i < count; ++i) {
      EXPECT_TRUE(model_.has_read(first + i, tags[i]))
          << fmt::format("the guest reads {:#x} in sector {}, after{}", tags[i], first + i,
                         model_.describe(first + i));
      if (::testing::Test::HasFailure()) return;
    }
  }

  blockdev::BlockNode& node_;
  std::vector<std::unique_ptr<Context>>& contexts_;
  GuestModel& model_;
  const Work work_;
  std::mt19937_64& random_;
  std::uint32_t& next_tag_;
  std::vector<bool> busy_;
  std::vector<bool> owned_;
  std::vector<std::unique_ptr<GuestRequest>> in_flight_;
  int started_{0};
  bool has_given_up_{false};
};

// Any geometry that the format has, small enough to be looked at thousands of times.
inline ImageSpec random_spec(std::mt19937_64& random) {
  ImageSpec spec;
  constexpr std::array kBits{9U, 9U, 10U, 12U, 12U, 14U, 16U, 17U};
  spec.cluster_bits = kBits[random() % kBits.size()];
  spec.version = random() % 4 == 0 ? 2 : 3;
  spec.refcount_order = spec.version == 2 ? 4 : static_cast<unsigned>(random() % 7);
  spec.extended_l2 = spec.version == 3 && spec.cluster_bits >= 14 && random() % 2 == 0;
  const std::uint64_t clusters = 32 + random() % 480;
  const std::uint64_t bytes_max = std::uint64_t{1} << 20;
  // Not always whole clusters.
  spec.size_bytes =
      std::min(clusters << spec.cluster_bits, bytes_max) - random() % 3 * kSectorBytes;
  if (random() % 3 == 0)
    spec.backing_bytes = spec.size_bytes / kSectorBytes * 3 / (1 + random() % 6) * kSectorBytes;
  spec.snapshot = spec.refcount_order >= 2 && random() % 3 == 0;
  spec.mapped_percent = random() % 3 == 0 ? 0 : static_cast<unsigned>(random() % 101);
  spec.compressed_percent = random() % 2 == 0 ? 0 : static_cast<unsigned>(random() % 60);
  spec.zstd = spec.version == 3 && random() % 2 == 0;
  if (spec.version == 3 && random() % 3 != 0) {
    spec.bitmap = random() % 2 == 0;
  } else if (spec.version == 3) {
    spec.data_file = random() % 3 == 0 ? DataFile::kRaw : DataFile::kMapped;
    spec.snapshot = false;
    spec.compressed_percent = 0;
    if (spec.data_file == DataFile::kRaw) spec.backing_bytes = 0;
    if (spec.data_file == DataFile::kRaw && random() % 2 == 0) spec.mapped_percent = 100;
  }
  return spec;
}

// More tables than the smallest caches hold, and a refcount table that is soon too small.
inline ImageSpec spec_of_many_tables(std::mt19937_64& random) {
  ImageSpec spec = random_spec(random);
  spec.version = 3;
  spec.cluster_bits = 9;
  spec.extended_l2 = false;
  spec.refcount_order = 4 + static_cast<unsigned>(random() % 3);
  spec.size_bytes = (std::uint64_t{3} << 19) - random() % 3 * kSectorBytes;
  spec.mapped_percent = static_cast<unsigned>(random() % 60);
  return spec;
}

// Up to the largest that there are, and so only a few of them.
inline ImageSpec spec_of_large_clusters(std::mt19937_64& random) {
  ImageSpec spec = random_spec(random);
  spec.cluster_bits = 18 + static_cast<unsigned>(random() % 4);
  spec.extended_l2 = spec.version == 3 && random() % 2 == 0;
  const std::uint64_t clusters = 2 + random() % 3;
  spec.size_bytes = (clusters << spec.cluster_bits) - random() % 3 * kSectorBytes;
  spec.backing_bytes = std::min(spec.backing_bytes, spec.size_bytes);
  return spec;
}

inline RigOptions random_rig(std::mt19937_64& random) {
  RigOptions options;
  options.direct = random() % 2 == 0;
  // Tiny caches, so that tables leave and come back; or everything in memory.
  if (random() % 2 == 0) options.l2_cache_bytes = 1;
  if (random() % 2 == 0) options.refcount_cache_bytes = 1;
  options.context_count = 1 + random() % 4;
  return options;
}

inline Work random_work(std::mt19937_64& random) {
  Work work;
  work.operations = 60 + static_cast<int>(random() % 200);
  work.in_flight_max = 1 + random() % 12;
  work.flush_percent = random() % 4 == 0 ? 0 : static_cast<unsigned>(random() % 15);
  work.through_percent = random() % 2 == 0 ? 0 : static_cast<unsigned>(random() % 40);
  work.discard_percent = static_cast<unsigned>(random() % 25);
  work.zero_percent = static_cast<unsigned>(random() % 20);
  work.length_sectors_max = std::uint64_t{8} << random() % 5;
  if (random() % 3 == 0) work.hot_sectors = 64 + random() % 256;
  if (random() % 2 == 0) work.compressed_percent = static_cast<unsigned>(random() % 30);
  return work;
}

}  // namespace vblk::qcow2::testing
