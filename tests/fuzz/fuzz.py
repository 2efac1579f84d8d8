#!/usr/bin/python3
"""Runs the fuzzers on hostile images, rings and frontends for some time, from seeds and what earlier runs have learned.

Prints TAP.
What they find is left in FOLDER/findings, FOLDER/rings/findings and FOLDER/frontends/findings; `image_fuzzer FILE` and so on
repeat it, and a copy of an image's in tests/fuzz/regressions, of a frontend's in its folder frontend, has the unit tests
repeat it from then on.
"""

import argparse
import os
import random
import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
sys.path.insert(0, str(SOURCE.parent / "support"))
from harness import Report  # noqa: E402

# An input takes some milliseconds. One that takes so long on the busiest machine hangs.
HANG_SECONDS = 25
MEMORY_MIB_MAX = 2048  # libFuzzer's own, with its corpus and AddressSanitizer's quarantine; inputs have their own bound
INPUT_BYTES_MAX = 4096
# A valid image, all mapped, that nobody uses: hostile_image.h.
WELL_MAPPED = bytes([0, 1, 0, 4, 3, 100, 0, 0])


# A packed ring of 8 entries, and a flush on it that works: hostile_ring.h.
FLUSH_ON_A_RING = bytes([1, 7, 0, 8, 0, 9])
# A set-up as a frontend should do it, and a flush on it that works: hostile_frontend.h.
SET_UP, REQUEST = 7, 8
FLUSH_OF_A_FRONTEND = bytes([0, 0, SET_UP, 0, REQUEST, 0, 2, 1])
# Of the time. Rings have little code.
IMAGE_SHARE, RING_SHARE, FRONTEND_SHARE = 0.5, 0.15, 0.35


def run_fuzzer(options, *arguments, canary=False, fuzzer=None, folder=None):
    environment = dict(os.environ, ASAN_OPTIONS="malloc_context_size=4:quarantine_size_mb=32",
                       UBSAN_OPTIONS="print_stacktrace=1")
    symbolizer = Path("/usr/lib/llvm-19/bin/llvm-symbolizer")
    if symbolizer.exists():
        environment["ASAN_SYMBOLIZER_PATH"] = str(symbolizer)
    if canary:
        environment["VBLK_FUZZ_CANARY"] = "1"
    command = [fuzzer or options.fuzzer, f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={MEMORY_MIB_MAX}",
               f"-artifact_prefix={folder or options.folder}/{'canary' if canary else 'findings'}/", *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=options.seconds + 300, env=environment)
    return done.returncode, done.stdout.decode(errors="replace")


def tell(runs, edges, folder):
    print(f"{runs[1] if runs else 'no'} runs, {edges[-1] if edges else 'no'} edges of the code seen; {folder}", file=sys.stderr)


def folder_for(options, name):
    folder = options.folder / name
    for part in ("corpus", "findings", "canary", "seeds"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return folder


def take_kept(seeds, *folders):
    """What is kept in the repository is where every run begins."""
    for kept in (file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()):
        (seeds / kept.name).write_bytes(kept.read_bytes())


def fuzz(report, options, fuzzer, folder, seconds, what):
    status, output = run_fuzzer(options, f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES_MAX}", folder / "corpus",
                                folder / "seeds", fuzzer=fuzzer, folder=folder)
    found = "\n".join(line for line in output.splitlines() if not re.match(r"#\d+\s|\s*NEW_FUNC", line))
    report.check(f"{seconds} s of hostile {what} do no harm", status == 0, found[-8000:])
    tell(re.search(r"Done (\d+) runs", output), re.findall(r"cov: (\d+)", output), folder)


