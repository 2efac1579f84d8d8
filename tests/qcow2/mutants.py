"""Defects to be seeded into copies of the code that keeps the order of writes, each of which a power cut must bring to light.

`where` is a source file, the first text of each change stands in it exactly once, and the second replaces it; mutant("name")
in it is whether this defect is awake. tests/qcow2/write_order_test.cpp says on which images each must be found.
"""

from collections import namedtuple

Mutant = namedtuple("Mutant", "name where changes")

WRITE_BACK = "blockdev/qcow2/write_back.cpp"
WRITE_PATH = "blockdev/qcow2/write_path.cpp"
ALLOCATOR = "blockdev/qcow2/cluster_allocator.cpp"
OPEN = "blockdev/qcow2/open.cpp"
COMPRESSED = "blockdev/qcow2/compressed_path.cpp"


def mutant(name, where, *changes):
    return Mutant(name, where, changes)


MUTANTS = (
    mutant("mapping-does-not-wait-for-refcounts", WRITE_BACK,
           ("    must_wait = round.order.refcount_change > state_.refcount_changes_stable ||",
            '    must_wait = (round.order.refcount_change > state_.refcount_changes_stable &&\n'
            '                 !mutant("mapping-does-not-wait-for-refcounts")) ||')),
    mutant("mapping-does-not-wait-for-data", WRITE_BACK,
           ("                round.order.barrier > state_.barriers_done;",
            '                (round.order.barrier > state_.barriers_done && !mutant("mapping-does-not-wait-for-data"));')),
    mutant("mapping-is-written-first", WRITE_BACK,
           ("  int error = co_await write_refcounts(context, round);\n  if (error != 0) co_return error;\n  bool must_wait",
            '  int error = mutant("mapping-is-written-first") ? co_await write_all(context, round.mapping) : 0;\n'
            "  if (error == 0) error = co_await write_refcounts(context, round);\n"
            "  if (error != 0) co_return error;\n  bool must_wait")),
    mutant("refcount-table-does-not-wait-for-blocks", WRITE_BACK,
           ("    error = co_await barrier(context);\n    if (error == 0) error = co_await write_all(context, round.refcount_table);",
            '    if (!mutant("refcount-table-does-not-wait-for-blocks")) error = co_await barrier(context);\n'
            "    if (error == 0) error = co_await write_all(context, round.refcount_table);")),
    mutant("data-file-is-not-flushed", WRITE_BACK,
           ("  if (state_.data_file != nullptr)\n    error =",
            '  if (state_.data_file != nullptr && !mutant("data-file-is-not-flushed"))\n    error =')),
    mutant("flush-leaves-out-the-last-barrier", WRITE_BACK,
           ("  if (error == 0) error = co_await barrier(context);\n  const std::lock_guard lock(state_.mutex);\n  if (error != 0) {\n    for",
            '  if (error == 0 && !mutant("flush-leaves-out-the-last-barrier")) error = co_await barrier(context);\n'
            "  const std::lock_guard lock(state_.mutex);\n  if (error != 0) {\n    for")),
    mutant("freed-meanwhile-is-free-at-once", WRITE_BACK,
           ("  if (!freed.empty()) {",
            '  if (mutant("freed-meanwhile-is-free-at-once")) {\n'
            "    freed.insert(freed.end(), state_.freed.begin(), state_.freed.end());\n"
            "    state_.freed.clear();\n"
            "  }\n"
            "  if (!freed.empty()) {")),
    mutant("copied-data-may-come-later", WRITE_PATH,
           ("order.barrier = state_.next_barrier();",
            'order.barrier = mutant("copied-data-may-come-later") ? 0 : state_.next_barrier();')),
    mutant("copied-table-may-come-later", WRITE_PATH,
           ("                        .barrier = must_write ? state_.next_barrier() : 0});",
            '                        .barrier = must_write && !mutant("copied-table-may-come-later") ? state_.next_barrier() : 0});')),
    mutant("replaced-cluster-is-free-at-once", WRITE_PATH,
           ("    if (!plan.in_same_cluster) state_.free_entry(old);",
            "    if (!plan.in_same_cluster) state_.free_entry(old);\n"
            '    if (mutant("replaced-cluster-is-free-at-once")) {\n'
            "      for (const FreedClusters& clusters : std::exchange(state_.freed, {}))\n"
            "        state_.quarantine.push_back({clusters, state_.epochs.current()});\n"
            "    }")),
    mutant("larger-refcount-table-may-come-later", ALLOCATOR,
           ("  if (error == 0) error = co_await write_back_.barrier(context);\n  if (error == 0) {\n    {",
            '  if (error == 0 && !mutant("larger-refcount-table-may-come-later"))\n'
            "    error = co_await write_back_.barrier(context);\n  if (error == 0) {\n    {")),
    mutant("bitmaps-are-given-up-later", OPEN,
           ("  if (error == 0) error = co_await write_back_.barrier(context);\n  co_return error;\n}\n\nTask<int> Qcow2Node::close",
            '  if (error == 0 && !mutant("bitmaps-are-given-up-later")) error = co_await write_back_.barrier(context);\n'
            "  co_return error;\n}\n\nTask<int> Qcow2Node::close")),
    mutant("compressed-data-may-come-later", COMPRESSED,
           ("    order.barrier = state_.next_barrier();",
            '    if (!mutant("compressed-data-may-come-later")) order.barrier = state_.next_barrier();')),
    mutant("compressed-data-is-not-counted", COMPRESSED,
           ("    const int error = co_await allocator_.raise(context, token, stream.cluster, refcount_change);",
            '    int error = 0;\n'
            '    if (!mutant("compressed-data-is-not-counted"))\n'
            "      error = co_await allocator_.raise(context, token, stream.cluster, refcount_change);")),
    mutant("compressed-count-may-come-later", COMPRESSED,
           ("    state_.set_entry(*slot, guest_offset, entry, order);",
            '    if (mutant("compressed-count-may-come-later")) order.refcount_change = 0;\n'
            "    state_.set_entry(*slot, guest_offset, entry, order);")),
)
