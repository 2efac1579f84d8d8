#include "blockdev/qcow2/table_cache.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <new>
#include <sys/mman.h>
#include <utility>

#include "blockdev/qcow2/format.h"

namespace vblk::qcow2 {

TableCache::TableCache(std::size_t slice_bytes, std::uint64_t bytes, std::uint64_t slice_count)
    : slice_bytes_(slice_bytes) {
  const std::uint64_t wanted =
      std::max<std::uint64_t>(1, std::min(bytes / slice_bytes, slice_count));
  const std::uint64_t set_count = (wanted + kWays - 1) / kWays;
  sets_ = std::vector<Set>(set_count);
  slots_.resize(set_count * kWays);
  for (std::size_t number = 0; number < slots_.size(); ++number) slots_[number].number_ = number;
  memory_bytes_ = slots_.size() * slice_bytes_;
  void* const mapping = ::mmap(nullptr, memory_bytes_, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::uint64_t*>(mapping);
}

TableCache::~TableCache() { ::munmap(memory_, memory_bytes_); }

bool TableCache::read(std::uint64_t index, std::size_t first_word,
                      std::span<std::uint64_t> out) const {
  const std::size_t set_number = set_of(index);
  const Set& set = sets_[set_number];
  for (std::size_t way = 0; way < kWays; ++way) {
    if (set.tags[way].load(std::memory_order_relaxed) != index + 1) continue;
    const std::uint32_t version = set.versions[way].load(std::memory_order_acquire);
    if (version % 2 != 0) return false;
    const std::size_t number = set_number * kWays + way;
    std::uint64_t* const words = words_of(number) + first_word;
    // Acquired one by one: a value of a later change brings the odd version before it into view.
    for (std::size_t i = 0; i < out.size(); ++i)
      out[i] = std::atomic_ref<std::uint64_t>(words[i]).load(std::memory_order_acquire);
    if (set.versions[way].load(std::memory_order_relaxed) != version ||
        set.tags[way].load(std::memory_order_relaxed) != index + 1)
      return false;
    set.note_use(way);
    return true;
  }
  return false;
}

TableCache::Slot* TableCache::find(std::uint64_t index) {
  const std::size_t first = set_of(index) * kWays;
  for (std::size_t number = first; number < first + kWays; ++number) {
    Slot& slot = slots_[number];
    if (!slot.valid && !slot.loading) continue;
    if (slot.index != index) continue;
    sets_[number / kWays].note_use(number % kWays);
    return &slot;
  }
  return nullptr;
}

// A second chance for each slot that was used since the last look.
TableCache::Slot* TableCache::claim(std::uint64_t index, std::uint64_t host_offset) {
  const std::size_t first = set_of(index) * kWays;
  Slot* victim = nullptr;
  for (std::size_t number = first; number < first + kWays; ++number) {
    Slot& slot = slots_[number];
    if (slot.loading || slot.dirty || slot.writing) continue;
    if (!slot.valid) {
      victim = &slot;
      break;
    }
    auto& used = sets_[number / kWays].used[number % kWays];
    if (!used.exchange(false, std::memory_order_relaxed) || victim == nullptr) victim = &slot;
  }
  if (victim == nullptr) return nullptr;
  set_tag(*victim, 0);
  victim->valid = false;
  victim->loading = true;
  victim->index = index;
  victim->host_offset = host_offset;
  victim->order = {};
  sets_[victim->number_ / kWays].note_use(victim->number_ % kWays);
  return victim;
}

bool TableCache::is_any_in_flight(std::uint64_t index) const {
  const std::size_t first = set_of(index) * kWays;
  for (std::size_t number = first; number < first + kWays; ++number) {
    if (slots_[number].loading || slots_[number].writing) return true;
  }
  return false;
}

void TableCache::set_tag(Slot& slot, std::uint64_t tag) {
  sets_[slot.number_ / kWays].tags[slot.number_ % kWays].store(tag, std::memory_order_relaxed);
}

void TableCache::begin_change(Slot& slot) {
  auto& version = sets_[slot.number_ / kWays].versions[slot.number_ % kWays];
  version.store(version.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

void TableCache::end_change(Slot& slot) {
  auto& version = sets_[slot.number_ / kWays].versions[slot.number_ % kWays];
  version.store(version.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

std::uint64_t TableCache::word(const Slot& slot, std::size_t number) const {
  return std::atomic_ref<std::uint64_t>(words_of(slot.number_)[number])
      .load(std::memory_order_relaxed);
}

// Released, so that a reader who sees it sees the odd version before it as well.
void TableCache::set_word(Slot& slot, std::size_t number, std::uint64_t value) {
  std::atomic_ref<std::uint64_t>(words_of(slot.number_)[number])
      .store(value, std::memory_order_release);
}

void TableCache::fill(Slot& slot, std::span<const std::byte> bytes) {
  begin_change(slot);
  for (std::size_t i = 0; i < slice_bytes_ / 8; ++i)
    set_word(slot, i, bytes.empty() ? 0 : load_be<std::uint64_t>(bytes.data() + i * 8));
  set_tag(slot, slot.index + 1);
  end_change(slot);
  slot.loading = false;
  slot.valid = true;
}

void TableCache::loaded(Slot& slot, std::span<const std::byte> bytes) {
  assert(bytes.size() == slice_bytes_);
  fill(slot, bytes);
}

void TableCache::loaded_zeroes(Slot& slot) { fill(slot, {}); }

void TableCache::load_failed(Slot& slot) { slot.loading = false; }

void TableCache::mark_dirty(Slot& slot, std::uint64_t change, const WriteOrder& order) {
  slot.order.include(order);
  if (slot.dirty) return;
  slot.dirty = true;
  slot.dirty_since = change;
  dirty_.push_back(&slot);
}

TableCache::Slot& TableCache::start_writing(std::span<std::byte> copy) {
  Slot& slot = *dirty_.front();
  assert(!slot.writing && "one write-back at a time");
  dirty_.pop_front();
  slot.dirty = false;
  slot.writing = true;
  slot.order = {};
  for (std::size_t i = 0; i < slice_bytes_ / 8; ++i) store_be(copy.data() + i * 8, word(slot, i));
  return slot;
}

void TableCache::written(Slot& slot) { slot.writing = false; }

void TableCache::write_failed(Slot& slot, std::uint64_t change, const WriteOrder& order) {
  slot.writing = false;
  slot.order.include(order);
  if (slot.dirty) std::erase(dirty_, &slot);
  slot.dirty = true;
  slot.dirty_since = change;
  const auto later = std::ranges::find_if(
      dirty_, [change](const Slot* other) { return other->dirty_since > change; });
  dirty_.insert(later, &slot);
}

}  // namespace vblk::qcow2
