#!/usr/bin/python3
"""Runs the fuzzer on hostile images for some time, from generated seeds and what earlier runs have learned. Prints TAP.

What it finds is left in FOLDER/findings; `image_fuzzer FILE` repeats it, and a copy in tests/fuzz/regressions has the
unit tests repeat it from then on.
"""

import argparse
import os
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


def run_fuzzer(options, *arguments, canary=False):
    environment = dict(os.environ, ASAN_OPTIONS="malloc_context_size=4:quarantine_size_mb=32",
                       UBSAN_OPTIONS="print_stacktrace=1")
    symbolizer = Path("/usr/lib/llvm-19/bin/llvm-symbolizer")
    if symbolizer.exists():
        environment["ASAN_SYMBOLIZER_PATH"] = str(symbolizer)
    if canary:
        environment["VBLK_FUZZ_CANARY"] = "1"
    command = [options.fuzzer, f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={MEMORY_MIB_MAX}",
               f"-artifact_prefix={options.folder}/{'canary' if canary else 'findings'}/", *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=options.seconds + 300, env=environment)
    return done.returncode, done.stdout.decode(errors="replace")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fuzzer", required=True, help="the program, built from tests/fuzz/image_fuzzer.cpp")
    parser.add_argument("--folder", required=True, type=Path, help="keeps the corpus and the findings")
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    seeds = options.folder / "seeds"
    for name in ("corpus", "findings", "canary"):
        (options.folder / name).mkdir(parents=True, exist_ok=True)
    subprocess.run([SOURCE / "make_seeds.py", seeds], check=True, stdout=sys.stderr)

    report = Report()
    canary = options.folder / "mapped"
    canary.write_bytes(WELL_MAPPED)
    status, output = run_fuzzer(options, canary, canary=True)
    report.check("a table entry lost on purpose is found", status != 0 and "is lost" in output, output[-4000:])
    status, output = run_fuzzer(options, f"-max_total_time={options.seconds}", f"-max_len={INPUT_BYTES_MAX}",
                                options.folder / "corpus", seeds)
    found = "\n".join(line for line in output.splitlines() if not re.match(r"#\d+\s|\s*NEW_FUNC", line))
    report.check(f"{options.seconds} s of hostile images do no harm", status == 0, found[-8000:])
    runs = re.search(r"Done (\d+) runs", output)
    edges = re.findall(r"cov: (\d+)", output)
    report.check("the fuzzer has been through its seeds", runs and int(runs[1]) >= len(list(seeds.iterdir())), output[-2000:])
    print(f"{runs[1] if runs else 'no'} runs, {edges[-1] if edges else 'no'} edges of the code seen; {options.folder}",
          file=sys.stderr)
    report.exit()


if __name__ == "__main__":
    main()
