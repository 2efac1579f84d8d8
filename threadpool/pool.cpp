#include "threadpool/pool.h"

#include <cassert>

#include "threadpool/asio_pool.h"
#include "threadpool/simple_pool.h"
#include "threadpool/thread_pool.h"

namespace vblk::threadpool {

std::string_view to_string(PoolKind kind) {
  switch (kind) {
    case PoolKind::kAdaptive:
      return "adaptive";
    case PoolKind::kCondition:
      return "condition";
    case PoolKind::kOneWord:
      return "one-word";
    case PoolKind::kWordPerWorker:
      return "word-per-worker";
    case PoolKind::kChained:
      return "chained";
    case PoolKind::kAsio:
      return "asio";
  }
  return "?";
}

std::optional<PoolKind> pool_kind_named(std::string_view name) {
  for (const PoolKind kind : kAllPoolKinds) {
    if (to_string(kind) == name) return kind;
  }
  return std::nullopt;
}

std::unique_ptr<Pool> make_pool(PoolKind kind, const ThreadPoolOptions& options) {
  assert(options.max_threads >= 1 && options.max_threads <= Pool::kMaxThreads);
  switch (kind) {
    case PoolKind::kAdaptive:
      return std::make_unique<ThreadPool>(options);
    case PoolKind::kAsio:
      return std::make_unique<AsioPool>(options);
    default:
      return std::make_unique<SimplePool>(kind, options);
  }
}

}  // namespace vblk::threadpool
