#!/usr/bin/python3
"""Interrupts that are held back, as an operator meets them: fewer for more in flight, told by ctl. Prints TAP.

With --table the numbers of docs/operation.md instead.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Folder, Report, Server, refused, run  # noqa: E402

MIB = 1 << 20
DEPTHS = (1, 8, 32)


def counters(options, folder):
    """Of the one queue while its ring runs: they begin anew with it."""
    status, output = run(options.vblk, "ctl", folder / "m", "query-status")
    if status != 0:
        raise RuntimeError(output)
    return json.loads(output)["queues"][0]


def measure(options, folder, depth, *arguments):
    """Interrupts and IOPS of random reads from the disk itself, and the driver's latencies in microseconds."""
    image = folder / "disk.raw"
    if not image.exists():
        image.write_bytes(b"data" * (16 * MIB))
    seconds = options.seconds
    with Server(options.vblk, [image, "--cache", "none", "--aio", options.engine, "--monitor", folder / "m", *arguments],
                folder / "s", folder / "log"):
        bench = subprocess.Popen(
            list(map(str, [options.vblk, "bench", "--socket-path", folder / "s", "--iodepth", depth, "--runtime", seconds,
                           "--output-format", "json", "--eta", "never"])),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        time.sleep(0.5 + 0.25 * seconds)
        before = counters(options, folder)
        time.sleep(0.5 * seconds)
        after = counters(options, folder)
        read = json.loads(bench.communicate(timeout=seconds + 60)[0])["jobs"][0]["read"]
    requests = after["requests"] - before["requests"]
    percentiles = read["clat_ns"]["percentile"]
    return {"requests": requests,
            "interrupts": (after["interrupts"] - before["interrupts"]) / max(1, requests),
            "merged": after["interrupts-merged"] - before["interrupts-merged"],
            "iops": read["iops"],
            "p50": percentiles["50.000000"] / 1000, "p99": percentiles["99.000000"] / 1000}


def table(options, folder):
    print("| depth | `--interrupt-max-us` | interrupts per request | IOPS | p50 us | p99 us |")
    print("|--:|--:|--:|--:|--:|--:|")
    for depth in DEPTHS:
        for hold in (0, 20, 50, 100, 200):
            got = measure(options, folder, depth, "--interrupt-max-us", hold)
            print(f"| {depth} | {hold} | {got['interrupts']:.3f} | {got['iops']:,.0f} | {got['p50']:.0f} | {got['p99']:.0f} |",
                  flush=True)


def check(options, folder, report):
    for depth in DEPTHS:
        off = measure(options, folder, depth)
        held = measure(options, folder, depth, "--interrupt-max-us", 1000)
        told = f"without: {off}\nheld: {held}"
        report.check(f"depth {depth}: requests are served with and without", min(off["requests"], held["requests"]) > 100, told)
        report.check(f"depth {depth}: nothing is merged where nothing is held", off["merged"] == 0, told)
        # Whoever has one request in flight waits for nothing else.
        report.check(f"depth {depth}: at most one interrupt for each request", held["interrupts"] <= 1.01, told)
        if depth >= 8:
            report.check(f"depth {depth}: one for several answers", held["interrupts"] <= 0.25, told)
        print(f"# depth {depth}: {off['interrupts']:.3f} interrupts per request, {held['interrupts']:.3f} with 1000 us")
    at = ["--socket-path", folder / "other"]
    image = folder / "disk.raw"
    refused(report, options.vblk, "a time that is too long", folder, [image, *at, "--interrupt-max-us", "10001"],
            "--interrupt-max-us 10001")
    refused(report, options.vblk, "a time that is no number", folder, [image, *at, "--interrupt-max-us", "soon"],
            "--interrupt-max-us soon")
    refused(report, options.vblk, "a batch without a time", folder, [image, *at, "--interrupt-max-batch", "8"],
            "--interrupt-max-batch")
    refused(report, options.vblk, "a batch of none", folder,
            [image, *at, "--interrupt-max-us", "10", "--interrupt-max-batch", "0"], "--interrupt-max-batch 0")
    (folder / "vblk.toml").write_text(f'[[device]]\nimage = "{image}"\nsocket-path = "{folder}/s"\nmonitor = "{folder}/m"\n'
                                      "interrupt-max-us = 70\ninterrupt-max-batch = 5\n")
    process = subprocess.Popen([options.vblk, "serve", "--config", folder / "vblk.toml"], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        process.stdout.readline()
        status, output = run(options.vblk, "ctl", folder / "m", "query-status")
        answer = json.loads(output) if status == 0 else {}
        report.check("a configuration file sets both, and query-status tells them",
                     (answer.get("interrupt-max-us"), answer.get("interrupt-max-batch")) == (70, 5), output)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path)
    parser.add_argument("--engine", default="threads", help="its answers come one by one")
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    options.vblk = options.vblk.resolve()
    with Folder() as folder:
        if options.table:
            return table(options, folder)
        report = Report()
        check(options, folder, report)
    report.exit()


if __name__ == "__main__":
    main()
