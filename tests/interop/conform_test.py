#!/usr/bin/python3
"""`vblk conform` on vblk, on Debian's qemu-storage-daemon, on backends that misbehave, and on seeded defects. Prints TAP.

The suite's claims are what is tested: that a good backend passes whole, on each engine and format; that known defects of
another backend are found; that nothing a backend does makes it hang or crash; and that each defect of
tests/conform/mutants.py is found by the test that is said to find it.
"""

import argparse
import array
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parent / "conform")]
from harness import ENGINES, Folder, Report, Server, make_sparse, run, wait_until  # noqa: E402
from mutants import MUTANTS  # noqa: E402

QSD = "qemu-storage-daemon"
MIB = 1 << 20
RUN_LIMIT_SECONDS = 120
# What a good backend may leave out, and why.
EXPECTED_SKIPS = {
    "durability/claimed-write-through": "writeback is 1",
    "durability/": "takes root" if os.geteuid() else "does not lie on",
    "migration/": "no LOG_SHMFD is offered",  # but with --migration on, see below
}
# Defects that Debian 12's qemu-storage-daemon (7.2) is known to have, found by hand before this suite was written.
QSD_DEFECTS = ("durability/claimed-write-through", "durability/no-flush-no-wce", "reconnect/writeback", "config/size-max",
               "ring/used-length-of-failure", "request/get-id")


# Runs beside each other, on two processors; single tests wait for more of their time than whole runs do.
AT_ONCE = 3
SINGLE_TESTS_AT_ONCE = 6
TRIES = 10


def conform(vblk, *arguments, folder, limit=RUN_LIMIT_SECONDS, **environment):
    """Runs the suite; returns (status, output, seconds). Its scratch images lie in `folder`."""
    begin = time.monotonic()
    status, output = run(vblk, "conform", *arguments, timeout=limit,
                         env=os.environ | {"TMPDIR": str(folder)} | environment)
    return status, output, time.monotonic() - begin


def tap_of(output):
    """The tests of a TAP report: name -> ("ok", "not ok", or the reason of a skip)."""
    results = {}
    for line in output.splitlines():
        found = re.match(r"(ok|not ok) \d+ - (\S+)(?: # SKIP (.*))?$", line)
        if found:
            results[found[2]] = found[3] or found[1]
    return results


def is_expected_skip(name, reason):
    return any(name.startswith(prefix) and part in reason for prefix, part in EXPECTED_SKIPS.items())


def test_vblk(report, options):
    """Every engine and format, some at a time: a run waits for most of its time."""
    def run_one(image_format, engine):
        with Folder() as folder:
            status, output, seconds = conform(options.vblk, "--profile", "vblk", "--aio", engine, "--format", image_format,
                                              "--output", "tap", "--duration", 2, folder=folder)
            return status, output, seconds, os.listdir(folder)

    cases = [(image_format, engine) for image_format in ("raw", "qcow2") for engine in ENGINES]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = list(pool.map(lambda case: run_one(*case), cases))
    for (image_format, engine), (status, output, seconds, left) in zip(cases, runs):
        title = f"vblk, {engine}, {image_format}"
        results = tap_of(output)
        failed = [name for name, result in results.items() if result == "not ok"]
        skips = {name: result for name, result in results.items() if result not in ("ok", "not ok")}
        report.check(f"{title}: passes whole, {len(results)} tests", status == 0 and not failed and len(results) > 150,
                     f"status {status}\n" + "\n".join(line for line in output.splitlines() if not line.startswith("ok")))
        unexpected = [f"{name}: {reason}" for name, reason in skips.items() if not is_expected_skip(name, reason)]
        report.check(f"{title}: skips only what it must ({', '.join(skips) or 'nothing'})", not unexpected,
                     "\n".join(unexpected))
        report.check(f"{title}: within {RUN_LIMIT_SECONDS} s, and nothing is left behind",
                     seconds < RUN_LIMIT_SECONDS and not left, f"{seconds:.0f} s; {left}")


def test_vblk_migration(report, options):
    """A disk that can be migrated offers a log of dirty pages; by itself it does not."""
    with Folder() as folder:
        serve = f"{options.vblk} serve {{image}} --socket-path {{socket}} --queues 4 --migration on --log-level warning"
        status, output, _ = conform(options.vblk, "--backend-command", serve, "--group", "migration", "--group", "program",
                                    "--output", "tap", folder=folder)
    results = tap_of(output)
    report.check(f"vblk, --migration on: passes what is about the log, {len(results)} tests, and skips nothing",
                 status == 0 and set(results.values()) == {"ok"} and len(results) > 10, output)


