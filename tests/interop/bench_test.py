#!/usr/bin/python3
"""`vblk bench` as a storage engineer meets it: targets, job files, formats, and everything that goes wrong. Prints TAP."""

import argparse
import csv
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Folder, Report, Server, make_sparse, run, wait_until  # noqa: E402

MIB = 1 << 20
QSD = "qemu-storage-daemon"


def refused(report, vblk, title, arguments, names):
    status, output = run(vblk, "bench", *arguments)
    report.check(f"{title}: refused in one line that names it",
                 status in (1, 2) and names in output and output.count("\n") == 1, f"status {status}\n{output}")


def run_apart(*command, **options):
    """Runs a command to its end; returns (status, output, errors)."""
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, **options)
    return done.returncode, done.stdout, done.stderr


def jobs_of(report, title, status, output):
    """The jobs of a JSON report, or none where there is no report."""
    try:
        jobs = json.loads(output)["jobs"]
    except ValueError:
        jobs = []
    report.check(f"{title}: ends with 0 and a report", status == 0 and jobs, f"status {status}\n{output[:2000]}")
    return jobs


def test_bad_options(report, vblk):
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, MIB)
        at = ["--image", image, "--runtime", "0.1", "--ramp_time", "0"]
        for title, arguments, names in (
                ("no target", ["--rw", "read"], "--socket-path"),
                ("two targets", [*at, "--socket-path", folder / "s"], "--socket-path"),
                ("unknown kind", [*at, "--rw", "sideways"], "sideways"),
                ("odd block", [*at, "--bs", "700"], "700"),
                ("one bad block of a list", [*at, "--bs", "4k,9"], "'9': use a multiple of 512"),
                ("no depth", [*at, "--iodepth", "0"], "iodepth"),
                ("flushes of reads", [*at, "--fsync", "1"], "fsync"),
                ("verify of trims", [*at, "--rw", "trim", "--verify"], "verify"),
                ("rate 0", [*at, "--rate_iops", "0"], "rate_iops"),
                ("rate process without rate", [*at, "--rate_process", "poisson"], "rate_iops"),
                ("amount that does not divide", ["--image", image, "--io_size", "5000"], "io_size"),
                ("size that does not divide", [*at, "--size", "10k"], "size"),
                ("amount and time", [*at, "--io_size", "8k"], "--io_size"),
                ("runtime 0", ["--image", image, "--runtime", "0"], "--runtime"),
                ("runtime that is no time", ["--image", image, "--runtime", "soon"], "soon"),
                ("more than the disk has", [*at, "--size", "2M"], str(MIB)),
                ("a block larger than the disk", [*at, "--bs", "2M"], str(MIB)),
                ("engine of a backend", ["--socket-path", folder / "s", "--aio", "native"], "--aio"),
                ("unknown engine", [*at, "--aio", "warp"], "warp"),
                ("unknown format", [*at, "--format", "null"], "null"),
                ("format of a backend", ["--socket-path", folder / "s", "--format", "raw"], "--format"),
                ("flush tests, format of a backend", ["flush", "--socket-path", folder / "s", "--format", "raw"], "--format"),
                ("job file that is not there", ["--image", image, folder / "none.fio"], "none.fio"),
                ("job file and workload", ["--image", image, "--bs", "4k", folder / "none.fio"], "--bs"),
                ("format", [*at, "--output-format", "xml"], "xml"),
                ("image that is not there", ["--image", folder / "none.img"], "none.img"),
                ("writes to a read-only image", [*at, "--rw", "write", "--read-only"], "read-only"),
                ("backend that is not there", ["--socket-path", folder / "none", "--runtime", "1"], str(folder / "none")),
                ("process of an image", [*at, "--pid", "1"], "--pid"),
                ("rings of an image", [*at, "--ring", "packed"], "--ring"),
                ("rings that nobody knows", ["--socket-path", folder / "s", "--ring", "round"], "round"),
                ("flushes of no device", ["--socket-path", folder / "s", "--flush-device", "/proc/version"], "/proc/version"),
                ("flushes of a device that is not there", [*at, "--flush-device", folder / "none"], "none"),
                ("process that is not there", ["--socket-path", folder / "s", "--pid", "4194999"], "4194999"),
                ("report in a folder that is not there", [*at, "--output", folder / "none/report"], "none/report"),
                ("report that is a folder", [*at, "--output", folder], "Is a directory"),
                ("log in a folder that is not there", [*at, "--hdr-log", folder / "none/log"], "none/log"),
                ("flush tests, page in a folder that is not there", ["flush", "--image", image, "--html", folder / "none/page"],
                 "none/page"),
                ("flush tests, a process that is not there", ["flush", "--socket-path", folder / "s", "--pid", "4194999"],
                 "4194999"),
                ("flush tests of an image that is not there", ["flush", "--image", folder / "none.img"], "none.img"),
                ("flush tests of a folder", ["flush", "--image", folder], str(folder)),
                ("flush tests without a target", ["flush"], "--socket-path"),
                ("flush tests of an unknown engine", ["flush", "--image", image, "--aio", "warp"], "warp"),
                ("flush tests of an engine for flushes alone", ["flush", "--image", image, "--aio", "flush=native"], "flush=native"),
        ):
            refused(report, vblk, f"bench, {title}", arguments, names)
        with Server(vblk, [image], folder / "s", folder / "log"):
            refused(report, vblk, "bench, an image that a server has", [*at, "--rw", "write"], "disk.img")
            refused(report, vblk, "bench flush, an image that a server has", ["flush", "--image", image], "disk.img")
            refused(report, vblk, "bench, more queues than the backend has",
                    ["--socket-path", folder / "s", "--numjobs", "4"], "queues")
        report.check("what is refused leaves the image alone", image.read_bytes() == bytes(MIB))
        (folder / "report").write_text("an older one")
        refused(report, vblk, "bench, an older report and no image",
                ["--image", folder / "none.img", "--output", folder / "report"], "none.img")
        report.check("what is refused leaves an older report alone", (folder / "report").read_text() == "an older one")


