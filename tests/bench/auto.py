#!/usr/bin/python3
"""`--aio auto` beside each fixed engine, in interleaved rounds: within 5 % of the best, never worse than the default?

Every round measures every cell on every engine once, one right after the other, in a new random order; a measurement
starts a fresh server and counts after a second, and with auto after a time in which it explores and settles. The best fixed
engine of a cell is the one with the highest median over the rounds. Ratios are within a round: median, lowest and highest.

Wanted: 0.95 of the best, and 1 of threads, the default (0.97 where threads is the best: it is compared with itself).
Verdicts: `holds` where the median ratios are so, and no round is below nine tenths of that; `does not hold` where every
round is below; otherwise nothing is shown, for the rounds contradict each other. Ends with status 1 if a cell does not
hold.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compare import ENGINES, Cell, Disks, measure_server, number, spread, vblk_command  # noqa: E402

SIDES = (*ENGINES, "auto")
DEFAULT = "threads"
FIXED_SETTLE_SECONDS = 1
HOLDS, FAILS = "holds", "does not hold"


class Disk(Disks):
    """The one disk that is needed here, without a file system for image files."""

    def _make_files(self):
        self.files, self.files_loop = self.folder, None


def core_grid():
    cells = []
    for size, name in ((4096, "4k"), (65536, "64k")):
        for rw, kind in (("randread", "read"), ("randwrite", "write")):
            for depth in (1, 32):
                cells.append(Cell("auto", f"{name} random {kind}, depth {depth}", None,
                                  {"rw": rw, "bs": size, "iodepth": depth}))
    cells.append(Cell("auto", "4k write + flush, depth 1", None, {"rw": "randwrite", "bs": 4096, "iodepth": 1, "fsync": 1}))
    return cells


def measure(options, cells, disks):
    for round_number in range(options.rounds):
        # Cells in a new order; the sides of one cell one after another, in a new order too: what drifts, drifts for all.
        order = [(cell, side) for cell in random.sample(cells, len(cells)) for side in random.sample(SIDES, len(SIDES))]
        for cell in cells:
            cell.rounds.append({})
        for done, (cell, side) in enumerate(order):
            if sys.stderr.isatty():
                print(f"\r\033[Kround {round_number + 1} of {options.rounds}, {done} of {len(order)}: {cell.title}, {side}",
                      end="", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="vblk-auto-") as folder:
                socket = Path(folder) / "s"
                cell.engine = side
                cell.rounds[-1][side] = measure_server(options.vblk, vblk_command(options.vblk, cell, side, disks, socket),
                                                       socket, cell, options.seconds, random.randrange(1 << 31),
                                                       options.settle if side == "auto" else FIXED_SETTLE_SECONDS)


def verdict_of(*ratios_and_wanted):
    """Of (median, lowest, highest) each with what it ought to be."""
    if any(highest < wanted for (_, _, highest), wanted in ratios_and_wanted):
        return FAILS
    if all(median >= wanted and lowest >= 0.9 * wanted for (median, lowest, _), wanted in ratios_and_wanted):
        return HOLDS
    return "nothing shown"


def report(cells):
    print("| workload | auto IOPS | best fixed engine | auto / best | auto / threads | CPU auto / best | verdict |\n"
          "|---|--:|---|--:|--:|--:|---|")
    verdicts = []
    for cell in cells:
        best = max(ENGINES, key=lambda side: cell.median(side, "iops") or 0)
        to_best, to_default = cell.ratio("iops", "auto", best), cell.ratio("iops", "auto", DEFAULT)
        verdict = verdict_of((to_best, 0.95), (to_default, 0.97 if best == DEFAULT else 1))
        verdicts.append(verdict)
        print(f"| {cell.title} | {number(cell.median('auto', 'iops'), 0)} | {best} | {spread(to_best)} | {spread(to_default)} "
              f"| {spread(cell.ratio('cpu', 'auto', best))} | {verdict} |", flush=True)
    ratios = [cell.ratio("iops", "auto", max(ENGINES, key=lambda side: cell.median(side, "iops") or 0))[0] for cell in cells]
    print(f"\n{verdicts.count(HOLDS)} of {len(cells)} cells hold, {verdicts.count(FAILS)} do not; median of auto / best over all: {statistics.median(ratios):.2f}")
    return verdicts.count(FAILS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1, help="of each measurement (default: 1)")
    parser.add_argument("--settle", type=float, default=6, help="seconds for auto to settle (default: 6)")
    parser.add_argument("--only", default="", help="cells whose title has this in it")
    parser.add_argument("--size", type=int, default=512, help="MiB of the disk (default: 512)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    random.seed(options.seed)
    cells = [cell for cell in core_grid() if options.only in cell.title]
    if not cells:
        parser.error(f"no cell has '{options.only}' in its title")
    begin = time.monotonic()
    # Ended from outside, it still takes down what it has set up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with Disk(options.size, False) as disks:
        print(f"--seed {options.seed}, {options.rounds} rounds of {options.seconds} s after {options.settle} s, on a "
              f"{disks.description}; load average before: {os.getloadavg()[0]:.1f}\n", flush=True)
        measure(options, cells, disks)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        failed = report(cells)
    print(f"load average after: {os.getloadavg()[0]:.1f}; {time.monotonic() - begin:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
