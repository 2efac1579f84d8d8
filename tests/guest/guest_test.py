#!/usr/bin/python3
"""A real guest on a vblk disk: Debian's cloud kernel in QEMU without KVM, one boot per batch of scenarios.

The guest's first process (tests/guest/init, tests/guest/root_init) reports each check on the serial console; this
program serves the disk, watches the console, and then looks at the image from the host's side. Prints TAP.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import ENGINES, Folder, KernelTrace, Report, Server, allocated_bytes, make_sparse, run, wait_until  # noqa: E402

SOURCE = Path(__file__).resolve().parent
SCRIPTS = SOURCE.parent.parent / "scripts"
MIB = 1 << 20
# An emulated processor on a busy machine: a boot takes about 20 s alone on two cores.
BOOT_SECONDS_MAX = 420


class Guest:
    """The kernel and initial RAM file system, made once per build folder."""

    def __init__(self, cache):
        cache.mkdir(parents=True, exist_ok=True)
        kernel = cache / "kernel"
        self.initramfs = cache / "initramfs.gz"
        subprocess.run([SCRIPTS / "fetch_guest_kernel.sh", kernel], check=True, stdout=sys.stderr)
        subprocess.run([SCRIPTS / "make_guest_initramfs.sh", kernel, SOURCE / "init", self.initramfs], check=True)
        self.vmlinuz = next((kernel / "boot").glob("vmlinuz-*"))

    def command(self, socket, queue_count, parameters, reconnects=False, properties=""):
        """Of QEMU. `reconnects`: it goes on with whoever listens at `socket` next, when its backend has gone. `properties`:
        more of the device."""
        words = " ".join(f"vblk.{key}={value}" for key, value in parameters.items())
        return [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "512",
            "-machine", "q35,memory-backend=mem", "-object", "memory-backend-memfd,id=mem,size=512M,share=on",
            "-chardev", f"socket,id=c,path={socket}" + (",reconnect=1" if reconnects else ""),
            "-device", f"vhost-user-blk-pci,chardev=c,num-queues={queue_count}" + (f",{properties}" if properties else ""),
            "-kernel", str(self.vmlinuz), "-initrd", str(self.initramfs),
            "-append", f"console=ttyS0 quiet panic=-1 {words}",
            "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio", "-net", "none",
        ]

    def boot(self, socket, queue_count, parameters, on_ready=None, reconnects=False, properties=""):
        """Boots, waits for power-off; returns (console text, whether it ended in time).

        `on_ready` is called, once, when the guest says that it waits for the host. The rest is as for command().
        """
        command = self.command(socket, queue_count, parameters, reconnects, properties)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        limit = threading.Timer(BOOT_SECONDS_MAX, process.kill)
        limit.start()
        console = b""
        for line in process.stdout:
            console += line
            if on_ready and b"VBLK-GUEST: READY" in line:
                on_ready()
                on_ready = None
        process.wait()
        ended = limit.is_alive()
        limit.cancel()
        return console.decode(errors="replace").replace("\r", ""), ended


def report_guest(report, title, console, ended, expected):
    """One TAP line per check that the guest reported, and one that it reached its end having reported enough."""
    results = re.findall(r"VBLK-GUEST: (PASS|FAIL) (.*)", console)
    for result, name in results:
        report.check(f"{title}: {name}", result == "PASS", console if result == "FAIL" else "")
    complete = ended and "VBLK-GUEST: END" in console and len(results) >= expected
    report.check(f"{title}: guest ran to its end", complete, console)
    return complete


def test_engine(report, guest, options, folder, engine):
    """Everything that writes, on one engine and the page cache bypassed; then the host's view of the image."""
    image = folder / "disk.img"
    make_sparse(image, 256 * MIB)
    parameters = {"run": "identity,files,fio,durability,discard", "serial": f"guest-{engine}", "cache": "write_back"}
    arguments = [image, "--aio", engine, "--cache", "none", "--queues", 2, "--serial", f"guest-{engine}"]
    with Server(options.vblk, arguments, folder / "s", folder / "log") as server:
        console, ended = guest.boot(server.socket, 2, parameters)
        report_guest(report, engine, console, ended, 17)
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


