// When a write is stable: observed at the file system where that is allowed (sync_watch.h), and by
// killing the backend.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <memory>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/sync_watch.h"
#include "blockdev/conform/test.h"

namespace vblk::conform {

using namespace virtio;

namespace {

// Apart by a cluster of any size that images have, so that each write is the first at its place, if
// the image is one of the suite's own: a file system may write over old blocks by FUA, which no
// sync shows.
constexpr std::uint64_t kStepSectors = 256;
constexpr std::uint64_t kFirstSector = 4096;

// A guest on a backend whose syncs are counted.
class Observed {
 public:
  Observed(Probe& probe, const GuestOptions& options) : guest_(probe, options) {
    auto watch = SyncWatch::open(probe.image_path());
    if (!watch) Probe::skip(watch.error().message);
    watch_ = std::move(*watch);
    // A watch that sees nothing proves nothing: what is fsynced here must be seen. The image's
    // inode is what counts, so that any descriptor of it will do.
    image_.reset(::open(probe.image_path().c_str(), O_RDONLY | O_CLOEXEC));
    const std::uint64_t before = watch_->count();
    if (!image_ || ::fsync(image_.get()) != 0 || watch_->count() == before) {
      Probe::skip(
          "what reaches the disk cannot be observed: a sync of the suite's own is not seen");
    }
  }

  [[nodiscard]] Guest& guest() { return guest_; }

  // Writes to a new place.
  void write() {
    sector_ += kStepSectors;
    guest_.fill(kDefaultBlock, sector_);
    guest_.must_write(sector_, kDefaultBlock);
  }
  // The same, which has to be stable at its completion.
  void write_stable(const std::string& after_what) {
    must_sync(
        sector_ + kStepSectors, [this] { write(); },
        fmt::format("a write {} completes without a sync of the image", after_what));
  }
  void write_and_flush_stable(const std::string& which) {
    must_sync(
        sector_ + kStepSectors,
        [this] {
          write();
          guest_.must_flush();
        },
        fmt::format("a write and {} complete without a sync of the image", which));
  }
  // `what` writes at `sector` and has to have the image synced. Where it has not, a write over
  // blocks that the image had already proves nothing: it may be stable all the same.
  template <typename Function>
  void must_sync(std::uint64_t sector, const Function& what, std::string otherwise_seen) {
    const bool was_hole = is_hole(sector);
    const std::uint64_t blocks = image_blocks();
    const std::uint64_t before = watch_->count();
    what();
    if (watch_->count() > before) return;
    if (was_hole || image_blocks() > blocks) Probe::fail(std::move(otherwise_seen));
    Probe::skip(
        "the image has had these blocks before: a write over them may be stable by FUA, which no "
        "sync shows. A sparse image can be judged");
  }
  [[nodiscard]] std::uint64_t sector() const { return sector_; }

  // Writes that have to be stable, each after another kind of earlier operation.
  void write_stable_after_each_kind(const std::string& how) {
    write_stable(how);
    write_stable(how + ", the second");
    guest_.must_read(sector_, kDefaultBlock);
    write_stable(how + ", after a read");
    if (guest_.has(kBlkFFlush)) {
      guest_.must_flush();
      write_stable(how + ", after a flush");
      guest_.must_flush();
      guest_.must_flush();
      write_stable(how + ", after two flushes");
    }
    const Segment segment{kFirstSector, 8, 0};
    if (guest_.has(kBlkFDiscard)) {
      guest_.segments(kBlkTDiscard, {&segment, 1});
      write_stable(how + ", after a discard");
    }
    if (guest_.has(kBlkFWriteZeroes)) {
      guest_.segments(kBlkTWriteZeroes, {&segment, 1});
      write_stable(how + ", after write zeroes");
    }
    guest_.request(kBlkTGetId, 0, {}, guest_.data().first(kBlkIdBytes));
    write_stable(how + ", after GET_ID");
  }

