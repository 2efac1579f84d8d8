// Partial results, in the one place that knows about them.
#include "aio/transfer.h"

#include <cerrno>
#include <vector>

#include <gtest/gtest.h>

#include "aio/io_request.h"

namespace vblk::aio {
namespace {

// A request over iovecs of the given lengths, in one buffer.
class Request {
 public:
  Request(IoKind kind, const std::vector<std::size_t>& lengths) {
    std::size_t total = 0;
    for (const std::size_t length : lengths) total += length;
    buffer_.resize(total + 1);
    std::size_t offset = 0;
    for (const std::size_t length : lengths) {
      iov_.push_back({buffer_.data() + offset, length});
      offset += length;
    }
    request_.kind = kind;
    request_.offset_bytes = 1000;
    request_.length_bytes = total;
    request_.iov = iov_.data();
    request_.iov_count = static_cast<std::uint32_t>(iov_.size());
    request_.transfer.begin(request_);
  }
  Transfer::Next advance(long result) { return request_.transfer.advance(request_, result); }
  [[nodiscard]] const Transfer& transfer() const { return request_.transfer; }
  // Where the next byte goes, as an offset in the buffer.
  [[nodiscard]] std::ptrdiff_t position() const {
    return static_cast<std::byte*>(iov_[request_.transfer.iov_first()].iov_base) - buffer_.data();
  }

 private:
  std::vector<std::byte> buffer_;
  std::vector<iovec> iov_;
  IoRequest request_;
};

TEST(Transfer, is_finished_by_a_whole_result) {
  Request request(IoKind::kRead, {100, 200});
  EXPECT_EQ(request.advance(300), Transfer::Next::kFinished);
  EXPECT_EQ(request.transfer().error(), 0);
}

TEST(Transfer, goes_on_after_every_possible_short_result) {
  for (long first = 1; first < 300; ++first) {
    Request request(IoKind::kWrite, {100, 0, 50, 150});
    ASSERT_EQ(request.advance(first), Transfer::Next::kResubmit);
    EXPECT_EQ(request.transfer().offset_bytes(), 1000U + static_cast<std::uint64_t>(first));
    EXPECT_EQ(request.transfer().length_bytes(), 300U - static_cast<std::uint64_t>(first));
    EXPECT_EQ(request.position(), first);
    EXPECT_EQ(request.advance(300 - first), Transfer::Next::kFinished);
    EXPECT_EQ(request.transfer().error(), 0);
  }
}

TEST(Transfer, skips_empty_iovecs_at_the_front) {
  Request request(IoKind::kRead, {0, 0, 10});
  EXPECT_EQ(request.transfer().iov_first(), 2U);
}

TEST(Transfer, calls_the_end_of_the_file_inside_a_read_no_data) {
  Request request(IoKind::kRead, {100});
  ASSERT_EQ(request.advance(40), Transfer::Next::kResubmit);
  EXPECT_EQ(request.advance(0), Transfer::Next::kFinished);
  EXPECT_EQ(request.transfer().error(), ENODATA);
}

TEST(Transfer, gives_up_a_write_that_makes_no_progress) {
  Request request(IoKind::kWrite, {100});
  std::uint32_t calls = 1;
  while (request.advance(0) == Transfer::Next::kResubmit) ++calls;
  EXPECT_EQ(calls, Transfer::kMaxStalls);
  EXPECT_EQ(request.transfer().error(), ENOSPC);
}

TEST(Transfer, counts_stalls_only_in_a_row) {
  Request request(IoKind::kWrite, {100});
  for (int i = 0; i < 50; ++i) {
    ASSERT_EQ(request.advance(-EAGAIN), Transfer::Next::kResubmit);
    ASSERT_EQ(request.advance(1), Transfer::Next::kResubmit);
  }
  EXPECT_EQ(request.transfer().length_bytes(), 50U);
}

TEST(Transfer, never_tires_of_signals) {
  Request request(IoKind::kFlush, {});
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(request.advance(-EINTR), Transfer::Next::kResubmit);
  EXPECT_EQ(request.advance(0), Transfer::Next::kFinished);
  EXPECT_EQ(request.transfer().error(), 0);
}

TEST(Transfer, reports_an_error_as_it_is) {
  for (const int error : {EIO, ENOSPC, EBADF, EINVAL, EOPNOTSUPP}) {
    Request request(IoKind::kWriteZeroes, {});
    EXPECT_EQ(request.advance(-error), Transfer::Next::kFinished);
    EXPECT_EQ(request.transfer().error(), error);
  }
}

TEST(Transfer, does_not_believe_more_than_it_asked_for) {
  Request request(IoKind::kRead, {100});
  EXPECT_EQ(request.advance(101), Transfer::Next::kFinished);
  EXPECT_EQ(request.transfer().error(), EIO);
}

}  // namespace
}  // namespace vblk::aio
