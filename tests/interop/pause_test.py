#!/usr/bin/python3
"""Devices that pause: by command, for a full disk, for a failed request; and go on with nothing lost. Prints TAP.

The full disk is a small ext4 file system with a file beside the image that takes the rest; when that goes there is space
again (root, for loop devices). Other failures come from strace's fault injection.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
import qcow2_images as qcow2  # noqa: E402
from harness import ENGINES, Folder, Poke, Script, Server, make_sparse, run, run_tests, wait_until  # noqa: E402
from qcow2_images import qemu_img  # noqa: E402

MIB = 1 << 20
STATUS_OK, STATUS_IOERR = 0, 1
MIX = "wwwwwrrrddzuuf"


def ctl(options, folder, *words):
    status, output = run(options.vblk, "ctl", folder / "m", *words)
    if status != 0:
        raise RuntimeError(f"vblk ctl {words}: {output}")
    return json.loads(output)


def state(options, folder):
    return ctl(options, folder, "query-status").get("state")


def is_good(answer):
    return all(answer.get(word, 0) == 0 for word in ("failed", "bad", "lost")) and "error" not in answer["text"]


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class SmallDisk:
    """A server whose image lies on an ext4 file system of 32 MiB that is nearly full."""

    SCRIPT = """mount -o loop "$1/fs" "$1/small" && mv "$1"/disk.* "$1/small/" || exit 1
        free=$(($(stat -f -c '%a * %S' "$1/small")))
        fallocate -l $((free - 3 * 1048576)) "$1/small/filler" || exit 1
        shift; exec "$@" """

    def __init__(self, options, folder, image, *arguments):
        (folder / "small").mkdir(exist_ok=True)
        make_sparse(folder / "fs", 32 * MIB)
        status, output = run("mkfs.ext4", "-q", "-m", 0, folder / "fs")
        if status != 0:
            raise RuntimeError(output)
        self.folder = folder
        self.image = folder / "small" / image
        self.server = Server(options.vblk, [self.image, "--monitor", folder / "m", "--queues", 4, "--iothreads", 2, *arguments],
                             folder / "s", folder / "log", ["unshare", "-m", "bash", "-c", self.SCRIPT, "-", str(folder)],
                             wrapper_stays=False)

    def inside(self, *command):
        return run("nsenter", "-t", self.server.process.pid, "-m", *command)

    @contextlib.contextmanager
    def kept_mounted(self):
        """Yields a function as inside() is, which goes on when the server has ended."""
        with subprocess.Popen(["nsenter", "-t", str(self.server.process.pid), "-m", "sleep", "infinity"]) as holder:
            wait_until(lambda: Path(f"/proc/{holder.pid}/comm").read_text().strip() == "sleep")
            try:
                yield lambda *command: run("nsenter", "-t", holder.pid, "-m", *command)
            finally:
                holder.kill()

    def make_space(self):
        status, output = self.inside("rm", self.folder / "small" / "filler")
        if status != 0:
            raise RuntimeError(output)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.kill()


def make_image(folder, form):
    if form == "raw":
        make_sparse(folder / "disk.raw", 16 * MIB)
        return "disk.raw"
    qemu_img("create", "-f", "qcow2", folder / "disk.qcow2", 16 * MIB)
    return "disk.qcow2"


def needs_root(report, name):
    if os.geteuid() == 0:
        return False
    report.skip(name, "loop devices need root")
    return True


def test_full_disk(report, options, form, engine, cache, recovery="keep"):
    """Random requests meet a full disk, wait, and go on by themselves when there is space.

    Without in-flight recovery qcow2 writes its tables with the flushes, which then meet the full disk as well.
    """
    name = f"{form} on {engine}, {cache}, a full disk" + ("" if recovery else ", without recovery")
    if needs_root(report, name):
        return
    with Folder() as folder, Script(options.churn) as churn:
        with SmallDisk(options, folder, make_image(folder, form), "--aio", engine, "--cache", cache) as disk:
            churn(f"connect {folder / 's'} 4 {recovery}")
            seed = options.random.getrandbits(32)
            churn.start(f"run {seed} 1500 8 65536 wwwwwwf")
            report.check(f"{name}: pauses the device", wait_until(lambda: state(options, folder) == "paused", 20),
                         disk.server.log.read_text())
            time.sleep(1.5)  # a look at the disk in vain
            status = ctl(options, folder, "query-status")
            failed = (status["paused"] or {}).get("failed") or {}
            report.check(f"{name}: query-status tells why, and that it looks again",
                         "No space" in failed.get("error", "") and failed.get("retries") is True and
                         sum(queue["kept"] for queue in status["queues"]) > 0, status)
            report.check(f"{name}: nothing is answered meanwhile", not churn.has_answer(0))
            disk.make_space()
            report.check(f"{name}: goes on by itself with space again",
                         wait_until(lambda: state(options, folder) == "running", 10), disk.server.log.read_text())
            answer = churn.answer()
            report.check(f"{name}: every request is answered once, without an error",
                         is_good(answer) and answer["done"] == answer["started"], f"seed {seed}\n{answer['text']}")
            verified = churn("verify")
            report.check(f"{name}: the disk is as the model has it", is_good(verified), verified["text"])
            churn(f"dump {folder / 'model'}")
            churn("flush")
            churn("disconnect")
            log = disk.server.log.read_text()
            report.check(f"{name}: the log says that it paused and that it went on",
                         "the device is paused until there is space" in log and "there is space again" in log, log)
            # Out of the mount namespace, which ends with the server.
            disk.server.process.send_signal(signal.SIGSTOP)
            disk.inside("cp", "--sparse=always", disk.image, folder / "before-the-end")
            disk.server.process.send_signal(signal.SIGCONT)
            report.check(f"{name}: the server ends with 0", disk.server.stop() == 0, log)
        status, text = run("qemu-img", "compare", "-f", "raw", "-F", form, folder / "model", folder / "before-the-end")
        report.check(f"{name}: qemu-img compare finds the model in the image", status == 0, text)
        if form == "qcow2":
            found = qcow2.check(folder / "before-the-end")
            report.check(f"{name}: qemu-img check finds leaks at most", qcow2.is_sound(found), found["text"][-2000:])


def test_next_server_of_a_full_disk(report, options, form, end):
    """The server ends while the disk is full: a driver that keeps what is in flight loses nothing."""
    name = f"{form}, {end.name} while the disk is full"
    if needs_root(report, name):
        return
    with Folder() as folder, Script(options.churn) as churn:
        image = make_image(folder, form)
        with SmallDisk(options, folder, image, "--cache", "writeback") as disk:
            churn(f"connect {folder / 's'} 4 keep")
            churn.start("run 5 1500 8 65536 wwwwww")
            report.check(f"{name}: pauses", wait_until(lambda: state(options, folder) == "paused", 20))
            with disk.kept_mounted() as inside:
                begin = time.monotonic()
                disk.server.process.send_signal(end)
                status = disk.server.process.wait(timeout=20)
                report.check(f"{name}: ends soon", time.monotonic() - begin < 5)
                # The next server finds the image as the first one left it, with space.
                status_of_copy, text = inside("cp", "--sparse=always", disk.image, folder / "copy")
                report.check(f"{name}: leaves the image", status_of_copy == 0, text)
            if end == signal.SIGTERM:
                # What qcow2 has in memory may not fit either; then it says so.
                report.check(f"{name}: with 0 unless its last flush fails", status == 0 or (form == "qcow2" and status == 1),
                             f"{status}\n{disk.server.log.read_text()}")
        (folder / "s").unlink(missing_ok=True)
        with Server(options.vblk, [folder / "copy", "--format", form, "--queues", 4, "--iothreads", 2], folder / "s",
                    folder / "log2") as server:
            answer = churn.answer()
            report.check(f"{name}: the next server, with space, finishes what was kept",
                         is_good(answer) and answer["done"] == answer["started"], f"{answer['text']}\n{server.log.read_text()}")
            report.check(f"{name}: it found something to finish", "were in flight when" in server.log.read_text())
            verified = churn("verify")
            report.check(f"{name}: the disk is as the model has it", is_good(verified), verified["text"])
            churn("disconnect")


def test_end_of_a_full_disk(report, options, form):
    """SIGTERM while the disk is full: a driver that cannot keep what is in flight is told."""
    name = f"{form}, the end of a full disk"
    if needs_root(report, name):
        return
    with Folder() as folder:
        with SmallDisk(options, folder, make_image(folder, form), "--cache", "writeback") as disk, \
                Poke(options.poke, folder / "s") as poke:
            for sector in range(0, 16 * MIB // 512, 1024):
                poke.start(f"write {sector} 1024 {sector % 251 + 1}")
                if not wait_until(lambda: poke.has_answer(0) or state(options, folder) == "paused"):
                    break
                if state(options, folder) == "paused":
                    break
                poke.answer()
            begin = time.monotonic()
            disk.server.stop()
            answer = poke.answer()
            report.check(f"{name}: a driver that cannot keep them gets an error, soon",
                         answer.get("status") == STATUS_IOERR and time.monotonic() - begin < 5, answer["text"])


def strace(fault):
    return ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + fault.split(":")[0], "-e", "inject=" + fault]


def test_policies(report, options):
    write, read, flush = "pwritev2:error=EIO:when=1", "preadv2:error=EIO:when=1", "fdatasync:error=EIO:when=1"
    full = "pwritev2:error=ENOSPC:when=1"
    cases = [
        ("a failed write", write, [], "write 0 8 7", STATUS_IOERR),
        ("a failed write, ignored", write, ["--werror", "ignore"], "write 0 8 7", STATUS_OK),
        ("a failed read, ignored", read, ["--rerror", "ignore"], "read 0 8", STATUS_OK),
        ("no space, reported", full, ["--werror", "report"], "write 0 8 7", STATUS_IOERR),
        ("a failed flush, which cannot be repeated, in spite of stop", flush, ["--werror", "stop"], "flush", STATUS_IOERR),
    ]
    for name, fault, arguments, command, wanted in cases:
        with Folder() as folder:
            make_sparse(folder / "disk.img", MIB)
            with Server(options.vblk, [folder / "disk.img", "--aio", "threads", "--cache", "writeback", "--monitor",
                                       folder / "m", *arguments], folder / "s", folder / "log", strace(fault)) as server, \
                    Poke(options.poke, server.socket) as poke:
                if command == "flush":
                    poke("write 0 8 1")
                answer = poke(command)
                report.check(f"{name}: has status {wanted}", answer.get("status") == wanted, answer["text"])
                report.check(f"{name}: the device goes on", state(options, folder) == "running")
    for name, fault, option, command in (("a failed write", write, "--werror", "write 0 8 7"),
                                         ("a failed read", read, "--rerror", "read 0 8")):
        with Folder() as folder:
            make_sparse(folder / "disk.img", MIB)
            with Server(options.vblk, [folder / "disk.img", "--aio", "threads", "--cache", "writeback", "--monitor",
                                       folder / "m", option, "stop"], folder / "s", folder / "log", strace(fault)) as server, \
                    Poke(options.poke, server.socket) as poke:
                poke.start(command)
                name = f"{name}, {option} stop"
                report.check(f"{name}: pauses", wait_until(lambda: state(options, folder) == "paused"))
                report.check(f"{name}: is not answered, and not tried again by itself", not poke.has_answer(2.5))
                status = ctl(options, folder, "query-status")["paused"]
                report.check(f"{name}: query-status tells the error and that it waits",
                             "Input/output" in status["failed"]["error"] and status["failed"]["retries"] is False, status)
                answer = ctl(options, folder, "resume")
                report.check(f"{name}: resume", answer == {"state": "running", "was-paused": True}, answer)
                report.check(f"{name}: then it is done", poke.answer().get("status") == STATUS_OK)
                retried = sum(queue["retried"] for queue in ctl(options, folder, "query-status")["queues"])
                report.check(f"{name}: once", retried == 1, retried)


def test_pause_under_load(report, options, form, engine):
    """Paused and resumed, with other engines, limits and servers in between: every request is answered once."""
    name = f"{form} on {engine}, paused under load"
    with Folder() as folder, Script(options.churn) as churn:
        image = folder / make_image(folder, form)
        start = lambda: Server(options.vblk, [image, "--monitor", folder / "m", "--queues", 4, "--iothreads", 2,  # noqa: E731
                                              "--aio", engine, "--cache", "writeback"], folder / "s", folder / "log")
        server, pauses, ends = start(), 0, []
        quiet = still = empty = True
        size = 16 * MIB
        try:
            churn(f"connect {folder / 's'} 4 keep")
            seed = options.random.getrandbits(32)
            churn.start(f"run {seed} 10000000 8 65536 {MIX} 4")
            while not churn.has_answer(options.random.uniform(0.01, 0.15)):
                pauses += 1
                ctl(options, folder, "pause")
                before = digest(image)
                queues = ctl(options, folder, "query-status")["queues"]
                empty = empty and all(queue["in-flight"] == 0 for queue in queues)
                what = options.random.choice(("nothing", "engines", "limits", "size", "end"))
                if what == "engines":
                    ctl(options, folder, "set-aio", options.random.choice(ENGINES))
                elif what == "limits":
                    ctl(options, folder, "set-limits", options.random.choice(("iops-total=500", "none")))
                elif what == "size":
                    size += 64 << 10
                    ctl(options, folder, "resize", size)
                elif what == "end":
                    ends.append(server.stop())
                    server = start()
                    continue
                else:
                    time.sleep(0.05)
                    quiet = quiet and digest(image) == before
                still = still and state(options, folder) == "paused"
                ctl(options, folder, "resume")
            answer = churn.answer()
            report.check(f"{name}: every request is answered once, as the model has it",
                         is_good(answer) and 0 < answer["done"] == answer["started"], f"seed {seed}\n{answer['text']}")
            report.check(f"{name}: nothing is in flight while it is paused, and nothing is written", pauses > 3 and empty and quiet,
                         f"{pauses} pauses, empty: {empty}, quiet: {quiet}")
            report.check(f"{name}: it stays paused whatever is changed", still)
            report.check(f"{name}: a paused server ends with 0", all(status == 0 for status in ends), ends)
            ctl(options, folder, "set-limits", "none")
            verified = churn("verify")
            report.check(f"{name}: the disk is as the model has it", is_good(verified), verified["text"])
            churn("disconnect")
        finally:
            server.kill()


def test_paused_image_is_whole(report, options):
    """What is copied while the device is paused holds all that was answered."""
    for form in ("raw", "qcow2"):
        with Folder() as folder:
            image = folder / make_image(folder, form)
            with Server(options.vblk, [image, "--monitor", folder / "m", "--cache", "writeback"], folder / "s",
                        folder / "log") as server, Poke(options.poke, server.socket) as poke:
                poke("write 2048 64 9")
                ctl(options, folder, "pause")
                (folder / "copy").write_bytes(image.read_bytes())
                poke.start("write 2048 64 10")
                report.check(f"{form}, paused: new requests wait", not poke.has_answer(0.5))
                answer = ctl(options, folder, "resume")
                report.check(f"{form}, resumed: they are done", poke.answer().get("status") == STATUS_OK, answer)
                again = ctl(options, folder, "resume")
                report.check(f"{form}: resume of what is not paused says so", again["was-paused"] is False, again)
            status, text = run("qemu-img", "convert", "-f", form, "-O", "raw", folder / "copy", folder / "copy.raw")
            with open(folder / "copy.raw", "rb") as copy:
                copy.seek(2048 * 512)
                content = copy.read(64 * 512)
            report.check(f"{form}: a copy made while it was paused is whole", status == 0 and content == b"\x09" * len(content), text)


def test_next_driver_of_a_paused_device(report, options):
    with Folder() as folder:
        image = folder / make_image(folder, "raw")
        with Server(options.vblk, [image, "--monitor", folder / "m"], folder / "s", folder / "log") as server:
            ctl(options, folder, "pause")
            with Poke(options.poke, server.socket) as poke:
                poke.start("write 0 8 3")
                report.check("a driver that comes while the device is paused waits", not poke.has_answer(0.5))
                poke.process.kill()
                poke.process.wait()
            with Poke(options.poke, server.socket) as poke:
                poke.start("write 0 8 4")
                report.check("and so does the next", not poke.has_answer(0.3))
                ctl(options, folder, "resume")
                report.check("until it is resumed", poke.answer().get("status") == STATUS_OK)
            report.check("the server ends with 0", server.stop() == 0, server.log.read_text())


def test_pause_of_a_slow_disk(report, options):
    with Folder() as folder:
        make_sparse(folder / "disk.img", MIB)
        with Server(options.vblk, [folder / "disk.img", "--aio", "threads", "--cache", "writeback", "--monitor", folder / "m"],
                    folder / "s", folder / "log", strace("pwritev2:delay_enter=9200000:when=1")) as server, \
                Poke(options.poke, server.socket) as poke:
            poke.start("write 0 8 7")
            time.sleep(0.5)
            status, output = run(options.vblk, "ctl", folder / "m", "pause")
            report.check("a disk that takes longer than pause waits: pause fails in one line that says so", status == 1 and
                         "1 requests are still at the disk" in output and len(output.strip().splitlines()) == 1, output)
            report.check("the request ends as ever", poke.answer().get("status") == STATUS_OK)
            queues = ctl(options, folder, "query-status")["queues"]
            report.check("and the device is paused then", state(options, folder) == "paused" and
                         all(queue["in-flight"] == 0 for queue in queues), queues)
            ctl(options, folder, "pause")
            poke.start("write 0 8 8")
            report.check("a second pause is none too many", not poke.has_answer(0.3))
            ctl(options, folder, "resume")
            report.check("one resume ends both", poke.answer().get("status") == STATUS_OK)


def all_tests():
    yield from ((test_policies,), (test_paused_image_is_whole,), (test_next_driver_of_a_paused_device,),
                (test_pause_of_a_slow_disk,))
    for form in ("raw", "qcow2"):
        for engine in ENGINES:
            yield from ((test_full_disk, form, engine, "none"), (test_pause_under_load, form, engine))
        yield test_full_disk, form, "threads", "writeback"
        for end in (signal.SIGTERM, signal.SIGKILL):
            yield test_next_server_of_a_full_disk, form, end
        yield test_end_of_a_full_disk, form
    for engine in ENGINES:
        yield test_full_disk, "qcow2", engine, "writeback", ""


if __name__ == "__main__":
    run_tests(__doc__, ("poke", "churn"), all_tests())
