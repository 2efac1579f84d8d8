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
}
# Defects that Debian 12's qemu-storage-daemon (7.2) is known to have, found by hand before this suite was written.
QSD_DEFECTS = ("durability/claimed-write-through", "durability/no-flush-no-wce", "reconnect/writeback", "config/size-max",
               "ring/used-length-of-failure", "request/get-id")


# Runs beside each other, on two processors.
AT_ONCE = 3
TRIES = 3


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
                                              "--output", "tap", "--duration", 3, folder=folder)
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


def test_backends_that_do_not_start(report, options):
    for title, command, names in (("that is not there", "/nowhere/at-all {socket}", "/nowhere/at-all"),
                                  ("that ends at once", "false {socket}", "ended with status 1"),
                                  ("that says why", "sh -c 'echo no such disk >&2; exit 3' {socket}", "no such disk")):
        with Folder() as folder:
            status, output, _ = conform(options.vblk, "--backend-command", command, folder=folder)
            left = os.listdir(folder)
        report.check(f"a program {title}: status 3 and one line that says so",
                     status == 3 and names in output and output.count("\n") == 1 and not left, f"{status}: {output} {left}")


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
                 len(re.findall(r'", (MUST|SHOULD|robust):$', output, re.MULTILINE)) == len(names), output[:1000])
    report.check("--list takes a group", set(re.findall(r"^([a-z-]+)/", few, re.MULTILINE)) == {"memory"}, few[:500])
    status, text = run("python3", HERE.parent.parent / "scripts" / "conform_table.py", "--check", options.vblk)
    report.check("docs/conformance.md has the table of --list", status == 0, text)


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


def test_interrupt(report, options):
    with Folder() as folder:
        process = subprocess.Popen([str(options.vblk), "conform", "--profile", "vblk", "--group", "integrity", "--duration", "60"],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=os.environ | {"TMPDIR": str(folder)})
        wait_until(lambda: any(folder.glob("*/s")))
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            output = "no end"
        left = os.listdir(folder)
        remains = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in read_bytes(path)]
    report.check("SIGINT: ends at once with status 130, a sum, no files and no processes left",
                 process.returncode == 130 and "interrupted" in output and not left and not remains,
                 f"status {process.returncode}\n{output}\n{left} {remains}")


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


# ---- Seeded defects

def mutant_command(options):
    serve = f"{options.mutant} serve {{image}} --socket-path {{socket}} --monitor {{monitor}} --queues 4 --log-level off"
    return ["--backend-command", serve, "--read-only-command", serve + " --read-only", "--resize-command",
            f"{options.vblk} ctl {{monitor}} resize {{bytes}}", "--output", "tap", "--duration", 3, "--randseed", 1]


def test_mutants(report, options):
    missing = "".join(path.read_text() for path in options.mutant.parent.glob("*.missing"))
    report.check("each seeded defect still has its place in the source", not missing,
                 missing + "(change tests/conform/mutants.py along with the source)")
    tests = sorted({mutant.found_by for mutant in MUTANTS})
    with Folder() as folder:
        status, output, _ = conform(options.vblk, *mutant_command(options), *(w for t in tests for w in ("--test", t)),
                                    folder=folder)
    sound = tap_of(output)
    report.check("without a defect the same program passes the tests that are to find them", status == 0, output)

    def run_one(mutant):
        # Some show only where a request is in flight at the right moment, which a busy machine may miss.
        for _ in range(TRIES):
            with Folder() as folder:
                status, output, seconds = conform(options.vblk, *mutant_command(options), "--test", mutant.found_by,
                                                  folder=folder, VBLK_MUTANT=mutant.name)
            if status == 1:
                break
        return status, output, seconds

    with ThreadPoolExecutor(AT_ONCE) as pool:
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
    for test in (test_options, test_listing, test_formats, test_interrupt, test_destructive_is_asked_for,
                 test_backends_that_do_not_start, test_misbehaving_backends, test_backend_that_dies, test_mutants, test_vblk,
                 test_vblk_cache_modes, test_qemu):
        if options.only and options.only not in test.__name__:
            continue
        try:
            test(report, options)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            report.check(f"{test.__name__} runs", False, error)
    report.exit()


if __name__ == "__main__":
    main()
