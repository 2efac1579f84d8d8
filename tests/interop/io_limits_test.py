#!/usr/bin/python3
"""A device's I/O limits as a user meets them: exact, fair, changed under way, and no obstacle to anything. Prints TAP.

Rates are counted on the server's side, between two looks at `vblk ctl query-status`, while `vblk bench` keeps both of a
device's queues full, each on an I/O thread of its own.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import ENGINES, Folder, Poke, Script, Server, make_sparse, refused, run, run_tests  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
SECONDS = 5
TOLERANCE = 0.02
SETTLE_SECONDS = 0.5
# Two queues that are served in turn differ by a request or two, and by what a look at them is late.
UNFAIR = 0.08  # of all: a queue whose thread gets no processor for a while loses some turns
QUEUES = ["--queues", 2, "--iothreads", 2]


def ctl(options, folder, *words):
    status, output = run(options.vblk, "ctl", folder / "m", *words)
    if status != 0:
        raise RuntimeError(f"vblk ctl {words}: {output}")
    return json.loads(output)


def serve(options, folder, *arguments, image=None):
    disk = [image] if image else ["--format", "null", "--size", "1G"]
    return Server(options.vblk, [*disk, *QUEUES, "--monitor", folder / "m", *arguments], folder / "s", folder / "log")


class Load:
    """`vblk bench` on both queues while a `with` block runs."""

    def __init__(self, options, folder, rw, block_size, depth=16):
        self.command = [options.vblk, "bench", "--socket-path", folder / "s", "--numjobs", 2, "--rw", rw, "--bs", block_size,
                        "--iodepth", depth, "--runtime", 120, "--ramp_time", 0, "--eta", "never"]

    def __enter__(self):
        self.process = subprocess.Popen(list(map(str, self.command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        time.sleep(SETTLE_SECONDS)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def completed(options, folder):
    """(time, requests completed by each queue)."""
    before = time.monotonic()
    queues = ctl(options, folder, "query-status")["queues"]
    middle = (before + time.monotonic()) / 2
    return middle, [queue["requests"] - queue["in-flight"] for queue in queues]


def rates(options, folder, seconds=SECONDS):
    """Requests per second of each queue, over so many seconds."""
    begin, before = completed(options, folder)
    time.sleep(seconds)
    end, after = completed(options, folder)
    return [(late - early) / (end - begin) for early, late in zip(before, after)]


def check_rate(report, name, measure, expected):
    """`measure` tells the rates of the queues. A machine that is busy with other things may be too slow, three times of four."""
    for _ in range(4):
        found = measure()
        total = sum(found)
        if total > expected * (1 - TOLERANCE):
            break
    report.check(f"{name}: {expected:g} requests per second within 2 % over {SECONDS} s",
                 abs(total / expected - 1) <= TOLERANCE, f"{total:.1f}: {found}")
    report.check(f"{name}: both queues are served equally", abs(found[0] - found[1]) <= UNFAIR * total, found)


def test_rates(report, options):
    cases = [
        ("iops-total=200", "randrw", "4k", 200),
        ("iops-total=5000", "randread", "4k", 5000),
        ("iops-total=40000", "randread", "4k", 40000),
        ("bps-write=20M", "randwrite", "64k", 320),
        ("iops-read=100,iops-write=700", "randwrite", "4k", 700),
        ("iops-total=1000,iops-size=8k", "randread", "16k", 500),
        ("bps-total=8M,iops-total=1500", "randrw", "4k", 1500),
    ]
    for limits, rw, block_size, expected in cases:
        with Folder() as folder, serve(options, folder, "--limits", limits), Load(options, folder, rw, block_size):
            check_rate(report, f"{limits}, {rw} of {block_size}", lambda: rates(options, folder), expected)


def test_bench_agrees(report, options):
    """What the guest's side sees is the same."""
    with Folder() as folder, serve(options, folder, "--limits", "iops-total=3000"):
        status, text = run(options.vblk, "bench", "--socket-path", folder / "s", "--numjobs", 2, "--iodepth", 8, "--runtime", 5,
                           "--output-format", "json", "--eta", "never")
        found = json.loads(text)["jobs"][0]["read"]["iops"] if status == 0 else text
        report.check("iops-total=3000: vblk bench measures 3000 within 2 % over 5 s",
                     status == 0 and abs(found / 3000 - 1) <= TOLERANCE, found)


def test_real_disk(report, options, engine):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 64 * MIB)
        with serve(options, folder, "--aio", engine, "--limits", "iops-total=400", image=folder / "disk.img"), \
                Load(options, folder, "randwrite", "4k"):
            check_rate(report, f"iops-total=400 on a file by {engine}", lambda: rates(options, folder), 400)


def test_burst(report, options):
    limits = "iops-total=200,iops-total-max=2000,iops-total-max-length=3"
    with Folder() as folder, serve(options, folder, "--limits", limits):
        with Load(options, folder, "randread", "4k"):
            # The load has settled by now, in the burst's first second.
            burst = sum(rates(options, folder, 2))
            time.sleep(1.5)
            after = sum(rates(options, folder, 3))
    report.check("a burst has its own rate", abs(burst / 2000 - 1) <= TOLERANCE, burst)
    report.check("and ends after its time", abs(after / 200 - 1) <= 2 * TOLERANCE, after)