def test_file_system_survives(report, guest, options, folder, engine):
    """The image that a guest has filled, checked by the host."""
    image = folder / "disk.img"
    make_sparse(image, 128 * MIB)
    with Server(options.vblk, [image, "--aio", engine, "--queues", 2], folder / "s", folder / "log") as server:
        console, ended = guest.boot(server.socket, 2, {"run": "files"})
        report_guest(report, f"{engine}, left for the host", console, ended, 9)
        # Killed, not asked: what the guest flushed must be in the image anyway.
        server.kill()
    status, output = run("e2fsck", "-fn", image)
    report.check(f"{engine}: host's e2fsck finds nothing", status == 0, output)


# What a flush looks like to the kernel, per engine, as strace prints it. io_uring's submissions lie in shared memory,
# where strace sees nothing; there the kernel's own tracepoint is counted.
FLUSH_CALL = {"threads": re.compile(r"\bfdatasync\("), "native": re.compile(r"IOCB_CMD_FD?SYNC")}
DURABLE_WRITES = 50


def test_durability(report, guest, options, folder, engine):
    """Each of the guest's fifty fsyncs must be a flush at the host's kernel: the promise that others break."""
    image, trace = folder / "disk.img", folder / "trace"
    name = f"{engine}: {DURABLE_WRITES} fsyncs of the guest are as many flushes at the host"
    make_sparse(image, 32 * MIB)
    wrapper = ["strace", "-f", "-qq", "-e", "trace=fdatasync,fsync,io_submit", "-o", str(trace)]
    with contextlib.ExitStack() as stack:
        if engine == "io_uring":
            wrapper = []
            kernel = stack.enter_context(KernelTrace(folder, "io_uring/io_uring_submit_req"))
            if kernel.refusal:
                report.skip(name, kernel.refusal)
                return
        arguments = [image, "--aio", engine, "--cache", "none", "--queues", 2]
        with Server(options.vblk, arguments, folder / "s", folder / "log", wrapper) as server:
            console, ended = guest.boot(server.socket, 2, {"run": "durability"})
            report_guest(report, f"{engine} under trace", console, ended, 2)
            server.stop()
    lines = trace.read_text(errors="replace").splitlines()
    is_flush = FLUSH_CALL.get(engine, re.compile(r"\bFSYNC\b|opcode 3\b"))
    count = sum(len(is_flush.findall(line)) for line in lines)
    report.check(name, count >= DURABLE_WRITES, f"{count} flushes in {len(lines)} traced lines\n" + "\n".join(lines[-5:]))


def test_read_only(report, guest, options, folder, engine):
    image, content = folder / "disk.img", folder / "content"
    content.mkdir()
    (content / "message").write_text("written by the host\n")
    make_sparse(image, 32 * MIB)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", content, image)
    before = image.read_bytes()
    with Server(options.vblk, [image, "--aio", engine, "--read-only"], folder / "s", folder / "log") as server:
        console, ended = guest.boot(server.socket, 1, {"run": "readonly"})
        report_guest(report, f"{engine}, read-only", console, ended, 8)
    report.check(f"{engine}, read-only: image is unchanged", image.read_bytes() == before)


def test_write_through(report, guest, options, folder, engine):
    image = folder / "disk.img"
    make_sparse(image, 128 * MIB)
    parameters = {"run": "identity,files", "serial": "wt", "cache": "write_through"}
    arguments = [image, "--aio", engine, "--cache", "directsync", "--queues", 2, "--serial", "wt"]
    with Server(options.vblk, arguments, folder / "s", folder / "log") as server:
        console, ended = guest.boot(server.socket, 2, parameters)
        report_guest(report, f"{engine}, directsync", console, ended, 12)


