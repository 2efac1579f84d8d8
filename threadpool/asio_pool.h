// boost::asio::thread_pool behind the interface of our pools. See pool.h.
#pragma once

#include <memory>

#include "threadpool/pool.h"

namespace vblk::threadpool {

class AsioPool final : public Pool {
 public:
  explicit AsioPool(const ThreadPoolOptions& options);
  ~AsioPool() override;
  void submit(WorkList& batch) override;
  [[nodiscard]] ThreadPoolStatistics statistics() const override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vblk::threadpool
