#!/usr/bin/python3
"""Disks and processes that fail while a driver writes: nothing that was acknowledged is lost. Prints TAP.

ENOSPC comes from a small tmpfs, EIO from a loop device over one (both need root) and strace's fault injection,
everything else from signals.
"""

import argparse
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import ENGINES, Folder, Poke, Report, Server, make_sparse, wait_until  # noqa: E402

MIB = 1 << 20
BLOCK_BYTES = 4096
LOAD_SECONDS = 0.3
STATUS_OK, STATUS_IOERR = 0, 1


def lost_blocks(image, acknowledged):
    """Blocks that were acknowledged and do not hold their own number; (lost, acknowledged)."""
    numbers = [number for number, in struct.iter_unpack("<Q", acknowledged.read_bytes())]
    lost = 0
    with open(image, "rb") as file:
        for number in numbers:
            file.seek(number * BLOCK_BYTES)
            lost += file.read(BLOCK_BYTES) != struct.pack("<Q", number) * (BLOCK_BYTES // 8)
    return lost, len(numbers)


def has_content(path):
    return path.exists() and path.stat().st_size > 0


def test_stop_under_load(report, options, engine, cache):
    name = f"{engine}, {cache}, SIGTERM under load"
    with Folder() as folder:
        image, acknowledged = folder / "disk.img", folder / "acknowledged"
        make_sparse(image, 2048 * MIB)
        arguments = [image, "--aio", engine, "--cache", cache]
        with Server(options.vblk, arguments, folder / "s", folder / "log") as server, \
                Poke(options.poke, server.socket) as poke:
            poke.start(f"storm 32 {acknowledged}")
            report.check(f"{name}: writes are acknowledged", wait_until(lambda: has_content(acknowledged)))
            time.sleep(LOAD_SECONDS)
            status = server.stop()
            report.check(f"{name}: ends with 0", status == 0, f"{status}\n{server.log.read_text()}")
            report.check(f"{name}: nothing is answered with an error", poke.answer().get("failed") == 0)
        lost, count = lost_blocks(image, acknowledged)
        report.check(f"{name}: every acknowledged write is in the image", count > 0 and lost == 0,
                     f"{lost} of {count} lost")


def test_kill_under_load(report, options, engine, cache):
    name = f"{engine}, {cache}, SIGKILL under load"
    with Folder() as folder:
        image, acknowledged = folder / "disk.img", folder / "acknowledged"
        make_sparse(image, 2048 * MIB)
        with Server(options.vblk, [image, "--aio", engine, "--cache", cache], folder / "s", folder / "log") as server, \
                Poke(options.poke, server.socket) as poke:
            poke.start(f"storm 32 {acknowledged}")
            wait_until(lambda: has_content(acknowledged))
            time.sleep(LOAD_SECONDS)
            server.kill()
            poke.answer()
        lost, count = lost_blocks(image, acknowledged)
        report.check(f"{name}: every acknowledged write is in the image", count > 0 and lost == 0,
                     f"{lost} of {count} lost")


def test_driver_dies(report, options, engine):
    name = f"{engine}, drivers that die under load"
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, 256 * MIB)
        with Server(options.vblk, [image, "--aio", engine], folder / "s", folder / "log") as server:
            descriptors = len(os.listdir(f"/proc/{server.pid()}/fd"))
            for attempt in range(10):
                acknowledged = folder / f"acknowledged-{attempt}"
                poke = Poke(options.poke, server.socket)
                poke.start(f"storm 64 {acknowledged}")
                wait_until(acknowledged.exists)
                time.sleep(0.02 * attempt)
                os.kill(poke.process.pid, signal.SIGKILL)
                poke.process.wait()
            with Poke(options.poke, server.socket) as poke:
                answer = poke("write 0 8 7")
                report.check(f"{name}: the next one is served", answer.get("status") == STATUS_OK, answer["text"])
            calm = wait_until(lambda: len(os.listdir(f"/proc/{server.pid()}/fd")) == descriptors)
            report.check(f"{name}: leave no descriptors behind", calm, os.listdir(f"/proc/{server.pid()}/fd"))
            report.check(f"{name}: the server ends with 0", server.stop() == 0, server.log.read_text())


