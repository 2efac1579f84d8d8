#!/usr/bin/python3
"""Real guests on vblk disks: Debian's cloud kernel in QEMU without KVM, one boot per batch of scenarios.

The guest's first process (tests/guest/init, tests/guest/root_init) reports each check on the serial console; this
program serves the disks, watches the console, and then looks at the images from the host's side. What can share a guest
does, each scenario on a disk of its own, and guests run beside each other. Prints TAP.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import (ENGINES, Devices, Folder, KernelTrace, Report, Server, allocated_bytes, make_sparse, run,  # noqa: E402
                     wait_until)
from running_guest import BOOT_SECONDS_MAX, SOURCE, Disk, GuestSystem, Qmp, RunningGuest  # noqa: E402

MIB = 1 << 20


def name_of(number):
    """The guest's name of a disk: they are vda, vdb and so on, in the order of QEMU's options."""
    return f"vd{chr(ord('a') + number)}"


def create_image(path, form, size_bytes):
    run("qemu-img", "create", "-q", "-f", form, path, size_bytes)
    return path


def as_toml(devices):
    """A file for `vblk serve --config`: each device is a dictionary of its keys."""
    def value_of(value):
        return json.dumps(str(value) if isinstance(value, Path) else value)
    return "".join("[[device]]\n" + "".join(f"{key} = {value_of(value)}\n" for key, value in device.items())
                   for device in devices)


def is_clean(log):
    """Whether a server had nothing to complain of."""
    return not re.search(r" vblk (warning|error): ", log)


def report_guest(report, title, console, ended, expected):
    """One TAP line per check that the guest reported, and one that it reached its end having reported enough."""
    results = re.findall(r"VBLK-GUEST: (PASS|FAIL) (.*)", console)
    for result, name in results:
        report.check(f"{title}: {name}", result == "PASS", console if result == "FAIL" else "")
    complete = ended and "VBLK-GUEST: END" in console and len(results) >= expected
    report.check(f"{title}: guest ran to its end", complete, console)
    return complete


def test_engine(report, guest, options, folder, engine):
    """Everything that writes, on one engine and the page cache bypassed. A second disk is served through the page cache, and
    its server killed in the end, not asked: what the guest has flushed must be in the image anyway."""
    image, other = folder / "disk.img", folder / "other.img"
    make_sparse(image, 256 * MIB)
    make_sparse(other, 128 * MIB)
    parameters = {"disks": "vda,vdb", "vda.run": "identity,files,fio,discard", "serial": f"guest-{engine}",
                  "cache": "write_back", "vdb.run": "files"}
    arguments = [image, "--aio", engine, "--cache", "none", "--queues", 2, "--serial", f"guest-{engine}"]
    with Server(options.vblk, arguments, folder / "s", folder / "log") as server, \
            Server(options.vblk, [other, "--aio", engine, "--cache", "writeback", "--queues", 2], folder / "s2",
                   folder / "log2") as killed:
        console, ended = guest.boot([Disk(server.socket), Disk(killed.socket)], parameters)
        killed.kill()
        report_guest(report, engine, console, ended, 25)
        report.check(f"{engine}: server ends with status 0", server.stop() == 0, server.log.read_text())
        report.check(f"{engine}: server removed its socket", not server.socket.exists())
    # The guest's discard of [16 MiB, 48 MiB) must have left a hole in the file, not zeroes.
    with open(image, "rb") as file:
        hole = os.lseek(file.fileno(), 16 * MIB, os.SEEK_HOLE)
        try:
            data = os.lseek(file.fileno(), hole, os.SEEK_DATA)
        except OSError:
            data = 256 * MIB
    report.check(f"{engine}: discarded range is a hole in the image", hole == 16 * MIB and data >= 48 * MIB,
                 f"hole at {hole}, data again at {data}, allocated {allocated_bytes(image)}")
    status, output = run("e2fsck", "-fn", other)
    report.check(f"{engine}, left for the host: e2fsck finds nothing", status == 0, output)


# What a flush looks like to the kernel, per engine, as strace prints it. io_uring's submissions lie in shared memory,
# where strace sees nothing; there the kernel's own tracepoint is counted, on threads of the name that the device has.
IS_FLUSH = {"threads": re.compile(r"\bfdatasync\("), "native": re.compile(r"IOCB_CMD_FD?SYNC"),
            "io_uring": re.compile(r"^\s*traced-io.*(\bFSYNC\b|opcode 3\b)")}
DURABLE_WRITES = 50
# Of the scenario cache_mode, in each of its stages.
CACHE_WRITES = 10


class CacheWatch:
    """A disk whose driver turns its write cache off and on, and what the server and the host's kernel make of that."""

    STAGES = ("flushed", "turned off", "written without a cache", "turned on", "flushed again")

    def __init__(self, stack, vblk, folder):
        folder.mkdir()
        self.folder, self.seen = folder, []
        make_sparse(folder / "disk", 32 * MIB)
        wrapper = ["strace", "-f", "-qq", "-e", "trace=fdatasync,pwritev2", "-o", str(folder / "trace")]
        arguments = [folder / "disk", "--aio", "threads", "--cache", "none", "--queues", 2, "--monitor", folder / "m"]
        self.server = stack.enter_context(Server(vblk, arguments, folder / "s", folder / "log", wrapper))

    def look(self):
        status, trace = ask(self.folder / "m", "query-status"), (self.folder / "trace").read_text(errors="replace")
        self.seen.append({"writeback": status["writeback"], "asked": status["flushes"]["requested"],
                          "flushes": len(re.findall(r"\bfdatasync\(", trace)), "stable writes": trace.count("RWF_DSYNC")})

    def report(self, report):
        told = dict(zip(self.STAGES, self.seen))
        if not report.check("a write cache that is turned off and on: the host has seen each stage", len(told) == len(self.STAGES),
                            told):
            return
        def more(stage, what):
            before = self.STAGES[self.STAGES.index(stage) - 1]
            return told[stage][what] - (told[before][what] if stage != self.STAGES[0] else 0)
        report.check("a write cache that is turned off and on: the server does as the driver says",
                     [seen["writeback"] for seen in self.seen] == [True, False, False, True, True], told)
        for stage in ("flushed", "flushed again"):
            report.check(f"{stage}: as many flushes by the guest, and at the host's kernel",
                         min(more(stage, "asked"), more(stage, "flushes")) >= CACHE_WRITES, told)
        report.check("without a cache: the guest flushes nothing, and each write is stable",
                     more("written without a cache", "asked") == 0
                     and more("written without a cache", "stable writes") >= CACHE_WRITES, told)