def test_vblk_with_one_queue(report, options):
    """As it serves by default. What takes two queues is no demand on a backend that has one."""
    with Folder() as folder:
        tests = ("request/two-queues", "durability/flush-all-queues", "reconnect/inflight-sigkill", "config/num-queues",
                 "protocol/every-queue")
        status, output, _ = conform(options.vblk, "--backend-command",
                                    f"{options.vblk} serve {{image}} --socket-path {{socket}} --log-level warning",
                                    *(word for name in tests for word in ("--test", name)), "--output", "tap", folder=folder)
    results = tap_of(output)
    report.check("vblk with one queue: nothing fails, and what takes two is skipped",
                 status == 0 and len(results) == len(tests) and "takes 2 queues" in results["request/two-queues"] and
                 results["reconnect/inflight-sigkill"] == "ok", output)


def test_vblk_cache_modes(report, options):
    """Where the disk itself starts in write-through, the test of what it claims has something to do."""
    for cache in ("writethrough", "writeback", "directsync"):
        with Folder() as folder:
            status, output, _ = conform(options.vblk, "--profile", "vblk", "--cache", cache, "--group", "durability",
                                        "--output", "tap", folder=folder)
        report.check(f"vblk, cache={cache}: passes what is about durability", status == 0, output)
        claimed = tap_of(output).get("durability/claimed-write-through")
        if cache != "writeback" and os.geteuid() == 0 and "does not lie on" not in str(claimed):
            report.check(f"vblk, cache={cache}: what it claims of writes is looked at", claimed == "ok", claimed)


def test_qemu(report, options):
    if not shutil.which(QSD):
        report.skip("qemu-storage-daemon is tested", "it is not installed")
        return
    version = run(QSD, "--version")[1].splitlines()[0]
    with Folder() as folder:
        status, output, seconds = conform(options.vblk, "--profile", QSD, "--output", "tap", "--duration", 2, folder=folder)
        left = os.listdir(folder)
    results = tap_of(output)
    report.check("qemu-storage-daemon: the run ends in time, with status 1", status == 1 and not left,
                 f"status {status} after {seconds:.0f} s, left {left}\n{output[-2000:]}")
    passed = sum(result == "ok" for result in results.values())
    report.check("qemu-storage-daemon: passes most tests", passed > len(results) / 2, f"{passed} of {len(results)}")
    for name in QSD_DEFECTS:
        title = f"qemu-storage-daemon: a known defect is found by {name}"
        if "version 7.2" not in version:
            report.skip(title, f"it is known of 7.2, and this is {version}")
        elif results.get(name) not in ("ok", "not ok"):
            report.skip(title, results.get(name, "it did not run"))
        else:
            report.check(title, results[name] == "not ok", output[-3000:])


# ---- Backends that misbehave

class Fake:
    """A listening socket, with a function that each connection is given to, in a thread of its own."""

    def __init__(self, path, serve):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(16)
        self.serve = serve
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection):
        try:
            with connection:
                self.serve(connection)
        except OSError:
            pass

    def close(self):
        self.listener.close()


def says_nothing(connection):
    while connection.recv(4096):
        pass


def closes_at_once(connection):
    connection.close()


def sends_garbage(connection):
    connection.sendall(os.urandom(4096))
    says_nothing(connection)


def answers_for_ever(connection):
    while True:
        connection.sendall(struct.pack("<IIIQ", 1, 5, 8, 1 << 32 | 1 << 30))


def answers(connection, on_memory=None, features=1 << 32 | 1 << 30 | 1 << 9, used=False):
    """Says yes to everything, and serves no ring."""
    while True:
        space = socket.CMSG_SPACE(16 * 4)
        head, control, _, _ = connection.recvmsg(12, space)
        if len(head) < 12:
            return
        request, flags, size = struct.unpack("<III", head)
        payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
        fds = array.array("i")
        for _, _, data in control:
            fds.frombytes(data[:len(data) - len(data) % fds.itemsize])
        answer = None
        if request == 1:
            answer = struct.pack("<Q", features)
        elif request == 15:
            answer = struct.pack("<Q", 1 << 0 | 1 << 3 | 1 << 9)
        elif request == 17:
            answer = struct.pack("<Q", 1)
        elif request == 11:
            answer = payload
        elif request == 24:
            offset, length, _ = struct.unpack("<III", payload[:12])
            config = (struct.pack("<Q", 131072) + bytes(12) + struct.pack("<I", 512)).ljust(256, b"\0")
            answer = payload[:12] + config[offset:offset + length]
        elif flags & 8:
            answer = struct.pack("<Q", 0)
        if request == 5 and on_memory:
            on_memory(fds)
        if answer is not None:
            connection.sendall(struct.pack("<III", request, 5, len(answer)) + answer)
        for fd in fds:
            os.close(fd)