def test_changes(report, options):
    with Folder() as folder, serve(options, folder, "--limits", "iops-total=1"):
        status = ctl(options, folder, "query-status")
        report.check("query-status tells the limits", status["limits"] == "iops-total=1", status)
        with Load(options, folder, "randread", "4k"):
            waiting = sum(queue["waiting"] for queue in ctl(options, folder, "query-status")["queues"])
            report.check("query-status tells how many requests wait", waiting > 20, waiting)
            answer = ctl(options, folder, "set-limits", "iops-total=2000")
            report.check("set-limits tells what is and what was",
                         answer == {"limits": "iops-total=2000", "before": "iops-total=1"}, answer)
            check_rate(report, "a limit that is raised while requests wait", lambda: rates(options, folder), 2000)
            ctl(options, folder, "set-limits", "iops-total=500,bps-read=1M")
            check_rate(report, "limits that are lowered and added", lambda: rates(options, folder), 256)
            ctl(options, folder, "set-limits", "none")
            free = sum(rates(options, folder, 1))
            report.check("no limit is no limit", free > 5000, free)
            report.check("and query-status says so", ctl(options, folder, "query-status")["limits"] == "none")


def test_end_while_waiting(report, options):
    """Nobody waits for anybody's turn when the server or the driver ends."""
    for name, ends in (("SIGTERM", lambda server, poke: server.stop()), ("the driver's end", lambda server, poke: None)):
        with Folder() as folder:
            make_sparse(folder / "disk.img", 64 * MIB)
            with serve(options, folder, "--limits", "iops-total=2", image=folder / "disk.img") as server, \
                    Poke(options.poke, server.socket) as poke:
                poke.start(f"storm 32 {folder / 'acknowledged'}")
                time.sleep(SETTLE_SECONDS)
                begin = time.monotonic()
                if ends(server, poke) is None:
                    poke.process.kill()
                    poke.process.wait()
                    with Poke(options.poke, server.socket) as other:
                        report.check(f"{name} while requests wait: the next driver is served", "capacity" in other("config"))
                took = time.monotonic() - begin
                report.check(f"{name} while requests wait takes no longer than without limits", took < 3, took)
                status = server.stop() if server.process.poll() is None else server.process.returncode
                report.check(f"{name} while requests wait: the server ends with 0", status == 0, server.log.read_text())


def restart(start):
    """The next server, as a service manager starts it: again while the killed one's last requests hold the image's lock."""
    for _ in range(10):
        try:
            return start()
        except RuntimeError as error:
            if "in use by another process" not in str(error):
                raise
    return start()


def test_kills_and_changes(report, options, engine):
    """Killed, restarted, set to other engines and other limits while requests wait: each is answered once."""
    with Folder() as folder, Script(options.churn) as churn:
        image = folder / "disk.img"
        make_sparse(image, 24 * MIB)
        start = lambda: Server(options.vblk, [image, "--queues", 4, "--iothreads", 2, "--monitor", folder / "m",  # noqa: E731
                                              "--limits", "iops-total=800", "--aio", engine], folder / "s", folder / "log")
        server, kills, recovered, changes = start(), 0, 0, 0
        try:
            churn(f"connect {folder / 's'} 4 keep")
            seed = options.random.getrandbits(32)
            churn.start(f"run {seed} 10000000 8 65536 wwwwwrrrddzuuf 4")
            while not churn.has_answer(options.random.uniform(0.01, 0.2)):
                if options.random.random() < 0.5:
                    server.kill()
                    kills += 1
                    server = restart(start)
                    continue
                changes += 1
                ctl(options, folder, "set-aio", options.random.choice(ENGINES))
                ctl(options, folder, "set-limits", f"iops-total={options.random.choice((50, 400, 3000))}")
                recovered += sum(queue["recovered"] for queue in ctl(options, folder, "query-status")["queues"])
            answer = churn.answer()
            good = all(answer.get(word, 0) == 0 for word in ("failed", "bad", "lost"))
            report.check(f"{engine}, killed and changed at a limit: every request is answered once, as the model has it",
                         good and 0 < answer["done"] == answer["started"], f"seed {seed}\n{answer['text']}")
            report.check(f"{engine}, killed and changed at a limit: it was", kills > 2 and changes > 2 and recovered > 0,
                         f"{kills} kills, {changes} changes, {recovered} recovered")
            ctl(options, folder, "set-limits", "none")
            verified = churn("verify")
            report.check(f"{engine}, killed and changed at a limit: the disk is as the model has it",
                         verified.get("bad", 0) == 0 and "error" not in verified["text"], verified["text"])
            churn("disconnect")
        finally:
            server.kill()


def test_refusals(report, options):
    with Folder() as folder:
        at = ["--format", "null", "--size", "1M", "--socket-path", folder / "s"]
        for text, names in (("iops=5", "iops-total"), ("iops-total=x", "whole number"), ("bps-read=1Q", "10M"),
                            ("iops-total-max=5", "not given"), ("iops-total=5,iops-total-max=4", "less than"),
                            ("iops-total=5,iops-total-max-length=2", "not given"), ("", "NAME=VALUE")):
            refused(report, options.vblk, f"--limits '{text}'", folder, [*at, f"--limits={text}"] if text else
                    [*at, "--limits", ","], names)
        with serve(options, folder, "--limits", "iops-read=7") as server:
            status, output = run(options.vblk, "ctl", folder / "m", "set-limits", "iops-read-max=3")
            report.check("set-limits that make no sense are refused in one line", status == 1 and "less than" in output and
                         len(output.strip().splitlines()) == 1, output)
            left = ctl(options, folder, "query-status")["limits"]
            report.check("and change nothing", left == "iops-read=7", left)
            server.stop()


if __name__ == "__main__":
    run_tests(__doc__, ("poke", "churn"), [
        (test_refusals,), (test_rates,), (test_bench_agrees,), (test_burst,), (test_changes,), (test_end_while_waiting,),
        *((test, engine) for engine in ENGINES for test in (test_real_disk, test_kills_and_changes))])
