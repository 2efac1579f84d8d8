// A cache of table slices: of L2 tables (the mapping) or of refcount blocks.
//
// A slice is a piece of a table, 4 KiB at most, known by its index: for L2 the guest range that it
// maps, for refcounts the host range that it counts. Set-associative: a slice can lie in any of the
// kWays slots of its set. Where all slices fit, none ever has to leave.
//
//   a slot is       tag        meaning
//   free            0          nothing in it
//   loading         0          its coroutine reads; others who want it wait
//   clean           index + 1  as on the disk
//   dirty           index + 1  changed since; waits for the next write-back
//   writing         index + 1  a copy of it is on its way to the disk; may be changed meanwhile,
//                              and is dirty again then; does not leave
//
// Reading is lock-free: read() copies entries and then asks whether the slot was changed meanwhile
// (a sequence lock: `version` is odd while it is). Everything else runs under the owner's mutex.
// Words are kept decoded, so that a reader swaps no bytes.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "blockdev/qcow2/write_order.h"

namespace vblk::qcow2 {

class TableCache {
 public:
  static constexpr std::size_t kWays = 8;

  struct Slot {
    std::uint64_t index{0};        // of the slice
    std::uint64_t host_offset{0};  // where it is on the disk; 0: its table does not exist, and the
                                   // slice reads as zeroes
    bool valid{false};
    bool loading{false};
    bool dirty{false};
    bool writing{false};
    std::uint64_t dirty_since{0};  // number of the change that made it dirty
    WriteOrder order;              // what must be stable before it is written

   private:
    friend class TableCache;
    std::size_t number_{0};
  };

  // Room for `bytes` of slices, rounded up to whole sets, and never more than `slice_count` need.
  // Memory is taken when it is touched. Throws std::bad_alloc.
  TableCache(std::size_t slice_bytes, std::uint64_t bytes, std::uint64_t slice_count);
  ~TableCache();
  TableCache(const TableCache&) = delete;
  TableCache& operator=(const TableCache&) = delete;

  [[nodiscard]] std::size_t slice_bytes() const { return slice_bytes_; }
  [[nodiscard]] std::size_t slot_count() const { return slots_.size(); }

  // Any thread: copies words [first, first + out.size()) of a slice. False: it is not there, or is
  // being changed.
  [[nodiscard]] bool read(std::uint64_t index, std::size_t first_word,
                          std::span<std::uint64_t> out) const;

  // ---- Under the mutex.

  // The slot that holds the slice or is loading it, or nullptr.
  [[nodiscard]] Slot* find(std::uint64_t index);
  // A slot for a slice that find() has not found, now `loading`; nullptr if every slot of its set
  // is dirty, writing or loading.
  [[nodiscard]] Slot* claim(std::uint64_t index, std::uint64_t host_offset);
  // Whether a slot in which the slice could lie is loading or writing: when that has ended, claim()
  // may find it free.
  [[nodiscard]] bool is_any_in_flight(std::uint64_t index) const;
  // Ends loading: with the disk's bytes, with zeroes, or not at all.
  void loaded(Slot& slot, std::span<const std::byte> bytes);
  void loaded_zeroes(Slot& slot);
  void load_failed(Slot& slot);

  [[nodiscard]] std::uint64_t word(const Slot& slot, std::size_t number) const;
  // Brackets changes of words, for those who read without the mutex.
  void begin_change(Slot& slot);
  void set_word(Slot& slot, std::size_t number, std::uint64_t value);
  void end_change(Slot& slot);

  // Puts a changed slot on the list of dirty ones. `change` numbers changes of all caches.
  void mark_dirty(Slot& slot, std::uint64_t change, const WriteOrder& order);
  [[nodiscard]] bool has_dirty() const { return !dirty_.empty(); }
  [[nodiscard]] bool has_dirty_before(std::uint64_t change) const {
    return !dirty_.empty() && dirty_.front()->dirty_since <= change;
  }
  [[nodiscard]] const Slot& first_dirty() const { return *dirty_.front(); }
  // The slot that has been dirty for longest; it must be there. Now `writing`, with a copy of its
  // bytes as the disk wants them.
  Slot& start_writing(std::span<std::byte> copy);
  void written(Slot& slot);
  // It stays dirty, as it was before.
  void write_failed(Slot& slot, std::uint64_t change, const WriteOrder& order);

  // Every valid slot, for those whose table has moved.
  template <typename Function>
  void for_each_valid(Function function) {
    for (Slot& slot : slots_) {
      if (slot.valid) function(slot);
    }
  }

 private:
  // What read() looks at, side by side.
  struct alignas(64) Set {
    std::array<std::atomic<std::uint64_t>, kWays> tags{};
    std::array<std::atomic<std::uint32_t>, kWays> versions{};
    // Since claim() last looked. Written by those who read, but only where it changes.
    mutable std::array<std::atomic<bool>, kWays> used{};
    void note_use(std::size_t way) const {
      if (!used[way].load(std::memory_order_relaxed))
        used[way].store(true, std::memory_order_relaxed);
    }
  };
  [[nodiscard]] std::size_t set_of(std::uint64_t index) const { return index % sets_.size(); }
  [[nodiscard]] std::uint64_t* words_of(std::size_t slot_number) const {
    return memory_ + slot_number * (slice_bytes_ / 8);
  }
  void set_tag(Slot& slot, std::uint64_t tag);
  void fill(Slot& slot, std::span<const std::byte> bytes);

  const std::size_t slice_bytes_;
  std::vector<Set> sets_;
  std::deque<Slot> slots_;  // kWays per set; never moved
  std::uint64_t* memory_{nullptr};
  std::size_t memory_bytes_{0};
  std::deque<Slot*> dirty_;  // by dirty_since
};

}  // namespace vblk::qcow2