def takes_memory_away(connection):
    answers(connection, on_memory=lambda fds: [os.ftruncate(fd, 0) for fd in fds])


def test_misbehaving_backends(report, options):
    tests = ("protocol/reply-ack", "config/padding", "ring/notified", "request/read-beyond-end")
    selection = [word for name in tests for word in ("--test", name)]
    for serve in (says_nothing, closes_at_once, sends_garbage, answers_for_ever, answers, takes_memory_away):
        what = serve.__name__.replace("_", " ")
        with Folder() as folder:
            fake = Fake(folder / "s", serve)
            status, output, seconds = conform(options.vblk, "--socket-path", folder / "s", "--output", "tap", *selection,
                                              folder=folder)
            fake.close()
        results = tap_of(output)
        # The one that says yes to everything even passes what is only said.
        wanted = {"not ok"} if serve not in (answers, takes_memory_away) else {"ok", "not ok"}
        good = status == 1 and set(results) == set(tests) and set(results.values()) <= wanted and \
            results["ring/notified"] == "not ok"
        report.check(f"a backend that {what}: the tests fail, and end", good, f"status {status}, {seconds:.0f} s\n{output}")
        if serve is takes_memory_away:
            report.check("a backend that takes memory away: the test that it kills is told as killed",
                         "killed by signal 7" in output, output)


def test_programs(report, options):
    """A program that breaks each convention: says nothing of itself, ends well without its disk, and goes into the background."""
    script = f'test -e "$1" || exit 0; {options.vblk} serve "$1" --socket-path "$2" --log-level off & wait'
    with Folder() as folder:
        program = folder / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        status, output, _ = conform(options.vblk, "--backend-command", f"{program} {{image}} {{socket}}", "--group", "program",
                                    "--output", "tap", folder=folder)
        started_by_others = tap_of(conform(options.vblk, "--backend-command", f"sh {program} {{image}} {{socket}}", "--group",
                                           "program", "--output", "tap", folder=folder)[1])
    results = tap_of(output)
    report.check("a program that keeps no convention fails each test of its group",
                 status == 1 and len(results) == 4 and
                 {result for name, result in results.items() if name != "program/fd"} == {"not ok"} and
                 "--socket-path" in results["program/fd"], output)
    report.check("a program that starts another one is not held to the conventions of that",
                 all("begins with 'sh'" in started_by_others[f"program/{name}"]
                     for name in ("print-capabilities", "foreground", "fd")),
                 started_by_others)


SPDK = """import json, os, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
config = json.load(open(arguments["-c"]))
calls = {call["method"]: call["params"] for part in config["subsystems"] for call in part["config"]}
disk = calls.get("bdev_aio_create") or calls["bdev_uring_create"]
controller = calls["vhost_create_blk_controller"]
assert controller["dev_name"] == disk["name"] and disk["block_size"] == 512
words = [VBLK, "serve", disk["filename"], "--socket-path", os.path.join(arguments["-S"], controller["ctrlr"])]
os.execv(VBLK, words + ["--log-level", "off"] + ["--read-only"] * controller["readonly"])
"""


def test_spdk_profile(report, options):
    """SPDK is not there: its command line and file are, and serve a disk by a stand-in that reads them as SPDK does."""
    with Folder() as folder:
        program = folder / "vhost"
        program.write_text(f"#!{sys.executable}\nVBLK = {str(options.vblk)!r}\n{SPDK}")
        program.chmod(0o755)
        for engine in ("native", "io_uring"):
            status, output, _ = conform(options.vblk, "--profile", "spdk", "--program", program, "--aio", engine, "--test",
                                        "request/read-write", "--test", "request/read-only*", "--output", "tap", folder=folder)
            results = tap_of(output)
            report.check(f"the profile of SPDK, {engine}: starts a disk, and a read-only one",
                         status == 0 and len(results) == 4 and set(results.values()) == {"ok"}, output)
        for arguments, names in ((["--aio", "threads"], "io_uring"), (["--format", "qcow2"], "raw"),
                                 (["--cache", "writeback"], "none")):
            status, output, _ = conform(options.vblk, "--profile", "spdk", *arguments, folder=folder)
            report.check(f"the profile of SPDK: {' '.join(arguments)} is refused", status == 2 and names in output, output)


