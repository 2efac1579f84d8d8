#!/usr/bin/python3
"""Runs the GoogleTest programs of a build folder, or reads one TAP log, and counts single cases.

Appends "NAME PASSED FAILED SKIPPED" to the tally. A program that ends badly without naming a failed case (a crash, a
sanitizer's report, a time-out) is one failed case, and so is one that ran fewer cases than it announced.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def count_gtest(output, status):
    results = re.findall(r"\[ +(OK|FAILED|SKIPPED) +\] [^\n]*\(\d+ ms\)$", output, re.MULTILINE)
    passed, failed, skipped = (results.count(word) for word in ("OK", "FAILED", "SKIPPED"))
    announced = re.search(r"Running (\d+) tests? from", output)
    complete = announced is not None and len(results) == int(announced.group(1))
    if failed == 0 and (status != 0 or not complete):
        failed = 1
    return passed, failed, skipped


def count_tap(output, status):
    passed = failed = skipped = 0
    for line in output.splitlines():
        if line.startswith("not ok "):
            failed += 1
        elif re.match(r"ok \d+ .*# SKIP", line):
            skipped += 1
        elif re.match(r"ok \d+ ", line):
            passed += 1
    plan = re.search(r"^1\.\.(\d+)$", output, re.MULTILINE)
    complete = plan is not None and int(plan.group(1)) == passed + failed + skipped
    if failed == 0 and (status != 0 or not complete):
        failed = 1
    return passed, failed, skipped


def gtest_programs(build, names):
    """The programs that Meson knows as GoogleTest tests, by test name."""
    output = subprocess.run(["meson", "introspect", build, "--tests"], check=True, capture_output=True).stdout
    programs = {test["name"]: test["cmd"][0] for test in json.loads(output) if test["protocol"] == "gtest"}
    return {name: path for name, path in programs.items() if not names or name in names}


def told(name, counts, seconds):
    return f"  {name}: {counts[0]} passed, {counts[1]} failed, {counts[2]} skipped in {seconds:.0f} s"


def run_program(path):
    command = [path]
    if "build-tsan" in path:
        # ThreadSanitizer's shadow does not fit around addresses as random as newer kernels make them.
        command = ["setarch", "-R", path]
    begin = time.monotonic()
    environment = dict(os.environ, UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1", TSAN_OPTIONS="halt_on_error=0")
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                              env=environment, timeout=900)
        return done.returncode, done.stdout.decode(errors="replace"), time.monotonic() - begin
    except subprocess.TimeoutExpired as error:
        return 124, (error.stdout or b"").decode(errors="replace") + "\nran past 900 s\n", time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--tally", required=True)
    parser.add_argument("--tap", help="a TAP log to count")
    parser.add_argument("--status", type=int, default=0, help="exit status of the program that wrote the log")
    parser.add_argument("--seconds", type=float, default=0, help="that it took")
    parser.add_argument("--build", help="build folder whose GoogleTest programs run")
    parser.add_argument("--at-once", type=int, default=1, help="programs that run beside each other")
    parser.add_argument("tests", nargs="*", help="only these")
    options = parser.parse_args()
    begin = time.monotonic() - options.seconds

    if options.tap:
        output = Path(options.tap).read_text(errors="replace")
        counts = count_tap(output, options.status)
        if counts[1]:
            print("\n".join(line for line in output.splitlines() if line.startswith(("not ok", "#"))))
            print(f"  whole log: {options.tap}, {options.tap}.err")
    else:
        counts = [0, 0, 0]
        programs = gtest_programs(options.build, options.tests)
        targets = [os.path.relpath(path, os.path.abspath(options.build)) for path in programs.values()]
        if subprocess.run(["ninja", "-C", options.build, *targets]).returncode != 0:
            sys.exit(1)
        with ThreadPoolExecutor(options.at_once) as pool:
            for name, (status, output, seconds) in zip(programs, pool.map(run_program, programs.values())):
                one = count_gtest(output, status)
                log = Path(options.tally).parent / f"{options.name}-{name}.log"
                log.write_text(output)
                print(told(name, one, seconds), flush=True)
                if one[1]:
                    print(output[-8000:])
                counts = [total + part for total, part in zip(counts, one)]
    print(told(options.name, counts, time.monotonic() - begin), flush=True)
    with open(options.tally, "a") as tally:
        print(options.name, *counts, file=tally)
    sys.exit(1 if counts[1] else 0)


if __name__ == "__main__":
    main()