def fuzz_frontends(report, options, seconds):
    folder = folder_for(options, "frontends")
    source = random.Random(1)
    for number in range(64):
        # Of each kind: a set-up, requests, messages of every sort on top, and once more.
        steps = bytes([SET_UP, source.randrange(256)])
        for _ in range(source.randrange(4, 30)):
            steps += bytes([source.choice([0, 1, 2, 3, SET_UP, REQUEST, REQUEST, REQUEST, 11, 12, 13, 14, 15])])
            steps += source.randbytes(source.randrange(2, 7))
        (folder / "seeds" / str(number)).write_bytes(bytes([number, source.randrange(16)]) + steps)
    take_kept(folder / "seeds", SOURCE / "regressions" / "frontend", SOURCE / "corpus" / "frontend")
    canary = folder / "flush"
    canary.write_bytes(FLUSH_OF_A_FRONTEND)
    status, output = run_fuzzer(options, canary, canary=True, fuzzer=options.frontend_fuzzer, folder=folder)
    report.check("a frontend's request called lost on purpose is found", status != 0 and "is lost" in output, output[-4000:])
    fuzz(report, options, options.frontend_fuzzer, folder, seconds, "frontends")


def fuzz_rings(report, options, seconds):
    folder = folder_for(options, "rings")
    source = random.Random(1)
    for number in range(64):
        # Of each kind, with steps that lead somewhere: descriptors, chains, requests that work, cycles.
        steps = b"".join(bytes([source.choice([0, 2, 3, 6, 8, 8, 9, 9])]) + source.randbytes(5) for _ in range(20))
        (folder / "seeds" / str(number)).write_bytes(bytes([number % 16, source.randrange(64), source.randrange(256)]) + steps)
    take_kept(folder / "seeds", SOURCE / "corpus" / "ring")
    canary = folder / "flush"
    canary.write_bytes(FLUSH_ON_A_RING)
    status, output = run_fuzzer(options, canary, canary=True, fuzzer=options.ring_fuzzer, folder=folder)
    report.check("a request called lost on purpose is found", status != 0 and "is lost" in output, output[-4000:])
    fuzz(report, options, options.ring_fuzzer, folder, seconds, "rings")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fuzzer", required=True, help="the program, built from tests/fuzz/image_fuzzer.cpp")
    parser.add_argument("--ring-fuzzer", required=True, help="the one from tests/fuzz/ring_fuzzer.cpp")
    parser.add_argument("--frontend-fuzzer", required=True, help="the one from tests/fuzz/frontend_fuzzer.cpp")
    parser.add_argument("--folder", required=True, type=Path, help="keeps the corpus and the findings")
    parser.add_argument("--seconds", type=int, default=60, help="of all together")
    options = parser.parse_args()
    seeds = options.folder / "seeds"
    for name in ("corpus", "findings", "canary"):
        (options.folder / name).mkdir(parents=True, exist_ok=True)
    subprocess.run([SOURCE / "make_seeds.py", seeds], check=True, stdout=sys.stderr)
    take_kept(seeds, SOURCE / "regressions", SOURCE / "corpus" / "image")

    report = Report()
    canary = options.folder / "mapped"
    canary.write_bytes(WELL_MAPPED)
    status, output = run_fuzzer(options, canary, canary=True)
    report.check("a table entry lost on purpose is found", status != 0 and "is lost" in output, output[-4000:])
    images, rings, frontends = (max(1, round(options.seconds * share)) for share in (IMAGE_SHARE, RING_SHARE, FRONTEND_SHARE))
    status, output = run_fuzzer(options, f"-max_total_time={images}", f"-max_len={INPUT_BYTES_MAX}",
                                options.folder / "corpus", seeds)
    found = "\n".join(line for line in output.splitlines() if not re.match(r"#\d+\s|\s*NEW_FUNC", line))
    report.check(f"{images} s of hostile images do no harm", status == 0, found[-8000:])
    runs = re.search(r"Done (\d+) runs", output)
    edges = re.findall(r"cov: (\d+)", output)
    report.check("the fuzzer has been through its seeds", runs and int(runs[1]) >= len(list(seeds.iterdir())), output[-2000:])
    tell(runs, edges, options.folder)
    fuzz_rings(report, options, rings)
    fuzz_frontends(report, options, frontends)
    report.exit()


if __name__ == "__main__":
    main()
