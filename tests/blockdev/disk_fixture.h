// The vocabulary of the disk tests: an I/O context without a loop thread, requests with a guest's
// memory behind them, and a flat array as the model of a disk.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "aio/engine_set.h"
#include "blockdev/block_node.h"
#include "blockdev/io_context.h"
#include "blockdev/io_loop.h"

namespace vblk::blockdev::testing {

using Bytes = std::vector<std::byte>;

inline Bytes random_bytes(std::mt19937_64& random, std::size_t count) {
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = std::byte(random());
  return bytes;
}

// A request, its memory, and its outcome.
class TestRequest : public BlockRequest {
 public:
  static constexpr std::byte kGuard{0xe7};

  TestRequest(BlockOperation kind, std::uint64_t offset, std::uint64_t length) {
    operation = kind;
    offset_bytes = offset;
    length_bytes = length;
    thread_ = std::this_thread::get_id();
    complete = [](BlockRequest& request, int result) {
      auto& self = static_cast<TestRequest&>(request);
      ++self.completions;
      self.error = result;
      EXPECT_FALSE(self.submitting) << "completed inside submit()";
      EXPECT_EQ(std::this_thread::get_id(), self.thread_) << "completed on another thread";
    };
  }

  // One element, aligned for any disk.
  void use_plain_memory() {
    memory_.assign(length_bytes + kPage, kGuard);
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    std::byte* const aligned = memory_.data() + (kPage - address % kPage) % kPage;
    set_layout({{aligned, length_bytes}});
  }
  // Elements of random length, some of them empty, at random addresses.
  void use_scattered_memory(std::mt19937_64& random) {
    std::vector<std::size_t> lengths;
    for (std::uint64_t left = length_bytes; left > 0;) {
      const std::size_t longest = random() % 8 == 0 ? left : std::min<std::uint64_t>(left, 3000);
      lengths.push_back(random() % (longest + 1));
      left -= lengths.back();
    }
    memory_.assign(length_bytes + lengths.size() * kGapMax + kPage, kGuard);
    std::vector<iovec> elements;
    std::byte* free = memory_.data();
    for (const std::size_t length : lengths) {
      free += random() % kGapMax;
      elements.push_back({free, length});
      free += length;
    }
    set_layout(std::move(elements));
  }

  void fill(std::span<const std::byte> bytes) {
    const std::byte* from = bytes.data();
    for (const iovec& element : layout_) {
      if (element.iov_len != 0) std::memcpy(element.iov_base, from, element.iov_len);
      from += element.iov_len;
    }
  }
  [[nodiscard]] Bytes bytes() const {
    Bytes flat;
    for (const iovec& element : layout_) {
      const auto* const from = static_cast<const std::byte*>(element.iov_base);
      flat.insert(flat.end(), from, from + element.iov_len);
    }
    return flat;
  }
  // Whether the bytes around the elements are as they were.
  [[nodiscard]] bool left_its_neighbours_alone() const {
    Bytes outside = memory_;
    for (const iovec& element : layout_) {
      const auto start = static_cast<std::byte*>(element.iov_base) - memory_.data();
      std::fill_n(outside.begin() + start, element.iov_len, kGuard);
    }
    return std::ranges::all_of(outside, [](std::byte byte) { return byte == kGuard; });
  }

  int completions{0};
  int error{-1};
  bool submitting{false};

 private:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kGapMax = 64;

  void set_layout(std::vector<iovec> elements) {
    layout_ = std::move(elements);
    working_copy_ = layout_;
    iov = working_copy_.data();
    iov_count = static_cast<std::uint32_t>(working_copy_.size());
  }

  std::thread::id thread_;
  Bytes memory_;
  std::vector<iovec> layout_;        // as the guest laid it out
  std::vector<iovec> working_copy_;  // the node's to rewrite
};

// One I/O thread's context on the calling thread. Nothing runs but inside drain() and run().
class Context {
 public:
  explicit Context(std::unique_ptr<aio::EngineSet> engines)
      : context_(std::make_unique<IoContext>(loop_, std::move(engines))) {}

  void start(BlockNode& node, TestRequest& request) {
    request.submitting = true;
    node.submit(request, *context_);
    request.submitting = false;
  }
  void drain() { context_->drain(); }
  int run(BlockNode& node, TestRequest& request) {
    start(node, request);
    drain();
    EXPECT_EQ(request.completions, 1);
    return request.error;
  }