class FakeBackend:
    """Something that listens, and answers as `behaviour` says."""

    def __init__(self, path, behaviour):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.thread = threading.Thread(target=self.serve, args=(behaviour,), daemon=True)
        self.thread.start()

    def serve(self, behaviour):
        connection, _ = self.listener.accept()
        with connection:
            try:
                behaviour(connection)
            except OSError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


def lying_config(capacity_sectors):
    """A backend that does all that is asked and has a config space of `capacity_sectors`."""
    def behave(connection):
        # vhost-user.rst, "Message Specification": request, flags, size, payload. VERSION_1, PROTOCOL_FEATURES, FLUSH.
        features = struct.pack("<Q", 1 << 32 | 1 << 30 | 1 << 9)
        protocol = struct.pack("<Q", 1 << 9 | 1 << 3)  # CONFIG, REPLY_ACK
        while True:
            header = connection.recv(12, socket.MSG_WAITALL)
            if len(header) < 12:
                return
            request, flags, size = struct.unpack("<III", header)
            payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
            answer = {1: features, 15: protocol, 17: struct.pack("<Q", 1), 11: payload}.get(request)
            if request == 24:  # GET_CONFIG
                answer = payload[:12] + struct.pack("<Q", capacity_sectors).ljust(size - 12, b"\0")
            elif answer is None and flags & 8:
                answer = struct.pack("<Q", 0)
            if answer is not None:
                connection.sendall(struct.pack("<III", request, 5, len(answer)) + answer)
    return behave


class BadBackends:
    """Runs against backends that are none. Some take half a minute to be given up, so other tests go on meanwhile."""

    CASES = (
        ("closes at once", lambda connection: None, "connection|send"),
        ("talks HTTP", lambda connection: (connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), time.sleep(1)), ""),
        ("says nothing", lambda connection: time.sleep(30), "answer"),
        ("has a disk without sectors", lying_config(0), "0 sectors"),
        ("has a disk beyond all addresses", lying_config(1 << 60), "sectors"),
        ("completes nothing", lying_config(2048), "in flight"),
    )

    def __init__(self, vblk):
        self.vblk, self.outcomes = vblk, {}
        self.threads = [threading.Thread(target=self.run, args=case[:2]) for case in self.CASES]
        for thread in self.threads:
            thread.start()

    def run(self, title, behaviour):
        with Folder() as folder, FakeBackend(folder / "s", behaviour):
            begin = time.monotonic()
            outcome = run(self.vblk, "bench", "--socket-path", folder / "s", "--runtime", "0.2", "--ramp_time", "0")
            self.outcomes[title] = *outcome, time.monotonic() - begin

    def check(self, report):
        for thread in self.threads:
            thread.join()
        for title, _, names in self.CASES:
            status, output, seconds = self.outcomes[title]
            line = [line for line in output.splitlines() if line.startswith("vblk: bench:")]
            report.check(f"bench, a backend that {title}: an end and one line",
                         status == 1 and len(line) == 1 and re.search(names, line[0]) and seconds < 60,
                         f"status {status} after {seconds:.1f} s\n{output}")


