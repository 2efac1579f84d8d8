#!/usr/bin/python3
"""Writes a copy of a source file with its defects (mutants.py), each asleep until VBLK_MUTANT names it.

A text that is not there (any more) is left out, with a line in the file NAME.missing: tests/interop/conform_test.py reports
it as a failure, and nobody's build breaks over it.
"""

import sys
from pathlib import Path

from mutants import MUTANTS, VARIANTS


def main():
    root, where, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    source = (root / where).read_text()
    missing = []
    for mutant in MUTANTS + VARIANTS:
        for text, instead in mutant.changes if mutant.where == where else ():
            if source.count(text) != 1:
                missing.append(f"{mutant.name}: {source.count(text)} times in {where}: {text.splitlines()[0]}")
                continue
            source = source.replace(text, instead)
    output.write_text(f'#include "tests/conform/mutant.h"\n{source}')
    output.with_suffix(".missing").write_text("".join(line + "\n" for line in missing))


if __name__ == "__main__":
    main()
