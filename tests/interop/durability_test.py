#!/usr/bin/python3
"""What a flush and a write are to the kernel, in every engine and cache mode, as the driver was told. Prints TAP.

For each server, drivers that negotiate FLUSH and CONFIG_WCE differently write, flush and write zeroes, one request at a
time. Whether the disk was asked to make data stable while a request was under way is seen from outside:
  - system calls, by strace: fdatasync or IOCB_CMD_FDSYNC for a flush, RWF_DSYNC in a write (threads, native);
  - the file system's own tracepoints, for all engines: its sync must have begun and ended between the request's start
    and its completion. Needs root and ext4.
What must be seen follows from virtio 1.2, "Block Device", "Device Operation", and from the config space, which must say
what is done.
"""

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import ENGINES, Folder, KernelTrace, Poke, Report, Server, make_sparse  # noqa: E402

MIB = 1 << 20
FLUSH, CONFIG_WCE = 1 << 9, 1 << 11
CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")
STARTS_WRITING_THROUGH = ("writethrough", "directsync")

# What a driver refuses, and how it is called.
DRIVERS = ((0, "flush and config-wce"), (CONFIG_WCE, "flush"), (FLUSH | CONFIG_WCE, "neither"))

FLUSH_CALLS = {"threads": r"\bfdatasync\(", "native": r"IOCB_CMD_FDSYNC|\bfdatasync\("}
STABLE_WRITE_CALLS = {"threads": r"\bpwritev2\(.*RWF_DSYNC", "native": r"RWF_DSYNC, aio_lio_opcode=IOCB_CMD_PWRITEV"}
# Two clocks read one after the other, and times printed in whole microseconds. Requests are further apart.
CLOCK_SLACK_NS = 50_000
PAUSE_SECONDS = 0.001


class Syscalls:
    """What strace wrote, with times as CLOCK_MONOTONIC."""

    def __init__(self, path):
        offset = time.time_ns() - time.monotonic_ns()
        self.calls = []
        for line in path.read_text(errors="replace").splitlines():
            found = re.match(r"(?:\d+ +)?(\d+)\.(\d{6}) (.*)", line)
            if found:
                self.calls.append((int(found[1]) * 10**9 + int(found[2]) * 1000 - offset, found[3]))

    def count(self, pattern, answer):
        begin, end = answer["begin"] - CLOCK_SLACK_NS, answer["end"] + CLOCK_SLACK_NS
        return sum(1 for at, call in self.calls if begin <= at <= end and re.search(pattern, call))


class FileSystemSyncs:
    """Spans in which ext4 made one file stable, whoever asked for it and however."""

    def __init__(self, lines, inode):
        self.spans, begun = [], []
        for line in lines:
            found = re.search(rf" (\d+)\.(\d{{6}}): ext4_sync_file_(enter|exit): .*\bino {inode} ", line)
            if not found:
                continue
            at = int(found[1]) * 10**9 + int(found[2]) * 1000
            if found[3] == "enter":
                begun.append(at)
            elif begun:
                self.spans.append((begun.pop(), at))

    def count(self, answer):
        begin, end = answer["begin"] - CLOCK_SLACK_NS, answer["end"] + CLOCK_SLACK_NS
        return sum(1 for first, last in self.spans if begin <= first and last <= end)


def drive(program, socket, cache):
    """Requests of drivers of all kinds.

    Returns [(title, answer, whether a sync must be seen, kind)], false claims, and whether anything is left to flush.
    """
    requests, claims = [], []
    sector = 0
    # Whether a flush has anything to do: at first nobody knows what was written before.
    dirty = cache != "unsafe"
    for refused, name in DRIVERS:
        settings = (None,) if refused & CONFIG_WCE else (None, 0, 1)
        for writeback in settings:
            with Poke(program, socket, refused) as poke:
                title = name if writeback is None else f"{name}, writeback set to {writeback}"
                if writeback is not None:
                    poke(f"writeback {writeback}")
                config = poke("config")
                if refused & FLUSH:
                    through = True
                elif refused & CONFIG_WCE:
                    # Such a driver must expect a cache and cannot switch it off: the user's choice decides.
                    through = cache in STARTS_WRITING_THROUGH
                else:
                    through = config["writeback"] == 0
                    expected = writeback if writeback is not None else int(cache not in STARTS_WRITING_THROUGH)
                    claims.append((f"{title}: config says writeback={expected}", config["writeback"] == expected,
                                   config["text"]))
                through = through and cache != "unsafe"
                # Each write goes where nothing was written yet: the file system then cannot use FUA instead of a sync.
                script = [("write", f"write {sector} 8 170", through, "write"),
                          ("write of one sector", f"write {sector + 64} 1 170", through, "edge"),
                          ("write zeroes", f"zeroes {sector} 8 0", through, "zeroes")]
                dirty = cache != "unsafe" and (dirty or not through)
                if not refused & FLUSH:
                    script.append(("flush", "flush", dirty, "flush"))
                    script.append(("flush with nothing written since", "flush", False, "flush"))
                    dirty = False
                for what, command, must_sync, kind in script:
                    time.sleep(PAUSE_SECONDS)
                    requests.append((f"{title}: {what}", poke(command), must_sync, kind))
                sector += 128
    return requests, claims, dirty