def test_end_of_backend(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 16 * MIB)
        with Server(vblk, [folder / "disk.img"], folder / "s", folder / "log") as server:
            timer = threading.Timer(1, server.kill)
            timer.start()
            begin = time.monotonic()
            status, output = run(vblk, "bench", "--socket-path", folder / "s", "--iodepth", "8", "--runtime", "60",
                                 "--ramp_time", "0")
            timer.join()
        samples = re.search(r"^  read .* (\d+)$", output, re.MULTILINE)
        report.check("bench, a backend that dies: results so far, what was in flight, and status 1",
                     status == 1 and samples and int(samples[1]) > 0 and "in flight" in output and
                     time.monotonic() - begin < 20, f"status {status}\n{output}")
        report.check("bench, a backend that dies: nothing is told of what it has used", "backend -" not in output and
                     re.search(r"backend (n/a|\d)", output), output)


class StalledRun:
    """A run whose backend is stopped in the middle. It takes half a minute to be given up, so other tests go on meanwhile."""

    def __init__(self, vblk):
        self.folder = Folder()
        path = self.folder.__enter__()
        make_sparse(path / "disk.img", 16 * MIB)
        self.server = Server(vblk, [path / "disk.img"], path / "s", path / "log")
        self.server.__enter__()
        self.bench = subprocess.Popen([vblk, "bench", "--socket-path", path / "s", "--iodepth", "8", "--runtime", "120",
                                       "--ramp_time", "0", "--eta", "never"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True)
        time.sleep(1)
        os.kill(self.server.pid(), signal.SIGSTOP)

    def check(self, report):
        output, _ = self.bench.communicate(timeout=60)
        os.kill(self.server.pid(), signal.SIGCONT)
        self.server.__exit__()
        self.folder.__exit__()
        samples = re.search(r"^  read .* (\d+)$", output, re.MULTILINE)
        report.check("bench, a backend that stalls: results so far, what was in flight, and status 1",
                     self.bench.returncode == 1 and samples and int(samples[1]) > 0 and
                     re.search(r"8 requests? in flight|8 in flight", output), f"status {self.bench.returncode}\n{output}")


def test_interrupt(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 16 * MIB)
        command = [vblk, "bench", "--image", folder / "disk.img", "--runtime", "60", "--eta", "always"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as bench:
            time.sleep(2)
            bench.send_signal(signal.SIGINT)
            output, errors = bench.communicate(timeout=20)
        report.check("bench, Ctrl-C: results so far, and status 130",
                     bench.returncode == 130 and re.search(rb"^  read +[1-9]", output, re.MULTILINE) and
                     b"interrupted" in errors, f"status {bench.returncode}\n{output.decode()}\n{errors.decode()}")


def test_progress(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 16 * MIB)
        at = [vblk, "bench", "--image", folder / "disk.img", "--ramp_time", "0"]
        line = r"randread 4096 depth 1: \d+ s, about \d+ s left, [1-9]\d* IOPS, p99 \d+\.\d us"

        def errors_of(runtime, *options):
            command = list(map(str, [*at, "--runtime", runtime, *options]))
            return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60).stderr

        report.check("bench, --eta always: a plain line each second", len(re.findall(line, errors_of(3, "--eta", "always"))) >= 2)
        lines = errors_of(11).splitlines()
        report.check("bench without a terminal: a plain line each ten seconds",
                     len(lines) == 1 and re.fullmatch(line, lines[0]), lines)
        report.check("bench, --eta never: nothing", errors_of(1.5, "--eta", "never") == "")
        ours, theirs = pty.openpty()
        with subprocess.Popen(list(map(str, [*at, "--runtime", 3])), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=theirs) as bench:
            os.close(theirs)
            shown = b""
            try:
                while chunk := os.read(ours, 4096):
                    shown += chunk
            except OSError:
                pass  # the terminal's other end is closed
            os.close(ours)
        report.check("bench on a terminal: one line, written over each second and gone in the end",
                     bench.returncode == 0 and len(re.findall(r"\r\x1b\[K" + line, shown.decode())) >= 2 and
                     b"\n" not in shown and shown.endswith(b"\r\x1b[K"), shown)


def test_full_output(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", MIB)
        at = ["--image", folder / "disk.img", "--runtime", "0.2", "--ramp_time", "0"]
        done = subprocess.run(list(map(str, [vblk, "bench", *at, "--output", "/dev/full"])), stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=20)
        report.check("bench, a full disk under --output: one line, and the report on standard output",
                     done.returncode == 1 and b"read" in done.stdout and done.stderr.count(b"\n") == 1 and
                     b"/dev/full" in done.stderr, done.stderr.decode())
        with open("/dev/full", "wb") as full:
            done = subprocess.run(list(map(str, [vblk, "bench", *at])), stdin=subprocess.DEVNULL, stdout=full,
                                  stderr=subprocess.PIPE, timeout=20)
        report.check("bench, standard output that is full: status 1 and one line",
                     done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr.decode())


def test_report(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 4 * MIB)
        with Server(vblk, [folder / "disk.img", "--queues", "2"], folder / "s", folder / "log") as server:
            status, output = run(vblk, "bench", "--socket-path", server.socket, "--pid", server.pid(), "--rw", "randwrite",
                                 "--bs", "8k", "--iodepth", 4, "--fsync", 2, "--numjobs", 2, "--runtime", 0.3,
                                 "--output-format", "json")
            jobs = jobs_of(report, "bench of a backend", status, output)
            write, own = (jobs[0]["write"], jobs[0]["vblk"]) if jobs else ({}, {})
            report.check("bench reports what it did, by fio's names",
                         jobs and write["total_ios"] > 0 and write["lat_ns"]["N"] == write["total_ios"] and
                         abs(write["bw_bytes"] - write["iops"] * 8192) < 2 and
                         abs(jobs[0]["sync"]["total_ios"] * 2 - write["total_ios"]) < 20, output[:3000])
            report.check("bench reports what the backend has used", jobs and own["usage"]["cpu_us_per_io"] > 0 and
                         own["usage"]["kicks"] > 0 and own["usage"]["voluntary_context_switches"] > 0, own.get("usage"))
        can_count = os.access("/sys/kernel/tracing/events/io_uring/io_uring_queue_async_work/id", os.R_OK)
        for engine, expected in (("threads", 0), ("io_uring", 1)):
            with Server(vblk, [folder / "disk.img", "--aio", engine], folder / "s", folder / "log") as server:
                _, output = run(vblk, "bench", "--socket-path", server.socket, "--pid", server.pid(), "--rw", "randwrite",
                                "--fsync", 1, "--runtime", 0.3, "--output-format", "json")
            job = json.loads(output)["jobs"][0]
            punts = job["vblk"]["usage"]["io_uring_punts"]
            per_flush = None if punts is None else punts / max(1, job["sync"]["total_ios"])
            right = (per_flush == 0 if expected == 0 else per_flush >= 0.9) if can_count else punts is None
            report.check(f"bench counts the io_uring punts of the {engine} engine", right, f"{punts}, {per_flush} per flush")
        status, output = run(vblk, "bench", "--image", folder / "disk.img", "--rw", "write", "--bs", "4k,64k", "--iodepth",
                             "1,8", "--runtime", 0.1, "--ramp_time", 0)
        report.check("bench takes lists, and sums them up", status == 0 and output.count("\nwrite ") == 4, output)


def test_workloads(report, vblk):
    """Every kind of request, on an image and on a backend, counted where fio would count it."""
    kinds = {"read": "read", "randread": "read", "write": "write", "randwrite": "write", "trim": "trim", "randtrim": "trim",
             "writezeroes": "trim", "randwritezeroes": "trim", "flush": "sync"}
    with Folder() as folder:
        make_sparse(folder / "disk.img", 4 * MIB)

        def counts_on(target):
            found = {}
            for rw in kinds:
                status, output = run(vblk, "bench", *target, "--rw", rw, "--io_size", "256k", "--iodepth", "4", "--output-format",
                                     "json")
                job = json.loads(output)["jobs"][0] if status == 0 else {}
                found[rw] = {name: job[name]["total_ios"] for name in ("read", "write", "trim", "sync") if job}
            return found

        expected = {rw: {name: 64 if name == where else 0 for name in ("read", "write", "trim", "sync")}
                    for rw, where in kinds.items()}
        found = counts_on(["--image", folder / "disk.img", "--aio", "io_uring"])
        report.check("bench of an image does every kind of request", found == expected, found)
        with Server(vblk, [folder / "disk.img"], folder / "s", folder / "log"):
            found = counts_on(["--socket-path", folder / "s"])
        report.check("bench of a backend does every kind of request", found == expected, found)
        with Server(vblk, [folder / "disk.img"], folder / "s", folder / "log"):
            found = counts_on(["--socket-path", folder / "s", "--ring", "packed"])
        report.check("bench of a backend does every kind of request on packed rings", found == expected, found)
        make_sparse(folder / "disk.img", 4 * MIB)
        at = ["--image", folder / "disk.img", "--output-format", "json"]
        run(vblk, "bench", *at, "--rw", "write", "--offset", "1M", "--size", "1M", "--io_size", "2M")
        content = (folder / "disk.img").read_bytes()
        report.check("bench keeps to its part of the disk", content[:MIB] == bytes(MIB) and content[2 * MIB:] == bytes(2 * MIB) and
                     all(any(content[at:at + 4096]) for at in range(MIB, 2 * MIB, 4096)))
        status, output = run(vblk, "bench", *at, "--rw", "randrw", "--rwmixread", "75", "--io_size", "16M",
                             "--random_distribution", "zipf:1.2")
        job = json.loads(output)["jobs"][0] if status == 0 else {"read": {"total_ios": 0}}
        report.check("bench keeps to the mix", abs(job["read"]["total_ios"] - 3072) < 150, job["read"]["total_ios"])


def test_qcow2(report, vblk):
    """An image is measured as what it is, and never written over as something else."""
    with Folder() as folder:
        named, other = folder / "disk.qcow2", folder / "disk.img"
        for image in (named, other):
            run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
        load = ["--rw", "randwrite", "--iodepth", "8", "--runtime", "0.3", "--ramp_time", "0", "--verify"]
        before = other.read_bytes()
        refused(report, vblk, "bench, a qcow2 image by another name", ["--image", other, *load], "--format qcow2")
        report.check("a refused qcow2 image is left alone", other.read_bytes() == before)
        for image, options in ((named, []), (other, ["--format", "qcow2"])):
            status, text = run(vblk, "bench", "--image", image, *options, *load)
            check_status, check = run("qemu-img", "check", "-f", "qcow2", image)
            report.check(f"bench of {image.name} measures the disk in it",
                         status == 0 and check_status == 0 and image.stat().st_size > MIB, f"{text}\n{check}")


def test_open_loop(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 4 * MIB)
        at = ["--image", folder / "disk.img", "--iodepth", "64", "--ramp_time", "0"]
        for process in ("linear", "poisson"):
            status, output = run(vblk, "bench", *at, "--rate_iops", 500, "--rate_process", process, "--runtime", 2,
                                 "--output-format", "json")
            job = jobs_of(report, f"an open loop, {process}", status, output)[0]
            report.check(f"an open loop, {process}: as many as were asked for, and nothing that grows",
                         abs(job["read"]["iops"] - 500) < 75 and not job["vblk"]["saturated"], output[:500])
        status, output = run(vblk, "bench", *at, "--rate_iops", 5_000_000, "--runtime", 1)
        report.check("an open loop that the disk cannot follow is saturated, and has no latencies",
                     status == 0 and "SATURATED" in output and "p99" not in output, output)


def test_counters(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 4 * MIB)
        at = ["--image", folder / "disk.img", "--aio", "threads", "--rw", "randwrite", "--fsync", 1, "--io_size", "1M",
              "--output-format", "json"]
        can_count = os.access("/sys/kernel/tracing/events/raw_syscalls/sys_enter/id", os.R_OK)
        for options, expected in (([], False), (["--count-syscalls"], can_count)):
            _, output, errors = run_apart(vblk, "bench", *at, *options)
            counted = json.loads(output)["jobs"][0]["vblk"]["usage"]["system_calls"]
            # A write and an fdatasync each, at least.
            report.check(f"system calls are counted where that is asked for and possible, {options}",
                         counted >= 2 * 256 if expected else counted is None, counted)
            report.check(f"bench says in one line that it cannot count system calls, {options}",
                         errors.count("\n") == ("tracefs" in errors) == bool(options and not expected), errors)
        usage = json.loads(output)["jobs"][0]["vblk"]["usage"]
        report.check("flushes are counted, those asked for and those issued",
                     usage["flushes"] == 256 and 0 < usage["flushes_issued"] <= 256, usage)
        device = os.stat(folder).st_dev
        device_counts = os.access(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat", os.R_OK)
        report.check("flushes that reach the device are counted where there is one",
                     (usage["device_flushes"] is not None) == device_counts, usage)
        report.check("the machine's time is counted", usage["machine_cpu_us_per_io"] > 0 and usage["steal_ms"] >= 0 and
                     usage["submitted"] >= 512, usage)


def test_formats(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 4 * MIB)
        status, _ = run(vblk, "bench", "--image", folder / "disk.img", "--rw", "randrw", "--runtime", 0.3, "--output-format",
                        "json", "--output", folder / "out.json", "--hdr-log", folder / "out.hlog")
        job = json.loads((folder / "out.json").read_text())["jobs"][0] if status == 0 else {}
        # A tool of fio's own that reads its json+.
        tool, output = run("fio_jsonplus_clat2csv", folder / "out.json", folder / "out.csv")
        made = folder / "out_job0.csv"
        rows = list(csv.DictReader(made.open(), skipinitialspace=True)) if made.exists() else []
        counts = [int(row["read_clat_ns_cumulative"]) for row in rows if row["read_clat_ns_cumulative"]]
        report.check("bench's JSON is read by fio_jsonplus_clat2csv",
                     tool == 0 and counts and counts[-1] == job["read"]["total_ios"],
                     f"{output}\n{rows[:1]}\n{job.get('read', {}).get('total_ios')}")
        lines = (folder / "out.hlog").read_text().splitlines()
        report.check("bench's HdrHistogram log has a histogram for each thing timed",
                     sum(line.startswith(("Tag=randrw.read,", "Tag=randrw.write,")) for line in lines) == 2, "\n".join(lines))


def test_job_file(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 4 * MIB)
        (folder / "jobs.fio").write_text("[global]\nbs=4k\nsize=2M\n[fill]\nrw=write\nverify=pattern\n"
                                         "[a]\nstonewall\nrw=randread\nio_size=1M\n[b]\nrw=randwrite\noffset=2M\nio_size=512k\n")
        status, output = run(vblk, "bench", "--image", folder / "disk.img", "--output-format", "json", folder / "jobs.fio")
        jobs = {job["jobname"]: job for job in jobs_of(report, "bench of a job file", status, output)}
        report.check("jobs of a file do what it says",
                     set(jobs) == {"fill", "a", "b"} and jobs["fill"]["write"]["total_ios"] == 512 and
                     jobs["fill"]["vblk"]["verified_blocks"] == 512 and jobs["a"]["read"]["total_ios"] == 256 and
                     jobs["b"]["write"]["total_ios"] == 128 and jobs["a"]["groupid"] == jobs["b"]["groupid"] == 1,
                     output[:2000])


def test_verify(report, vblk):
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, 4 * MIB)
        at = ["--image", image, "--verify", "--randseed", 7, "--bs", "8k"]
        status, output = run(vblk, "bench", *at, "--rw", "write", "--io_size", "4M", "--iodepth", 4)
        report.check("verify: what was written is there", status == 0 and "512 blocks written" in output, output)
        status, output = run(vblk, "bench", *at, "--rw", "randread", "--io_size", "4M", "--iodepth", 4)
        report.check("verify: a later run with the same seed finds it", status == 0, output)
        with open(image, "r+b") as file:
            file.seek(3 * MIB + 4096 + 511)
            file.write(b"!")
        status, output = run(vblk, "bench", *at, "--rw", "read", "--io_size", "4M", "--iodepth", 4)
        report.check("verify: a byte that was changed is found, and where", status == 1 and str(3 * MIB) in output, output)


def is_listened_on(path):
    """The path is there some time before."""
    with socket.socket(socket.AF_UNIX) as one:
        return one.connect_ex(str(path)) == 0


def test_storage_daemon(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 4 * MIB)
        command = [QSD, "--blockdev", f"driver=file,node-name=d,filename={folder / 'disk.img'}", "--export",
                   f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={folder / 's'},writable=on,num-queues=2"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as daemon:
            wait_until(lambda: is_listened_on(folder / "s"))
            status, output = run(vblk, "bench", "--socket-path", folder / "s", "--pid", daemon.pid, "--rw", "randwrite",
                                 "--numjobs", 2, "--iodepth", 8, "--io_size", "4M", "--verify")
            report.check("bench drives and verifies qemu-storage-daemon", status == 0 and "0 wrong" in output, output)
            status, output = run(vblk, "bench", "--socket-path", folder / "s", "--sync", "dsync", "--rw", "write",
                                 "--io_size", "64k")
            report.check("bench has qemu-storage-daemon write through", status == 0, output)
            daemon.terminate()


def test_flush(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 32 * MIB)
        at = ["flush", "--image", folder / "disk.img", "--runtime", "0.2", "--idle", "0.2", "--p99-limit", "10s", "--eta",
              "never"]
        status, output = run(vblk, "bench", *at, "--aio", "threads,io_uring", "--output-format", "json", "--html",
                             folder / "page.html", timeout=300)
        try:
            document = json.loads(output)
        except ValueError:
            document = {"rows": []}
        rows = document["rows"]
        targets = {row["target"] for row in rows}
        report.check("bench flush measures each engine in each cache mode",
                     status == 0 and targets == {f"{engine}, {cache}" for engine in ("threads", "io_uring")
                                                 for cache in ("none", "writeback")}, output[:3000])
        tests = {target: {row["test"] for row in rows if row["target"] == target} for target in targets}
        common = {"write + flush", "concurrency", "background load", "write-through", "burst", "nothing to flush"}
        report.check("bench flush runs every test", all(tests[target] == common | ({"streaming"} if "writeback" in target
                                                                                   else set()) for target in targets), tests)
        streams = {row["variant"]: row for row in rows if row["test"] == "streaming"}
        report.check("flushes beside a stream are timed, and the stream as well",
                     set(streams) == {"no write-behind", "write-behind"} and
                     all(not row["saturated"] and row["stream_bytes_per_second"] > 0 for row in streams.values()), streams)
        shared = [row["flushes_per_fdatasync"] for row in rows if row["variant"].startswith("64 at once")]
        report.check("64 flushes at once share calls", shared and min(shared) > 4, shared)
        idle = [row for row in rows if row["test"] == "nothing to flush" and not row["variant"]]
        report.check("flushes with nothing to do reach no device", idle and
                     all(row["flushes_per_fdatasync"] is None or row["flushes_per_fdatasync"] > 50 for row in idle), idle)
        report.check("the power-cut model loses nothing and notices a liar", document.get("power_cuts", {}).get("lost") == 0
                     and document["power_cuts"]["canary_noticed"], document.get("power_cuts"))
        page = (folder / "page.html").read_text() if (folder / "page.html").exists() else ""
        report.check("bench flush draws its page", page.count("<svg") == 3 and page.count("<tr>") == len(rows) + 1 and
                     "http" not in page.replace("http://www.w3.org", ""), page[:1000])
        run("qemu-img", "create", "-q", "-f", "qcow2", folder / "disk.qcow2", "64M")
        status, output, errors = run_apart(vblk, "bench", "flush", "--image", folder / "disk.qcow2", "--aio", "threads",
                                           "--cache", "none", "--runtime", "0.05", "--idle", "0", "--p99-limit", "10s",
                                           "--output-format", "json")
        each = [row for row in json.loads(output)["rows"] if row["variant"] == "each carried out"]
        report.check("bench flush of qcow2: what is not carried out has no figures, and says why", status == 0 and len(each) == 1 and
                     each[0]["lat_ns"]["N"] == 0 and "qcow2" in each[0]["note"], f"{each}\n{errors}")
        status, output, errors = run_apart(vblk, "bench", "flush", "--image", folder / "disk.img", "--aio", "threads", "--cache",
                                           "none", "--runtime", "0.3", "--idle", "0", "--p99-limit", "1us")
        report.check("bench flush fails where the limit is passed, and says so in one line",
                     status == 1 and "FAIL" in output and errors.count("\n") == 1 and
                     re.match("vblk: bench flush: FAIL: .* 0.001 ms on 'threads, none'", errors), f"{output}\n{errors}")
        status, output = run(vblk, "bench", "flush", "--image", folder / "disk.img", "--aio", "threads", "--cache", "unsafe",
                             "--idle", "0", "--runtime", "0.1")
        report.check("bench flush warns of storage that ignores flushes",
                     status == 0 and re.search("warning: threads, unsafe: .* ignores them", output), output)
        for option in ("--output", "--html"):
            command = [vblk, "bench", *at, "--aio", "threads", "--cache", "none", option, "/dev/full"]
            done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
            report.check(f"bench flush, a full disk under {option}: one line, and the report on standard output",
                         done.returncode == 1 and "power-cut model" in done.stdout and done.stderr.count("\n") == 1 and
                         "/dev/full" in done.stderr, done.stderr)
        status, output = run(vblk, "bench", "flush", "--image", folder / "disk.img", "--aio", "threads", "--cache", "none",
                             "--runtime", "0.1", "--idle", "0", "--p99-limit", "10s")
        report.check("bench flush passes judgement on few samples, and says so",
                     status == 0 and "PASS (of few samples)" in output, output)


def test_stalled_image(report, vblk):
    """Ctrl-C ends a run on a disk that answers nothing any more, and what was measured is told."""
    with Folder() as folder:
        make_sparse(folder / "disk.img", 32 * MIB)
        stalling = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=preadv2", "-e",
                    "inject=preadv2:delay_enter=100000000:when=200+"]
        command = [*stalling, vblk, "bench", "--image", folder / "disk.img", "--aio", "threads", "--runtime", "300", "--iodepth", "2",
                   "--ramp_time", "0", "--eta", "never"]
        output, errors = folder / "output", folder / "errors"
        with open(output, "w") as out, open(errors, "w") as err:
            strace = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                      start_new_session=True)
        time.sleep(5)
        children = Path(f"/proc/{strace.pid}/task/{strace.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGINT)
        # strace itself stays as long as its delays.
        has_ended = wait_until(lambda: "2 requests in flight" in errors.read_text(), 25)
        os.killpg(strace.pid, signal.SIGKILL)
        strace.wait()
        report.check("bench of an image that stalls, Ctrl-C: results so far, and what is in flight",
                     has_ended and "FAILED: 0 requests with errors, 2 in flight" in output.read_text() and
                     re.search(r"read +[1-9]", output.read_text()), f"{output.read_text()}\n{errors.read_text()}")


def test_flush_of_a_backend(report, vblk):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 32 * MIB)
        at = ["flush", "--socket-path", folder / "s", "--idle", "0.1", "--p99-limit", "10s", "--output-format", "json",
              "--eta", "never"]
        with Server(vblk, [folder / "disk.img", "--queues", "4"], folder / "s", folder / "log"):
            status, output = run(vblk, "bench", *at, "--runtime", "0.1", timeout=120)
            rows = json.loads(output)["rows"] if status == 0 else []
            report.check("bench flush measures a backend", {row["test"] for row in rows} == {
                "write + flush", "concurrency", "background load", "write-through", "burst", "nothing to flush"}, output[:2000])
            with subprocess.Popen(list(map(str, [vblk, "bench", *at, "--runtime", "1"])), stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
                time.sleep(3)
                bench.send_signal(signal.SIGINT)
                output, errors = bench.communicate(timeout=20)
            report.check("bench flush, Ctrl-C: results so far, and status 130",
                         bench.returncode == 130 and json.loads(output)["rows"] and "interrupted" in errors, f"{output}\n{errors}")
        with Server(vblk, [folder / "disk.img", "--queues", "4", "--read-only"], folder / "s", folder / "log"):
            status, output, errors = run_apart(vblk, "bench", *at, "--runtime", "0.1")
            report.check("bench flush of a disk that cannot be written: no verdict in one line, and status 1",
                         status == 1 and json.loads(output)["unjudged"] == [str(folder / "s")] and
                         re.fullmatch("vblk: bench flush: NO VERDICT: .*\n", errors), f"{output[:2000]}\n{errors}")
        with Server(vblk, [folder / "disk.img", "--queues", "4"], folder / "s", folder / "log") as server:
            timer = threading.Timer(3, server.kill)
            timer.start()
            done = subprocess.run(list(map(str, [vblk, "bench", *at, "--runtime", "1"])), stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True, timeout=60)
            timer.join()
        report.check("bench flush, a backend that dies: results so far, one line, and status 1",
                     done.returncode == 1 and json.loads(done.stdout)["rows"] and done.stderr.count("\n") == 1, done)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    vblk = parser.parse_args().vblk.resolve()
    report = Report()
    meanwhile = StalledRun(vblk), BadBackends(vblk)
    for test in (test_bad_options, test_end_of_backend, test_interrupt, test_progress, test_full_output,
                 test_report, test_workloads, test_qcow2, test_open_loop, test_counters, test_formats, test_job_file,
                 test_verify, test_storage_daemon, test_stalled_image, test_flush, test_flush_of_a_backend):
        try:
            test(report, vblk)
        except (RuntimeError, OSError, subprocess.TimeoutExpired, KeyError, IndexError, ValueError) as error:
            report.check(f"{test.__name__} runs", False, repr(error))
    for runs in meanwhile:
        runs.check(report)
    report.exit()


if __name__ == "__main__":
    main()
