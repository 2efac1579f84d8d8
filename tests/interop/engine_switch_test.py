#!/usr/bin/python3
"""The engines of a running server changed under load, by its monitor, and what is said to bad input. Prints TAP.

A driver keeps four queues busy with writes, reads that must find them, and flushes, and notes when each request
completed. Meanwhile the engines are changed a thousand times, for all kinds of operation and for one; among the changes
are questions (query-aio), which change nothing. How long a queue saw no completion around a change is compared with how
long around a question: both disturb the machine alike, so what a change holds up is what it has more.
"""

import argparse
import array
import bisect
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Folder, Poke, Report, Server, make_sparse, run, wait_until  # noqa: E402

MIB = 1 << 20
QUEUES, IO_THREADS, DEPTH = 4, 2, 4
CHANGES = 1000
# After the answer, for as long a request that the change had held up would still be on its way.
TAIL_NS = 5_000_000
# A change may hold up a queue for no more than this many times what a question does, at p99: io_destroy(2) alone on an
# I/O thread, 30 to 40 ms, is far beyond.
PAUSE_RATIO_MAX = 3.0
STOP_SECONDS = 0.3

SELECTIONS = ("native", "io_uring", "threads", "read=native", "write=io_uring", "flush=native", "read=threads,write=native",
              "discard=io_uring", "auto", "read=io_uring", "write=auto", "flush=threads")


def ctl(vblk, monitor, *words):
    return run(vblk, "ctl", monitor, *words)


