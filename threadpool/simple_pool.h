// One queue under a mutex, and four ways to wake who waits for it. See pool.h.
#pragma once

#include <memory>

#include "threadpool/pool.h"

namespace vblk::threadpool {

class SimplePool final : public Pool {
 public:
  // `kind`: kCondition, kOneWord, kWordPerWorker or kChained (asserted). Starts `max_threads`
  // threads; throws std::system_error where the kernel refuses one.
  SimplePool(PoolKind kind, const ThreadPoolOptions& options);
  ~SimplePool() override;
  void submit(WorkList& batch) override;
  [[nodiscard]] ThreadPoolStatistics statistics() const override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vblk::threadpool
