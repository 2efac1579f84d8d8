#!/usr/bin/python3
"""Counts the instructions that a request takes on the device's side, by callgrind.

Prints the table of docs/benchmarks.md. With --check FILE it compares with the table in FILE instead, as TAP: a cost that
has changed, for better or worse, is to be seen in the change that does it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# By how much a case may differ from the table: other builds of libc and of the compiler's library do.
TOLERANCE = 0.10
TIMEOUT_S = 300
PHASES = ("dispatch", "submit", "complete")


def count(program):
    """Instructions per request, by case and phase."""
    table = {}
    # Not where O_DIRECT may be missing.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        raw, image = Path(folder) / "raw", Path(folder) / "disk.qcow2"
        raw.write_bytes(b"data" * (1 << 20))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
        subprocess.run(["valgrind", "--quiet", "--tool=callgrind", "--collect-atstart=no",
                        f"--callgrind-out-file={folder}/dump", program, image], check=True, stdout=subprocess.DEVNULL,
                       timeout=TIMEOUT_S)
        # One dump for each phase, numbered; the last, of the program's end, has no trigger.
        for path in sorted(Path(folder).glob("dump.*"), key=lambda dump: int(dump.suffix[1:])):
            text = path.read_text()
            trigger = re.search(r"^desc: Trigger: Client Request: (.*)\|(.*)\|(\d+)$", text, re.MULTILINE)
            totals = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
            if trigger is None or totals is None:
                continue
            case, phase, requests = trigger.groups()
            table.setdefault(case, {})[phase] = int(totals[1]) / int(requests)
    return table


def total(phases):
    return round(sum(phases.values()))


def print_table(table):
    print("| disk, requests | dispatch | submit | complete | total |")
    print("|---|--:|--:|--:|--:|")
    for case, phases in table.items():
        print(f"| {case} | " + " | ".join(str(round(phases[phase])) for phase in PHASES) + f" | {total(phases)} |")


def documented(path):
    """Total by case, from the table in the document."""
    return {match[1]: int(match[2]) for match in
            re.finditer(r"^\| ([^|]* at once) \|(?: \d+ \|){3} (\d+) \|$", path.read_text(), re.MULTILINE)}


def check(table, path):
    """TAP: whether each case costs what the document says."""
    expected = documented(path)
    failed = False
    for number, case in enumerate(expected, 1):
        name = f"{case}: {expected[case]} instructions per request"
        if case not in table:
            print(f"ok {number} - {name} # SKIP this machine does not have the engine")
        elif abs(total(table[case]) / expected[case] - 1) <= TOLERANCE:
            print(f"ok {number} - {name}")
        else:
            failed = True
            print(f"not ok {number} - {name}")
            print(f"# now {total(table[case])}; if that is meant, put the table of `./dev bench instructions` into {path}")
    print(f"1..{len(expected)}")
    return 1 if failed or not expected else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="tests/bench/instructions of the build folder")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with the table in FILE")
    arguments = parser.parse_args()
    table = count(arguments.program)
    if arguments.check:
        return check(table, arguments.check)
    print_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