  int write(BlockNode& node, std::uint64_t offset, std::span<const std::byte> bytes,
            bool write_through = false) {
    TestRequest request(BlockOperation::kWrite, offset, bytes.size());
    request.write_through = write_through;
    request.use_plain_memory();
    request.fill(bytes);
    return run(node, request);
  }
  int write_zeroes(BlockNode& node, std::uint64_t offset, std::uint64_t length, bool may_unmap) {
    TestRequest request(BlockOperation::kWriteZeroes, offset, length);
    request.may_unmap = may_unmap;
    return run(node, request);
  }
  int discard(BlockNode& node, std::uint64_t offset, std::uint64_t length) {
    TestRequest request(BlockOperation::kDiscard, offset, length);
    return run(node, request);
  }
  int flush(BlockNode& node) {
    TestRequest request(BlockOperation::kFlush, 0, 0);
    return run(node, request);
  }
  // The bytes read; empty after an error, which fails the test.
  Bytes read(BlockNode& node, std::uint64_t offset, std::uint64_t length) {
    TestRequest request(BlockOperation::kRead, offset, length);
    request.use_plain_memory();
    const int error = run(node, request);
    EXPECT_EQ(error, 0);
    return error == 0 ? request.bytes() : Bytes{};
  }

  IoContext& operator*() { return *context_; }
  IoContext* operator->() { return context_.get(); }

