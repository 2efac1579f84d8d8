#!/usr/bin/python3
"""Writes the table of `vblk conform --list` into docs/conformance.md, or with --check says whether it is there."""

import re
import subprocess
import sys
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "conformance.md"
BEGIN, END = "<!-- table: scripts/conform_table.py -->\n", "<!-- end of table -->\n"


def table(vblk):
    text = subprocess.run([vblk, "conform", "--list"], check=True, capture_output=True, text=True).stdout
    rows = ["| test | statement | where it is made | |", "|---|---|---|---|"]
    for name, writes, document, section, force, statement in re.findall(
            r'^(\S+)( \(writes\))?\n    (.*), "(.*)", (\w+):\n    (.*)$', text, re.MULTILINE):
        rows.append(f"| `{name}`{' *' if writes else ''} | {statement} | {document}, \"{section}\" | {force} |")
    return "\n".join(rows) + "\n"


def main():
    check, vblk = sys.argv[1] == "--check", sys.argv[-1]
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = before + BEGIN + table(vblk) + END + after
    if not check:
        DOCUMENT.write_text(wanted)
    elif wanted != text:
        sys.exit(f"{DOCUMENT} is not what --list says; run scripts/conform_table.py {vblk}")


if __name__ == "__main__":
    main()