def test_backends_that_do_not_start(report, options):
    for title, command, names in (("that is not there", "/nowhere/at-all {socket}", "/nowhere/at-all"),
                                  ("that ends at once", "false {socket}", "ended with status 1"),
                                  ("that says why", "sh -c 'echo no such disk >&2; exit 3' {socket}", "no such disk")):
        with Folder() as folder:
            status, output, _ = conform(options.vblk, "--backend-command", command, folder=folder)
            left = os.listdir(folder)
        report.check(f"a program {title}: status 3 and one line that says so",
                     status == 3 and names in output and output.count("\n") == 1 and not left, f"{status}: {output} {left}")
    with Folder() as folder:
        done = subprocess.run([str(options.vblk), "conform", "--backend-command", "false {socket}", "--group", "program",
                               "--output", "junit"], capture_output=True, text=True, timeout=RUN_LIMIT_SECONDS,
                              env=os.environ | {"TMPDIR": str(folder)})
        _, tap, _ = conform(options.vblk, "--backend-command", "false {socket}", "--output", "tap", folder=folder)
    report.check("junit, no backend: is XML with an error that says so",
                 done.returncode == 3 and is_incomplete_junit(done.stdout, "ended with status 1", 4), done)
    report.check("tap, no backend: bails out", "Bail out! " in tap and "ended with status 1" in tap, tap)


def test_backend_that_dies(report, options):
    """A server that is killed from outside, at random moments of a whole group."""
    with Folder() as folder:
        command = [str(options.vblk), "conform", "--profile", "vblk", "--group", "request", "--output", "tap"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=os.environ | {"TMPDIR": str(folder)})
        done = []
        reader = threading.Thread(target=lambda: done.append(process.communicate()[0]))
        reader.start()
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if str(folder).encode() in path.read_bytes() and b"serve" in path.read_bytes():
                        os.kill(int(path.parent.name), signal.SIGKILL)
                except (OSError, ValueError):
                    pass
            time.sleep(0.03)
        reader.join(60)
        output = done[0] if done else "no end"
    results = tap_of(output)
    report.check("a backend that dies all the time: tests fail with 'killed by signal 9', and the run ends",
                 process.returncode == 1 and "killed by signal 9" in output and len(results) > 20,
                 f"status {process.returncode}\n{output[-3000:]}")


# ---- What a user says and gets

def test_options(report, options):
    with Folder() as folder:
        for title, arguments, names in (
                ("no backend", [], "--profile"),
                ("two backends", ["--profile", "vblk", "--socket-path", "x"], "--profile"),
                ("unknown profile", ["--profile", "spam"], "spam"),
                ("unknown engine", ["--profile", "vblk", "--aio", "fast"], "fast"),
                ("unknown test", ["--profile", "vblk", "--test", "ring/nothing"], "ring/nothing"),
                ("unknown group", ["--profile", "vblk", "--group", "rings"], "rings"),
                ("test and group that do not meet", ["--profile", "vblk", "--test", "ring/full", "--group", "config"], "--group"),
                ("unknown format of output", ["--profile", "vblk", "--output", "html"], "html"),
                ("bad seed", ["--profile", "vblk", "--randseed", "x"], "x"),
                ("bad duration", ["--profile", "vblk", "--duration", "0"], "0"),
                ("command without a socket", ["--backend-command", "true"], "{socket}"),
                ("command with an open quote", ["--backend-command", "sh -c 'x {socket}"], "quote"),
                ("engine of a command", ["--backend-command", "x {socket}", "--aio", "native"], "--aio"),
                ("destructive on an own image", ["--profile", "vblk", "--destructive"], "--destructive"),
                ("unknown option", ["--profile", "vblk", "--spam"], "--spam")):
            status, output, _ = conform(options.vblk, *arguments, folder=folder)
            report.check(f"{title}: refused in one line that names it",
                         status == 2 and names in output and output.count("\n") == 1, f"status {status}\n{output}")


def test_listing(report, options):
    with Folder() as folder:
        status, output, _ = conform(options.vblk, "--list", folder=folder)
        few = conform(options.vblk, "--list", "--group", "memory", folder=folder)[1]
    names = re.findall(r"^([a-z-]+/[a-z0-9-]+)", output, re.MULTILINE)
    report.check("--list: each test once, with its statement", status == 0 and len(names) == len(set(names)) > 150 and
                 len(re.findall(r'", (MUST|SHOULD|states|robust):$', output, re.MULTILINE)) == len(names), output[:1000])
    sources = set(re.findall(r'^    (.*), "(?:[^"]+)", \w+:$', output, re.MULTILINE))
    report.check("--list: each statement names a document with its version", sources <= {
        "virtio 1.2", "virtio 1.3", "vhost-user.rst (QEMU 7.2)", "vhost-user.rst (QEMU 8.2)",
        "vhost-user.rst (QEMU 11.0)"}, sources)
    report.check("--list takes a group", set(re.findall(r"^([a-z-]+)/", few, re.MULTILINE)) == {"memory"}, few[:500])
    status, text = run("python3", HERE.parent.parent / "scripts" / "conform_table.py", "--check", options.vblk)
    report.check("docs/conformance.md has the table of --list", status == 0, text)


