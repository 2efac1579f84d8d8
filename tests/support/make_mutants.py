#!/usr/bin/python3
"""Writes a copy of a source file with its defects, each asleep until mutant.h, beside the list of them, says it is awake.

A text that is not there (any more) is left out, with a line in the file NAME.missing: a test beside the list reports it as a
failure, and nobody's build breaks over it.
"""

import runpy
import sys
from pathlib import Path


def main():
    root, listed_in, where, output = Path(sys.argv[1]), Path(sys.argv[2]).resolve(), sys.argv[3], Path(sys.argv[4])
    listed = runpy.run_path(str(listed_in))
    source = (root / where).read_text()
    missing = []
    for mutant in listed["MUTANTS"] + listed.get("VARIANTS", ()):
        for text, instead in mutant.changes if mutant.where == where else ():
            if source.count(text) != 1:
                missing.append(f"{mutant.name}: {source.count(text)} times in {where}: {text.splitlines()[0]}")
                continue
            source = source.replace(text, instead)
    hook = listed_in.relative_to(root.resolve()).with_name("mutant.h")
    output.write_text(f'#include "{hook}"\n{source}')
    output.with_suffix(".missing").write_text("".join(line + "\n" for line in missing))


if __name__ == "__main__":
    main()