def test_full_disk(report, options, engine):
    name = f"{engine}, full disk"
    if os.geteuid() != 0:
        report.skip(name, "mounting a small tmpfs needs root")
        return
    with Folder() as folder:
        small = folder / "small"
        small.mkdir()
        mount = f"mount -t tmpfs -o size=2m tmpfs {small} && truncate -s 8M {small}/disk.img && exec \"$@\""
        arguments = [small / "disk.img", "--aio", engine, "--cache", "writeback", "--werror", "report"]
        with Server(options.vblk, arguments, folder / "s", folder / "log", ["unshare", "-m", "bash", "-c", mount, "-"],
                    wrapper_stays=False) as server, Poke(options.poke, server.socket) as poke:
            report.check(f"{name}: a write that fits succeeds", poke("write 0 2048 5").get("status") == STATUS_OK)
            full = poke("write 4096 2048 6")
            full = poke("write 8192 2048 6")
            report.check(f"{name}: a write that does not fit is an I/O error", full.get("status") == STATUS_IOERR, full["text"])
            old = poke("read 0 2048")
            report.check(f"{name}: what was written before is there",
                         old.get("status") == STATUS_OK and old.get("first") == 5 and old.get("same") == "true", old["text"])
            poke("discard 0 2048")
            again = poke("write 8192 1024 6")
            report.check(f"{name}: with space again, writes succeed", again.get("status") == STATUS_OK, again["text"])
            report.check(f"{name}: the server ends with 0", server.stop() == 0, server.log.read_text())


def test_failing_device(report, options, engine, cache):
    """A block device that runs out of room below: the kernel's own errors, by every engine's own way."""
    name = f"{engine}, {cache}, failing device"
    if os.geteuid() != 0:
        report.skip(name, "loop devices need root")
        return
    with Folder() as folder:
        small = folder / "small"
        small.mkdir()
        # Gone with its last user, and the memory below with the mount namespace.
        script = f"""mount -t tmpfs -o size=2m tmpfs {small} && truncate -s 8M {small}/disk &&
            device=$(losetup --direct-io=on --show -f {small}/disk) || exit 1
            "$@" serve "$device" --socket-path {folder}/s --aio {engine} --cache {cache} --werror report & server=$!
            trap 'kill -TERM $server' TERM
            wait $server; wait $server; status=$?
            losetup -d "$device"; exit $status"""
        server = subprocess.Popen(["unshare", "-m", "bash", "-c", script, "-", options.vblk], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=open(folder / "log", "wb"))
        try:
            ready = server.stdout.readline()
            if not ready.startswith(b"vblk: ready"):
                report.skip(name, f"no loop device: {(folder / 'log').read_text()}")
                return
            with Poke(options.poke, folder / "s") as poke:
                report.check(f"{name}: a write that fits succeeds", poke("write 0 1024 5").get("status") == STATUS_OK)
                # The loop driver calls a write that finds some room a success; so the last one is to find none.
                writes = ["write 8192 2048 6", "write 12000 2048 7", "write 4096 2048 8"]
                answers = [poke(command) for command in (*writes, "flush", "flush")]
                text = "\n".join(answer["text"] for answer in answers)
                statuses = [answer.get("status") for answer in answers]
                if cache == "none":
                    report.check(f"{name}: a write that does not fit is an I/O error, a flush of the rest is none",
                                 statuses[2:] == [STATUS_IOERR, STATUS_OK, STATUS_OK], text)
                else:
                    report.check(f"{name}: the flush of a write that does not fit fails, and the next one as well",
                                 statuses == [STATUS_OK, STATUS_OK, STATUS_OK, STATUS_IOERR, STATUS_IOERR], text)
                old = poke("read 0 1024")
                report.check(f"{name}: what was written before is there", old.get("status") == STATUS_OK and
                             old.get("first") == 5 and old.get("same") == "true", old["text"])
            server.terminate()
            status = server.wait(20)
            report.check(f"{name}: the server ends as its last flush does", status == (0 if cache == "none" else 1),
                         f"{status}\n{(folder / 'log').read_text()}")
        finally:
            server.terminate()
            server.wait(20)