ONE_FRONTEND = """import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[2])
listener.listen(1)
connection, _ = listener.accept()
listener.close()
os.set_inheritable(connection.fileno(), True)
os.execv(VBLK, [VBLK, "serve", sys.argv[1], "--fd", str(connection.fileno()), "--queues", "2", "--log-level", "off"])
"""


def test_one_frontend(report, options):
    """A program that serves one frontend and ends with it, as several do, is started again for the next one."""
    tests = ("protocol/features-renegotiated", "request/two-queues", "ring/sizes", "memory/slots", "reconnect/features",
             "reconnect/inflight-marked", "durability/flushed-survives-sigkill", "hostile-ring/next-beyond",
             "hostile-message/version", "hostile-message/descriptor-leak", "integrity/random")
    with Folder() as folder:
        program = folder / "program"
        program.write_text(f"#!{sys.executable}\nVBLK = {str(options.vblk)!r}\n{ONE_FRONTEND}")
        program.chmod(0o755)
        command = ["--backend-command", f"{program} {{image}} {{socket}}", *(w for t in tests for w in ("--test", t))]
        status, output, _ = conform(options.vblk, *command, "--duration", 1, "--output", "tap", folder=folder)
        alone = subprocess.Popen([str(program), str(folder / "image"), str(folder / "socket")])
        make_sparse(folder / "image", 64 * MIB)
        wait_until(lambda: (folder / "socket").exists(), 60)
        refused, text, _ = conform(options.vblk, "--socket-path", folder / "socket", folder=folder)
        alone.wait(30)
    results = tap_of(output)
    report.check("a program that ends with its frontend passes, started again for each",
                 status == 0 and len(results) == len(tests) and "not ok" not in results.values() and
                 "ends with each frontend" in results["hostile-message/descriptor-leak"], output)
    report.check("one that others have started is named for what it is, with status 3",
                 refused == 3 and "serves one frontend" in text and "--backend-command" in text, f"{refused}: {text}")


def test_small_limits(report, options):
    """A backend that takes no more than it says is in the right: what is larger is not sent to it, and the rest works."""
    groups = ("protocol", "config", "ring", "packed", "request", "memory", "durability", "reconnect", "integrity")
    with Folder() as folder:
        status, output, _ = conform(options.vblk, *mutant_command(options, groups[0]), *(w for g in groups for w in ("--group", g)),
                                    folder=folder, VBLK_MUTANT="limits-are-small")
    results = tap_of(output)
    too_large = [name for name, result in results.items() if "and the backend takes" in result]
    report.check(f"a backend with small limits: nothing fails, {len(too_large)} tests do not fit",
                 status == 0 and "not ok" not in results.values() and results.get("request/read-write") == "ok" and
                 results.get("integrity/random") == "ok" and results.get("config/seg-max") == "ok" and
                 0 < len(too_large) < 20, output)


def test_image_that_was_written(report, options):
    """Over blocks that an image has already a write may be stable without a sync: nobody is accused for that."""
    with Folder() as folder:
        image = folder / "disk.img"
        image.write_bytes(os.urandom(MIB) * 64)
        os.sync()
        for mutant, wanted in (("", {"ok"}), ("write-through-without-sync", {"skip"})):
            with Server(options.mutant, [image, "--queues", "2"], folder / "s", folder / "log",
                        wrapper=("env", f"VBLK_MUTANT={mutant}"), wrapper_stays=False) as server:
                _, output, _ = conform(options.vblk, "--socket-path", server.socket, "--destructive", "--image", image, "--test",
                                       "durability/write-through", "--test", "durability/no-flush-no-wce", "--output", "tap",
                                       folder=folder)
            results = tap_of(output)
            title = f"a written image, {mutant or 'sound server'}: nothing fails"
            if any("cannot be observed" in result for result in results.values()):
                report.skip(title, next(iter(results.values())))
                continue
            seen = {"skip" if "had these blocks before" in result else result for result in results.values()}
            # Whether the file system writes over blocks by FUA is its own choice, and that of the disk below.
            report.check(title, len(results) == 2 and seen <= wanted | {"skip"}, output)


