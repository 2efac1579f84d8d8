#!/usr/bin/python3
"""Writes the fuzzer's seed corpus: inputs in the form that tests/fuzz/hostile_image.h describes."""

import itertools
import random
import struct
import sys
from pathlib import Path

CLUSTER = 512
SPEC_FLAGS = {"version 2": 1, "extended": 2, "lazy": 4, "snapshot": 8, "backing": 16, "compressed": 32}


def requests(source):
    """A guest's day: some of every kind of request, with lengths and flags of all kinds."""
    return b"".join(struct.pack("<BBHB", source.randrange(256), source.randrange(256), source.randrange(65536),
                                source.randrange(256)) for _ in range(12))


def patched(source, cluster_index, flags, order, patches):
    version_2 = flags & SPEC_FLAGS["version 2"]
    spec = bytes([0, cluster_index, flags]) + (b"" if version_2 else bytes([order]))
    spec += bytes([source.randrange(16), source.choice([0, 50, 100])])
    return spec + bytes([len(patches)]) + b"".join(patches) + bytes([source.randrange(64)]) + requests(source)


def patch(region, index, value):
    """`value`: the kind of the value, and what it takes (Patcher::value)."""
    return struct.pack("<BH", region, index) + value


def literal(number):
    return struct.pack("<BQ", 0, number)


def one_patch_each():
    # Header fields, in the order of kHeaderFields, at their edges.
    for field, number in itertools.product(range(18), (0, 1, 3, 0x15, 0x200, 1 << 31, (1 << 32) - 1, 1 << 61, (1 << 64) - 1)):
        yield patch(0, field, literal(number))
    # Table entries: pointers to tables, compressed clusters, flags.
    for region, kind in itertools.product(range(3, 9), range(1, 8)):
        yield patch(region, 0, bytes([kind, 4, 1, 0, 0, 0]))


def minimal_image(version, clusters):
    """A header, a refcount table and block, an L1 and an L2 table, and data: one cluster each."""
    header = struct.pack(">IIQIIQIIQQIIQ", 0x514649fb, version, 0, 0, 9, clusters * CLUSTER, 0, 1, 3 * CLUSTER, CLUSTER, 1,
                         0, 0)
    if version == 3:
        header += struct.pack(">QQQII", 0, 0, 0, 4, 104)
    tables = [header, struct.pack(">Q", 2 * CLUSTER), struct.pack(">6H", 1, 1, 1, 1, 1, 1),
              struct.pack(">Q", 4 * CLUSTER | 1 << 63), struct.pack(">Q", 5 * CLUSTER | 1 << 63), b"data"]
    return b"".join(table.ljust(CLUSTER, b"\0") for table in tables)


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(1)
    seeds = []
    for cluster_index, flags in itertools.product(range(1, 6), (0, 1, 2, 4, 8, 9, 16, 32, 34, 42, 56)):
        seeds.append(patched(source, cluster_index, flags, source.randrange(7), []))
    for one in one_patch_each():
        seeds.append(patched(source, source.randrange(1, 4), source.choice([0, 8, 16, 40]), source.randrange(7), [one]))
    for version, clusters in itertools.product((2, 3), (1, 64)):
        image = minimal_image(version, clusters)
        seeds.append(bytes([1]) + struct.pack("<H", len(image)) + image + bytes([0]) + requests(source))
    for number, seed in enumerate(seeds):
        (folder / f"seed-{number:03}").write_bytes(seed)
    print(f"{len(seeds)} seeds in {folder}")


if __name__ == "__main__":
    main()