def test_modes(report, guest, options, folder, engines):
    """Each of the guest's fifty fsyncs must be a flush at the host's kernel, on each engine: the promise that others break.
    In the same guest a disk that is read-only, one without a write cache, and one whose driver turns its write cache off and on."""
    disks, runs, traces, expected = [], {}, {}, 0
    with contextlib.ExitStack() as stack:
        for engine in engines:
            place = folder / engine
            place.mkdir()
            make_sparse(place / "disk", 32 * MIB)
            if engine == "io_uring":
                kernel = stack.enter_context(KernelTrace(place, "io_uring/io_uring_submit_req"))
                if kernel.refusal:
                    report.skip(f"{engine}: {DURABLE_WRITES} fsyncs of the guest are as many flushes at the host", kernel.refusal)
                    continue
                device = {"name": "traced", "image": place / "disk", "format": "raw", "socket-path": place / "s", "aio": engine,
                          "cache": "none", "queues": 2}
                stack.enter_context(Devices(options.vblk, place, as_toml([device])))
            else:
                wrapper = ["strace", "-f", "-qq", "-e", "trace=fdatasync,fsync,io_submit", "-o", str(place / "trace")]
                arguments = [place / "disk", "--aio", engine, "--cache", "none", "--queues", 2]
                stack.enter_context(Server(options.vblk, arguments, place / "s", place / "log", wrapper))
            traces[engine] = place / "trace"
            runs[f"{name_of(len(disks))}.run"] = "durability"
            disks.append(Disk(place / "s"))
            expected += 2

        content, read_only = folder / "content", folder / "read-only.img"
        content.mkdir()
        (content / "message").write_text("written by the host\n")
        make_sparse(read_only, 32 * MIB)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", content, read_only)
        before = read_only.read_bytes()
        stack.enter_context(Server(options.vblk, [read_only, "--aio", engines[0], "--read-only"], folder / "s-ro",
                                   folder / "log-ro"))
        runs[f"{name_of(len(disks))}.run"] = "readonly"
        disks.append(Disk(folder / "s-ro", queues=1))

        make_sparse(folder / "through.img", 128 * MIB)
        arguments = [folder / "through.img", "--aio", engines[min(1, len(engines) - 1)], "--cache", "directsync", "--queues", 2,
                     "--serial", "through"]
        stack.enter_context(Server(options.vblk, arguments, folder / "s-wt", folder / "log-wt"))
        runs |= {f"{name_of(len(disks))}.run": "identity,files", "serial": "through", "cache": "write_through"}
        disks.append(Disk(folder / "s-wt"))

        watch, cached = CacheWatch(stack, options.vblk, folder / "cached"), name_of(len(disks))
        runs[f"{cached}.run"] = "cache_mode"
        disks.append(Disk(watch.server.socket))

        names = ",".join(name_of(number) for number in range(len(disks)))
        console, ended = guest.boot(disks, {"disks": names} | runs, {cached: [watch.look] * len(CacheWatch.STAGES)})
        report_guest(report, "traced, read-only and write-through disks", console, ended, expected + 8 + 12 + 10)
        watch.report(report)
    for engine, trace in traces.items():
        lines = trace.read_text(errors="replace").splitlines()
        count = sum(len(IS_FLUSH[engine].findall(line)) for line in lines)
        report.check(f"{engine}: {DURABLE_WRITES} fsyncs of the guest are as many flushes at the host", count >= DURABLE_WRITES,
                     f"{count} flushes in {len(lines)} traced lines\n" + "\n".join(lines[-5:]))
    report.check("read-only: image is unchanged", read_only.read_bytes() == before)


# What QEMU offers of rings: packed, event index, indirect descriptors, and their size. Each combination has a small ring and a
# large one, and all sizes are there. Without indirect descriptors a request takes three of the ring's.
RINGS = (
    (True, True, True, 128), (True, False, True, 64), (True, True, False, 256), (True, False, False, 8),
    (True, True, True, 2), (True, False, True, 1024), (True, True, False, 4), (True, False, False, 1024),
    (False, True, True, 512), (False, False, True, 16), (False, True, False, 128), (False, False, False, 32),
    (False, True, True, 2), (False, False, True, 1024), (False, True, False, 4), (False, False, False, 1024),
)
# The first of them, which are packed, get more than fio.
RINGS_USED_FULLY = 3


def ring_properties(packed, event_idx, indirect, size):
    words = {"packed": packed, "event_idx": event_idx, "indirect_desc": indirect}
    return ",".join(f"{key}={'on' if value else 'off'}" for key, value in words.items()) + f",queue-size={size}"


def rings_negotiated(packed=False, event_idx=True, indirect=True):
    """As the guest tells it."""
    return ",".join(word for word, is_on in (("packed", packed), ("event_idx", event_idx), ("indirect", indirect)) if is_on)