def test_output_is_bounded(report, options):
    """A program that says much is not held up, and what it says last is what is told."""
    with Folder() as folder:
        program = folder / "program"
        program.write_text(f"#!/bin/sh\nhead -c 20000000 /dev/zero | tr '\\000' 'x' >&2\necho >&2\n"
                           f"test -e {folder}/once && {{ echo 'why it ends' >&2; exit 1; }}\n"
                           f"touch {folder}/once\nexec {options.vblk} serve $1 --socket-path $2\n")
        program.chmod(0o755)
        status, output, _ = conform(options.vblk, "--backend-command", f"{program} {{image}} {{socket}}", "--test",
                                    "protocol/reply-ack", folder=folder)
    report.check("a program that says 20 MB first: is waited for, and its last line is told",
                 status == 1 and "ended with status 1" in output and "why it ends" in output and len(output) < 4000, output[-2000:])


def test_destructive_is_asked_for(report, options):
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, 64 * MIB)
        with Server(options.vblk, [image, "--queues", "2"], folder / "s", folder / "log") as server:
            common = ["--socket-path", server.socket, "--output", "tap", "--duration", 1, "--group"]
            polite = tap_of(conform(options.vblk, *common, "request", folder=folder)[1])
            untouched = image.stat().st_blocks == 0
            status, output, _ = conform(options.vblk, *common, "request", "--destructive", "--image", image, folder=folder)
            bold = tap_of(output)
            durability = tap_of(conform(options.vblk, *common, "durability", "--destructive", "--image", image,
                                        folder=folder)[1])
    report.check("without --destructive nothing is written to a disk of others",
                 untouched and "takes --destructive" in polite.get("request/read-write", "") and
                 polite.get("request/read-beyond-end") == "ok", polite)
    report.check("with --destructive it is", status == 0 and bold.get("request/read-write") == "ok", output)
    seen = durability.get("durability/flush", "")
    if os.geteuid() or "does not lie" in seen:
        report.skip("with --image, what reaches the disk of a running backend is observed", seen)
    else:
        report.check("with --image, what reaches the disk of a running backend is observed", seen == "ok", durability)


def test_formats(report, options):
    tests = ("--test", "request/get-id", "--test", "protocol/mem-slots", "--randseed", 7)
    with Folder() as folder:
        common = ["--profile", "vblk", "--aio", "native", *tests]
        status, human, _ = conform(options.vblk, *common, folder=folder)
        report.check("human: a line per test and a sum", status == 0 and "2 passed, 0 failed, 0 skipped" in human, human)
        _, junit, _ = conform(options.vblk, *common, "--output", "junit", folder=folder)
        try:
            suite = xml.etree.ElementTree.fromstring(junit)
        except xml.etree.ElementTree.ParseError as error:
            suite = None
            junit += f"\n{error}"
        report.check("junit: is XML with both tests", suite is not None and suite.get("failures") == "0" and
                     len(suite.findall("testcase")) == 2, junit)
        fails = ["--backend-command", f"{options.mutant} serve {{image}} --socket-path {{socket}} --log-level off", *tests]
        environment = {"VBLK_MUTANT": "id-is-not-padded"}
        status, human, _ = conform(options.vblk, *fails, folder=folder, **environment)
        report.check("human: a failure says its statement, what was seen, and how to repeat it",
                     status == 1 and "virtio 1.2" in human and "seen: " in human and
                     re.search(r"again: vblk conform --backend-command '.*' --randseed 7 --test request/get-id\n", human), human)
        status, junit, _ = conform(options.vblk, *fails, "--output", "junit", folder=folder, **environment)
        suite = xml.etree.ElementTree.fromstring(junit)
        failure = suite.find("testcase/failure")
        report.check("junit: a failure has its message", status == 1 and suite.get("failures") == "1" and
                     failure is not None and "NUL" in "".join(failure.itertext()), junit)
        test_validity(report, options, folder)


def is_complete_tap(output):
    """Whether it is TAP: test lines numbered from 1, comments, and a plan at one end."""
    lines = output.removesuffix("\n").split("\n")
    numbers = [int(found[1]) for line in lines if (found := re.match(r"(?:not )?ok (\d+) - [^#]+(?:# SKIP .+)?$", line))]
    others = [line for line in lines if not re.match(r"(?:not )?ok \d+ |#|1\.\.\d+$|Bail out! ", line)]
    plans = [line for line in lines if line.startswith("1..")]
    return numbers == list(range(1, len(numbers) + 1)) and not others and len(plans) == 1 and \
        (plans[0] == f"1..{len(numbers)}" or lines[-1].startswith("Bail out!"))