def test_injected_errors(report, options):
    cases = (("a failed write", "pwritev2:error=EIO:when=1", ("write 0 8 1", STATUS_IOERR), ("write 0 8 1", STATUS_OK)),
             ("a failed read", "preadv2:error=EIO:when=1", ("read 0 8", STATUS_IOERR), ("read 0 8", STATUS_OK)),
             ("an interrupted write", "pwritev2:error=EINTR:when=1", ("write 0 8 1", STATUS_OK), ("read 0 8", STATUS_OK)),
             ("a failed flush", "fdatasync:error=EIO:when=1", ("flush", STATUS_IOERR), ("flush", STATUS_IOERR)))
    for name, fault, *steps in cases:
        with Folder() as folder:
            image = folder / "disk.img"
            make_sparse(image, MIB)
            wrapper = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + fault.split(":")[0], "-e", "inject=" + fault]
            # strace counts for each thread by itself, so there is one for all requests.
            arguments = [image, "--aio", "threads", "--thread-pool-max", "1", "--cache", "writeback"]
            with Server(options.vblk, arguments, folder / "s", folder / "log", wrapper) as server, \
                    Poke(options.poke, server.socket) as poke:
                for step, (command, status) in enumerate(steps, 1):
                    answer = poke(command)
                    report.check(f"threads, {name}, request {step}: {command} has status {status}",
                                 answer.get("status") == status, answer["text"])
                if "flush" in name:
                    status = server.stop()
                    report.check(f"threads, {name}: the server ends with an error", status == 1, status)
                    named = "disk.img" in server.log.read_text()
                    report.check(f"threads, {name}: the log names the image", named, server.log.read_text())


def test_sizes(report, options, engine):
    with Folder() as folder:
        image = folder / "odd.img"
        image.write_bytes(b"x" * 700)
        name = f"{engine}, image of 700 bytes"
        with Server(options.vblk, [image, "--aio", engine], folder / "s", folder / "log") as server, \
                Poke(options.poke, server.socket) as poke:
            config = poke("config")
            report.check(f"{name}: the guest sees two sectors", config.get("capacity") == 2, config["text"])
            tail = poke("read 1 1")
            report.check(f"{name}: the tail reads as zeroes",
                         tail.get("status") == STATUS_OK and tail.get("first") == ord("x") and tail.get("same") == "false",
                         tail["text"])
            poke("write 1 1 9")
            server.stop()
        content = image.read_bytes()
        report.check(f"{name}: a write makes the last sector whole", content == b"x" * 512 + b"\x09" * 512, content[:8])
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, MIB)
        with Server(options.vblk, [image, "--aio", engine], folder / "s", folder / "log") as server, \
                Poke(options.poke, server.socket) as poke:
            os.truncate(image, 2 * MIB)
            grown = poke("write 2048 8 1")
            report.check(f"{engine}, image that grows: the guest keeps its size", grown.get("status") == STATUS_IOERR,
                         grown["text"])
            os.truncate(image, MIB // 2)
            for command in ("read 1536 8", "write 1536 8 3", "flush"):
                answer = poke(command)
                report.check(f"{engine}, image that shrinks: {command} ends", "status" in answer, answer["text"])
            report.check(f"{engine}, image that shrinks: the server ends with 0", server.stop() == 0, server.log.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    parser.add_argument("--poke", required=True, type=Path, help="the driver for scripts")
    options = parser.parse_args()
    options.vblk, options.poke = options.vblk.resolve(), options.poke.resolve()
    report = Report()
    tests = [(test_injected_errors,)]
    for engine in ENGINES:
        tests += [(test_driver_dies, engine), (test_full_disk, engine), (test_sizes, engine)]
        for cache in ("none", "writeback"):
            tests += [(test_failing_device, engine, cache)]
            tests += [(test_stop_under_load, engine, cache), (test_kill_under_load, engine, cache)]
    for test, *arguments in tests:
        try:
            test(report, options, *arguments)
        except (RuntimeError, OSError) as error:
            report.check(f"{test.__name__} {arguments} runs", False, error)
    report.exit()


if __name__ == "__main__":
    main()
