#!/usr/bin/python3
"""What a large qcow2 disk costs in memory: 64 GiB, every cluster mapped, read all over. Prints TAP.

The disk's tables are real (qemu-img's preallocation), its data is a hole. What counts is the server's anonymous memory
beyond that of a raw disk of the same size: the caches, what keeps them in order, and the tables that are always in
memory. The budget is what docs/man/vblk.1 says of --l2-cache-size, and a part of it for the rest.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Folder, Poke, Report, Server, make_sparse, run  # noqa: E402

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DISK_BYTES = 64 * GIB
SLICE_BYTES = 4 * KIB
L2_CACHE_BYTES_MAX = 32 * MIB  # "what the tables of the whole disk need, at most 32M"
# Slots, the L1 table, the filter over metadata, coroutine frames, the allocator's own: a quarter of the cache, and this.
OTHER_BYTES_MAX = 4 * MIB


def anonymous_bytes(server):
    text = Path(f"/proc/{server.pid()}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) * KIB


def read_all_over(options, server, cluster_bytes, report, name):
    """Reads in no order, a dozen for each slice of the L2 tables: every piece of the mapping is needed, but for one in 100,000."""
    slices = DISK_BYTES // (SLICE_BYTES // 8 * cluster_bytes)
    status, output = run(options.vblk, "bench", "--socket-path", server.socket, "--rw", "randread", "--bs", 4 * KIB, "--iodepth", 32,
                         "--io_size", 12 * slices * 4 * KIB)
    report.check(f"{name}: reads all over the disk succeed", status == 0, output)
    return slices


def test_disk(report, options, folder, cluster_bytes, arguments, cache_bytes, raw_bytes):
    image = folder / f"disk-{cluster_bytes}.qcow2"
    name = f"64 GiB in clusters of {cluster_bytes // KIB} KiB{' with ' + ' '.join(arguments) if arguments else ''}"
    if not image.exists():
        status, output = run("qemu-img", "create", "-q", "-f", "qcow2", "-o",
                             f"preallocation=metadata,cluster_size={cluster_bytes}", image, DISK_BYTES)
        if status != 0:
            report.check(f"{name}: qemu-img makes it", False, output)
            return
    with Server(options.vblk, [image, *arguments], folder / "s", folder / "log") as server:
        slices = read_all_over(options, server, cluster_bytes, report, name)
        used = anonymous_bytes(server) - raw_bytes
    budget = cache_bytes * 5 // 4 + OTHER_BYTES_MAX
    report.check(f"{name}: {budget // KIB} KiB at most beyond a raw disk", used <= budget, f"{used // KIB} KiB")
    # A cache that is not used would pass, too.
    expected = min(slices * SLICE_BYTES, cache_bytes) // 2
    report.check(f"{name}: the cache is filled", used >= expected, f"{used // KIB} KiB, not {expected // KIB} KiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, help="the program under test")
    parser.add_argument("--poke", required=True, help="the driver for scripts, built from tests/interop/poke.cpp")
    options = parser.parse_args()
    report = Report()
    with Folder() as folder:
        make_sparse(folder / "disk.raw", DISK_BYTES)
        with Server(options.vblk, [folder / "disk.raw"], folder / "s", folder / "log") as server:
            with Poke(options.poke, server.socket) as poke:
                poke("read 0 1")
                raw_bytes = anonymous_bytes(server)
        whole = DISK_BYTES // (64 * KIB) * 8
        test_disk(report, options, folder, 64 * KIB, [], whole, raw_bytes)
        test_disk(report, options, folder, 64 * KIB, ["--l2-cache-size", "1M"], MIB, raw_bytes)
        test_disk(report, options, folder, 8 * KIB, [], L2_CACHE_BYTES_MAX, raw_bytes)
    report.exit()


if __name__ == "__main__":
    main()