def test_validity(report, options, folder):
    """What a program says on its way out may be anything; what is printed of it stays TAP and XML."""
    ends = folder / "ends"
    noise = r"1..99\r<&\001\033[2J\377\200\303\360\237\230\200 ]]>"
    ends.write_text(f"#!/bin/sh\ntest -e {folder}/once || {{ touch {folder}/once; exec {options.vblk} serve $1 --socket-path $2; }}\n"
                    f"printf 'not ok 7\\n{noise}\"' >&2\nexit 1\n")
    ends.chmod(0o755)
    command = ["--backend-command", f"{ends} {{image}} {{socket}}", "--test", "config/[bpcs]*", "--output"]
    status, tap, _ = conform(options.vblk, *command, "tap", folder=folder)
    (folder / "once").unlink()
    report.check("tap: whatever a program says, its lines are TAP's", status == 1 and is_complete_tap(tap) and
                 "not ok" in set(tap_of(tap).values()), tap)
    if shutil.which("prove"):
        (folder / "tap").write_text(tap)
        text = run("prove", "--exec", "cat", folder / "tap")[1]
        report.check("tap: prove reads it, and finds nothing wrong but the failures",
                     "Parse errors" not in text and f"Failed {sum(r == 'not ok' for r in tap_of(tap).values())}/" in text, text)
    done = subprocess.run([str(word) for word in (options.vblk, "conform", *command, "junit")], capture_output=True,
                          timeout=RUN_LIMIT_SECONDS, env=os.environ | {"TMPDIR": str(folder)})
    try:
        suite = xml.etree.ElementTree.fromstring(done.stdout)
    except xml.etree.ElementTree.ParseError as error:
        report.check("junit: whatever a program says, it is XML", False, f"{error}\n{done.stdout}")
        return
    cases = suite.findall("testcase")
    counts = {"tests": len(cases), "failures": len(suite.findall("testcase/failure")),
              "skipped": len(suite.findall("testcase/skipped")), "errors": 0}
    report.check("junit: whatever a program says, it is XML, and its sums are those of its cases",
                 done.returncode == 1 and counts["failures"] > 3 and all(suite.get(key) == str(n) for key, n in counts.items()) and
                 all(case.get("name") and case.get("classname") and float(case.get("time")) >= 0 for case in cases),
                 done.stdout)


def test_duration(report, options):
    """A soak goes on for as long as it is told to."""
    with Folder() as folder:
        status, output, seconds = conform(options.vblk, "--profile", "vblk", "--test", "integrity/random", "--duration", "3s",
                                          "--output", "tap", folder=folder)
    report.check("--duration 3s: an integrity test takes 3 s and little more", status == 0 and 3 <= seconds < 20,
                 f"{seconds:.1f} s\n{output}")


def interrupted(options, number, *arguments):
    """Sends a signal to a run in its first test, a soak; returns (status, output, files left, processes left)."""
    with Folder() as folder:
        process = subprocess.Popen([str(options.vblk), "conform", "--profile", "vblk", "--group", "integrity", "--duration", "60",
                                    *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=os.environ | {"TMPDIR": str(folder)})
        # The first backend is that of the first contact, which is not in the report, and gone in a moment.
        seen = {}

        def is_in_a_test():
            for path in folder.glob("*/s"):
                seen.setdefault(path, time.monotonic())
            return any(path.exists() and time.monotonic() - since > 1 for path, since in seen.items())
        is_there = wait_until(is_in_a_test, 60)
        process.send_signal(number)
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            output = "no end"
        left = os.listdir(folder)
        remains = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in read_bytes(path)]
    return process.returncode, output if is_there else "no test has begun", left, remains


def test_interrupt(report, options):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        status, output, left, remains = interrupted(options, number)
        report.check(f"{number.name}: ends at once with status 130, a sum, no files and no processes left",
                     status == 130 and "tests were not run: interrupted" in output and not left and not remains,
                     f"status {status}\n{output}\n{left} {remains}")
    status, output, _, _ = interrupted(options, signal.SIGINT, "--output", "tap")
    report.check("tap, interrupted: stays TAP, and bails out", status == 130 and is_complete_tap(output) and
                 "Bail out! " in output and "interrupted" in output, output)
    status, output, _, _ = interrupted(options, signal.SIGINT, "--output", "junit")
    report.check("junit, interrupted: is XML with an error, and each test that did not run",
                 status == 130 and is_incomplete_junit(output, "interrupted", 3), output)


