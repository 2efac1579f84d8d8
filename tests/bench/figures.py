#!/usr/bin/python3
"""The figures of docs/bench.md: what write-behind is worth, flushes against qemu-storage-daemon's, what the load itself costs,
and whether `vblk bench` and fio agree. Interleaved rounds; what is compared are ratios within a round.

The disk is a file, written once: a flush must have a disk to go to. Absolute numbers are of one machine and one hour.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QSD = "qemu-storage-daemon"
ENGINES = ("threads", "native", "io_uring")
BATCHED = "fio, batches"
FIO_ENGINES = {"native": "libaio", "io_uring": "io_uring"}
STREAM_JOBS = """[flush]
rw=randwrite
bs=4k
size=64M
iodepth=256
fsync=1
rate_iops={rate:g}
runtime={seconds}
time_based
[stream]
rw=write
bs=128k
offset=64M
iodepth=8
runtime={seconds}
time_based
"""


def run_json(command):
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr}")
    return json.loads(done.stdout)


def bench(options, *arguments):
    return run_json([options.vblk, "bench", *arguments, "--output-format", "json"])


def quantile(bins, fraction):
    """Of the nearest rank, in fio's bins: {latency in ns: count}. None without any."""
    if not bins:
        return None
    rank, below = max(1, -int(-fraction * sum(bins.values()) // 1)), 0
    for latency in sorted(bins):
        below += bins[latency]
        if below >= rank:
            return latency
    return max(bins)


def bins_of(timed):
    return {int(latency): count for latency, count in timed.get("bins", {}).items()}


def show(values, digits=1, unit=""):
    values = [value for value in values if value is not None]
    if not values:
        return "n/a"
    return f"{statistics.median(values):,.{digits}f}{unit} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratios(ours, theirs):
    return [a / b for a, b in zip(ours, theirs) if a is not None and b]


def interleaved(options, sides, measure):
    """{side: [measurement of each round]}, each round in a new random order."""
    results = {side: [None] * options.rounds for side in sides}
    for number in range(options.rounds):
        for side in random.sample(sides, len(sides)):
            print(f"round {number + 1}/{options.rounds}: {side}", file=sys.stderr, flush=True)
            results[side][number] = measure(side)
    return results


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def stream_figures(options):
    """Flush latency beside a stream to the page cache; the stream's rate is that at which it became durable."""
    jobs = options.folder / "stream.fio"
    jobs.write_text(STREAM_JOBS.format(seconds=options.stream_seconds, rate=options.flush_rate))
    pooled = {}

    def measure(side):
        engine, behind = side
        os.sync()
        begin = time.monotonic()
        report = bench(options, "--image", options.image, "--aio", engine, "--cache", "writeback",
                       *(["--write-behind", options.write_behind] if behind else []), jobs)
        with open(options.image, "rb") as image:
            os.fsync(image.fileno())
        seconds = time.monotonic() - begin
        by_name = {job["jobname"]: job for job in report["jobs"]}
        bins = bins_of(by_name["flush"]["sync"]["lat_ns"])
        for latency, count in bins.items():
            pooled.setdefault(side, {}).setdefault(latency, 0)
            pooled[side][latency] += count
        stream = by_name["stream"]["write"]
        if stream["io_bytes"] > options.image_bytes - (64 << 20):
            raise RuntimeError("the stream came round: use a larger --image-gib")
        def ms(fraction):
            return quantile(bins, fraction) / 1e6 if bins else None

        return {"p99": ms(0.99), "p50": ms(0.5), "rate": stream["io_bytes"] / seconds / (1 << 20)}

    print(f"\nFlushes at {options.flush_rate:g} per second beside a stream of 128k writes, --cache writeback, "
          f"{options.stream_seconds:g} s\n")
    row("engine", "--write-behind", "flush p50 ms", "flush p99 ms", "p99 of all rounds", "flushes", "stream MiB/s, durable")
    row("---", "---", *["--:"] * 5)
    for engine in options.engines:
        results = interleaved(options, [(engine, False), (engine, True)], measure)
        columns = {}
        for side, rounds in results.items():
            columns[side[1]] = {name: [entry[name] for entry in rounds] for name in rounds[0]}
            own = columns[side[1]]
            row(engine, options.write_behind if side[1] else "without", show(own["p50"]), show(own["p99"]),
                f"{quantile(pooled[side], 0.99) / 1e6:,.1f}", sum(pooled[side].values()), show(own["rate"], 0))
        row(engine, "ratio", *[show(ratios(columns[True][name], columns[False][name]), 3) for name in ("p50", "p99")],
            f"{quantile(pooled[(engine, True)], 0.99) / quantile(pooled[(engine, False)], 0.99):.3f}", "",
            show(ratios(columns[True]["rate"], columns[False]["rate"]), 3))


def server_command(options, server, engine, socket):
    if server == QSD:
        return [QSD, "--blockdev", f"driver=file,node-name=d,filename={options.image},cache.direct=on,aio={engine}",
                "--object", "iothread,id=t", "--export", f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,"
                f"addr.path={socket},writable=on,iothread=t,num-queues=4"]
    disk = ["--format", "null", "--size", "1G"] if engine == "null" else [options.image, "--aio", engine]
    return [options.vblk, "serve", *disk, "--queues", "4", "--socket-path", socket, "--log-level", "warning"]


def bench_of_server(options, command, socket, *arguments, wrapper=()):
    socket.unlink(missing_ok=True)
    with subprocess.Popen(list(map(str, [*wrapper, *command])), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 20
            while not socket.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"does not start: {' '.join(map(str, command))}")
                time.sleep(0.01)
            report = run_json([*wrapper, options.vblk, "bench", "--socket-path", socket, "--pid", server.pid, "--runtime",
                               options.seconds, "--ramp_time", "0.3", "--flush-device", options.image, *arguments,
                               "--output-format", "json"])
        finally:
            server.terminate()
    return report["jobs"][0]


def flush_figures(options):
    """Write and flush through a backend: ours and qemu-storage-daemon's."""
    socket = options.folder / "s"

    def measure_with(engine, arguments):
        def measure(server):
            job = bench_of_server(options, server_command(options, server, engine, socket), socket, "--rw", "randwrite",
                                  "--bs", "4k", "--fsync", "1", *arguments)
            commits = bins_of(job["vblk"]["write_and_flush_ns"])
            return {"rate": job["sync"]["total_ios"] * 1000 / job["write"]["runtime"], "p50": quantile(commits, 0.5) / 1e3,
                    "p99": quantile(commits, 0.99) / 1e3, "count": sum(commits.values())}
        return measure

    print(f"\n4k random write and flush, one I/O thread, {options.seconds:g} s\n")
    row("engine", "in flight", "server", "flushes/s", "write + flush p50 us", "p99 us", "samples in a round")
    row("---", "---", "---", *["--:"] * 4)
    for engine in options.engines:
        for name, arguments in (("16, 4 queues", ["--iodepth", "4", "--numjobs", "4"]), ("1", ["--iodepth", "1"])):
            results = interleaved(options, ["vblk", QSD], measure_with(engine, arguments))
            columns = {server: {key: [entry[key] for entry in rounds] for key in rounds[0]}
                       for server, rounds in results.items()}
            for server, own in columns.items():
                row(engine, name, server, show(own["rate"], 0), show(own["p50"]), show(own["p99"]),
                    f"{min(own['count']):,} or more")
            row(engine, name, "ratio",
                *[show(ratios(columns["vblk"][key], columns[QSD][key]), 2) for key in ("rate", "p50", "p99")], "")


def cost_figures(options):
    """What the load costs beside a backend that does nothing. On one processor neither can look for the other's work."""
    socket = options.folder / "s"
    cases = [(rw, depth, processors) for rw in ("randread", "randwrite") for depth in (1, 32, 128)
             for processors in ("all", "one")]

    def measure(case):
        job = bench_of_server(options, server_command(options, "vblk", "null", socket), socket, "--rw", case[0], "--bs", "4k",
                              "--iodepth", case[1], wrapper=["taskset", "-c", "0"] if case[2] == "one" else [])
        usage = job["vblk"]["usage"]
        return {"backend": usage["cpu_us_per_io"], "load": usage["load_cpu_us_per_io"],
                "iops": max(job["read"]["iops"], job["write"]["iops"])}

    print(f"\nProcessor time per request on the null disk, {options.seconds:g} s\n")
    row("4k", "depth", "processors", "per s", "backend us", "load us", "load / backend")
    row("---", "--:", "---", *["--:"] * 4)
    for case, rounds in interleaved(options, cases, measure).items():
        own = {key: [entry[key] for entry in rounds] for key in rounds[0]}
        row(*case, show(own["iops"], 0), show(own["backend"], 2), show(own["load"], 2),
            show(ratios(own["load"], own["backend"]), 2))


def fio_figures(options):
    """The same reads by `vblk bench --image` and by fio."""
    def measure_with(engine, depth):
        def measure(side):
            if side != "vblk bench":
                # As vblk bench does it: takes all that is done, and submits eight at once.
                batches = ["--iodepth_batch_submit=8", "--iodepth_batch_complete_min=1",
                           f"--iodepth_batch_complete_max={depth}"] if side == BATCHED else []
                report = run_json(["fio", "--name=x", f"--filename={options.image}", f"--ioengine={FIO_ENGINES[engine]}",
                                   "--direct=1", "--rw=randread", "--bs=4k", f"--iodepth={depth}", "--norandommap",
                                   f"--runtime={options.seconds}", "--time_based", "--ramp_time=1",
                                   f"--randseed={random.getrandbits(31)}", "--output-format=json+", "--lat_percentiles=1",
                                   "--clat_percentiles=0", *batches])
            else:
                report = bench(options, "--image", options.image, "--aio", engine, "--rw", "randread", "--bs", "4k",
                               "--iodepth", depth, "--runtime", options.seconds, "--ramp_time", "0.3")
            read = report["jobs"][0]["read"]
            bins = bins_of(read["lat_ns"])
            return {"iops": read["iops"], "mean": read["lat_ns"]["mean"] / 1e3, "p50": quantile(bins, 0.5) / 1e3,
                    "p99": quantile(bins, 0.99) / 1e3}
        return measure

    keys = ("iops", "mean", "p50", "p99")
    print(f"\n4k random reads of the same file, O_DIRECT, {options.seconds:g} s\n")
    row("engine", "depth", "tool", "per s", "mean us", "p50 us", "p99 us")
    row("---", "--:", "---", *["--:"] * 4)
    for engine in FIO_ENGINES:
        for depth in (1, 32):
            tools = ["vblk bench", "fio", *([BATCHED] if depth > 1 else [])]
            results = interleaved(options, tools, measure_with(engine, depth))
            columns = {tool: {key: [entry[key] for entry in rounds] for key in keys} for tool, rounds in results.items()}
            for tool, own in columns.items():
                row(engine, depth, tool, *[show(own[key], 0 if key == "iops" else 1) for key in keys])
            for tool in tools[1:]:
                row(engine, depth, f"ratio to {tool}", *[show(ratios(columns["vblk bench"][key], columns[tool][key]), 3)
                                                         for key in keys])


FIGURES = {"stream": stream_figures, "flush": flush_figures, "cost": cost_figures, "fio": fio_figures}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path)
    parser.add_argument("--only", choices=FIGURES, action="append", help="only this one (more than once: these)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each measurement but those of stream")
    parser.add_argument("--stream-seconds", type=float, default=15)
    parser.add_argument("--image-gib", type=int, default=24, help="more than a stream writes")
    parser.add_argument("--flush-rate", type=float, default=20, help="flushes per second beside a stream")
    parser.add_argument("--write-behind", default="8M")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=ENGINES)
    parser.add_argument("--directory", type=Path, default=os.environ.get("TMPDIR", "/var/tmp"), help="where the image is made")
    options = parser.parse_args()
    options.vblk = options.vblk.resolve()
    if options.rounds < 1 or options.seconds <= 0 or options.stream_seconds <= 0 or options.image_gib < 1:
        parser.error("use at least 1 round, a positive time and 1 GiB")
    with tempfile.TemporaryDirectory(prefix="vblk-figures-", dir=options.directory) as folder:
        options.folder = Path(folder)
        options.image = options.folder / "disk.img"
        wanted = options.only or list(FIGURES)
        gib = options.image_gib if "stream" in wanted else min(options.image_gib, 2)
        options.image_bytes = gib << 30
        print(f"writing {gib} GiB", file=sys.stderr)
        with open(options.image, "wb") as image:
            os.posix_fallocate(image.fileno(), 0, options.image_bytes)
        # Noise, which no storage below can tell from data.
        bench(options, "--image", options.image, "--rw", "write", "--bs", "1M", "--iodepth", "8", "--io_size", f"{gib}G")
        versions = [subprocess.run([name, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
                    for name in (options.vblk, QSD, "fio")]
        print(f"{'; '.join(versions)}; Linux {os.uname().release}; {os.cpu_count()} processors; file in {options.directory}; "
              f"{options.rounds} rounds", flush=True)
        for name in wanted:
            FIGURES[name](options)


if __name__ == "__main__":
    main()
