#!/usr/bin/python3
"""What a server costs that has nothing to do: processor, memory, and the time until it can be used. Prints TAP.

Bounds are those that docs/benchmarks.md states. The time is the best of some starts, so that a busy machine does not
decide it.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Folder, Poke, Server, make_sparse, run, run_on_each_engine, wait_until  # noqa: E402

MIB = 1 << 20
IDLE_SECONDS = 3
STARTS = 5
START_SECONDS_MAX = 0.05
RESIDENT_KIB_MAX = 16 * 1024
QUEUES = ["--queues", "4", "--iothreads", "4"]


def context_switches(pid):
    texts = ((task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if "ctxt_switches" in line)


def processor_ticks(pid):
    return sum(int(ticks) for ticks in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])


def is_idle(server):
    """Whether a stretch of time without requests goes by without a context switch."""
    before = context_switches(server.pid())
    time.sleep(IDLE_SECONDS)
    return context_switches(server.pid()) == before


def resident_kib_max(server):
    """Since its start, the guest's memory that it has touched included."""
    text = Path(f"/proc/{server.pid()}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1])


def test_idle_and_memory(report, options, engine):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 64 * MIB)
        with Server(options.vblk, [folder / "disk.img", *QUEUES, "--aio", engine], folder / "s", folder / "log") as server:
            status, output = run(options.vblk, "bench", "--socket-path", server.socket, "--rw", "randrw", "--numjobs", 4,
                                 "--iodepth", 32, "--runtime", 0.5)
            report.check(f"{engine}: four queues carry a load", status == 0, output)
            resident = resident_kib_max(server)
            report.check(f"{engine}: at most {RESIDENT_KIB_MAX} KiB resident with four queues", resident <= RESIDENT_KIB_MAX,
                         f"{resident} KiB")
            with Poke(options.poke, server.socket) as poke:
                poke("write 0 8 1")
                poke("flush")
                # The pool's guard goes off duty a millisecond after the last work, other things settle as fast.
                report.check(f"{engine}: no context switch in {IDLE_SECONDS} s beside a driver that asks for nothing",
                             wait_until(lambda: is_idle(server), 4 * IDLE_SECONDS))
                before = processor_ticks(server.pid())
                time.sleep(1)
                report.check(f"{engine}: no processor time either", processor_ticks(server.pid()) == before)


def seconds_to_start(options, folder, engine):
    begin = time.monotonic()
    with Server(options.vblk, [folder / "disk.img", *QUEUES, "--aio", engine], folder / "s", folder / "log"):
        return time.monotonic() - begin


def test_start(report, options, engine):
    with Folder() as folder:
        make_sparse(folder / "disk.img", 64 * MIB)
        best = min(seconds_to_start(options, folder, engine) for _ in range(STARTS))
        report.check(f"{engine}: at most {START_SECONDS_MAX} s from start to ready", best <= START_SECONDS_MAX, f"{best:.3f} s")


if __name__ == "__main__":
    run_on_each_engine(__doc__, test_idle_and_memory, test_start)
