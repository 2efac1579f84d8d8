#!/usr/bin/python3
"""How many system calls the server makes per request, counted by strace. Prints TAP.

Counts and not times: they are the same on a slow machine. Bounds are those that docs/benchmarks.md states; a loop that
forgot to batch, or to suppress notifications, would go beyond them. The server sleeps whenever it can, as on a machine
where to look for work first does not pay.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Folder, Report, Server, run  # noqa: E402

MIB = 1 << 20
# Engine, cache, depth -> most calls per request. With one request in flight the server sleeps twice for each, until the
# kick and until the disk is done, unless it is so slow that the next thing has happened before it would sleep. A sleep
# takes three calls (arm, wait, and read what woke it), a request two (submit and interrupt). io_uring enters the kernel
# once more for a completion, a worker of the pool adds its own sleep, the read and the signal; one more each is for a
# look in vain. With many requests in flight the calls are shared.
BOUNDS = {
    ("native", "none", 1): 9, ("native", "none", 32): 1, ("native", "none", 128): 1,
    ("io_uring", "none", 1): 10, ("io_uring", "none", 32): 1, ("io_uring", "none", 128): 1,
    ("threads", "none", 1): 12, ("threads", "none", 32): 5, ("threads", "none", 128): 4,
    ("threads", "writeback", 1): 6, ("threads", "writeback", 32): 2, ("threads", "writeback", 128): 2,
}


def counted_run(options, folder, engine, cache, depth, seconds):
    """One server from start to end; returns (system calls, requests, the table of calls)."""
    image, counts = folder / "disk.img", folder / "counts"
    image.write_bytes(b"x" * MIB)
    wrapper = ["strace", "-f", "-qq", "-c", "-o", str(counts)]
    with Server(options.vblk, [image, "--aio", engine, "--cache", cache, "--poll-max-us", "0"], folder / "s", folder / "log", wrapper) as server:
        status, output = run(options.vblk, "bench", "--socket-path", server.socket, "--iodepth", depth, "--runtime", seconds,
                             "--ramp_time", 0, "--output-format", "json")
        server.stop()
    if status != 0:
        raise RuntimeError(output)
    # The last line: % time, seconds, usecs/call, calls, [errors], "total".
    calls = int(counts.read_text().splitlines()[-1].split()[3])
    return calls, json.loads(output)["jobs"][0]["read"]["total_ios"], counts.read_text()


def calls_per_request(options, folder, engine, cache, depth):
    """From a short and a long run: what starting and stopping take is in both."""
    few_calls, few_requests, _ = counted_run(options, folder, engine, cache, depth, 0.2)
    calls, requests, table = counted_run(options, folder, engine, cache, depth, 1.5)
    more = max(1, requests - few_requests)
    return (calls - few_calls) / more, more, table


def flushes_per_call(options, folder, kind, depth):
    """Of guests that write and flush in turn, on a disk whose flush takes 20 ms: strace has it take that long."""
    image, counts = folder / f"disk.{kind}", folder / "counts"
    status, output = run("qemu-img", "create", "-q", "-f", kind, "-o", "preallocation=full", image, "4M")
    if status != 0:
        raise RuntimeError(output)
    wrapper = ["strace", "-f", "-qq", "--seccomp-bpf", "-c", "-o", str(counts), "-e", "trace=fdatasync",
               "-e", "inject=fdatasync:delay_exit=20000"]
    with Server(options.vblk, [image, "--aio", "threads", "--format", kind], folder / "s", folder / "log", wrapper) as server:
        status, output = run(options.vblk, "bench", "--socket-path", server.socket, "--rw", "randwrite", "--bs", "4k", "--fsync", "1",
                             "--iodepth", depth, "--runtime", 3, "--ramp_time", 0, "--output-format", "json")
        server.stop()
    if status != 0:
        raise RuntimeError(output)
    calls = int(counts.read_text().splitlines()[-1].split()[3])
    return json.loads(output)["jobs"][0]["sync"]["total_ios"] / calls


def waits_for_flushes(report, options):
    """Alone, each flush is a call. Of four, two would share one if nobody waited for those of the last call to come back."""
    for kind in ("raw", "qcow2"):
        with Folder() as folder:
            try:
                shared = {depth: flushes_per_call(options, folder, kind, depth) for depth in (1, 4)}
            except RuntimeError as error:
                report.check(f"{kind}, flushes that take their time: runs", False, error)
                continue
            report.check(f"{kind}, flushes that take their time: those of four guests share their calls", shared[1] <= 1.05 and
                         shared[4] >= 2.7, f"flushes per call: {shared}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    options = parser.parse_args()
    options.vblk = options.vblk.resolve()
    report = Report()
    for (engine, cache, depth), bound in BOUNDS.items():
        with Folder() as folder:
            name = f"{engine}, {cache}, depth {depth}"
            try:
                per_request, requests, counts = calls_per_request(options, folder, engine, cache, depth)
            except RuntimeError as error:
                report.check(f"{name}: runs", False, error)
                continue
            print(f"# {name}: {per_request:.2f} per request, {requests} requests", flush=True)
            report.check(f"{name}: at most {bound} system calls per request, of a thousand or more",
                         requests >= 1000 and per_request <= bound, f"{per_request:.2f} for {requests} requests\n{counts}")
    waits_for_flushes(report, options)
    report.exit()


if __name__ == "__main__":
    main()