# Properties of the device, and what the guest is then to have negotiated.
PACKED_RINGS = {
    "packed=on": "packed,event_idx,indirect",
    "packed=on,event_idx=off,queue-size=64": "packed,indirect",
    "packed=on,indirect_desc=off,queue-size=256": "packed,event_idx",
}


def test_packed(report, guest, options, folder, engine):
    """Packed rings: raw use over two queues and a file system, with and without what a ring may have besides."""
    for properties, rings in PACKED_RINGS.items():
        image, title = folder / "disk.img", f"{engine}, {properties}"
        make_sparse(image, 256 * MIB)
        parameters = {"run": "rings,files,fio,durability,discard", "rings": rings}
        arguments = [image, "--aio", engine, "--cache", "none", "--queues", 2, "--queue-size", 256]
        with Server(options.vblk, arguments, folder / "s", folder / "log") as server:
            console, ended = guest.boot(server.socket, 2, parameters, properties=properties)
            report_guest(report, title, console, ended, 15)
            report.check(f"{title}: server ends with status 0", server.stop() == 0, server.log.read_text())
        status, output = run("e2fsck", "-fn", image)
        report.check(f"{title}: host's e2fsck finds nothing", status == 0, output)


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
        console, ended = guest.boot(server.socket, 2, {"run": "rootfs"})
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
    """An empty qcow2 disk: raw use over two queues, then a file system, whose files the host compares."""
    image, title = folder / "disk.qcow2", f"{engine}, qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, 256 * MIB)
    parameters = {"run": "identity,fio,durability,discard,files", "serial": "qcow2", "cache": "write_back"}
    arguments = [image, "--aio", engine, "--cache", "none", "--queues", 2, "--serial", "qcow2"]
    with Server(options.vblk, arguments, folder / "s", folder / "log") as server:
        console, ended = guest.boot(server.socket, 2, parameters)
        report_guest(report, title, console, ended, 17)
        report.check(f"{title}: server ends with status 0", server.stop() == 0, server.log.read_text())
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
        console, ended = guest.boot(server.socket, 2, {"run": "rootfs"})
        report_guest(report, title, console, ended, 6)
        report.check(f"{title}: server ends with status 0", server.stop() == 0)
    report.check(f"{title}: what lies below is unchanged", before == (base.read_bytes(), middle.read_bytes()))
    check_root_file_system(report, title, folder, check_qcow2(report, title, folder, top))