 private:
  // Whether nothing was ever written at a sector, as far as that is known: of a raw image.
  [[nodiscard]] bool is_hole(std::uint64_t sector) const {
    constexpr std::string_view kQcow2Magic = "QFI\xfb";
    std::array<char, kQcow2Magic.size()> magic{};
    if (::pread(image_.get(), magic.data(), magic.size(), 0) < 0 ||
        std::string_view(magic.data(), magic.size()) == kQcow2Magic)
      return false;
    const auto offset = static_cast<off_t>(sector * kSectorBytes);
    const off_t data = ::lseek(image_.get(), offset, SEEK_DATA);
    return data < 0 ? errno == ENXIO : data >= offset + static_cast<off_t>(kDefaultBlock);
  }
  // What the file system has given it, what is still to be written included.
  [[nodiscard]] std::uint64_t image_blocks() const {
    struct stat file{};
    return ::fstat(image_.get(), &file) == 0 ? static_cast<std::uint64_t>(file.st_blocks) : 0;
  }

  Guest guest_;
  vhost_user::UniqueFd image_;
  std::unique_ptr<SyncWatch> watch_;
  std::uint64_t sector_{kFirstSector};
};

std::uint64_t writeback_of(Guest& guest) { return guest.config_field(kBlkConfigWriteback, 1); }

void set_writeback(Guest& guest, unsigned value) {
  const auto taken =
      guest.channel().write_config(kBlkConfigWriteback, {static_cast<std::byte>(value)});
  Probe::expect(taken == Channel::Taken::kOk,
                fmt::format("writeback = {} is {}", value, to_string(taken)));
}

void flush_reaches_the_disk(Probe& probe) {
  Observed observed(probe, {});
  Guest& guest = observed.guest();
  need_feature(guest, kBlkFFlush, "FLUSH");
  if (guest.has(kBlkFConfigWce)) set_writeback(guest, 1);
  for (int i = 0; i < 8; ++i) observed.write_and_flush_stable(fmt::format("flush {}", i));
}

void flush_alone_reaches_the_disk(Probe& probe) {
  Observed observed(probe, {.features = kPlainFeatures & ~bit(kBlkFConfigWce)});
  need_feature(observed.guest(), kBlkFFlush, "FLUSH");
  for (int i = 0; i < 4; ++i) observed.write_and_flush_stable(fmt::format("flush {}", i));
}

void flush_is_for_all_queues(Probe& probe) {
  need_queues(probe, 2);
  Observed observed(probe, {.queue_count = 2});
  Guest& guest = observed.guest();
  need_feature(guest, kBlkFFlush, "FLUSH");
  if (guest.has(kBlkFConfigWce)) set_writeback(guest, 1);
  for (std::uint64_t i = 0; i < 6; ++i) {
    const std::uint64_t sector = kFirstSector + (100 + i) * kStepSectors;
    observed.must_sync(
        sector,
        [&] {
          guest.fill(kDefaultBlock, i);
          guest.must_write(sector, kDefaultBlock, i % 2);
          guest.must_flush((i + 1) % 2);
        },
        fmt::format("a write on queue {} and a flush on queue {} complete without a sync", i % 2,
                    (i + 1) % 2));
  }
}

void claimed_write_through_is_done(Probe& probe) {
  Observed observed(probe, {});
  Guest& guest = observed.guest();
  need_feature(guest, kBlkFConfigWce, "CONFIG_WCE");
  if (writeback_of(guest) != 0) Probe::skip("writeback is 1 after negotiation: flushes are wanted");
  observed.write_stable_after_each_kind("with writeback 0, as the backend itself says");
}

void chosen_write_through_is_done(Probe& probe) {
  Observed observed(probe, {});
  Guest& guest = observed.guest();
  need_feature(guest, kBlkFConfigWce, "CONFIG_WCE");
  set_writeback(guest, 1);
  set_writeback(guest, 0);
  observed.write_stable_after_each_kind("with writeback set to 0");
}

void write_through_comes_and_goes(Probe& probe) {
  Observed observed(probe, {});
  Guest& guest = observed.guest();
  need_feature(guest, kBlkFConfigWce, "CONFIG_WCE");
  for (int i = 0; i < 4; ++i) {
    set_writeback(guest, 1);
    observed.write();
    set_writeback(guest, 0);
    observed.write_stable("after writeback was set from 1 to 0");
  }
}

void no_feature_is_write_through(Probe& probe) {
  Observed observed(probe, {.features = kPlainFeatures & ~bit(kBlkFConfigWce) & ~bit(kBlkFFlush)});
  if ((observed.guest().channel().offered() & bit(kBlkFFlush)) == 0)
    Probe::skip("no FLUSH is offered: nothing is promised");
  observed.write_stable_after_each_kind("with neither FLUSH nor CONFIG_WCE");
}

void wce_alone_is_write_through(Probe& probe) {
  Observed observed(probe, {.features = kPlainFeatures & ~bit(kBlkFFlush)});
  Guest& guest = observed.guest();
  need_feature(guest, kBlkFConfigWce, "CONFIG_WCE");
  Probe::expect(writeback_of(guest) == 0, "writeback is 1 with CONFIG_WCE and without FLUSH");
  observed.write_stable_after_each_kind("with CONFIG_WCE and without FLUSH");
}

// What was promised is there after SIGKILL: the process kept none of it for itself.
void survives_kill(Probe& probe, bool through) {
  Backend& backend = probe.own_backend("the backend is killed");
  constexpr std::uint64_t kCount = 24;
  {
    Guest guest(probe,
                {.features = through ? kPlainFeatures & ~bit(kBlkFConfigWce) & ~bit(kBlkFFlush)
                                     : kPlainFeatures});
    if ((guest.channel().offered() & bit(kBlkFFlush)) == 0)
      Probe::skip("no FLUSH is offered: nothing is promised");
    for (std::uint64_t i = 0; i < kCount; ++i) {
      guest.fill(kDefaultBlock, i);
      guest.must_write(kFirstSector + i * kStepSectors, kDefaultBlock);
    }
    if (!through) guest.must_flush();
    probe.expect_end();
    backend.kill();
  }
  Probe::value(backend.restart(), "starting it again after SIGKILL");
  Guest guest(probe);
  for (std::uint64_t i = 0; i < kCount; ++i) {
    guest.must_read(kFirstSector + i * kStepSectors, kDefaultBlock);
    const auto wrong = guest.differs(kDefaultBlock, i);
    Probe::expect(!wrong, fmt::format("write {} of {} is lost by SIGKILL, from its byte {} on", i,
                                      kCount, wrong.value_or(0)));
  }
}
void flushed_writes_survive(Probe& probe) { survives_kill(probe, false); }
void stable_writes_survive(Probe& probe) { survives_kill(probe, true); }

constexpr const char* kOperation = "Block Device / Device Operation";
constexpr const char* kInit = "Block Device / Device Initialization";

constexpr std::array kTests{
    Test{"durability/flush",
         {kVirtio, kOperation, Force::kMust,
          "a flush that completes has committed the writes that completed before it (case 3)"},
         flush_reaches_the_disk,
         true},
    Test{"durability/flush-without-wce",
         {kVirtio, kOperation, Force::kMust, "the same where FLUSH alone was negotiated"},
         flush_alone_reaches_the_disk,
         true},
    Test{"durability/flush-all-queues",
         {kVirtio, kOperation, Force::kMust, "a flush covers the writes of other queues"},
         flush_is_for_all_queues,
         true},
    Test{"durability/claimed-write-through",
         {kVirtio, kOperation, Force::kMust,
          "a write is stable at completion where the backend says writeback 0 by itself (case 2)"},
         claimed_write_through_is_done,
         true},
    Test{"durability/write-through",
         {kVirtio, kOperation, Force::kMust,
          "a write is stable at completion where the driver has set writeback to 0 (case 2), after "
          "every kind of earlier operation"},
         chosen_write_through_is_done,
         true},
    Test{"durability/write-through-toggled",
         {kVirtio, kOperation, Force::kMust,
          "the same whenever writeback changes from 1 to 0 (case 2)"},
         write_through_comes_and_goes,
         true},
    Test{"durability/no-flush-no-wce",
         {kVirtio, kOperation, Force::kMust,
          "a write is stable at completion where neither FLUSH nor CONFIG_WCE was negotiated (case "
          "1)"},
         no_feature_is_write_through,
         true},
    Test{"durability/wce-without-flush",
         {kVirtio, kInit, Force::kMust,
          "a write is stable at completion with CONFIG_WCE and without FLUSH negotiated"},
         wce_alone_is_write_through,
         true},
    Test{
        .name = "durability/flushed-survives-sigkill",
        .statement = {kVirtio, kOperation, Force::kMust, "what was flushed is there after SIGKILL"},
        .run = flushed_writes_survive,
        .destructive = true},
    Test{.name = "durability/stable-survives-sigkill",
         .statement = {kVirtio, kOperation, Force::kMust,
                       "what was stable at completion is there after SIGKILL"},
         .run = stable_writes_survive,
         .destructive = true},
};

}  // namespace

std::span<const Test> durability_tests() { return kTests; }

}  // namespace vblk::conform