def test_killed(report, options):
    """What has been written of a report to a file is XML whenever the program goes, and says that it has not ended."""
    with Folder() as folder, open(folder / "junit.xml", "wb") as output:
        process = subprocess.Popen([str(options.vblk), "conform", "--profile", "vblk", "--group", "program", "--test", "program/f*",
                                    "--group", "integrity", "--test", "integrity/*", "--duration", "60", "--output", "junit"],
                                   stdout=output, env=os.environ | {"TMPDIR": str(folder)})
        not_run = b'program/foreground" time="0.000"><skipped message="not run"/>'

        def is_under_way():
            text = (folder / "junit.xml").read_bytes()
            return b"</testsuite>" in text and not_run not in text
        wait_until(is_under_way, 60)
        process.kill()
        process.wait()
        text = (folder / "junit.xml").read_text()
    report.check("junit, killed: the file is XML with an error that says so",
                 is_incomplete_junit(text, "has not ended", 6) and 'name="program/foreground"' in text, text)


def is_incomplete_junit(output, why, tests):
    """Whether it is XML whose sums are right, with an error that says why, and so many tests besides."""
    try:
        suite = xml.etree.ElementTree.fromstring(output)
    except xml.etree.ElementTree.ParseError:
        return False
    errors = suite.findall("testcase/error")
    return len(errors) == 1 and suite.get("errors") == "1" and why in errors[0].get("message") and \
        suite.get("tests") == str(len(suite.findall("testcase"))) == str(tests + 1) and \
        suite.get("skipped") == str(len(suite.findall("testcase/skipped"))) and \
        suite.get("failures") == str(len(suite.findall("testcase/failure")))


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


# ---- Seeded defects

def mutant_command(options, found_by):
    serve = f"{options.mutant} serve {{image}} --socket-path {{socket}} --monitor {{monitor}} --queues 4 --log-level off"
    if found_by.startswith("migration/"):
        serve += " --migration on"
    return ["--backend-command", serve, "--read-only-command", serve + " --read-only", "--resize-command",
            f"{options.vblk} ctl {{monitor}} resize {{bytes}}", "--output", "tap", "--duration", 3, "--randseed", 1]


def test_mutants(report, options):
    missing = "".join(path.read_text() for path in options.mutant.parent.glob("*.missing"))
    report.check("each seeded defect still has its place in the source", not missing,
                 missing + "(change tests/conform/mutants.py along with the source)")
    tests = sorted({mutant.found_by for mutant in MUTANTS})
    sound = {}
    for some in ([t for t in tests if t.startswith("migration/")], [t for t in tests if not t.startswith("migration/")]):
        with Folder() as folder:
            status, output, _ = conform(options.vblk, *mutant_command(options, some[0]),
                                        *(w for t in some for w in ("--test", t)), folder=folder)
        sound |= tap_of(output)
        report.check(f"without a defect the same program passes the {len(some)} tests that are to find them", status == 0,
                     output)

    def run_one(mutant):
        # Some show only where a request is in flight at the right moment, which a busy machine may miss.
        for _ in range(TRIES):
            with Folder() as folder:
                status, output, seconds = conform(options.vblk, *mutant_command(options, mutant.found_by), "--test", mutant.found_by,
                                                  folder=folder, VBLK_MUTANT=mutant.name)
            if status == 1:
                break
        return status, output, seconds

    with ThreadPoolExecutor(SINGLE_TESTS_AT_ONCE) as pool:
        runs = list(pool.map(run_one, MUTANTS))
    for mutant, (status, output, _) in zip(MUTANTS, runs):
        title = f"{mutant.name} is found by {mutant.found_by}"
        if sound.get(mutant.found_by) != "ok":
            report.skip(title, sound.get(mutant.found_by, "did not run"))
            continue
        report.check(title, status == 1 and tap_of(output).get(mutant.found_by) == "not ok", f"status {status}\n{output}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    parser.add_argument("--mutant", required=True, type=Path, help="the server with seeded defects")
    parser.add_argument("--only", help="only the functions of this script whose names contain this")
    options = parser.parse_args()
    options.vblk, options.mutant = options.vblk.resolve(), options.mutant.resolve()
    report = Report()
    for test in (test_options, test_listing, test_formats, test_duration, test_interrupt, test_killed, test_destructive_is_asked_for,
                 test_programs, test_one_frontend, test_small_limits, test_image_that_was_written, test_output_is_bounded, test_spdk_profile, test_backends_that_do_not_start, test_misbehaving_backends,
                 test_backend_that_dies, test_mutants, test_vblk, test_vblk_with_one_queue, test_vblk_migration,
                 test_vblk_cache_modes, test_qemu):
        if options.only and options.only not in test.__name__:
            continue
        begin = time.monotonic()
        try:
            test(report, options)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            report.check(f"{test.__name__} runs", False, error)
        print(f"# {test.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    report.exit()


if __name__ == "__main__":
    main()
