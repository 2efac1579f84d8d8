"""Defects to be seeded into a copy of the server, each with a test of `vblk conform` that must find it.

`where` is a source file, `text` stands in it exactly once, and `instead` replaces it; mutant("name") in it is whether this
defect is the one that is wanted. The suite's own claims are what is tested: a defect that no test finds is a hole in it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    found_by: str  # a test of vblk conform
    where: str
    changes: tuple  # of (text, instead)


REQUEST = "blockdev/virtio/blk_request.cpp"
DEVICE = "blockdev/virtio/blk_device.cpp"
QUEUE = "blockdev/virtio/blk_queue.cpp"
RING = "blockdev/virtio/virtqueue.cpp"
INFLIGHT = "blockdev/virtio/inflight_region.cpp"
PACKED = "blockdev/virtio/packed_virtqueue.cpp"
PACKED_INFLIGHT = "blockdev/virtio/packed_inflight_region.cpp"
DIRTY = "blockdev/virtio/dirty_marker.cpp"
BACKEND = "blockdev/vhost_user/backend.cpp"
NODE = "blockdev/raw_node.cpp"
SERVER = "tests/conform/mutant_server.cpp"  # its defects stand in it


def mutant(name, found_by, where, *changes):
    return Mutant(name, found_by, where, changes)


MUTANTS = (
    # ---- Requests
    mutant("range-check-overflows", "request/read-beyond-end", REQUEST,
           ("  return sector <= capacity_sectors &&",
            '  if (mutant("range-check-overflows")) return sector * kSectorBytes + length_bytes <= capacity_bytes;\n'
            "  return sector <= capacity_sectors &&")),
    mutant("range-check-is-skipped", "request/write-beyond-end", REQUEST,
           ("  if (!is_in_range(sector, length_bytes, limits.capacity_bytes)) return refuse(kBlkSIoErr);",
            "  if (!is_in_range(sector, length_bytes, limits.capacity_bytes)) {\n"
            '    if (mutant("range-check-is-skipped")) return {.kind = BlkCommandKind::kFlush};\n'
            "    return refuse(kBlkSIoErr);\n  }")),
    mutant("odd-lengths-are-rounded", "request/odd-length", REQUEST,
           ("  if (length_bytes % kSectorBytes != 0) return refuse(kBlkSIoErr);",
            "  if (length_bytes % kSectorBytes != 0) {\n"
            '    if (mutant("odd-lengths-are-rounded")) return {.kind = BlkCommandKind::kFlush};\n'
            "    return refuse(kBlkSIoErr);\n  }")),
    mutant("unknown-type-is-an-error", "request/unknown-type", REQUEST,
           ("      return refuse(kBlkSUnsupp);\n  }\n}",
            '      return refuse(mutant("unknown-type-is-an-error") ? kBlkSIoErr : kBlkSUnsupp);\n  }\n}')),
    mutant("discard-takes-unmap", "request/discard-unmap", REQUEST,
           ("kind == BlkCommandKind::kWriteZeroes ? kBlkWriteZeroesFlagUnmap : 0;",
            'kind == BlkCommandKind::kWriteZeroes || mutant("discard-takes-unmap") ? kBlkWriteZeroesFlagUnmap : 0;')),
    mutant("unknown-flags-are-ignored", "request/write-zeroes-flags", REQUEST,
           ("    if ((wire.flags & ~known_flags) != 0) return refuse(kBlkSUnsupp);",
            '    if ((wire.flags & ~known_flags) != 0 && !mutant("unknown-flags-are-ignored")) return refuse(kBlkSUnsupp);')),
    mutant("read-only-write-is-swallowed", "request/read-only", REQUEST,
           ("      if (limits.read_only) return refuse(kBlkSIoErr);\n      return transfer(BlkCommandKind::kWrite",
            '      if (limits.read_only && mutant("read-only-write-is-swallowed")) return {.kind = BlkCommandKind::kFlush};\n'
            "      if (limits.read_only) return refuse(kBlkSIoErr);\n      return transfer(BlkCommandKind::kWrite")),
    mutant("used-length-is-zero", "ring/used-length-counts", REQUEST,
           ("  const std::uint64_t length = data_bytes + 1 == writable_bytes",
            '  if (mutant("used-length-is-zero")) return 0;\n'
            '  if (mutant("used-length-is-one-too-many")) return static_cast<std::uint32_t>(writable_bytes + 1);\n'
            "  const std::uint64_t length = data_bytes + 1 == writable_bytes")),
    mutant("used-length-is-one-too-many", "ring/used-length", REQUEST),
    # ---- Queues
    mutant("used-length-of-failures-is-full", "ring/used-length-of-failure", QUEUE,
           ("  *slot.status = static_cast<std::byte>(status);",
            '  if (mutant("used-length-of-failures-is-full")) data_bytes = slot.writable_bytes - 1;\n'
            "  *slot.status = static_cast<std::byte>(status);")),
    mutant("only-the-first-segment-is-done", "request/write-zeroes-segments", QUEUE,
           ("    if (done.segment_next < done.segment_count) return",
            '    if (done.segment_next < done.segment_count && !mutant("only-the-first-segment-is-done")) return')),
    mutant("write-zeroes-is-short", "request/write-zeroes", QUEUE,
           ("  slot.length_bytes = segment.length_bytes;",
            "  slot.length_bytes = segment.length_bytes;\n"
            '  if (zeroes && mutant("write-zeroes-is-short") && slot.length_bytes > 512) slot.length_bytes -= 512;\n'
            '  if (!zeroes && mutant("discard-is-wide")) slot.length_bytes += 4096;')),
    mutant("discard-is-wide", "request/discard", QUEUE),
    mutant("write-through-without-sync", "durability/write-through", QUEUE,
           ("  slot.write_through = operation == blockdev::BlockOperation::kWrite && device.write_through();",
            "  slot.write_through = operation == blockdev::BlockOperation::kWrite && device.write_through();\n"
            '  if (mutant("write-through-without-sync")) slot.write_through = false;\n'
            "  static thread_local bool after_flush = false;\n"
            '  if (mutant("no-sync-after-a-flush") && after_flush) slot.write_through = false;\n'
            "  after_flush = operation == blockdev::BlockOperation::kFlush;")),
    mutant("no-sync-after-a-flush", "durability/write-through", QUEUE),
    mutant("id-is-not-padded", "request/get-id", QUEUE,
           ("    std::memcpy(piece.iov_base, id.data() + copied, part);",
            '    std::memcpy(piece.iov_base, id.data() + copied, mutant("id-is-not-padded") ? std::min<std::size_t>(part, 5) : part);\n'
            "    static unsigned times = 0;\n"
            '    if (mutant("id-changes") && copied == 0) *static_cast<char*>(piece.iov_base) ^= static_cast<char>(++times % 2);')),
    mutant("id-changes", "integrity/random", QUEUE),
    # ---- The device
    mutant("unoffered-features-are-accepted", "protocol/features-unoffered", DEVICE,
           ("  if ((features & ~offered_features_) != 0) {",
            '  if (mutant("features-survive")) features |= negotiated_features();\n'
            '  if ((features & ~offered_features_) != 0 && !mutant("unoffered-features-are-accepted")) {')),
    mutant("features-survive", "reconnect/features", DEVICE,
           ("void BlkDevice::reset() {", 'void BlkDevice::reset() {\n  if (mutant("features-survive")) return;')),
    mutant("writeback-survives", "reconnect/writeback", DEVICE,
           ("  set_by_driver_.reset();", '  if (!mutant("writeback-survives")) set_by_driver_.reset();')),
    mutant("writeback-without-flush", "config/writeback-without-flush", DEVICE,
           ("    const bool volatile_allowed = negotiated(kBlkFFlush);",
            '    const bool volatile_allowed = negotiated(kBlkFFlush) || mutant("writeback-without-flush");')),
    mutant("writeback-is-stale", "config/writeback-set", DEVICE,
           ("  config[kBlkConfigWriteback] = static_cast<std::byte>(writeback);",
            '  config[kBlkConfigWriteback] = static_cast<std::byte>(mutant("writeback-is-stale") ? options_.write_cache : writeback);\n'
            '  config[33] = static_cast<std::byte>(mutant("padding-is-set") ? 1 : 0);')),
    mutant("padding-is-set", "config/padding", DEVICE),
    mutant("config-offset-is-ignored", "config/every-range", DEVICE,
           ("    std::memcpy(out.data(), bytes.data() + offset,",
            '    std::memcpy(out.data(), bytes.data() + (mutant("config-offset-is-ignored") ? 0 : offset),')),
    mutant("read-only-fields-are-accepted", "config/read-only-fields", DEVICE,
           ("  if (!is_writeback || !negotiated(kBlkFConfigWce)) {",
            '  if (!is_writeback && mutant("read-only-fields-are-accepted")) return {};\n'
            "  if (!is_writeback || !negotiated(kBlkFConfigWce)) {")),
    mutant("num-queues-is-wrong", "config/num-queues", DEVICE,
           ("store_le<std::uint16_t>(config.data() + kBlkConfigNumQueues, options_.queue_count);",
            "store_le<std::uint16_t>(config.data() + kBlkConfigNumQueues,\n"
            '                          static_cast<std::uint16_t>(options_.queue_count + mutant("num-queues-is-wrong")));')),
    mutant("capacity-is-stale", "config/resize-told", DEVICE,
           ("  store_le<std::uint64_t>(config.data() + kBlkConfigCapacity, node_.size_bytes() / kSectorBytes);",
            "  static const std::uint64_t first_size = node_.size_bytes();\n"
            "  store_le<std::uint64_t>(config.data() + kBlkConfigCapacity,\n"
            '                          (mutant("capacity-is-stale") ? first_size : node_.size_bytes()) / kSectorBytes);')),
    mutant("alignment-offset-is-too-large", "config/topology", DEVICE,
           ("  config[kBlkConfigPhysicalBlockExp] = static_cast<std::byte>(std::countr_zero(physical / block));",
            "  config[kBlkConfigPhysicalBlockExp] = static_cast<std::byte>(std::countr_zero(physical / block));\n"
            '  if (mutant("alignment-offset-is-too-large")) config[kBlkConfigAlignmentOffset] = std::byte{200};')),
    mutant("size-max-is-zero", "config/size-max", DEVICE,
           ("config.data() + kBlkConfigSizeMax, kSegmentBytesMax);",
            'config.data() + kBlkConfigSizeMax, mutant("size-max-is-zero") ? 0 : kSegmentBytesMax);')),
    # ---- Rings
    mutant("event-idx-notification-is-lost", "ring/used-event", RING,
           ("  return need_event(used_event, used_index_, old_index);",
            '  if (mutant("event-idx-notification-is-lost") && used_index_ % 50 == 0) return false;\n'
            "  return need_event(used_event, used_index_, old_index);")),
    mutant("event-idx-batch-is-missed", "ring/used-event-in-batch", RING,
           ("  if (!std::exchange(published_before_, true)) return true;",
            "  if (!std::exchange(published_before_, true)) return true;\n"
            '  if (mutant("event-idx-batch-is-missed")) {\n'
            "    const auto only = load_acquire_le<std::uint16_t>(layout_.avail_ring + avail_used_event_offset(layout_.size));\n"
            "    return only == static_cast<std::uint16_t>(used_index_ - 1);\n  }")),
    mutant("event-idx-kick-is-lost", "ring/kick-event-idx", RING,
           ("    store_release_le(layout_.used_ring + used_avail_event_offset(layout_.size), next_avail_);",
            "    store_release_le(layout_.used_ring + used_avail_event_offset(layout_.size),\n"
            '                     static_cast<std::uint16_t>(next_avail_ + mutant("event-idx-kick-is-lost")));')),
    mutant("kick-is-not-asked-for", "ring/kick", RING,
           ("    store_release_le(layout_.used_ring + kUsedFlagsOffset, std::uint16_t{0});\n  }\n  // The wish",
            '    if (!mutant("kick-is-not-asked-for"))\n'
            "      store_release_le(layout_.used_ring + kUsedFlagsOffset, std::uint16_t{0});\n"
            '    if (mutant("avail-event-without-feature"))\n'
            "      store_release_le(layout_.used_ring + used_avail_event_offset(layout_.size), next_avail_);\n"
            "  }\n  // The wish")),
    mutant("avail-event-without-feature", "ring/used-ring-end", RING),
    mutant("flags-with-event-idx", "ring/used-flags", RING,
           ("  if (layout_.event_idx)\n    store_release_le(layout_.used_ring + kUsedFlagsOffset, std::uint16_t{0});",
            "  if (layout_.event_idx)\n    store_release_le(layout_.used_ring + kUsedFlagsOffset,\n"
            '                     static_cast<std::uint16_t>(mutant("flags-with-event-idx")));')),
    mutant("no-interrupt-is-ignored", "ring/not-notified", RING,
           ("    return (flags & kAvailFNoInterrupt) == 0;",
            '    if (mutant("no-interrupt-is-ignored")) return true;\n'
            '    if (mutant("notification-is-lost") && used_index_ % 40 == 0) return false;\n'
            "    return (flags & kAvailFNoInterrupt) == 0;")),
    mutant("notification-is-lost", "ring/notified", RING),
    mutant("indirect-only-at-the-head", "ring/indirect-after-direct", RING,
           ("    if ((descriptor.flags & kDescFIndirect) != 0) return walk_indirect(descriptor, builder);",
            "    if ((descriptor.flags & kDescFIndirect) != 0 &&\n"
            '        (!mutant("indirect-only-at-the-head") || count == 1))\n'
            "      return walk_indirect(descriptor, builder);")),
    mutant("indirect-without-feature", "hostile-ring/indirect-not-negotiated", RING,
           ("  if (!layout_.indirect) return broken(",
            '  if (!layout_.indirect && !mutant("indirect-without-feature")) return broken(')),
    mutant("indirect-data-goes-astray", "ring/indirect", RING,
           ("    const Descriptor entry = read_descriptor(table, index);",
            "    Descriptor entry = read_descriptor(table, index);\n"
            '    if (mutant("indirect-data-goes-astray") && entry.length_bytes == 4096) entry.guest_address += 4096;')),
    mutant("chains-may-loop", "hostile-ring/chain-loop", RING,
           ("    if (count > layout_.size)",
            '    if (count > layout_.size && !mutant("chains-may-loop"))')),
    mutant("used-id-is-wrong", "ring/full", RING,
           ("  store_le<std::uint32_t>(element, head);",
            '  store_le<std::uint32_t>(element, mutant("used-id-is-wrong") && head != 0 ? head - 1U : head);')),
    mutant("descriptor-is-written", "ring/descriptors-untouched", RING,
           ("  ++used_index_;\n  if (inflight_) inflight_.completed(head);",
            '  if (mutant("descriptor-is-written"))\n'
            "    store_le<std::uint32_t>(const_cast<std::byte*>(layout_.descriptor_table) + head * kDescriptorBytes + 8, 0U);\n"
            "  ++used_index_;\n  if (inflight_) inflight_.completed(head);")),
    # ---- Packed rings
    mutant("packed-counter-does-not-change", "packed/laps", PACKED,
           ("  next_used_.advance(buffer.length, layout_.size);",
            '  next_used_.advance(mutant("packed-list-is-not-skipped") ? std::size_t{1} : buffer.length, layout_.size);\n'
            '  if (mutant("packed-counter-does-not-change")) next_used_.wrap = true;')),
    mutant("packed-list-is-not-skipped", "packed/list-over-end", PACKED),
    mutant("packed-id-is-wrong", "packed/buffer-id", PACKED,
           ("  store_le<std::uint16_t>(used + kPackedIdOffset, id);",
            "  store_le<std::uint16_t>(used + kPackedIdOffset,\n"
            '                          static_cast<std::uint16_t>(mutant("packed-id-is-wrong") && id != 0 ? id - 1 : id));')),
    mutant("packed-id-is-the-first", "packed/buffer-id", PACKED,
           ("  const std::uint16_t id = copies_[copy].id;",
            '  if (mutant("packed-id-is-cut")) copies_[copy].id %= layout_.size;\n'
            '  const std::uint16_t id = copies_[mutant("packed-id-is-the-first") ? free_copy_ : copy].id;'),
           ("  const std::uint16_t id = copies_[peeked_.last].id;",
            '  const std::uint16_t id = copies_[mutant("packed-id-is-the-first") ? peeked_.first : peeked_.last].id;')),
    mutant("packed-id-is-cut", "hostile-packed/id-beyond", PACKED),
    mutant("packed-write-flag-is-missing", "packed/write-flag", PACKED,
           ("packed_used_flags(next_used_.wrap) | kDescFWrite);",
            'packed_used_flags(next_used_.wrap) | (mutant("packed-write-flag-is-missing") ? 0 : kDescFWrite));')),
    mutant("packed-events-are-never-off", "packed/not-notified", PACKED,
           ("  if (!layout_.event_idx) return packed_event_flags(event) != kPackedEventDisable;",
            '  if (mutant("packed-events-are-never-off")) return true;\n'
            '  if (mutant("packed-event-is-lost") && next_used_.index % 8 == 0) return false;\n'
            "  if (!layout_.event_idx) return packed_event_flags(event) != kPackedEventDisable;")),
    mutant("packed-event-is-lost", "packed/event", PACKED),
    mutant("packed-event-is-in-any-lap", "packed/event-holds-back", PACKED,
           ("  return packed_need_event(event, next_used_, count, layout_.size);",
            '  const std::uint32_t lap = mutant("packed-event-is-in-any-lap") ? 0x8000U : 0U;\n'
            "  return packed_need_event(lap == 0 ? event : (event & ~lap) | (next_used_.wrap ? lap : 0U), next_used_, count,\n"
            "                           layout_.size);")),
    mutant("packed-event-flag-is-reserved", "packed/device-event", PACKED,
           ("  store_release_le(layout_.device_event, packed_event(kPackedEventDisable));",
            '  store_release_le(layout_.device_event, packed_event(mutant("packed-event-flag-is-reserved") ? 3 : kPackedEventDisable));')),
    mutant("packed-kick-is-not-asked-for", "packed/kick", PACKED,
           (": packed_event(kPackedEventEnable));",
            ': packed_event(mutant("packed-kick-is-not-asked-for") ? kPackedEventDisable : kPackedEventEnable));')),
    mutant("packed-kick-is-asked-for-elsewhere", "packed/kick-event-idx", PACKED,
           ("? packed_event(kPackedEventAtDescriptor, next_avail_)",
            "? packed_event(kPackedEventAtDescriptor,\n"
            "               PackedPosition{static_cast<std::uint16_t>(\n"
            '                                  (next_avail_.index + (mutant("packed-kick-is-asked-for-elsewhere") ? 5 : 0)) %\n'
            "                                  layout_.size),\n"
            "                              next_avail_.wrap})")),
    mutant("packed-indirect-ends-without-next", "packed/indirect-flags", PACKED,
           ("  for (std::size_t i = 0; i < entries; ++i)\n    add(read_descriptor(table + i * kDescriptorBytes), builder);",
            "  for (std::size_t i = 0; i < entries; ++i) {\n"
            "    PackedDescriptor entry = read_descriptor(table + i * kDescriptorBytes);\n"
            '    if (mutant("packed-indirect-data-goes-astray") && entry.length_bytes == 4096) entry.guest_address += 4096;\n'
            "    add(entry, builder);\n"
            '    if (mutant("packed-indirect-ends-without-next") && (entry.flags & kDescFNext) == 0) break;\n  }')),
    mutant("packed-indirect-data-goes-astray", "packed/indirect", PACKED),
    mutant("packed-used-bit-is-ignored", "packed/only-available", PACKED,
           ("  if (!is_packed_available(load_flags(next_avail_.index), next_avail_.wrap)) return std::nullopt;",
            "  const auto is_available = [](std::uint16_t flags, bool wrap) {\n"
            '    if (mutant("packed-used-bit-is-ignored")) return ((flags & kPackedFAvail) != 0) == wrap;\n'
            "    return is_packed_available(flags, wrap);\n  };\n"
            "  if (!is_available(load_flags(next_avail_.index), next_avail_.wrap)) return std::nullopt;")),
    mutant("packed-list-goes-on-anywhere", "hostile-packed/list-into-nothing", PACKED,
           ("    if (!is_packed_available(next.flags, position.wrap)) {",
            '    if (!is_available(next.flags, position.wrap) && !mutant("packed-list-goes-on-anywhere")) {')),
    mutant("packed-indirect-without-feature", "hostile-packed/indirect-not-negotiated", PACKED,
           ("  if (!layout_.indirect) return broken(",
            '  if (!layout_.indirect && !mutant("packed-indirect-without-feature")) return broken(')),
    mutant("packed-base-is-halved", "packed/vring-base", BACKEND),
    # ---- The log of dirty pages
    mutant("log-misses-the-status", "migration/log-status", DIRTY,
           ("    ranges.push_back({memory_->guest_address_of(begin), piece.iov_len});",
            '    if (mutant("log-misses-the-status") && piece.iov_len == 1) continue;\n'
            '    if (mutant("log-misses-the-data") && piece.iov_len > 1) continue;\n'
            "    ranges.push_back({memory_->guest_address_of(begin),\n"
            '                      mutant("log-misses-later-pages") && piece.iov_len > 4096 ? 4096 : piece.iov_len});'),
           ("  ranges.push_back({memory_->guest_address_of(status), 1});",
            '  if (!mutant("log-misses-the-status")) ranges.push_back({memory_->guest_address_of(status), 1});')),
    mutant("log-misses-the-data", "migration/log-queues", DIRTY),
    mutant("log-misses-later-pages", "migration/log-data", DIRTY),
    mutant("log-misses-the-used-ring", "migration/log-used-ring", DIRTY,
           ("  for (const RingPart& part : ring_parts_) log_->mark(",
            '  if (mutant("log-misses-the-used-ring")) return;\n'
            "  for (const RingPart& part : ring_parts_) log_->mark(")),
    mutant("log-flag-is-ignored", "migration/log-used-ring", BACKEND,
           ("          .marks_ring = (ring.addresses.flags & kVringAddressFLog) != 0,",
            '          .marks_ring = (ring.addresses.flags & kVringAddressFLog) != 0 || mutant("log-flag-is-ignored"),')),
    mutant("log-is-never-off", "migration/log-off", BACKEND,
           ("  if ((session_.features & bit(kFLogAll)) == 0 || session_.log == nullptr) return {};",
            '  if (((session_.features & bit(kFLogAll)) == 0 && !mutant("log-is-never-off")) || session_.log == nullptr) return {};')),
    mutant("log-base-is-not-answered", "migration/log-base", BACKEND,
           ("  if (!changed || wants_reply(message)) return changed;",
            '  if (!changed || wants_reply(message) || mutant("log-base-is-not-answered")) return changed;')),
    # ---- In flight
    mutant("packed-in-flight-is-never-cleared", "reconnect/inflight-area-packed", PACKED_INFLIGHT,
           ("  for (const std::uint16_t entry : entries)\n"
            "    store_release<std::uint8_t>(desc(entry) + kPackedInflightFlagOffset, 0);",
            '  if (!mutant("packed-in-flight-is-never-cleared"))\n'
            "    for (const std::uint16_t entry : entries)\n"
            "      store_release<std::uint8_t>(desc(entry) + kPackedInflightFlagOffset, 0);")),
    mutant("packed-in-flight-is-forgotten", "reconnect/inflight-marked-packed", PACKED_INFLIGHT,
           ("    walk.in_flight.push_back(std::move(buffer));",
            '    if (!mutant("packed-in-flight-is-forgotten")) walk.in_flight.push_back(std::move(buffer));')),
    mutant("in-flight-is-forgotten", "reconnect/inflight-marked", INFLIGHT,
           ("    recovery.heads.push_back(head);",
            '    if (!mutant("in-flight-is-forgotten")) recovery.heads.push_back(head);')),
    mutant("in-flight-is-never-cleared", "reconnect/inflight-area", INFLIGHT,
           ("  clear_last_batch(count);\n  store_release<std::uint16_t>(begin_ + kInflightUsedIndexOffset, used_index);\n}\n\n}",
            '  if (!mutant("in-flight-is-never-cleared")) clear_last_batch(count);\n'
            "  store_release<std::uint16_t>(begin_ + kInflightUsedIndexOffset, used_index);\n}\n\n}")),
    mutant("in-flight-is-never-marked", "reconnect/inflight-sigkill", INFLIGHT,
           ("  store_release<std::uint8_t>(entry + kInflightFlagOffset, 1);",
            '  if (!mutant("in-flight-is-never-marked")) store_release<std::uint8_t>(entry + kInflightFlagOffset, 1);')),
    # ---- The protocol
    mutant("ack-is-not-sent", "protocol/reply-ack", BACKEND,
           ("  if (!wants_reply(message)) return outcome;",
            '  if (!wants_reply(message) || (mutant("ack-is-not-sent") && outcome)) return outcome;')),
    mutant("ack-is-sent-unasked", "protocol/reply-ack-unasked", BACKEND,
           ("(message.header.flags & kFlagNeedReply) != 0;",
            '((message.header.flags & kFlagNeedReply) != 0 || mutant("ack-is-sent-unasked"));')),
    mutant("vring-base-is-stale", "protocol/vring-base", BACKEND,
           ("VringState{.index = state.index, .value = base});",
            'VringState{.index = state.index, .value = mutant("vring-base-is-stale") ? 0U\n'
            '                             : mutant("packed-base-is-halved") ? base & 0xffffU : base});')),
    mutant("vring-base-is-ignored", "protocol/index-wraps", BACKEND,
           ("  (*ring)->next_avail = state.value;",
            '  if (!mutant("vring-base-is-ignored")) (*ring)->next_avail = state.value;')),
    mutant("stop-is-answered-and-not-done", "protocol/stopped-ring", BACKEND,
           ("  stop(**ring,\n       suspends",
            '  const bool lazy = mutant("stop-is-answered-and-not-done");\n'
            "  if (!lazy) stop(**ring,\n       suspends"),
           ("  (*ring)->started = false;\n  (*ring)->waits_for_memory = false;\n  (*ring)->kick.reset();",
            "  if (!lazy) (*ring)->started = false;\n  (*ring)->waits_for_memory = false;\n  if (!lazy) (*ring)->kick.reset();")),
    mutant("disabled-rings-go-on", "protocol/disabled-ring", BACKEND,
           ("  if (!(*ring)->enabled) stop(**ring, Afterwards::kUnknown);",
            '  if (mutant("disabled-rings-go-on") || mutant("disabled-rings-write")) return {};\n'
            "  if (!(*ring)->enabled) stop(**ring, Afterwards::kUnknown);")),
    mutant("disabled-rings-write", "protocol/disabled-ring-write", BACKEND),
    mutant("rings-start-enabled", "protocol/ring-starts-disabled", BACKEND,
           ("  if (ring.queue != nullptr || !ring.started || !ring.enabled) return {};",
            '  if (ring.queue != nullptr || !ring.started || (!ring.enabled && !mutant("rings-start-enabled"))) return {};')),
    mutant("call-descriptor-is-kept", "protocol/call-descriptor-changes", BACKEND,
           ("    thread_of(**ring).run_and_wait([&] { (*ring)->queue->set_call_fd(fd->get()); });\n  }",
            '    if (mutant("call-descriptor-is-kept")) return {};\n'
            "    thread_of(**ring).run_and_wait([&] { (*ring)->queue->set_call_fd(fd->get()); });\n  }")),
    mutant("kicks-are-not-polled-for", "protocol/kick-descriptor-none", BACKEND,
           ('  if (no_fd) return refused("a ring without a kick descriptor is not supported");',
            '  if (no_fd && mutant("kicks-are-not-polled-for")) return {};\n'
            '  if (no_fd) return refused("a ring without a kick descriptor is not supported");')),
    mutant("unoffered-protocol-features-are-accepted", "protocol/protocol-features-unoffered", BACKEND,
           ("  if (surplus != 0) return refused(",
            '  if (surplus != 0 && !mutant("unoffered-protocol-features-are-accepted")) return refused(')),
    mutant("one-queue-too-many", "protocol/every-queue", BACKEND,
           ("  return reply_u64(message, session_.rings.size());",
            '  return reply_u64(message, session_.rings.size() + (mutant("one-queue-too-many") ? 1 : 0));')),
    mutant("removed-slots-stay", "memory/slot-removed", BACKEND,
           ("  if (removed == 0) return refused(",
            '  if (mutant("removed-slots-stay")) return {};\n'
            '  if (mutant("removal-leaks") && !message.fds.empty()) message.fds[0].release();\n'
            "  if (removed == 0) return refused(")),
    mutant("removal-looks-at-the-offset", "memory/slot-named", BACKEND,
           ("           region->size_bytes() == wire.size_bytes && region->user_address() == wire.user_address;",
            "           region->size_bytes() == wire.size_bytes && region->user_address() == wire.user_address &&\n"
            '           (wire.mmap_offset == 0 || !mutant("removal-looks-at-the-offset"));')),
    mutant("removal-leaks", "memory/removal-descriptor", BACKEND),
    mutant("descriptors-are-missing-and-mapped", "hostile-message/no-descriptors", BACKEND,
           ('  if (message.fds.size() != 1) return refused("no descriptor comes with it");\n  const auto wire = payload_of<SingleMemoryRegion>',
            '  if (message.fds.empty() && mutant("descriptors-are-missing-and-mapped")) return {};\n'
            '  if (message.fds.size() != 1) return refused("no descriptor comes with it");\n'
            "  const auto wire = payload_of<SingleMemoryRegion>")),
    mutant("one-message-leaks-descriptors", "hostile-message/descriptor-leak", BACKEND,
           ("  if (!outcome) {\n    outcome.error().message =",
            '  if (!outcome && mutant("one-message-leaks-descriptors") && message.request() == Request::kSetVringEnable)\n'
            "    for (UniqueFd& fd : message.fds) fd.release();\n"
            "  if (!outcome) {\n    outcome.error().message =")),
    mutant("too-many-descriptors-end-it", "hostile-message/many-descriptors", BACKEND,
           ("  if (message.fds.size() > rule.fds_max) {",
            '  if (message.fds.size() > rule.fds_max && rule.request == Request::kGetStatus &&\n'
            '      mutant("too-many-descriptors-end-it")) std::abort();\n'
            "  if (message.fds.size() > rule.fds_max) {")),
    mutant("config-of-a-migration-is-ignored", "config/set-config-migration", BACKEND,
           ("  if (head.flags == kForMigration)\n",
            '  if (head.flags == kForMigration && mutant("config-of-a-migration-is-ignored")) return {};\n'
            "  if (head.flags == kForMigration)\n")),
    # ---- Status
    mutant("status-is-never-zero", "status/initial", BACKEND,
           ("  const bool needs_reset = needs_reset_.load(std::memory_order_relaxed);\n  return static_cast<std::uint8_t>(",
            '  if (mutant("status-is-never-zero")) return session_.status.value() | 1U;\n'
            '  if (mutant("reset-is-needed-for-nothing") && session_.status.is_driver_ok()) return session_.status.value() | 64U;\n'
            "  const bool needs_reset = needs_reset_.load(std::memory_order_relaxed);\n  return static_cast<std::uint8_t>(")),
    mutant("reset-is-needed-for-nothing", "status/driver-ok", BACKEND),
    mutant("status-is-forgotten", "status/kept", BACKEND,
           ("  if (value != 0) return session_.status.write(value, session_.features_accepted);",
            '  if (value != 0 && mutant("status-is-forgotten")) return {};\n'
            '  if (value != 0 && mutant("features-ok-is-dropped")) return session_.status.write(value & ~std::uint64_t{8}, session_.features_accepted);\n'
            "  if (value != 0) return session_.status.write(value, session_.features_accepted);")),
    mutant("features-ok-is-dropped", "status/features-ok", BACKEND),
    mutant("reset-leaves-the-rings", "status/reset", BACKEND,
           ("void Backend::reset() {\n  for (Ring& ring : session_.rings) {",
            "void Backend::reset() {\n  for (Ring& ring : session_.rings) {\n"
            '    if (mutant("reset-leaves-the-rings")) continue;')),
    mutant("reset-is-not-needed", "status/needs-reset", BACKEND,
           ("                                      needs_reset_.store(true, std::memory_order_relaxed);",
            '                                      if (!mutant("reset-is-not-needed"))\n'
            "                                      needs_reset_.store(true, std::memory_order_relaxed);")),
    mutant("reset-is-needed-in-silence", "status/needs-reset-told", BACKEND,
           ("void Backend::tell_needs_reset() {\n",
            'void Backend::tell_needs_reset() {\n  if (mutant("reset-is-needed-in-silence")) return;\n')),
    mutant("reset-device-does-nothing", "status/reset-device", BACKEND,
           ('    return refused("RESET_DEVICE was not negotiated");\n',
            '    return refused("RESET_DEVICE was not negotiated");\n'
            '  if (mutant("reset-device-does-nothing")) return {};\n')),
    # ---- The program
    mutant("capabilities-are-of-a-network-card", "program/print-capabilities", SERVER),
    mutant("failure-ends-with-status-0", "program/fails-early", SERVER),
    mutant("it-serves-from-a-child", "program/foreground", SERVER),
    mutant("fd-is-not-known", "program/fd", SERVER),
    # ---- More of the protocol
    mutant("change-of-size-is-not-told", "config/resize-told", BACKEND,
           ("  if (!backend_channel_) return;",
            '  if (!backend_channel_ || mutant("change-of-size-is-not-told")) return;')),
    mutant("unknown-messages-are-acknowledged", "hostile-message/unknown", BACKEND,
           ('    outcome = refused(fmt::format("message {} is not supported", message.header.request));',
            '    if (!mutant("unknown-messages-are-acknowledged"))\n'
            '      outcome = refused(fmt::format("message {} is not supported", message.header.request));')),
    mutant("queue-index-is-not-checked", "hostile-message/queue-index", BACKEND,
           ("  if (index < session_.rings.size()) return &session_.rings[index];",
            '  if (index < session_.rings.size() || mutant("queue-index-is-not-checked"))\n'
            "    return &session_.rings[index % session_.rings.size()];")),
    # ---- The disk
    mutant("flush-does-nothing", "durability/flush", NODE,
           ("  if (earlier != 0 || options_.ignore_flush)",
            '  if (earlier != 0 || options_.ignore_flush || mutant("flush-does-nothing"))')),
    mutant("a-write-goes-astray", "integrity/random", NODE,
           ("  request.io.offset_bytes = request.offset_bytes;\n  request.io.length_bytes = request.length_bytes;",
            "  request.io.offset_bytes = request.offset_bytes;\n"
            '  if (mutant("a-write-goes-astray") && request.operation == BlockOperation::kWrite &&\n'
            "      request.offset_bytes % (std::uint64_t{1} << 20) == 8192)\n"
            "    request.io.offset_bytes += 4096;\n"
            "  request.io.length_bytes = request.length_bytes;")),
)

# No defects: other servers that are in the right, on which no test may fail. Their changes come after those of the defects.
VARIANTS = (
    mutant("limits-are-small", "", DEVICE,
           ('mutant("size-max-is-zero") ? 0 : kSegmentBytesMax);',
            'mutant("size-max-is-zero") ? 0 : mutant("limits-are-small") ? 8192 : kSegmentBytesMax);'),
           ("config.data() + kBlkConfigSegMax, segments_max(options_.queue_size_max));",
            "config.data() + kBlkConfigSegMax,\n"
            '                          mutant("limits-are-small") ? 2 : segments_max(options_.queue_size_max));'),
           ("config.data() + kBlkConfigMaxDiscardSectors, kBlkSegmentSectorsMax);",
            'config.data() + kBlkConfigMaxDiscardSectors, mutant("limits-are-small") ? 64 : kBlkSegmentSectorsMax);'),
           ("config.data() + kBlkConfigMaxDiscardSeg, kBlkSegmentsMax);",
            'config.data() + kBlkConfigMaxDiscardSeg, mutant("limits-are-small") ? 1U : std::uint32_t{kBlkSegmentsMax});'),
           ("config.data() + kBlkConfigMaxWriteZeroesSectors, kBlkSegmentSectorsMax);",
            'config.data() + kBlkConfigMaxWriteZeroesSectors, mutant("limits-are-small") ? 64 : kBlkSegmentSectorsMax);'),
           ("config.data() + kBlkConfigMaxWriteZeroesSeg, kBlkSegmentsMax);",
            'config.data() + kBlkConfigMaxWriteZeroesSeg, mutant("limits-are-small") ? 1U : std::uint32_t{kBlkSegmentsMax});')),
    mutant("limits-are-small", "", REQUEST,
           ("  // Engines take at most IOV_MAX pieces,",
            '  if (mutant("limits-are-small") &&\n'
            "      (data.size() > 2 || std::ranges::any_of(data, [](const iovec& piece) { return piece.iov_len > 8192; })))\n"
            "    return refuse(kBlkSIoErr);\n"
            "  // Engines take at most IOV_MAX pieces,"),
           ("  if (count > segments.size()) return refuse(kBlkSUnsupp);",
            '  if (count > (mutant("limits-are-small") ? 1 : segments.size())) return refuse(kBlkSUnsupp);'),
           ("    in_range = in_range && wire.sector_count <= kBlkSegmentSectorsMax &&",
            '    in_range = in_range && wire.sector_count <= (mutant("limits-are-small") ? 64 : kBlkSegmentSectorsMax) &&')),
)