 private:
  IoLoop loop_;
  std::unique_ptr<IoContext> context_;
};

// Random requests on a disk, checked against a flat array.
struct RandomOperations {
  int count{600};
  bool reads_any_byte{false};  // otherwise reads are of whole sectors, as all else is
  std::uint64_t length_bytes_max{65536};
  std::size_t batch_max{8};                // in flight together; these never overlap
  std::uint64_t place_bytes_max{1 << 30};  // only this much of the start of the disk is used
  // Whether what was discarded reads as zeroes (files). Otherwise (devices) each byte may be as it
  // was, too.
  bool discard_zeroes{true};
};

// Takes over into `model` what a discard has left: zeroes or what was there.
inline void adopt_discarded(BlockNode& node, Context& context, std::uint64_t offset,
                            std::uint64_t length, Bytes& model) {
  const Bytes left = context.read(node, offset, length);
  for (std::size_t i = 0; i < left.size(); ++i) {
    ASSERT_TRUE(left[i] == model[offset + i] || left[i] == std::byte{0})
        << "a discard wrote garbage at " << offset + i;
    model[offset + i] = left[i];
  }
}

// Returns what the disk ought to hold in the end. `model` is what it holds now.
inline Bytes run_random_operations(BlockNode& node, Context& context, Bytes model,
                                   const RandomOperations& options, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const std::uint64_t units =
      std::min<std::uint64_t>(model.size(), options.place_bytes_max) / kSectorBytes;
  struct InFlight {
    std::unique_ptr<TestRequest> request;
    Bytes expected;
  };
  for (int done = 0; done < options.count;) {
    std::vector<InFlight> batch;
    std::vector<bool> busy(units);
    const std::size_t batch_size = 1 + random() % options.batch_max;
    for (std::size_t i = 0; i < batch_size; ++i) {
      constexpr std::array kKinds{BlockOperation::kRead, BlockOperation::kWrite,
                                  BlockOperation::kFlush, BlockOperation::kDiscard,
                                  BlockOperation::kWriteZeroes};
      const BlockOperation kind = kKinds[random() % kKinds.size()];
      // Flushes wait for a real disk; one in a few is enough.
      if (kind == BlockOperation::kFlush && random() % 8 != 0) continue;
      const std::uint64_t first = random() % units;
      // Short ones are as frequent as long ones.
      const std::uint64_t length_max =
          std::max<std::uint64_t>(1, (options.length_bytes_max >> random() % 10) / kSectorBytes);
      const std::uint64_t count = 1 + random() % std::min(length_max, units - first);
      const auto busy_begin = busy.begin() + static_cast<std::ptrdiff_t>(first);
      const auto busy_end = busy_begin + static_cast<std::ptrdiff_t>(count);
      if (std::find(busy_begin, busy_end, true) != busy_end) continue;
      std::fill(busy_begin, busy_end, true);
      std::uint64_t offset = first * kSectorBytes;
      std::uint64_t length = kind == BlockOperation::kFlush ? 0 : count * kSectorBytes;
      if (kind == BlockOperation::kRead && options.reads_any_byte) {
        const std::uint64_t cut = random() % length;
        offset += cut;
        length = 1 + random() % (length - cut);
      }
      InFlight in_flight{std::make_unique<TestRequest>(kind, offset, length), {}};
      TestRequest& request = *in_flight.request;
      const auto place = model.begin() + static_cast<std::ptrdiff_t>(offset);
      request.write_through = random() % 16 == 0;
      switch (kind) {
        case BlockOperation::kRead:
        case BlockOperation::kWrite:
          if (random() % 2 == 0) {
            request.use_scattered_memory(random);
          } else {
            request.use_plain_memory();
          }
          if (kind == BlockOperation::kRead) {
            in_flight.expected.assign(place, place + static_cast<std::ptrdiff_t>(length));
          } else {
            const Bytes data = random_bytes(random, length);
            request.fill(data);
            std::ranges::copy(data, place);
          }
          break;
        case BlockOperation::kFlush:
        case BlockOperation::kWriteBehind:
          break;
        case BlockOperation::kWriteZeroes:
          request.may_unmap = random() % 2 == 0;
          std::fill_n(place, length, std::byte{0});
          break;
        case BlockOperation::kDiscard:
          if (options.discard_zeroes) std::fill_n(place, length, std::byte{0});
          break;
      }
      context.start(node, request);
      batch.push_back(std::move(in_flight));
    }
    context.drain();
    for (const auto& [request, expected] : batch) {
      EXPECT_EQ(request->completions, 1);
      EXPECT_EQ(request->error, 0) << aio::to_string(request->operation) << " at "
                                   << request->offset_bytes << "+" << request->length_bytes;
      EXPECT_TRUE(request->left_its_neighbours_alone());
      if (request->operation == BlockOperation::kRead) {
        EXPECT_TRUE(request->bytes() == expected)
            << "wrong bytes at " << request->offset_bytes << "+" << request->length_bytes;
      }
      if (request->operation == BlockOperation::kDiscard && !options.discard_zeroes)
        adopt_discarded(node, context, request->offset_bytes, request->length_bytes, model);
      if (::testing::Test::HasFailure()) return model;
    }
    done += static_cast<int>(batch.size());
  }
  return model;
}  // NOLINT(clang-analyzer-cplusplus.NewDeleteLeaks): the batch owns its requests

// Several I/O threads on one disk at once, each with sectors of its own among the others': what one
// has written, another must not undo. Returns what the disk ought to hold in the end.
//
// `make_engines` is called on each thread.
template <typename MakeEngines>
Bytes run_neighbouring_threads(BlockNode& node, Bytes model, const MakeEngines& make_engines,
                               std::uint64_t seed) {
  constexpr std::size_t kThreads = 3;
  constexpr int kRounds = 100;
  const std::uint64_t sectors = model.size() / kSectorBytes;
  const auto run = [&](std::size_t own) {
    std::mt19937_64 random(seed + own);
    Context context(make_engines());
    for (int round = 0; round < kRounds && !::testing::Test::HasFailure(); ++round) {
      std::vector<std::unique_ptr<TestRequest>> batch;
      for (std::uint64_t sector = own; sector < sectors; sector += kThreads) {
        if (random() % 4 != 0) continue;
        const bool zero = random() % 8 == 0;
        auto request = std::make_unique<TestRequest>(
            zero ? BlockOperation::kWriteZeroes : BlockOperation::kWrite, sector * kSectorBytes,
            kSectorBytes);
        Bytes data(kSectorBytes);
        if (!zero) {
          data = random_bytes(random, kSectorBytes);
          request->use_scattered_memory(random);
          request->fill(data);
        }
        std::ranges::copy(data, model.data() + request->offset_bytes);
        context.start(node, *request);
        batch.push_back(std::move(request));
      }
      context.drain();
      for (const auto& request : batch) {
        EXPECT_EQ(request->error, 0);
        EXPECT_TRUE(
            std::ranges::equal(context.read(node, request->offset_bytes, kSectorBytes),
                               std::span(model).subspan(request->offset_bytes, kSectorBytes)))
            << "wrong bytes at " << request->offset_bytes << " in round " << round;
      }
    }
    EXPECT_EQ(context.flush(node), 0);
  };
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (std::size_t own = 0; own < kThreads; ++own) threads.emplace_back(run, own);
  for (std::thread& thread : threads) thread.join();
  return model;
}

}  // namespace vblk::blockdev::testing