class Monitor:
    """A connection that stays: to start a program for each command would hold up the driver for longer than the command."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.answers = self.socket.makefile()

    def __call__(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        return json.loads(self.answers.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.answers.close()
        self.socket.close()


def query(vblk, monitor):
    status, output = ctl(vblk, monitor, "query-aio")
    assert status == 0, output
    return json.loads(output)["iothreads"]


def requests_of(thread, engine, kind):
    return sum(entry["requests-by-kind"][kind] for entry in thread["engines"] if entry["engine"] == engine)


class Completions:
    """When requests completed on each queue."""

    def __init__(self, path):
        values = array.array("Q")
        values.frombytes(path.read_bytes())
        self.of_queue = [[] for _ in range(QUEUES)]
        for value in values:
            self.of_queue[value % 64].append(value // 64)
        for times in self.of_queue:
            times.sort()

    def longest_gap_ns(self, begin, end):
        """The longest time without a completion on any queue that overlaps [begin, end]; 0 outside of the run."""
        longest = 0
        for times in self.of_queue:
            first, last = bisect.bisect_left(times, begin), bisect.bisect_right(times, end)
            if first == 0 or last == len(times):
                return 0
            around = times[first - 1:last + 1]
            longest = max(longest, max(later - earlier for earlier, later in zip(around, around[1:])))
        return longest


def percentile(values, fraction):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))]


def test_under_load(report, options, folder, format_name, seed):
    chance = random.Random(seed)
    image, monitor, times_file, stop = (folder / name for name in ("disk", "m", "times", "stop"))
    if format_name == "raw":
        make_sparse(image, 64 * MIB)
    else:
        status, output = run("qemu-img", "create", "-q", "-f", "qcow2", image, str(64 * MIB))
        assert status == 0, output
    arguments = [image, "--format", format_name, "--queues", QUEUES, "--iothreads", IO_THREADS, "--monitor", monitor]
    with Server(options.vblk, arguments, folder / "s", folder / "log") as server:
        with Poke(options.poke, folder / "s", queues=QUEUES) as poke:
            poke.start(f"pulse {DEPTH} {times_file} {stop}")
            time.sleep(0.5)
            spans = {"change": [], "question": []}
            refused, held_up_us = [], []
            with Monitor(monitor) as command:
                for _ in range(CHANGES):
                    for kind in chance.sample(list(spans), 2):
                        selection = chance.choice(SELECTIONS)
                        begin = time.monotonic_ns()
                        answer = command("set-aio", aio=selection) if kind == "change" else command("query-aio")
                        spans[kind].append((begin, time.monotonic_ns() + TAIL_NS))
                        if "return" not in answer:
                            refused.append(f"{selection}: {answer}")
                        elif kind == "change":
                            held_up_us += answer["return"]["held-up-us"]
                        time.sleep(TAIL_NS / 1e9)  # the next one's time is its own
            # A pause that there is, so that it is known to be seen.
            stopped = time.monotonic_ns()
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(STOP_SECONDS)
            server.process.send_signal(signal.SIGCONT)
            time.sleep(0.5)
            stop.touch()
            answer = poke.answer()
        if server.process.poll() is not None:
            report.check(f"{format_name}: the server lives on", False, server.log.read_text()[-2000:])
            return
        threads = query(options.vblk, monitor)
        status = server.stop()
    report.check(f"{format_name}: {CHANGES} changes under load are carried out", not refused, "\n".join(refused[:5]))
    report.check(f"{format_name}: no request fails, is lost or reads anything but what was written",
                 answer["failed"] == answer["wrong"] == answer["unanswered"] == 0 and answer["completed"] > 1000,
                 answer["text"])
    in_flight = [entry["in-flight"] for thread in threads for entry in thread["engines"]]
    report.check(f"{format_name}: nothing is in flight on any engine afterwards, nor is any left over",
                 not any(in_flight) and all(len(thread["engines"]) <= 3 for thread in threads), threads)
    completions = Completions(times_file)
    seen = completions.longest_gap_ns(stopped, stopped + TAIL_NS)
    report.check(f"{format_name}: a server stopped for {STOP_SECONDS} s is seen as one", seen > STOP_SECONDS * 0.8e9,
                 f"{seen} ns")
    gaps = {kind: [gap for gap in (completions.longest_gap_ns(*span) for span in spans[kind]) if gap > 0]
            for kind in spans}
    p99 = {kind: percentile(gaps[kind], 0.99) for kind in gaps}
    detail = ", ".join(f"{kind}: median {percentile(gaps[kind], 0.5) / 1e6:.2f} ms, p99 {p99[kind] / 1e6:.2f} ms"
                       for kind in gaps)
    print(f"# {format_name}: longest time without a completion on a queue around a {detail}", flush=True)
    print(f"# {format_name}: an I/O thread was held up by a change: median {percentile(held_up_us, 0.5):.0f} us, "
          f"p99 {percentile(held_up_us, 0.99):.0f} us", flush=True)
    report.check(f"{format_name}: at p99 a change holds a queue up no more than {PAUSE_RATIO_MAX} times as long as a "
                 "question does", p99["change"] <= PAUSE_RATIO_MAX * p99["question"], detail)
    report.check(f"{format_name}: server ends with status 0", status == 0, (folder / "log").read_text()[-2000:])
    if format_name == "qcow2":
        status, output = run("qemu-img", "check", image)
        report.check("qcow2: qemu-img check finds nothing", status == 0, output)


def test_one_kind(report, options, folder):
    """What each kind of operation is carried out by, counted by the engines."""
    image, monitor = folder / "disk", folder / "m"
    make_sparse(image, 16 * MIB)
    with Server(options.vblk, [image, "--monitor", monitor], folder / "s", folder / "log") as server:
        with Poke(options.poke, folder / "s") as poke:
            status, output = ctl(options.vblk, monitor, "set-aio", "read=native")
            report.check("set-aio read=native is carried out", status == 0, output)
            report.check("its answer tells the choice and the one before",
                         json.loads(output)["before"] == "threads" and json.loads(output)["aio"].startswith("read=native,"),
                         output)
            for _ in range(5):
                poke("write 0 8 1")
                poke("read 0 8")
                poke("flush")
            thread = query(options.vblk, monitor)[0]
            counts = {(engine, kind): requests_of(thread, engine, kind)
                      for engine in ("threads", "native") for kind in ("read", "write", "flush")}
            report.check("it changes reads alone", counts[("native", "read")] == 5 and counts[("threads", "write")] == 5
                         and counts[("threads", "flush")] >= 5 and counts[("threads", "read")] == 0, counts)
            report.check("query-aio tells the choice", thread["aio"].startswith("read=native,write=threads,"), thread)
            status, output = ctl(options.vblk, monitor, "set-aio", "auto")
            thread = query(options.vblk, monitor)[0]
            report.check("set-aio auto is carried out and told", status == 0 and thread["aio"] == "auto"
                         and {route["requested"] for route in thread["routes"]} == {"auto"}, (output, thread))
            ctl(options.vblk, monitor, "set-aio", "threads")

            def engines():
                return [entry["engine"] for entry in query(options.vblk, monitor)[0]["engines"]]

            # Each leaves with the next cycle of its loop.
            report.check("engines that serve nothing any more are gone",
                         wait_until(lambda: engines() == ["threads"]), engines())
            log = server.log.read_text()
            report.check("each change is logged", len(re.findall("engines changed from", log)) == 3, log)


def test_auto(report, options, folder):
    """Auto tries all engines under a load, settles, and says on what and why: in the log and when asked."""
    image, monitor = folder / "disk", folder / "m"
    make_sparse(image, 64 * MIB)
    with Server(options.vblk, [image, "--aio", "auto", "--monitor", monitor], folder / "s", folder / "log") as server:
        route = query(options.vblk, monitor)[0]["routes"][0]
        report.check("auto starts with the default, and says that it has seen no load",
                     route["engine"] == "threads" and "no load" in route["reason"], route)
        load = subprocess.Popen([options.vblk, "bench", "--socket-path", folder / "s", "--rw", "randread", "--iodepth", "4",
                                 "--runtime", "60", "--eta", "never"], stdout=subprocess.DEVNULL)
        try:
            settled = wait_until(lambda: query(options.vblk, monitor)[0]["auto"], 60)
            thread = query(options.vblk, monitor)[0]
        finally:
            load.terminate()
            load.wait()
        learned = thread["auto"]
        report.check("under load it settles within a minute, even on a busy machine", settled, thread)
        report.check("query-aio tells the class of the load, the engine, why, and what each engine cost",
                     len(learned) == 1 and re.match(r"read up to 16K, a few in flight: (threads|native|io_uring): .* us", learned[0])
                     and all(name in learned[0] for name in ("threads", "native", "io_uring")), learned)
        report.check("every engine was tried", all(requests_of(thread, name, "read") > 0
                                                   for name in ("threads", "native", "io_uring")), thread)
        log = server.log.read_text()
        report.check("the log tells the same", bool(learned) and learned[0] in log, log)


def test_bad_input(report, options, folder):
    image, monitor = folder / "disk", folder / "m"
    make_sparse(image, 16 * MIB)

    def check(name, words, status_wanted, pattern):
        status, output = ctl(options.vblk, *words)
        lines = output.strip().splitlines()
        report.check(f"{name}: status {status_wanted} and one clear line",
                     status == status_wanted and len(lines) == 1 and re.search(pattern, lines[0]), (status, output))

    with Server(options.vblk, [image, "--monitor", monitor], folder / "s", folder / "log") as server:
        check("unknown engine", (monitor, "set-aio", "aio"), 1, r"unknown engine 'aio'; there are threads, native, io_uring and auto")
        check("unknown engine of a kind", (monitor, "set-aio", "read=aio"), 1, r"unknown engine 'aio'")
        check("unknown kind", (monitor, "set-aio", "sync=native"), 1, r"unknown kind of operation 'sync'; there are read,")
        check("a kind named twice", (monitor, "set-aio", "read=native,read=threads"), 1, r"'read' is named twice")
        check("no engine", (monitor, "set-aio"), 2, r"name an engine")
        check("a word too many", (monitor, "query-aio", "native"), 2, r"query-aio takes no word such as 'native'")
        check("two words too many", (monitor, "set-aio", "native", "threads"), 2, r"more words than the command takes")
        check("no such socket", (folder / "none", "set-aio", "native"), 1, r"cannot connect to the monitor")
        thread = query(options.vblk, monitor)[0]
        report.check("none of that has changed anything", thread["aio"] == "threads", thread)
        server.kill()
        check("a server that is gone", (monitor, "set-aio", "native"), 1, r"does that still run")


def test_no_more_engines(report, options, folder):
    """A limit that keeps a new engine from being made: one line, and everything is as it was."""
    image, monitor = folder / "disk", folder / "m"
    make_sparse(image, 16 * MIB)
    with Server(options.vblk, [image, "--monitor", monitor], folder / "s", folder / "log") as server:
        with Poke(options.poke, folder / "s") as poke:
            used = len(list(Path(f"/proc/{server.pid()}/fd").iterdir()))
            # The connection to the monitor takes the last descriptor.
            subprocess.run(["prlimit", f"--nofile={used + 1}:", "--pid", str(server.pid())], check=True)
            status, output = ctl(options.vblk, monitor, "set-aio", "io_uring")
            report.check("an engine that cannot be made is told in one line", status == 1
                         and len(output.strip().splitlines()) == 1 and "nothing is changed" in output, output)
            subprocess.run(["prlimit", "--nofile=1024:", "--pid", str(server.pid())], check=True)
            thread = query(options.vblk, monitor)[0]
            report.check("and the engines are as they were", thread["aio"] == "threads", thread)
            report.check("and requests go on", poke("write 0 8 1")["status"] == 0)
            status, output = ctl(options.vblk, monitor, "set-aio", "io_uring")
            report.check("and once it can be made, it is", status == 0, output)
            report.check("and does requests", poke("write 0 8 1")["status"] == 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, help="the program under test")
    parser.add_argument("--poke", required=True, help="the driver: tests/interop/poke")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    print(f"# --seed {options.seed}", flush=True)
    report = Report()
    for format_name in ("raw", "qcow2"):
        with Folder() as folder:
            test_under_load(report, options, folder, format_name, options.seed)
    for test in (test_one_kind, test_auto, test_bad_input, test_no_more_engines):
        with Folder() as folder:
            test(report, options, folder)
    report.exit()


if __name__ == "__main__":
    main()