def check_syscalls(report, engine, cache, requests, syscalls):
    for title, answer, must_sync, kind in requests:
        patterns = {"write": STABLE_WRITE_CALLS[engine], "edge": STABLE_WRITE_CALLS[engine],
                    "zeroes": f"{FLUSH_CALLS[engine]}|{STABLE_WRITE_CALLS[engine]}", "flush": FLUSH_CALLS[engine]}
        # The edge of a block goes through the page cache by a thread, whatever the engine.
        pattern = f"{patterns[kind]}|{STABLE_WRITE_CALLS['threads']}" if kind == "edge" else patterns[kind]
        seen = syscalls.count(pattern, answer)
        good = answer.get("status") == 0 and (seen > 0) == must_sync
        report.check(f"{engine}, {cache}, {title}: {'carries' if must_sync else 'carries no'} sync, by strace", good,
                     f"{answer['text']}, {seen} calls that match {pattern}")


def check_file_system(report, engine, cache, requests, syncs):
    for title, answer, must_sync, _ in requests:
        seen = syncs.count(answer)
        good = answer.get("status") == 0 and (seen > 0) == must_sync
        what = "synced before completion" if must_sync else "not synced"
        report.check(f"{engine}, {cache}, {title}: {what}, by the file system", good, f"{answer['text']}, {seen} syncs")


def test_engine_and_cache(report, options, engine, cache):
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, 4 * MIB)
        trace = folder / "strace"
        wrapper = ["strace", "-f", "-qq", "-ttt", "-o", str(trace), "-e", "trace=pwritev2,pwrite64,fdatasync,fsync,io_submit"]
        # strace sees nothing of what io_uring is given in shared memory.
        wrapper = [] if engine == "io_uring" else wrapper
        with KernelTrace(folder, "ext4/ext4_sync_file_enter", "ext4/ext4_sync_file_exit") as kernel:
            arguments = [image, "--aio", engine, "--cache", cache]
            with Server(options.vblk, arguments, folder / "s", folder / "log", wrapper) as server:
                requests, claims, dirty = drive(options.poke, server.socket, cache)
                time.sleep(PAUSE_SECONDS)
                begin = time.monotonic_ns()
                status = server.stop()
                stop = {"status": status, "begin": begin, "end": time.monotonic_ns(), "text": f"status {status}"}
                requests.append(("SIGTERM", stop, dirty, "flush"))
        for title, good, detail in claims:
            report.check(f"{engine}, {cache}, {title}", good, detail)
        if wrapper:
            check_syscalls(report, engine, cache, requests, Syscalls(trace))
        title = f"{engine}, {cache}: requests against the file system's syncs"
        syncs = FileSystemSyncs(kernel.lines(), image.stat().st_ino)
        if kernel.refusal:
            report.skip(title, kernel.refusal)
        elif not kernel.lines() and cache != "unsafe":
            report.skip(title, f"{folder} does not lie on ext4")
        else:
            check_file_system(report, engine, cache, requests, syncs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    parser.add_argument("--poke", required=True, type=Path, help="the driver for scripts")
    options = parser.parse_args()
    options.vblk, options.poke = options.vblk.resolve(), options.poke.resolve()
    report = Report()
    for engine in ENGINES:
        for cache in CACHE_MODES:
            try:
                test_engine_and_cache(report, options, engine, cache)
            except RuntimeError as error:
                report.check(f"{engine}, {cache}: runs", False, error)
    report.exit()


if __name__ == "__main__":
    main()
