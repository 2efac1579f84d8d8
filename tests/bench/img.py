#!/usr/bin/python3
"""`vblk img` beside qemu-img: wall time and processor time of the same work, in turns. Prints a table.

Each round runs both programs once, the first one changing from round to round; what is compared is the ratio within a
round. Images lie in one folder on a file system of the machine, in the page cache: what is measured is the programs, not
the disk. The machine should be doing nothing else.

A virtual machine may give free memory back to its host, which Linux does two seconds after it has become free, and then pays for
each page that it uses again: more than for the copy. So that both programs find memory that is there, the file that the last
run left is removed right before a run, which takes less than two seconds, and after three in which nothing becomes free.
"""

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from harness import Folder  # noqa: E402

MIB = 1 << 20
SETTLE_SECONDS = 3


def make_disk(path, size):
    """Half of it holes; a quarter text that compresses, a quarter noise that does not, a mebibyte at a time."""
    rng = random.Random(1)
    lines = [b"%08x the quick brown fox, line %d\n" % (rng.getrandbits(32), number) for number in range(4096)]
    with open(path, "wb") as file:
        file.truncate(size)
        for at in range(0, size, MIB):
            kind = rng.randrange(4)
            if kind >= 2:
                continue
            file.seek(at)
            file.write(rng.randbytes(MIB) if kind == 0 else b"".join(rng.choices(lines, k=30000))[:MIB])


def run(command):
    """(wall seconds, processor seconds)."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    wall, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def check_result(name, program, expected, result):
    """What was made is the disk that it was made of, whoever made it, by qemu-img's judgement; this is not timed."""
    if not result.exists():
        return
    with open(result, "rb") as file:
        image_format = "qcow2" if file.read(4) == b"QFI\xfb" else "raw"
    done = subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", image_format, expected, result], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{name}: {program} made another disk: {done.stdout}{done.stderr}")


def compare(name, rounds, commands, clean_up, settle_seconds, check):
    """Rounds of both; commands are {program: command line}. `check` is called with what each has made in the last round."""
    programs = list(commands)
    times = {program: [] for program in programs}
    for number in range(rounds + 1):
        for program in programs if number % 2 else reversed(programs):
            time.sleep(settle_seconds)
            clean_up()
            measured = run(commands[program])
            if number > 0:  # the first warms the cache
                times[program].append(measured)
            if number == rounds:
                check(name, program)
    ours, theirs = times["vblk img"], times["qemu-img"]
    ratios = sorted(a[0] / b[0] for a, b in zip(ours, theirs))
    processor = statistics.median(a[1] / max(b[1], 1e-3) for a, b in zip(ours, theirs))
    print(f"| {name} | {statistics.median(t[0] for t in theirs):.3f} | {statistics.median(t[0] for t in ours):.3f} | "
          f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {processor:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path)
    parser.add_argument("--size-mib", type=int, default=4096, help="of the disk, half of it in use")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    programs = {"qemu-img": ["qemu-img"], "vblk img": [options.vblk.resolve(), "img"]}
    with Folder() as folder:
        raw, image, out = folder / "disk.raw", folder / "disk.qcow2", folder / "out"
        make_disk(raw, options.size_mib * MIB)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
        compressed = folder / "compressed.qcow2"
        subprocess.run(["qemu-img", "convert", "-c", "-o", "compression_type=zstd", "-f", "raw", "-O", "qcow2", raw, compressed],
                       check=True)
        mapped = folder / "mapped.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", mapped, "64G"], check=True)
        os.sync()
        print(f"{options.size_mib} MiB, {options.rounds} rounds, {os.cpu_count()} processors\n")
        print("| | qemu-img s | vblk s | ratio, median (range) | processor time, ratio |\n|---|---|---|---|---|")

        def both(name, *arguments, rounds=options.rounds, settle_seconds=0):
            if options.only not in name:
                return
            compare(name, rounds, {program: [*command, *arguments] for program, command in programs.items()},
                    lambda: out.unlink(missing_ok=True), settle_seconds,
                    lambda name, program: check_result(name, program, raw, out) if name != "create" else None)

        both("convert raw to qcow2", "convert", "-f", "raw", "-O", "qcow2", raw, out,
             settle_seconds=SETTLE_SECONDS)
        both("convert qcow2 to raw", "convert", "-f", "qcow2", "-O", "raw", image, out,
             settle_seconds=SETTLE_SECONDS)
        both("convert to qcow2, deflate", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, out, rounds=3)
        both("convert to qcow2, zstd", "convert", "-c", "-o", "compression_type=zstd", "-f", "raw", "-O", "qcow2", raw, out,
             rounds=3)
        both("convert compressed qcow2 to raw", "convert", "-f", "qcow2", "-O", "raw", compressed, out,
             settle_seconds=SETTLE_SECONDS)
        both("compare", "compare", "-f", "raw", "-F", "qcow2", raw, image)
        both("check, 64 GiB mapped", "check", mapped)
        both("dd, raw to qcow2", "dd", "-f", "raw", "-O", "qcow2", "bs=1M", f"if={raw}", f"of={out}",
             settle_seconds=SETTLE_SECONDS)
        both("bitmap made and removed, 64 GiB mapped", "bitmap", "--add", "--remove", mapped, "b")
        both("info", "info", image, rounds=2 * options.rounds)
        both("map", "map", "--output=json", image, rounds=2 * options.rounds)
        both("create", "create", "-q", "-f", "qcow2", out, "10G", rounds=2 * options.rounds)


if __name__ == "__main__":
    main()