def test_resize(report, guest, options, folder, engine):
    """A disk that becomes larger under a mounted file system: the guest sees it by itself, and grows into it."""
    image, title = folder / "disk.qcow2", f"{engine}, a disk that grows"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, 64 * MIB)
    arguments = [image, "--aio", engine, "--queues", 2, "--monitor", folder / "m"]
    with Server(options.vblk, arguments, folder / "s", folder / "log") as server:
        def grow():
            status, output = run(options.vblk, "ctl", folder / "m", "resize", "160M")
            report.check(f"{title}: ctl resize", status == 0, output)
        console, ended = guest.boot(server.socket, 2, {"run": "resize", "sectors": 160 * MIB // 512}, grow)
        report_guest(report, title, console, ended, 8)
        report.check(f"{title}: server ends with status 0", server.stop() == 0, server.log.read_text())
    raw = check_qcow2(report, title, folder, image)
    report.check(f"{title}: the host sees the new size", raw.stat().st_size == 160 * MIB)
    status, output = run("e2fsck", "-fn", raw)
    report.check(f"{title}: host's e2fsck finds nothing", status == 0, output)


KILLS = 6


def test_recovery(report, guest, options, folder, engine, properties=""):
    """The server is killed again and again under a guest that writes and verifies, and the next one goes on."""
    image, title = folder / "disk.qcow2", f"{engine}, a server that is killed" + (f", {properties}" if properties else "")
    run("qemu-img", "create", "-q", "-f", "qcow2", image, 192 * MIB)
    arguments = [image, "--aio", engine, "--cache", "none", "--queues", 2, "--iothreads", 2,
                 "--monitor", folder / "m"]
    # An emulated processor is slow, and the disk is not: without this, seldom is anything in flight.
    slow_disk = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwritev2", "-e", "inject=pwritev2:delay_enter=20ms"]

    def serve(number):
        return Server(options.vblk, arguments, folder / "s", folder / f"log-{number}", slow_disk)
    servers = [serve(0)]

    def is_in_flight():
        status = json.loads(run(options.vblk, "ctl", folder / "m", "query-status")[1])
        return sum(queue["in-flight"] for queue in status.get("queues", [])) > 4

    def kill_and_restart():
        for number in range(1, KILLS + 1):
            # QEMU tries once a second.
            time.sleep(random.uniform(1, 3))
            wait_until(is_in_flight, 5)
            servers[-1].kill()
            servers.append(serve(number))
    try:
        parameters = {"run": "rings,recovery", "seconds": 5 * KILLS, "rings": PACKED_RINGS.get(properties, "event_idx,indirect")}
        console, ended = guest.boot(servers[0].socket, 2, parameters, kill_and_restart, reconnects=True, properties=properties)
        report_guest(report, title, console, ended, 11)
        report.check(f"{title}: it was killed", len(servers) == KILLS + 1, len(servers))
        logs = "\n".join(server.log.read_text() for server in servers)
        found = sum(int(count) for count in re.findall(r"(\d+) requests were in flight when", logs))
        report.check(f"{title}: requests were in flight", found > 0, logs)
        print(f"# {title}: {KILLS} kills, {found} requests recovered", file=sys.stderr, flush=True)
        report.check(f"{title}: the last server ends with status 0", servers[-1].stop() == 0, logs)
    finally:
        servers[-1].kill()
    raw = check_qcow2(report, title, folder, image, leaks_allowed=True)
    status, output = run("e2fsck", "-fn", raw)
    report.check(f"{title}: host's e2fsck finds nothing", status == 0, output)


def test_recovery_packed(report, guest, options, folder, engine):
    test_recovery(report, guest, options, folder, engine, "packed=on")


class MigratingGuest:
    """A guest that goes from one QEMU to the next, and each time to the other of two servers of one image."""

    def __init__(self, guest, sockets, parameters, folder, properties):
        self.guest, self.sockets, self.parameters, self.folder, self.properties = guest, sockets, parameters, folder, properties
        self.processes, self.readers, self.console, self.is_ready = [], [], b"", threading.Event()
        self.start()

    def start(self, *incoming):
        number = len(self.processes)
        command = self.guest.command(self.sockets[number % 2], 2, self.parameters, properties=self.properties)
        command += ["-qmp", f"unix:{self.folder}/qmp-{number},server=on,wait=off", *incoming]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.processes.append(process)
        self.readers.append(threading.Thread(target=self.read, args=(process,)))
        self.readers[-1].start()

    def read(self, process):
        for line in process.stdout:
            self.console += line
            if b"VBLK-GUEST: READY" in line:
                self.is_ready.set()

    def tell(self, number, command, **arguments):
        """One QMP command to one QEMU; its answer."""
        path = self.folder / f"qmp-{number}"
        wait_until(path.exists)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(path))
            lines = connection.makefile("rw")
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                lines.write(json.dumps(request) + "\n")
                lines.flush()
                answer = {}
                while "return" not in answer and "error" not in answer:
                    answer = json.loads(lines.readline())
        return answer

    def migrate(self):
        """To a QEMU on the other server; what the old one says of it in the end."""
        number = len(self.processes) - 1
        path = self.folder / f"migrate-{number}"
        self.start("-incoming", f"unix:{path}")
        wait_until(path.exists)
        self.tell(number, "migrate-set-parameters", **{"downtime-limit": 2000, "max-bandwidth": 1 << 30})
        begun = self.tell(number, "migrate", uri=f"unix:{path}")
        status = begun
        if "error" not in begun:
            def is_over():
                nonlocal status
                status = self.tell(number, "query-migrate")["return"]
                return status.get("status") in ("completed", "failed", "cancelled")
            wait_until(is_over, 120)
        self.tell(number, "quit")
        self.processes[number].wait(30)
        return status

    def finish(self):
        """Waits for power-off; whether it came in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.processes[-1].wait(BOOT_SECONDS_MAX)
        ended = self.processes[-1].poll() is not None
        for process in self.processes:
            process.kill()
        for reader in self.readers:
            reader.join()
        return self.console.decode(errors="replace").replace("\r", ""), ended


MIGRATIONS = 3


def test_migration(report, guest, options, folder, engine, form="raw", properties=""):
    """A guest that writes and verifies goes back and forth between two QEMUs and two servers of its disk."""
    image, title = folder / "disk", f"{engine}, migration on {form}" + (f", {properties}" if properties else "")
    run("qemu-img", "create", "-q", "-f", form, image, 192 * MIB)
    arguments = [image, "--format", form, "--aio", engine, "--queues", 2, "--iothreads", 2, "--migration", "on"]
    servers = [Server(options.vblk, arguments, folder / name, folder / f"log-{name}") for name in ("a", "b")]
    parameters = {"run": "rings,recovery", "seconds": 8 * MIGRATIONS, "rings": PACKED_RINGS.get(properties, "event_idx,indirect")}
    migrating = MigratingGuest(guest, [server.socket for server in servers], parameters, folder, properties)
    try:
        pauses = []
        if migrating.is_ready.wait(BOOT_SECONDS_MAX):
            for number in range(MIGRATIONS):
                time.sleep(random.uniform(1, 3))
                status = migrating.migrate()
                pauses.append(status.get("downtime"))
                report.check(f"{title}: number {number + 1} is completed", status.get("status") == "completed", status)
        console, ended = migrating.finish()
        report_guest(report, title, console, ended, 11)
        logs = "\n".join(server.log.read_text() for server in servers)
        print(f"# {title}: {len(pauses)} migrations, downtime {pauses} ms", file=sys.stderr, flush=True)
        for server in servers:
            report.check(f"{title}: server {server.socket.name} ends with status 0", server.stop() == 0, logs)
        report.check(f"{title}: the disk was taken and given up each time",
                     logs.count("is taken") == logs.count("is given up") > MIGRATIONS, logs)
    finally:
        migrating.finish()
        for server in servers:
            server.kill()
    raw = image if form == "raw" else check_qcow2(report, title, folder, image, leaks_allowed=False)
    status, output = run("e2fsck", "-fn", raw)
    report.check(f"{title}: host's e2fsck finds nothing", status == 0, output)


def test_migration_qcow2(report, guest, options, folder, engine):
    test_migration(report, guest, options, folder, engine, "qcow2", "packed=on")


def test_two_guests(report, guest, options, folder, engine):
    """Two guests on two devices of one process, raw and qcow2, at the same time."""
    make_sparse(folder / "disk-0", 128 * MIB)
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "disk-1", "128M")
    text = "".join(f"""
        [[device]]
        name = "guest-{i}"
        image = "{folder}/disk-{i}"
        format = "{form}"
        socket-path = "{folder}/s{i}"
        queues = 2
        aio = "{engine}"
        """ for i, form in enumerate(("raw", "qcow2")))
    (folder / "vblk.toml").write_text(text)
    log = folder / "log"
    server = subprocess.Popen([options.vblk, "serve", "--config", folder / "vblk.toml"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=open(log, "wb"))
    try:
        wait_until(lambda: (folder / "s0").exists() and (folder / "s1").exists())
        results = {}
        threads = [threading.Thread(target=lambda i=i: results.update({i: guest.boot(folder / f"s{i}", 2, {"run": "files"})}))
                   for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(2):
            report_guest(report, f"{engine}, guest {i} of two on one process", *results[i], 9)
        server.terminate()
        report.check(f"{engine}: the server of both ends with 0", server.wait(20) == 0, log.read_text())
    finally:
        server.kill()
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", folder / "disk-1", folder / "raw-1")
    for image in ("disk-0", "raw-1"):
        status, output = run("e2fsck", "-fn", folder / image)
        report.check(f"{engine}: host's e2fsck finds nothing on {image}", status == 0, output)


def test_full_disk(report, guest, options, folder, engine):
    """The host's file system is full under a guest: it waits, and goes on when there is space, without an error."""
    name = f"{engine}, a full disk under the guest"
    if os.geteuid() != 0:
        report.skip(name, "loop devices need root")
        return
    (folder / "small").mkdir()
    make_sparse(folder / "fs", 64 * MIB)
    run("mkfs.ext4", "-q", "-m", "0", folder / "fs")
    script = """mount -o loop "$1/fs" "$1/small" && truncate -s 128M "$1/small/disk" || exit 1
        free=$(($(stat -f -c '%a * %S' "$1/small")))
        fallocate -l $((free - 6 * 1048576)) "$1/small/filler" || exit 1
        shift; exec "$@" """
    arguments = [folder / "small" / "disk", "--aio", engine, "--queues", 2, "--monitor", folder / "m"]
    with Server(options.vblk, arguments, folder / "s", folder / "log", ["unshare", "-m", "bash", "-c", script, "-", str(folder)],
                wrapper_stays=False) as server:
        paused = threading.Event()

        def make_space():
            for _ in range(BOOT_SECONDS_MAX * 2):
                time.sleep(0.5)
                status, text = run(options.vblk, "ctl", folder / "m", "query-status")
                if status == 0 and json.loads(text).get("state") == "paused":
                    paused.set()
                    time.sleep(3)
                    run("nsenter", "-t", server.process.pid, "-m", "rm", folder / "small" / "filler")
                    return
                if server.process.poll() is not None:
                    return

        watcher = threading.Thread(target=make_space)
        watcher.start()
        console, ended = guest.boot(server.socket, 2, {"run": "files"})
        report_guest(report, name, console, ended, 9)
        report.check(f"{name}: the device paused", paused.is_set(), server.log.read_text())
        report.check(f"{name}: the server ends with 0", server.stop() == 0, server.log.read_text())
        watcher.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, help="the program under test")
    parser.add_argument("--cache", required=True, type=Path, help="folder that keeps the guest's kernel")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: all")
    parser.add_argument("--only", metavar="NAME", help="only the batches with this in their names: qcow2, overlay")
    options = parser.parse_args()
    os.environ["PATH"] += ":/sbin:/usr/sbin"

    report = Report()
    guest = Guest(options.cache)
    batches = [(test_engine, engine) for engine in options.engine or ENGINES]
    batches += [(test_file_system_survives, engine) for engine in options.engine or ENGINES]
    batches += [(test_durability, engine) for engine in options.engine or ENGINES]
    # What happens in the device, on one engine each.
    batches += zip((test_read_only, test_write_through, test_root_file_system), itertools.cycle(options.engine or ENGINES))
    # The engines are below the format, which tests/interop runs on all of them: here one each will do.
    batches += [(test_qcow2, (options.engine or ENGINES)[-1]), (test_root_on_overlay, (options.engine or ENGINES)[0]),
                (test_resize, (options.engine or ENGINES)[-1]), (test_packed, (options.engine or ENGINES)[-1]),
                (test_recovery, "threads"), (test_recovery_packed, "threads"),
                (test_migration, (options.engine or ENGINES)[0]), (test_migration_qcow2, (options.engine or ENGINES)[-1]),
                (test_two_guests, (options.engine or ENGINES)[-1]), (test_full_disk, (options.engine or ENGINES)[0])]
    for test, engine in batches:
        if options.only and options.only not in test.__name__:
            continue
        start = time.monotonic()
        with Folder() as folder:
            try:
                test(report, guest, options, folder, engine)
            except RuntimeError as error:
                report.check(f"{engine}: {test.__name__} runs", False, error)
        print(f"# {test.__name__} on {engine}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    report.exit()


if __name__ == "__main__":
    main()
