#!/usr/bin/python3
"""Servers that are told to end at the moment their frontends are killed, with requests in flight. Prints TAP.

Whatever comes first, the end of a connection or the signal, and wherever the server is in either, it ends, with 0, and soon.
VBLK_TEST_ROUNDS repeats it more often; VBLK_TEST_SEED repeats the moments that are drawn, not those that happen.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import ENGINES, Devices, Folder, Script, Server, make_sparse, run_tests  # noqa: E402
from qcow2_images import MIB, qemu_img  # noqa: E402

ROUNDS = int(os.environ.get("VBLK_TEST_ROUNDS", 12))
# A server ends within a fraction of a second; a machine may be busy with other things for many.
PATIENCE = 60
MIX = "wwwwrrrddzuf"


def read(path):
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        return str(error)


def about(pid):
    """What a process that does not end is doing, without disturbing it: a debugger would end a sleep that nothing else ends."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        signals = [line for line in read(task / "status").splitlines() if line.startswith(("State", "Sig", "Shd"))]
        lines += [f"thread {read(task / 'comm')}: {read(task / 'wchan')}, {read(task / 'syscall')}", *signals, read(task / "stack")]
    for fd in sorted(Path(f"/proc/{pid}/fdinfo").iterdir(), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            lines += [f"descriptor {fd.name}: {os.readlink(f'/proc/{pid}/fd/{fd.name}')}", read(fd)]
    return "\n".join(lines)


def make_images(folder, form, count):
    images = [folder / f"disk{i}.{form}" for i in range(count)]
    for image in images:
        if form == "raw":
            make_sparse(image, 16 * MIB)
        else:
            qemu_img("create", "-f", "qcow2", image, 16 * MIB)
    return images


def device_text(folder, image, number, engine, migration):
    return (f'[[device]]\nname = "disk{number}"\nimage = "{image}"\nformat = "{image.suffix[1:]}"\nsocket-path = "{folder}/s{number}"\n'
            f'queues = 4\niothreads = 2\naio = "{engine}"\nmigration = {str(migration).lower()}\n')


def start_load(options, churn, socket):
    rings = options.random.choice(("", " packed"))
    answer = churn(f"connect {socket} 4 {options.random.choice(('', 'keep'))}{rings}")
    if not answer["text"].startswith("connected"):
        raise RuntimeError(answer["text"])
    churn.start(f"run {options.random.getrandbits(32)} 10000000 {options.random.choice((1, 8, 24))} 65536 {MIX} {2 * PATIENCE}")


def end_together(options, process, churns):
    """SIGTERM for the server and SIGKILL for its frontends, in either order, at once or nearly so."""
    kills = [lambda: process.send_signal(signal.SIGTERM),
             lambda: [os.kill(churn.process.pid, signal.SIGKILL) for churn in churns]]
    options.random.shuffle(kills)
    time.sleep(options.random.choice((0, 0.002, 0.03)) * options.random.random())
    kills[0]()
    time.sleep(options.random.choice((0, 0, 0.0002, 0.002, 0.01)) * options.random.random())
    kills[1]()
    begin = time.monotonic()
    try:
        return process.wait(PATIENCE), time.monotonic() - begin, ""
    except subprocess.TimeoutExpired:
        return None, PATIENCE, about(process.pid)


def test_ends(report, options, form, engine, devices, migration):
    title = f"{devices} of {form} on {engine}" + (", migration on" if migration else "")
    longest = 0
    for number in range(ROUNDS):
        with Folder() as folder, contextlib.ExitStack() as stack:
            images = make_images(folder, form, devices)
            if devices == 1:
                arguments = [images[0], "--format", form, "--aio", engine, "--queues", 4, "--iothreads", 2,
                             "--migration", "on" if migration else "off"]
                server = stack.enter_context(Server(options.vblk, arguments, folder / "s0", folder / "log"))
            else:
                text = "".join(device_text(folder, image, i, engine, migration) for i, image in enumerate(images))
                server = stack.enter_context(Devices(options.vblk, folder, text))
            churns = [stack.enter_context(Script(options.churn)) for _ in images]
            for i, churn in enumerate(churns):
                start_load(options, churn, folder / f"s{i}")
            status, seconds, why = end_together(options, server.process, churns)
            longest = max(longest, seconds)
            log = (folder / "log").read_text()
            if status != 0 or any(path.is_socket() for path in folder.iterdir()):
                report.check(f"{title}: it ends with 0, whatever comes first", False,
                             f"round {number}: status {status}\n{why}\n{log[-4000:]}")
                return
    report.check(f"{title}: it ends with 0, whatever comes first", True)
    print(f"# {title}: {ROUNDS} times, at most {longest * 1000:.0f} ms after the last signal", flush=True)


if __name__ == "__main__":
    tests = [(test_ends, "raw", engine, 1, False) for engine in ENGINES]
    tests += [(test_ends, "qcow2", "io_uring", 1, False), (test_ends, "raw", "io_uring", 1, True)]
    tests += [(test_ends, "raw", "threads", 3, False), (test_ends, "qcow2", "native", 3, False), (test_ends, "raw", "io_uring", 3, True)]
    run_tests(__doc__, ("churn",), tests)