def test_rings(report, guest, options, folder, engines):
    """Every kind of ring in one guest, on raw and qcow2 and all engines: small and large requests over two queues of each at
    once, at a depth beyond the small ones; and on some file systems and all that a disk can do."""
    devices, disks, parameters = [], [], {}
    for number, ring in enumerate(RINGS):
        disk, form = name_of(number), "raw" if number < RINGS_USED_FULLY or number % 2 == 0 else "qcow2"
        image = create_image(folder / f"disk-{number}", form, 256 * MIB)
        # What the server announces of a request's segments follows from the size of its queues.
        devices.append({"name": disk, "image": image, "format": form, "socket-path": folder / f"s{number}", "queues": 2,
                        "queue-size": ring[3], "aio": engines[number % len(engines)], "cache": "none"})
        disks.append(Disk(folder / f"s{number}", properties=ring_properties(*ring)))
        parameters |= {f"{disk}.run": "rings,tags" + (",files,fio,discard" if number < RINGS_USED_FULLY else ""),
                       f"{disk}.rings": rings_negotiated(*ring[:3]), f"{disk}.tags": ring[3] if ring[2] else ring[3] // 2}
    parameters[f"{name_of(len(RINGS) - 1)}.run"] += ",all_at_once"
    with Devices(options.vblk, folder, as_toml(devices)) as server:
        names = ",".join(name_of(number) for number in range(len(RINGS)))
        console, ended = guest.boot(disks, {"disks": names} | parameters)
        report_guest(report, "rings", console, ended, RINGS_USED_FULLY * 12 + len(RINGS) * 3 + 1)
        report.check("rings: server ends with status 0", server.stop() == 0, server.log.read_text())
        report.check("rings: server has nothing to complain of", is_clean(server.log.read_text()), server.log.read_text())
    for number, device in enumerate(devices):
        if number < RINGS_USED_FULLY:
            status, output = run("e2fsck", "-fn", device["image"])
            report.check(f"rings, {device['name']}: host's e2fsck finds nothing", status == 0, output)
        if device["format"] == "qcow2":
            check_qcow2(report, f"rings, {device['name']}", folder, device["image"])


def make_root_file_system(folder, image):
    """A raw image with a root file system, for tests/guest/root_init to be run from."""
    content = folder / "content"
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (content / name).mkdir(parents=True)
    (content / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (content / "bin/busybox").chmod(0o755)
    (content / "init").write_bytes((SOURCE / "root_init").read_bytes())
    (content / "init").chmod(0o755)
    (content / "content").write_bytes(os.urandom(5 * MIB))
    status, sums = run("md5sum", "content", cwd=content)
    (content / "content.md5").write_text(sums.replace(" content", " /content"))
    make_sparse(image, 96 * MIB)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", content, image)


def check_root_file_system(report, title, folder, image):
    """The host's view of what the guest has left in a raw image."""
    status, output = run("e2fsck", "-fn", image)
    report.check(f"{title}: host's e2fsck finds nothing", status == 0, output)
    made, sums = folder / "made-by-guest", folder / "sums"
    run("debugfs", "-R", f"dump /made-by-guest {made}", image)
    run("debugfs", "-R", f"dump /made-by-guest.md5 {sums}", image)
    status, output = run("md5sum", "-c", sums, cwd=folder)
    report.check(f"{title}: host reads what the guest wrote", status == 0, output)


def test_root_file_system(report, guest, options, folder, engine):
    """The host makes a root file system on a raw image, the guest boots from it and writes, the host checks it."""
    image, title = folder / "disk.img", f"{engine}, root on the disk"
    make_root_file_system(folder, image)
    with Server(options.vblk, [image, "--aio", engine, "--queues", 2], folder / "s", folder / "log") as server:
        console, ended = guest.boot([Disk(server.socket)], {"run": "rootfs"})
        report_guest(report, title, console, ended, 6)
        report.check(f"{title}: server ends with status 0", server.stop() == 0)
    check_root_file_system(report, title, folder, image)


def check_qcow2(report, title, folder, image, leaks_allowed=False):
    """qemu-img finds neither errors nor leaks; returns the disk as a raw image."""
    status, output = run("qemu-img", "check", image)
    allowed = (0, 3) if leaks_allowed else (0,)
    report.check(f"{title}: qemu-img check finds {'leaks at most' if leaks_allowed else 'nothing, not even leaks'}",
                 status in allowed, output)
    raw = folder / "disk.raw"
    status, output = run("qemu-img", "convert", "-O", "raw", image, raw)
    report.check(f"{title}: qemu-img reads it all", status == 0, output)
    return raw


def test_qcow2(report, guest, options, folder, engine):
    """An empty qcow2 disk: raw use over two queues, then a file system, whose files the host compares. Another one becomes larger
    under a mounted file system: the guest sees it by itself, and grows into it."""
    image, title = create_image(folder / "disk.qcow2", "qcow2", 256 * MIB), f"{engine}, qcow2"
    growing = create_image(folder / "growing.qcow2", "qcow2", 64 * MIB)
    parameters = {"disks": "vda,vdb", "vda.run": "identity,fio,discard,files", "serial": "qcow2", "cache": "write_back",
                  "vdb.run": "resize", "sectors": 160 * MIB // 512}
    arguments = [image, "--aio", engine, "--cache", "none", "--queues", 2, "--serial", "qcow2"]
    with Server(options.vblk, arguments, folder / "s", folder / "log") as server, \
            Server(options.vblk, [growing, "--aio", engine, "--queues", 2, "--monitor", folder / "m"], folder / "s2",
                   folder / "log2") as second:
        def grow():
            status, output = run(options.vblk, "ctl", folder / "m", "resize", "160M")
            report.check(f"{title}: ctl resize", status == 0, output)
        console, ended = guest.boot([Disk(server.socket), Disk(second.socket)], parameters, {"vdb": [grow]})
        report_guest(report, title, console, ended, 25)
        for one in (server, second):
            report.check(f"{title}: server ends with status 0", one.stop() == 0, one.log.read_text())
    raw = check_qcow2(report, f"{title} that grows", folder, growing)
    report.check(f"{title} that grows: the host sees the new size", raw.stat().st_size == 160 * MIB)
    status, output = run("e2fsck", "-fn", raw)
    report.check(f"{title} that grows: host's e2fsck finds nothing", status == 0, output)
    raw = check_qcow2(report, title, folder, image)
    status, output = run("e2fsck", "-fn", raw)
    report.check(f"{title}: host's e2fsck finds nothing", status == 0, output)
    files = folder / "files"
    files.mkdir()
    run("debugfs", "-R", f"rdump / {files}", raw)
    status, output = run("md5sum", "-c", "--quiet", "SUMS", cwd=files)
    report.check(f"{title}: host reads the guest's files", status == 0, output)


def test_root_on_overlay(report, guest, options, folder, engine):
    """A root file system on an overlay on an overlay on a raw image: the guest boots, and changes the top alone."""
    base, middle, top, title = (folder / "base.img", folder / "middle.qcow2", folder / "top.qcow2",
                                f"{engine}, root on an overlay")
    make_root_file_system(folder, base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.name, middle, cwd=folder)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", middle.name, top, cwd=folder)
    before = base.read_bytes(), middle.read_bytes()
    with Server(options.vblk, [top, "--aio", engine, "--queues", 2], folder / "s", folder / "log") as server:
        console, ended = guest.boot([Disk(server.socket)], {"run": "rootfs"})
        report_guest(report, title, console, ended, 6)
        report.check(f"{title}: server ends with status 0", server.stop() == 0)
    report.check(f"{title}: what lies below is unchanged", before == (base.read_bytes(), middle.read_bytes()))
    check_root_file_system(report, title, folder, check_qcow2(report, title, folder, top))


def ask(monitor, command):
    """What `vblk ctl` would ask, without a process for it; {} where nobody answers."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(monitor))
            connection.sendall(json.dumps({"execute": command}).encode() + b"\n")
            return json.loads(connection.makefile().readline())["return"]
    except (OSError, ValueError, KeyError):
        return {}


KILLS = 20


class KilledServer:
    """A disk whose server is killed again and again, with requests in flight where there are some."""

    # An emulated processor is slow, and the disk is not: without this, seldom is anything in flight.
    SLOW_DISK = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=pwritev2", "-e",
                 "inject=pwritev2:delay_enter=20ms"]

    def __init__(self, vblk, folder, form, packed):
        folder.mkdir()
        self.vblk, self.folder, self.form, self.packed = vblk, folder, form, packed
        self.image = create_image(folder / "disk", form, 192 * MIB)
        self.servers = []
        self.serve()

    def serve(self):
        arguments = [self.image, "--format", self.form, "--aio", "threads", "--cache", "none", "--queues", 2, "--iothreads", 2,
                     "--monitor", self.folder / "m"]
        self.servers.append(Server(self.vblk, arguments, self.folder / "s", self.folder / f"log-{len(self.servers)}",
                                   self.SLOW_DISK))

    def disk(self):
        return Disk(self.folder / "s", chardev="reconnect=1", properties="packed=on" if self.packed else "")

    def is_in_flight(self):
        return sum(queue["in-flight"] for queue in ask(self.folder / "m", "query-status").get("queues", [])) > 4

    def kill_and_restart(self):
        # QEMU tries once a second.
        for _ in range(KILLS):
            wait_until(self.is_in_flight, 5)
            time.sleep(random.uniform(0, 0.3))
            self.servers[-1].kill()
            self.serve()

    def log(self):
        return "\n".join(server.log.read_text() for server in self.servers)


def test_recovery(report, guest, options, folder, _):
    """The servers of four disks are killed again and again under a guest that writes and verifies, and the next ones go on."""
    killed = []
    try:
        for form, packed in itertools.product(("raw", "qcow2"), (False, True)):
            killed.append(KilledServer(options.vblk, folder / f"{form}-{'packed' if packed else 'split'}", form, packed))
        names = [name_of(number) for number in range(len(killed))]
        parameters = {"disks": "+".join(names), "run": "rings,recovery"}
        parameters |= {f"{name}.rings": rings_negotiated(one.packed) for name, one in zip(names, killed)}
        start = time.monotonic()
        console, ended = guest.boot([one.disk() for one in killed], parameters,
                                    {name: [one.kill_and_restart] for name, one in zip(names, killed)})
        report_guest(report, "servers that are killed", console, ended, 11 * len(killed))
        for one in killed:
            title, log = f"a server that is killed, {one.folder.name}", one.log()
            report.check(f"{title}: it was killed", len(one.servers) == KILLS + 1, len(one.servers))
            found = sum(int(count) for count in re.findall(r"(\d+) requests were in flight when", log))
            report.check(f"{title}: requests were in flight", found > 0, log)
            print(f"# {title}: {KILLS} kills, {found} requests recovered", file=sys.stderr, flush=True)
            report.check(f"{title}: the last server ends with status 0", one.servers[-1].stop() == 0, log)
        print(f"# {len(killed)} disks, {KILLS} kills of each: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    finally:
        for one in killed:
            one.servers[-1].kill()
    for one in killed:
        title = f"a server that is killed, {one.folder.name}"
        raw = one.image if one.form == "raw" else check_qcow2(report, title, folder, one.image, leaks_allowed=True)
        status, output = run("e2fsck", "-fn", raw)
        report.check(f"{title}: host's e2fsck finds nothing", status == 0, output)


class MigratingGuest(RunningGuest):
    """A guest that goes from one QEMU to the next, and each time to the other of two servers of each of its disks.

    `disks` is one list of them for each side. Its memory is copied, or, if `is_shared`, one that all QEMUs have.
    """

    def __init__(self, system, disks, parameters, folder, is_shared, on_ready):
        self.system, self.disks, self.parameters, self.folder = system, disks, parameters, folder
        self.is_shared = is_shared
        self.memory = f"memory-backend-file,share=on,mem-path={folder}/memory" if is_shared else "memory-backend-memfd,share=on"
        super().__init__(self.command(0), on_ready)

    def command(self, number, *incoming):
        return self.system.command(self.disks[number % 2], self.parameters,
                                   ("-qmp", f"unix:{self.folder}/qmp-{number},server=on,wait=off", *incoming),
                                   self.memory)

    def migrate(self):
        """To a QEMU on the other servers; what the old one says of it in the end."""
        number = len(self.processes) - 1
        path = self.folder / f"migrate-{number}"
        self.start(self.command(number + 1, "-incoming", "defer"))
        capabilities = [{"capability": "x-ignore-shared", "state": self.is_shared}]
        with contextlib.closing(Qmp(self.folder / f"qmp-{number + 1}")) as qmp:
            qmp.must("migrate-set-capabilities", capabilities=capabilities)
            qmp.must("migrate-incoming", uri=f"unix:{path}")
        with contextlib.closing(Qmp(self.folder / f"qmp-{number}")) as qmp:
            qmp.must("migrate-set-capabilities", capabilities=capabilities)
            qmp.must("migrate-set-parameters", **{"downtime-limit": 2000, "max-bandwidth": 1 << 30})
            status = qmp("migrate", uri=f"unix:{path}")

            def is_over():
                nonlocal status
                status = qmp.must("query-migrate")
                return status.get("status") in ("completed", "failed", "cancelled")
            if "error" not in status:
                wait_until(is_over, 120)
            with contextlib.suppress(OSError):
                qmp("quit")
        self.processes[number].wait(30)
        return status


MIGRATIONS = 3
COPYING_TRIES = 2


class Trial:
    """A report that is kept until it is known whether it counts."""

    def __init__(self):
        self.checks = []

    def check(self, *check):
        self.checks.append(check)
        return check[1]

    def passed(self):
        return all(passed for _, passed, *_ in self.checks)


def test_handover(report, guest, options, folder, engines):
    """A guest that writes and verifies goes back and forth between two QEMUs, and two servers of each of its disks."""
    migrate_between_servers(report, "handover", guest, options, folder, engines, is_shared=True)


def test_migration(report, guest, options, folder, engines):
    """As test_handover(), and its memory is copied meanwhile.

    Without KVM it is not only the servers that can fail: QEMU's emulated processors lose a store of the guest's now and then
    while memory is copied, whatever its disks (docs/testing.md, "Migration without KVM"). A guest that is broken once, and not
    again, counts as QEMU's.
    """
    for number in range(COPYING_TRIES):
        (folder / str(number)).mkdir()
        trial = Trial()
        try:
            migrate_between_servers(trial, "migration", guest, options, folder / str(number), engines, is_shared=False)
        except Exception:  # a guest that is broken may be gone in the middle of it
            trial.check("migration runs", False, traceback.format_exc())
        if trial.passed():
            break
        for name, passed, *detail in trial.checks:
            if not passed:
                print(f"# try {number + 1} of {COPYING_TRIES}: not ok: {name}", *detail, sep="\n", file=sys.stderr, flush=True)
    for check in trial.checks:
        report.check(*check)


def migrate_between_servers(report, title, guest, options, folder, engines, is_shared):
    kinds, servers = (("raw", False), ("qcow2", True)), []
    names = [name_of(number) for number in range(len(kinds))]
    arrived, over = threading.Barrier(len(kinds) + 1), threading.Event()

    def arrive():
        arrived.wait(BOOT_SECONDS_MAX)
        over.wait(BOOT_SECONDS_MAX)
    try:
        for number, (form, packed) in enumerate(kinds):
            create_image(folder / form, form, 192 * MIB)
            arguments = [folder / form, "--format", form, "--aio", engines[-number], "--queues", 2, "--iothreads", 2,
                         "--migration", "on"]
            servers.append([Server(options.vblk, arguments, folder / f"{form}-{side}", folder / f"log-{form}-{side}")
                            for side in "ab"])
        disks = [[Disk(servers[number][side].socket, properties="packed=on" if packed else "")
                  for number, (_, packed) in enumerate(kinds)] for side in range(2)]
        parameters = {"disks": "+".join(names), "run": "rings,recovery"}
        parameters |= {f"{name}.rings": rings_negotiated(packed) for name, (_, packed) in zip(names, kinds)}
        with MigratingGuest(guest, disks, parameters, folder, is_shared, {name: [arrive] for name in names}) as migrating:
            pauses = []
            wait_until(lambda: arrived.n_waiting == len(kinds) or migrating.processes[0].poll() is not None, BOOT_SECONDS_MAX)
            if arrived.n_waiting < len(kinds):
                arrived.abort()
            with contextlib.suppress(threading.BrokenBarrierError):
                arrived.wait()
                for number in range(MIGRATIONS):
                    time.sleep(random.uniform(1, 2))
                    status = migrating.migrate()
                    pauses.append(status.get("downtime"))
                    report.check(f"{title}: number {number + 1} is completed", status.get("status") == "completed", status)
            over.set()
            console, ended = migrating.finish()
        report_guest(report, title, console, ended, 11 * len(kinds))
        print(f"# {title}: {len(pauses)} migrations, downtime {pauses} ms", file=sys.stderr, flush=True)
        for (form, _), pair in zip(kinds, servers):
            logs = "\n".join(server.log.read_text() for server in pair)
            for server in pair:
                report.check(f"{title} on {form}: server {server.socket.name} ends with status 0", server.stop() == 0, logs)
            report.check(f"{title} on {form}: the disk was taken and given up each time",
                         logs.count("is taken") == logs.count("is given up") > MIGRATIONS, logs)
    finally:
        over.set()
        for server in itertools.chain(*servers):
            server.kill()
    for form, _ in kinds:
        raw = folder / form if form == "raw" else check_qcow2(report, f"{title} on {form}", folder, folder / form)
        status, output = run("e2fsck", "-fn", raw)
        report.check(f"{title} on {form}: host's e2fsck finds nothing", status == 0, output)


RESTARTS = 10
SWITCHES = 100
PAUSES = 10
PLUGS = 4
# With a listening socket that is passed on; each takes what QEMU waits before it connects again, a second.
RESTARTS_OF_RECONNECTING = 3
# What an orderly restart, and a change of engines, may cost the guest. Held to the best of the former and the half of the
# latter that are better: beside other tests a processor may be away for longer than that.
PAUSE_MS_MAX = 100


class ReplacedServer:
    """A disk whose server is ended in an orderly way, again and again, and a next one started right after it."""

    def __init__(self, vblk, arguments, folder):
        self.vblk, self.arguments, self.folder, self.socket = vblk, arguments, folder, folder / "s"
        folder.mkdir()
        self.servers, self.statuses = [], []

    def serve(self):
        log = self.folder / f"log-{len(self.servers)}"
        self.servers.append(self.start(log))

    def end(self):
        process = self.servers[-1].process
        limit = threading.Timer(20, process.kill)
        limit.start()
        process.send_signal(signal.SIGTERM)
        # Without a limit of its own, which would look only every 50 ms.
        self.statuses.append(process.wait())
        limit.cancel()

    def replace(self, count, pause_seconds):
        for _ in range(count):
            time.sleep(random.uniform(*pause_seconds))
            self.end()
            self.serve()

    def log(self):
        return "\n".join(server.log.read_text() for server in self.servers)

    def kill(self):
        for server in self.servers:
            server.kill()


class ConnectingServer(ReplacedServer):
    """QEMU listens, and each server is given a connection to it (--fd): QEMU waits for nobody."""

    chardev = "server=on,wait=off"

    def start(self, log):
        with socket.socket(socket.AF_UNIX) as connection:
            # The path is there a moment before somebody listens.
            if not wait_until(lambda: connection.connect_ex(str(self.socket)) == 0, 30):
                raise RuntimeError("QEMU does not listen")
            return Server(self.vblk, self.arguments, self.socket, log, connection=connection)


class ListeningServer(ReplacedServer):
    """Each server is given the socket that listens, as systemd would pass it; QEMU connects again."""

    chardev = "reconnect=1"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.socket))
        self.listener.listen(4)

    def start(self, log):
        return Server(self.vblk, self.arguments, self.socket, log, listener=self.listener)


def waits_ms(console, disk):
    """What the guest has told of its longest waits, the longest first, each time that it was asked."""
    return [[int(word) / 1000 for word in line.split()] for line in re.findall(rf"VBLK-GUEST: NOTE {disk} waits(.*)", console)]


def test_changes(report, guest, options, folder, engine):
    """What an operator does to a disk that is in use, all in one guest that writes and verifies: vda's server is replaced; vdb's
    engines are changed, it is paused, resumed and resized; vdc's and vdd's servers are replaced, their sockets kept; vde and vdf
    are unplugged and plugged in. What the guest has to wait is measured by it."""
    forms = ("qcow2", "qcow2", "raw", "qcow2", "raw", "qcow2")
    images = [create_image(folder / f"disk-{number}", form, 192 * MIB) for number, form in enumerate(forms)]
    common = ["--aio", engine, "--queues", 2, "--iothreads", 2]
    connecting = ConnectingServer(options.vblk, [images[0], "--format", forms[0], *common], folder / "a")
    listening = [ListeningServer(options.vblk, [images[number], "--format", forms[number], *common], folder / name_of(number))
                 for number in (2, 3)]
    monitor, failures, paused_ms = folder / "m", [], []

    def ctl(*words):
        status, output = run(options.vblk, "ctl", monitor, *words)
        if status != 0:
            failures.append(f"{words}: {output}")

    def switch():
        for _ in range(SWITCHES):
            kinds = random.sample(("read", "write", "flush"), random.randint(1, 3))
            some = ",".join(f"{kind}={random.choice(ENGINES)}" for kind in kinds)
            ctl("set-aio", random.choice((random.choice(ENGINES), some)))
            time.sleep(random.uniform(0, 0.03))

    def pause_and_resize():
        for number in range(1, PAUSES + 1):
            time.sleep(random.uniform(0, 0.2))
            size = f"{192 + number}M"
            if number % 2:
                ctl("resize", size)
            begun = time.monotonic()
            ctl("pause")
            time.sleep(random.uniform(0, 0.05))
            if number % 2 == 0:
                ctl("resize", size)
            ctl("resume")
            paused_ms.append((time.monotonic() - begun) * 1000)

    def unplug(number):
        time.sleep(random.uniform(0, 0.5))
        qmp.must("device_del", id=f"d{number}")
        qmp.wait_for("DEVICE_DELETED", device=f"d{number}")

    def plug(number, is_new_connection):
        # Linux ignores what comes into a slot for a second after it has turned its power off (pciehp, remove_board()).
        time.sleep(2.5)
        if is_new_connection:
            qmp.must("chardev-remove", id=f"c{number}")
            address = {"type": "unix", "data": {"path": str(folder / f"s{number}")}}
            qmp.must("chardev-add", id=f"c{number}", backend={"type": "socket", "data": {"addr": address, "server": False}})
        qmp.must("device_add", driver="vhost-user-blk-pci", id=f"d{number}", chardev=f"c{number}", bus=f"slot{number}",
                 **{"num-queues": 2})

    def plugs(number):
        return [action for turn in range(PLUGS)
                for action in (lambda: unplug(number), lambda is_new=turn % 2 == 1: plug(number, is_new))]

    pluggable = (4, 5)
    actions = {"vda": [lambda: time.sleep(1.5), lambda: connecting.replace(RESTARTS, (0.1, 0.5))],
               "vdb": [switch, pause_and_resize]}
    actions |= {name_of(2 + i): [lambda one=one: one.replace(RESTARTS_OF_RECONNECTING, (1.2, 1.5))]
                for i, one in enumerate(listening)}
    actions |= {name_of(number): plugs(number) for number in pluggable}
    # One is unplugged after the other: were both away, the first to come would get the first one's name.
    parameters = {"disks": "vda,vdb,vdc+vdd+vde,vdf", "vda.run": "load,load,complaints", "vdb.run": "load,load,size,complaints",
                  "vdc.run": "load,complaints", "vdd.run": "load,complaints", "vde.run": "hotplug", "vdf.run": "hotplug",
                  "unplugged": "vd[ef]", "rounds": PLUGS, "sectors": (192 + PAUSES) * MIB // 512}
    # Linux counts what is behind a port last.
    disks = [Disk(connecting.socket, chardev=connecting.chardev), Disk(folder / "s1"),
             *(Disk(one.socket, chardev=one.chardev) for one in listening),
             *(Disk(folder / f"s{number}", properties=f"bus=slot{number}") for number in pluggable)]
    more = (*(word for number in pluggable for word in ("-device", f"pcie-root-port,id=slot{number},slot={number}")),
            "-qmp", f"unix:{folder}/qmp,server=on,wait=off")
    with contextlib.ExitStack() as stack:
        for one in (connecting, *listening):
            stack.callback(one.kill)
        changing = stack.enter_context(Server(options.vblk, [images[1], "--format", "qcow2", *common, "--monitor", monitor],
                                              folder / "s1", folder / "log1"))
        plugged = [stack.enter_context(Server(options.vblk, [images[number], "--format", forms[number], *common],
                                              folder / f"s{number}", folder / f"log{number}")) for number in pluggable]
        for one in listening:
            one.serve()
        running = stack.enter_context(RunningGuest(guest.command(disks, parameters, more), actions))
        try:
            connecting.serve()
            qmp = Qmp(folder / "qmp")
        except (OSError, RuntimeError) as error:
            running.kill()
            raise RuntimeError(f"QEMU does not start: {running.console.decode()}") from error
        console, ended = running.finish()
        report_guest(report, "changes", console, ended, 4 + 5 + len(listening) * 3 + len(pluggable) * (1 + 3 * PLUGS))

        calm, replaced = waits_ms(console, "vda")
        switched, paused = waits_ms(console, "vdb")
        (reconnected,), (on_qcow2,) = waits_ms(console, "vdc"), waits_ms(console, "vdd")
        print(f"# longest wait of the guest while nothing happens: {calm[0]:.0f} ms", file=sys.stderr)
        for title, waits, count in (("a next server connects", replaced, RESTARTS),
                                    ("QEMU connects to a next server", reconnected, RESTARTS_OF_RECONNECTING),
                                    ("QEMU connects to a next server of qcow2", on_qcow2, RESTARTS_OF_RECONNECTING),
                                    ("engines are changed", switched, SWITCHES), ("it is paused", paused, PAUSES)):
            print(f"# longest waits while {title}, {count} times: {waits[count - 1]:.0f} to {waits[0]:.0f} ms, median "
                  f"{statistics.median(waits[:count]):.0f}", file=sys.stderr)
        print(f"# it was paused for {min(paused_ms):.0f} to {max(paused_ms):.0f} ms", file=sys.stderr, flush=True)

        last = connecting.servers[-1].process.wait(20)
        connecting.statuses.append(last)
        for one in listening:
            one.end()
        for one, title in ((connecting, "connects"), (listening[0], "listens"), (listening[1], "listens, on qcow2,")):
            report.check(f"a server that {title} is replaced: each ends with status 0", not any(one.statuses), one.statuses)
            report.check(f"a server that {title} is replaced: nothing is left in flight, and nothing to complain of",
                         is_clean(one.log()) and "were in flight" not in one.log(), one.log())
        report.check(f"half of the restarts take less than {PAUSE_MS_MAX} ms for the guest",
                     replaced[RESTARTS // 2] < PAUSE_MS_MAX, replaced)
        report.check(f"half of the changes of engines take less than {PAUSE_MS_MAX} ms for the guest",
                     switched[SWITCHES // 2] < PAUSE_MS_MAX, switched)
        report.check("every change of engine and size, every pause and its end is carried out", not failures, failures)
        for server, title in ((changing, "that is changed"), (plugged[0], "whose disk is unplugged"),
                              (plugged[1], "whose qcow2 disk is unplugged")):
            log = server.log.read_text()
            report.check(f"the server {title} has nothing to complain of", is_clean(log), log)
            report.check(f"the server {title} ends with status 0", server.stop() == 0, log)
        connections = [server.log.read_text().count("a frontend has connected") for server in plugged]
        report.check("they were found on the connection that they had, and on new ones",
                     connections == [1 + PLUGS // 2] * len(plugged), connections)
    for number in (number for number, form in enumerate(forms) if form == "qcow2"):
        check_qcow2(report, f"changes, {name_of(number)}", folder, images[number])


def test_two_guests(report, guest, options, folder, engine):
    """Two guests on two devices of one process, raw and qcow2, at the same time."""
    devices = [{"name": f"guest-{number}", "image": create_image(folder / f"disk-{number}", form, 128 * MIB), "format": form,
                "socket-path": folder / f"s{number}", "queues": 2, "aio": engine} for number, form in enumerate(("raw", "qcow2"))]
    with Devices(options.vblk, folder, as_toml(devices)) as server:
        guests = [RunningGuest(guest.command([Disk(device["socket-path"])], {"run": "files"})) for device in devices]
        for number, running in enumerate(guests):
            report_guest(report, f"{engine}, guest {number} of two on one process", *running.finish(), 9)
        report.check(f"{engine}: the server of both ends with 0", server.stop() == 0, server.log.read_text())
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", folder / "disk-1", folder / "raw-1")
    for image in ("disk-0", "raw-1"):
        status, output = run("e2fsck", "-fn", folder / image)
        report.check(f"{engine}: host's e2fsck finds nothing on {image}", status == 0, output)


def test_full_disk(report, guest, options, folder, engine):
    """The host's file systems are full under a guest's disks, raw and qcow2: each waits, and goes on when there is space, without
    an error."""
    name = f"{engine}, full disks under the guest"
    if os.geteuid() != 0:
        report.skip(name, "loop devices need root")
        return
    with contextlib.ExitStack() as stack:
        disks = [FullDisk(stack, options.vblk, folder / form, form, engine) for form in ("raw", "qcow2")]
        console, ended = guest.boot([Disk(disk.server.socket) for disk in disks], {"disks": "vda+vdb", "run": "files"})
        report_guest(report, name, console, ended, 2 * 9)
        for disk in disks:
            log = disk.server.log.read_text()
            report.check(f"{name}: the device paused, {disk.form}", disk.paused.is_set(), log)
            report.check(f"{name}: the server ends with 0, {disk.form}", disk.server.stop() == 0, log)


class FullDisk:
    """A disk on a file system of its own, which is too small for it. When it has paused for that, space is made."""

    SCRIPT = """mount -o loop "$1/fs" "$1/small" && qemu-img create -q -f "$2" "$1/small/disk" 128M || exit 1
        free=$(($(stat -f -c '%a * %S' "$1/small")))
        fallocate -l $((free - 6 * 1048576)) "$1/small/filler" || exit 1
        shift 2; exec "$@" """

    def __init__(self, stack, vblk, folder, form, engine):
        (folder / "small").mkdir(parents=True)
        self.folder, self.form, self.paused = folder, form, threading.Event()
        make_sparse(folder / "fs", 64 * MIB)
        run("mkfs.ext4", "-q", "-m", "0", folder / "fs")
        arguments = [folder / "small" / "disk", "--format", form, "--aio", engine, "--queues", 2, "--monitor", folder / "m"]
        self.server = stack.enter_context(Server(
            vblk, arguments, folder / "s", folder / "log", ["unshare", "-m", "bash", "-c", self.SCRIPT, "-", str(folder), form],
            wrapper_stays=False))
        watcher = threading.Thread(target=self._make_space)
        watcher.start()
        stack.callback(watcher.join)
        stack.callback(self.server.kill)  # before that

    def _make_space(self):
        for _ in range(BOOT_SECONDS_MAX * 2):
            time.sleep(0.5)
            if self.server.process.poll() is not None:
                return
            if ask(self.folder / "m", "query-status").get("state") == "paused":
                self.paused.set()
                time.sleep(3)
                run("nsenter", "-t", self.server.process.pid, "-m", "rm", self.folder / "small" / "filler")
                return


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, help="the program under test")
    parser.add_argument("--cache", required=True, type=Path, help="folder that keeps the guest's kernel")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: all")
    parser.add_argument("--only", metavar="NAME", help="only the batches with this in their names: qcow2, overlay")
    parser.add_argument("--beside", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="so many batches beside each other (default: one for each processor)")
    options = parser.parse_args()
    os.environ["PATH"] += ":/sbin:/usr/sbin"

    report, guest, engines = Report(), GuestSystem(options.cache), options.engine or list(ENGINES)
    # What happens in the device, and the formats above the engines, which tests/interop runs on all of them: on one engine each.
    first, last = engines[0], engines[-1]
    batches = [(test_recovery, None), (test_rings, engines), (test_handover, engines), (test_migration, engines),
               (test_modes, engines)]
    batches += [(test_engine, engine) for engine in engines]
    batches += [(test_qcow2, last), (test_two_guests, last), (test_full_disk, first), (test_root_file_system, last),
                (test_root_on_overlay, first)]
    # What measures, alone.
    for beside, chosen in ((options.beside, batches), (1, [(test_changes, last)])):
        run_batches(report, guest, options, [batch for batch in chosen if (options.only or "") in batch[0].__name__], beside)
    report.exit()


def run_batches(report, guest, options, batches, beside):
    """All of them, so many beside each other, those first that stand first."""
    waiting = iter(batches)

    def run_next():
        with contextlib.suppress(StopIteration):
            while True:
                run_batch(report, guest, options, *next(waiting))
    threads = [threading.Thread(target=run_next) for _ in range(beside)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_batch(report, guest, options, test, about):
    title = f"{test.__name__} on {about if isinstance(about, str) else 'several engines'}"
    start = time.monotonic()
    with Folder() as folder:
        try:
            test(report, guest, options, folder, about)
        except Exception as error:  # a lane that ends would take the batches behind it along
            report.check(f"{title} runs", False, "".join(traceback.format_exception(error)))
    print(f"# {title}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
